"""Prompt files: which inputs a caption is made from, the words of the instruction, the decoding settings."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean

IMAGE = "image"
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")


class Sampling(BaseModel):
    """Decoding settings, under the names that vLLM and transformers share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps all tokens.")
    max_tokens: int = Field(128, gt=0)
    repetition_penalty: float = Field(1.0, gt=0)


class Prompt(BaseModel):
    """One prompt file. ``inputs`` are ``image`` and earlier caption columns, which the texts name as ``{column}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    inputs: tuple[str, ...] = (IMAGE,)
    system: str | None = None
    user: str
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _placeholders_are_inputs(self) -> Prompt:
        for column in _PLACEHOLDER.findall(f"{self.system or ''} {self.user}"):
            if column not in self.inputs or column == IMAGE:
                raise ValueError(f"the text names {{{column}}}, which is not a column of inputs {list(self.inputs)}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name != IMAGE)

    @property
    def digest(self) -> str:
        return ledger.digest_json(self.model_dump(mode="json", exclude={"name"}))

    def render(self, columns: dict[str, str]) -> tuple[str | None, str]:
        """System and user text of one row. ``columns`` holds texts that are already neutralised."""

        def fill(text: str) -> str:
            return _PLACEHOLDER.sub(lambda match: columns[match.group(1)], text)

        return (fill(self.system) if self.system is not None else None), fill(self.user)


def load(name_or_path: str) -> Prompt:
    """A prompt file by path, or a packaged one by name. Raises ``UserError`` naming the key that is wrong."""
    import yaml

    packaged = files("clips_manifests") / "prompts"
    path: Any = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else packaged / f"{name_or_path}.yaml"
    if not path.is_file():
        names = sorted(entry.name.removesuffix(".yaml") for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
        raise UserError(
            f"There is no prompt {name_or_path!r}. {did_you_mean(name_or_path, names)} Or give a .yaml file."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError(f"Prompt file {path} does not hold a mapping. Write keys such as user: and sampling:.")
        return Prompt(name=Path(path.name).stem, **content)
    except yaml.YAMLError as error:
        raise UserError(f"Prompt file {path} is not valid YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(piece) for piece in first["loc"])
        known = Sampling.model_fields if key.startswith("sampling.") else Prompt.model_fields
        hint = f" {did_you_mean(key.rpartition('.')[2], known)}" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"Prompt file {path}, key {key or '(whole)'}: {first['msg']}.{hint}") from None
