"""The parts of a prompt file: what may stand under each of its keys. ``prompts.Prompt`` is the whole."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clips_data import draws, languages
from clips_data.errors import did_you_mean, nearest
from clips_data.recaption.engines import Decoding

IMAGE: Final = "image"
EXAMPLES: Final = "examples"
ColumnName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
_BRACED = re.compile(r"\{\s*(\w+)\s*\}")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Refused(ValueError):
    """What is wrong with several keys together; ``key`` is the one to mend, counted from the part that refuses."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Part(BaseModel):
    """Base of all parts: read once, never changed, unknown keys refused, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sampling(Part):
    """Decoding settings, under the names that vLLM and transformers share."""

    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps all tokens.")
    top_k_weights: dict[Annotated[int, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        {}, description="Top-k values with weights, one of which is drawn for each row, in place of top_k."
    )
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    max_tokens: int = Field(128, gt=0)
    num_samples: int = Field(1, gt=0, description="Answers to each request, each a column of its own.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @model_validator(mode="after")
    def _goes_together(self) -> Sampling:
        if self.top_k and self.top_k_weights:
            raise Refused("top_k_weights", "top_k and top_k_weights both say how many tokens to keep")
        for name, asked in (("num_samples", self.num_samples > 1), ("top_k_weights", bool(self.top_k_weights))):
            if asked and self.temperature == 0:
                raise Refused(name, f"{name} is of no use with temperature 0, which draws nothing")
        return self

    def decoding(self, seed: int, key: str) -> Decoding:
        """The settings of one row's request: with ``top_k_weights`` its k is drawn by (seed, key)."""
        names = set(Decoding.__dataclass_fields__) - {"top_k"}
        return Decoding(**{name: getattr(self, name) for name in names}, top_k=self._top_k(seed, key))

    def _top_k(self, seed: int, key: str) -> int:
        if not self.top_k_weights:
            return self.top_k
        choices = sorted(self.top_k_weights)  # the order of a mapping is no choice of anybody's
        return choices[draw([self.top_k_weights[k] for k in choices], seed, "prompt_top_k", key)]


class Cleaning(Part):
    """Which rules of ``clean`` are switched on for these captions."""

    cut_to_sentence: bool = Field(False, description="Cut a caption that hit max_tokens back to its last full stop.")
    first_sentence: bool = Field(False, description="Keep the first sentence only.")
    language: str | None = Field(None, description="Two-letter code; captions in any other language are rejected.")

    @field_validator("language")
    @classmethod
    def _can_be_told(cls, value: str | None) -> str | None:
        if value is not None and value not in languages.KNOWN:
            raise ValueError(f"{value!r} cannot be told; {', '.join(sorted(languages.KNOWN))} can")
        return value


class Variant(Part):
    """One wording. With ``where_empty`` it is drawn only for rows whose text of that column is empty."""

    user: str
    system: str | None = Field(None, description="In place of the prompt's own system text.")
    weight: float = Field(1.0, gt=0)
    where_empty: ColumnName | None = None


class Example(Part):
    """One pair of the bank of few-shot examples."""

    input: str
    output: str


class Examples(Part):
    """A bank of pairs, ``draw`` of which stand where a user text says ``{examples}``."""

    bank: tuple[Example, ...] = Field(min_length=1)
    draw: int = Field(3, gt=0)
    format: str = "{input} => {output}\n"

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Examples:
        if self.draw > len(self.bank):
            raise Refused("draw", f"{self.draw} examples cannot be drawn from a bank of {len(self.bank)}")
        if sorted(placeholders(self.format)) != ["input", "output"]:
            raise Refused("format", "it must name {input} and {output} once each, and nothing else")
        return self

    def drawn(self, seed: int, key: str) -> list[int]:
        """Places in the bank, in the order in which they are shown, none twice."""
        return draws.permutation(len(self.bank), seed, "prompt_examples", 0, key)[: self.draw]

    def text(self, seed: int, key: str) -> str:
        shown = (self.bank[i] for i in self.drawn(seed, key))
        return "".join(fill(self.format, {"input": pair.input, "output": pair.output}) for pair in shown)


