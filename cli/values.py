"""What one field of a config may hold, and how to say in words that a value is not that."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

NONE_WORD = "none"
"""What stands for "no value" in options and manifests, where a field allows it."""

Form = Literal["flag", "choice", "integer", "number", "text", "list", "lines", "yaml"]


@dataclass(frozen=True)
class Kind:
    """How a field looks on a command line: its form, whether ``none`` is allowed, and the choices of a Literal."""

    form: Form
    optional: bool = False
    choices: tuple[Any, ...] = ()


def kind_of(field: FieldInfo) -> Kind:
    annotation, optional = _without_none(field.annotation)
    origin = typing.get_origin(annotation)
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("repeated"):
        return Kind("lines", optional)
    if origin is Literal:
        return Kind("choice", optional, typing.get_args(annotation))
    if annotation is bool:
        return Kind("flag", optional)
    if annotation is int:
        return Kind("integer", optional)
    if annotation is float:
        return Kind("number", optional)
    if origin in (tuple, list) and isinstance(typing.get_args(annotation)[0], typing.NewType):
        return Kind("lines", optional)
    if origin in (tuple, list) and _is_plain(typing.get_args(annotation)[0]):
        return Kind("list", optional, _choices_of(typing.get_args(annotation)[0]))
    if _is_plain(annotation):
        return Kind("text", optional)
    return Kind("yaml", optional)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """``str | None`` → ``(str, True)``; ``Annotated[...]`` is looked through."""
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        optional = len(rest) < len(typing.get_args(annotation))
        annotation = rest[0] if len(rest) == 1 else annotation
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation, optional


def _is_plain(annotation: Any) -> bool:
    annotation, _ = _without_none(annotation)
    if typing.get_origin(annotation) is Literal:
        return True
    return isinstance(annotation, type) and (annotation in (int, float) or annotation.__name__ in ("str", "Path"))


def _choices_of(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def range_of(field: FieldInfo) -> str:
    """The field's bounds in words, or "" when it has none: ``"above 0, at most 10000"``."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = []
    for item in field.metadata:
        for bound, word in words.items():
            if getattr(item, bound, None) is not None:
                found.append(f"{word} {_number(getattr(item, bound))}")
    return ", ".join(found)


def default_text(field: FieldInfo) -> str:
    """The default as one would type it, or "required"."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return NONE_WORD
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list) and kind_of(field).form in ("list", "lines"):
        return ",".join(str(item) for item in value)
    if kind_of(field).form == "yaml":
        return _as_json(value)
    return _number(value) if isinstance(value, float | int) else str(value) or "empty"


def _as_json(value: Any) -> str:
    from pydantic_core import to_json

    return to_json(value).decode()


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def validated(config: type[BaseModel], values: Mapping[str, Any]) -> BaseModel:
    """A config from typed values, where ``none`` counts as no value. Raises pydantic's ``ValidationError``."""
    fields = config.model_fields
    plain = {
        name: None if value == NONE_WORD and name in fields and kind_of(fields[name]).optional else value
        for name, value in values.items()
    }
    return config.model_validate(plain)


def nearest_inside(config: type[BaseModel], key: str) -> str:
    """The known key inside of a config's values that is most like ``key``, as a sentence."""
    from clips_data.errors import did_you_mean

    inner = config.model_json_schema().get("$defs", {})
    return did_you_mean(key, [known for about in inner.values() for known in about.get("properties", {})])


def written_path(value: Any, path: Sequence[Any]) -> list[str]:
    """As much of pydantic's ``path`` as leads into ``value``: it also names a union's types, which nobody wrote.

    A text may be a mapping in YAML, as on a command line.
    """
    import yaml

    parts = []
    for part in path:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = yaml.safe_load(value)
        in_list = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, Mapping) and part in value):
            value = value[part]
            parts.append(str(part))
    return parts


def what_is_right(error: Mapping[str, Any]) -> str:
    """The end of a sentence about one of pydantic's errors: ``"it should be greater than 0"``."""
    message = str(error["msg"]).partition(", unable to parse")[0].removeprefix("Value error, ")
    for start in ("Input should", "String should", "Tuple should", "List should", "Value should"):
        if message.startswith(start):
            message = "it should" + message.removeprefix(start)
    return message.replace("valid tuple", "list").replace("valid dictionary", "mapping").rstrip(".")
