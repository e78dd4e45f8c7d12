"""Prompt files: which inputs a caption is made from, the words of the instruction, the decoding settings.

A prompt is rendered for one row at a time; whatever is drawn (wording, examples, top-k) is a function of (seed, key).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError, field_validator, model_validator

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_data.recaption.engines import Decoding
from clips_data.recaption.prompt_file import (
    EXAMPLES,
    IMAGE,
    Cleaning,
    ColumnName,
    Examples,
    Gate,
    OutputField,
    Part,
    Refused,
    Sampling,
    Variant,
    check_placeholders,
    draw,
    fill,
    placeholders,
    right,
    what_is_wrong,
)

__all__ = ["IMAGE", "Cleaning", "Prompt", "Rendered", "Sampling", "load", "packaged", "source"]

SUFFIX: Final = ".yaml"
GATED: Final = "gated"
"""Stands in place of a variant's number where the gate had its way."""


@dataclass(frozen=True)
class Rendered:
    """What one row is asked. With ``taken`` or ``missing`` no model is asked at all.

    ``taken`` is a caption of another column, to be kept as it is; ``missing`` names a column whose text is needed and
    empty. ``instruction`` is the user text without what was filled in.
    """

    system: str | None
    user: str
    variant: str
    decoding: Decoding
    taken: str | None = None
    missing: str | None = None
    instruction: str = ""