class OutputField(Part):
    """One text, or one list of short texts, of the JSON object that the model writes."""

    kind: Literal["text", "list"] = "text"
    about: str | None = Field(None, description="Goes into the schema; only some servers show it to the model.")
    max_chars: int = Field(500, gt=0, description="Of the text, or of each item of the list.")
    max_items: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _items_belong_to_lists(self) -> OutputField:
        if (self.kind == "list") != (self.max_items is not None):
            raise Refused("max_items", "a list says how many items it may have, and a text has none")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """JSON schema of the value."""
        shape: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": self.max_chars}
        if self.kind == "list":
            shape = {"type": "array", "items": shape, "minItems": 1, "maxItems": self.max_items}
        return {**shape, "description": self.about} if self.about else shape

    def read(self, value: Any) -> str | None:
        """The caption, items of a list with commas between them; ``None`` where ``value`` has not this shape."""
        items = value if self.kind == "list" else [value]
        if not isinstance(items, list) or not 1 <= len(items) <= (self.max_items or 1):
            return None
        if not all(isinstance(item, str) and 1 <= len(item) <= self.max_chars for item in items):
            return None
        caption = ", ".join(item.strip() for item in items)
        # An escape such as \ud83d without its other half is a string to JSON, but no text that a file can hold.
        return None if _SURROGATE.search(caption) else caption


class Gate(Part):
    """What becomes of a row whose ``column`` fits its image too badly to be trusted, or is empty.

    Its image goes with the text ``user``, or the caption of column ``take`` becomes the row's caption as it is.
    """

    column: ColumnName
    min: float = Field(description="Least image-text similarity, on the scale of the scorer that is used.")
    user: str | None = None
    system: str | None = None
    take: ColumnName | None = None

    @model_validator(mode="after")
    def _is_one_way_out(self) -> Gate:
        if (self.user is None) == (self.take is None):
            raise Refused("", "it needs either user, a text to go with the image, or take, a column")
        if self.take == self.column:
            raise Refused("take", f"{self.take!r} is the column that the gate distrusts")
        for name, text in (("user", self.user), ("system", self.system)):
            if self.column in placeholders(text or ""):
                raise Refused(name, f"it names {{{self.column}}}, the column that the gate distrusts")
        return self


# --- texts with placeholders ------------------------------------------------------------------------------------------


def placeholders(text: str) -> list[str]:
    return _BRACED.findall(text)


def fill(text: str, values: Mapping[str, str]) -> str:
    """``text`` with each ``{name}`` replaced, in one pass: braces in the values are left as they are."""
    return _BRACED.sub(lambda match: values[match.group(1)], text)


def check_placeholders(key: str, text: str, known: Iterable[str]) -> None:
    """Raises ``Refused`` for the first placeholder that nothing fills."""
    columns = [name for name in known if name != IMAGE]
    for name in placeholders(text):
        if name not in columns:
            raise Refused(key, f"the text names {{{name}}}, which is not a column of inputs. {right(name, columns)}")


def right(column: str, columns: Iterable[str]) -> str:
    """What to do about a column that is not among the inputs."""
    near = nearest(column, columns)
    return f"Did you mean {near!r}?" if near else "Add it to inputs."


def draw(weights: list[float], seed: int, purpose: str, key: str) -> int:
    """A place in ``weights``, drawn with their shares."""
    point = draws.uniform(seed, purpose, 0, key) * sum(weights)
    for place, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return place
    return len(weights) - 1  # rounding of the sum


# --- what is wrong, in words ------------------------------------------------------------------------------------------


def what_is_wrong(error: ValidationError, whole: type[Part]) -> str:
    """``key sampling.temprature: Extra inputs are not permitted. Did you mean 'temperature'?``"""
    errors = error.errors(include_url=False)
    # A misspelt key also leaves the right one missing; the misspelling is what to mend.
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    place, said, hint = [str(piece) for piece in first["loc"]], str(first["msg"]), ""
    refused = first.get("ctx", {}).get("error")
    if isinstance(refused, Refused):
        place, said = [*place, *filter(None, [refused.key])], str(refused)
    elif first["type"] == "extra_forbidden":
        hint = f" {did_you_mean(place[-1], _keys(place[:-1], whole))}"
    return f"key {'.'.join(place) or '(whole)'}: {said}{'' if said.endswith(('.', '?')) else '.'}{hint}"


def _keys(place: list[str], whole: type[Part]) -> list[str]:
    """The keys that may stand at ``place`` in a prompt file."""
    part = whole
    for piece in place:
        if piece in part.model_fields:
            part = _part_in(part.model_fields[piece].annotation) or part
    return [key for key in part.model_fields if key != "name"]


def _part_in(annotation: Any) -> type[Part] | None:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    return next(filter(None, map(_part_in, typing.get_args(annotation))), None)