class Prompt(Part):
    """One prompt file. ``inputs`` are ``image`` and caption columns, which the texts name as ``{column}``."""

    name: str
    about: str = Field("", description="Where the recipe comes from, what of it is not known, what differs here.")
    inputs: tuple[ColumnName, ...] = Field((IMAGE,), min_length=1)
    system: str | None = None
    user: tuple[Variant, ...] = Field(min_length=1)
    examples: Examples | None = None
    sampling: Sampling = Sampling()
    output: dict[ColumnName, OutputField] = Field({}, description="Empty: plain text.")
    clean: Cleaning = Cleaning()
    gate: Gate | None = None
    delimiters: tuple[str, ...] = Field(
        ('"""', '"""'), description="What stands before and after a column's text wherever it is filled in, or []."
    )

    # --- what is right ------------------------------------------------------------------------------------------------

    @field_validator("user", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """One text stands for one variant, and a text in the list for a variant without more."""
        variants = value if isinstance(value, list | tuple) else [value]
        return tuple({"user": variant} if isinstance(variant, str) else variant for variant in variants)

    @model_validator(mode="after")
    def _texts_name_inputs(self) -> Prompt:
        if EXAMPLES in self.inputs or len(set(self.inputs)) < len(self.inputs):
            raise Refused("inputs", f"{EXAMPLES!r} is no column, and no column may be named twice")
        check_placeholders("system", self.system or "", self.inputs)
        for number, variant in enumerate(self.user):
            key = "user" if len(self.user) == 1 else f"user.{number}"
            check_placeholders(key, variant.user, (*self.inputs, EXAMPLES))
            check_placeholders(f"{key}.system", variant.system or "", self.inputs)
            self._check_column(f"{key}.where_empty", variant.where_empty)
            if variant.where_empty in self._named(variant):
                raise Refused(f"{key}.where_empty", f"the text names {{{variant.where_empty}}}, which is empty then")
        if len(self.delimiters) not in (0, 2):
            raise Refused("delimiters", "they are two, one before and one after a text, or none: []")
        if all(variant.where_empty for variant in self.user):
            raise Refused("user", "every text has where_empty: none is left for rows that have a text")
        shows_examples = any(EXAMPLES in placeholders(variant.user) for variant in self.user)
        if shows_examples != (self.examples is not None):
            what = "{examples} needs a bank of them" if shows_examples else "no user text says {examples}"
            raise Refused(EXAMPLES, what)
        return self

    @model_validator(mode="after")
    def _gate_has_a_way_out(self) -> Prompt:
        if self.gate is None:
            return self
        self._check_column("gate.column", self.gate.column)
        self._check_column("gate.take", self.gate.take)
        check_placeholders("gate.user", self.gate.user or "", self.inputs)
        check_placeholders("gate.system", self.gate.system or "", self.inputs)
        if self.gate.user is not None and not self.needs_image:
            raise Refused("gate.user", "without an image in inputs there is nothing to describe; take a column")
        if self.gate.take is not None and self.output:
            raise Refused("gate.take", "one caption cannot be several outputs; give a text, user")
        return self

    def _check_column(self, key: str, column: str | None) -> None:
        if column is not None and column not in self.columns:
            raise Refused(key, f"{column!r} is not a column of inputs. {right(column, self.columns)}")

    # --- what others ask ----------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """The caption columns that it reads."""
        return tuple(name for name in self.inputs if name != IMAGE)

    @property
    def needs_image(self) -> bool:
        return IMAGE in self.inputs

    @property
    def digest(self) -> str:
        """Of everything that the captions depend on."""
        content = self.model_dump(mode="json", exclude={"name", "about"})
        # The model writes the fields in this order, which the digest of a mapping would not see.
        return ledger.digest_json({**content, "output": list(content["output"].items())})

    @property
    def shape(self) -> dict[str, Any] | None:
        """JSON schema of the answer, or ``None`` for plain text."""
        if not self.output:
            return None
        return {
            "type": "object",
            "properties": {name: field.shape for name, field in self.output.items()},
            "required": list(self.output),
            "additionalProperties": False,
        }

    def column_names(self, column: str) -> list[str]:
        """The columns that become of ``column``: one for each field, and for each of its samples."""
        names = [f"{column}_{field}" for field in self.output] or [column]
        if self.sampling.num_samples == 1:
            return names
        return [f"{name}_{sample}" for name in names for sample in range(self.sampling.num_samples)]

    # --- a row's request ----------------------------------------------------------------------------------------------

    def render(self, texts: Mapping[str, str], *, seed: int, key: str, fits: bool = True) -> Rendered:
        """What the row ``key`` is asked. ``texts`` are those of ``columns``, already neutralised.

        ``fits`` says whether the gate lets the row through; a row whose gated text is empty never passes.
        """
        empty = {name for name in self.columns if not texts[name].strip()}
        if self.gate is not None and (not fits or self.gate.column in empty):
            return self._gated(self.gate, texts, empty, seed, key)
        numbers = [n for n, variant in enumerate(self.user) if self._is_for(variant, empty)]
        if not numbers:
            usual = next(variant for variant in self.user if variant.where_empty is None)
            return self._missing(next(name for name in self._named(usual) if name in empty), "", seed, key)
        number = numbers[draw([self.user[n].weight for n in numbers], seed, "prompt_variant", key)]
        variant = self.user[number]
        return self._filled(self._system(variant), variant.user, str(number), texts, seed, key)

    def _gated(self, gate: Gate, texts: Mapping[str, str], empty: set[str], seed: int, key: str) -> Rendered:
        needed = [gate.take] if gate.take else placeholders(f"{gate.system or ''} {gate.user}")
        for name in needed:
            if name in empty:
                return self._missing(name, GATED, seed, key)
        if gate.take is not None:
            return Rendered(None, "", GATED, self.sampling.decoding(seed, key), taken=texts[gate.take])
        assert gate.user is not None
        return self._filled(gate.system, gate.user, GATED, texts, seed, key)

    def _filled(
        self, system: str | None, user: str, variant: str, texts: Mapping[str, str], seed: int, key: str
    ) -> Rendered:
        start, end = self.delimiters or ("", "")
        values = {name: f"{start}{texts[name]}{end}" for name in self.columns}
        if self.examples is not None:
            values[EXAMPLES] = self.examples.text(seed, key)
        return Rendered(
            fill(system, values) if system is not None else None,
            fill(user, values),
            variant,
            self.sampling.decoding(seed, key),
            instruction=" ".join(fill(user, dict.fromkeys(values, "")).split()),
        )

    def _missing(self, column: str, variant: str, seed: int, key: str) -> Rendered:
        return Rendered(None, "", variant, self.sampling.decoding(seed, key), missing=column)

    def _is_for(self, variant: Variant, empty: set[str]) -> bool:
        is_wanted = variant.where_empty is None or variant.where_empty in empty
        return is_wanted and not empty & set(self._named(variant))

    def _system(self, variant: Variant) -> str | None:
        return variant.system if variant.system is not None else self.system

    def _named(self, variant: Variant) -> list[str]:
        """The columns that a variant needs."""
        named = placeholders(f"{self._system(variant) or ''} {variant.user}")
        return [name for name in named if name != EXAMPLES]

    def read_output(self, text: str) -> dict[str, str] | None:
        """The caption of each field, under "" for plain text; ``None`` where the answer has not the promised shape.

        Engines that cannot force a shape may put the object into a code fence, as chat models like to.
        """
        if not self.output:
            return {"": text}
        try:
            answer = json.loads(_without_fence(text))
        except (ValueError, RecursionError):
            return None
        if not isinstance(answer, dict) or set(answer) != set(self.output):
            return None
        found = {}
        for name, field in self.output.items():
            caption = field.read(answer[name])
            if caption is None:
                return None
            found[name] = caption
        return found


def _without_fence(text: str) -> str:
    inside = text.strip()
    if inside.startswith("```") and inside.endswith("```"):
        inside = inside.strip("`").removeprefix("json")
    return inside


# --- files ------------------------------------------------------------------------------------------------------------


def packaged() -> list[str]:
    """The names of the prompts that come with clips, sorted."""
    return sorted(entry.name.removesuffix(SUFFIX) for entry in _folder().iterdir() if entry.name.endswith(SUFFIX))


def source(name_or_path: str) -> str:
    """The text of a prompt file: by path, or a packaged one by name. Raises ``UserError`` where there is none."""
    is_path = name_or_path.endswith((SUFFIX, ".yml"))
    path: Any = Path(name_or_path) if is_path else _folder() / f"{name_or_path}{SUFFIX}"
    if is_path and not path.is_file():
        raise UserError(f"There is no prompt file {name_or_path}. Name a .yaml file, or a packaged prompt.")
    if not is_path and name_or_path not in packaged():
        near = did_you_mean(name_or_path, packaged())
        raise UserError(f"There is no prompt {name_or_path!r}. {near} Or give a .yaml file.")
    try:
        return str(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"Prompt file {path} is not UTF-8: {error}. Save it as UTF-8.") from None


def load(name_or_path: str) -> Prompt:
    """A prompt file by path, or a packaged one by name. Raises ``UserError`` naming the key that is wrong."""
    import yaml

    text, name = source(name_or_path), Path(name_or_path).stem
    where = f"Prompt file {name_or_path}"
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} does not hold a mapping. Write keys such as user: and sampling:.")
    if "name" in content:
        raise UserError(f"{where}, key name: a prompt has the name of its file. Leave the key out.")
    try:
        return Prompt.model_validate({**content, "name": name})
    except ValidationError as error:
        raise UserError(f"{where}, {what_is_wrong(error, Prompt)}") from None


def _folder() -> Any:
    return files("clips_manifests") / "prompts"
