"""What zero-shot classes are called, and the prompts that each name is put into.

Names and templates are open_clip's, which are OpenAI's; WordNet ids come with timm, on which open_clip depends. Nothing
of either is copied here.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean

CLASS: Final = "{c}"
"""Stands for the class in a template."""
PAPER: Final = "clip_paper"
DEFAULT_TEMPLATES: Final = "openai"
_SYNSETS: Final[Mapping[str, str]] = {
    "imagenet": "imagenet_synsets.txt",
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
}
"""Sets of ImageNet's classes → timm's file of their WordNet ids, in the order of their labels."""


@dataclass(frozen=True)
class ClassNames:
    """``names`` by label. ``synsets`` are their WordNet ids, which name ImageNet's folders; empty for other lists."""

    names: tuple[str, ...]
    source: str
    """For result files."""
    synsets: tuple[str, ...] = ()

    def label(self, word: str) -> int | None:
        """Of a folder or row that says it by WordNet id, name (underscores are spaces) or number from 0, in this
        order; ``None`` where it is none of these classes."""
        for name in (word, word.replace("_", " ")):
            if name in self._labels:
                return self._labels[name]
        return int(word) if word.isdecimal() and int(word) < len(self.names) else None

    @functools.cached_property
    def _labels(self) -> dict[str, int]:
        """The first of equal names keeps its label."""
        pairs = [*enumerate(self.synsets), *enumerate(self.names)]
        return {word: label for label, word in reversed(pairs)}


@dataclass(frozen=True)
class Templates:
    """Prompts with ``{c}`` for the class."""

    texts: tuple[str, ...]
    source: str
    """For result files."""
    canonical: bool = False
    """Whether names lose case and punctuation as these templates have, and split at commas into aliases."""

    def prompts(self, name: str) -> list[str]:
        """Of one class: every alias in every template."""
        if not self.canonical:
            return [text.replace(CLASS, name) for text in self.texts]
        aliases = [canonical(alias) for alias in name.split(",")]
        return [text.replace(CLASS, alias) for alias in aliases if alias for text in self.texts]


def class_names(classes: str) -> ClassNames:
    """``imagenet``, or the 200 of it that ``imagenet-a`` or ``imagenet-r`` have, or a file with one name a line.

    Raises ``UserError`` for a file that cannot be read, is empty or has an empty line between names.
    """
    if classes in _SYNSETS:
        return _imagenet(classes)
    path = Path(classes)
    if not path.is_file():
        raise UserError(
            f"The classes {classes!r} are neither a file with one name a line nor a list that clips knows. "
            f"{did_you_mean(classes, _SYNSETS)}"
        )
    return ClassNames(tuple(_lines(path, "class names")), f"file {path.name}")


def templates(name: str) -> Templates:
    """``openai``, ``simple``, ``clip_paper``, ``photo``, or a file with one a line.

    Raises ``UserError`` for a file that cannot be read, is empty, or has a line without ``{c}``.
    """
    if name in _TEMPLATES:
        return _TEMPLATES[name]()
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"The templates {name!r} are neither a file with one a line nor a set that clips knows. "
            f"{did_you_mean(name, _TEMPLATES)}"
        )
    return checked(_lines(path, "templates"), f"file {path.name}")


def digests_of_files(classes: str | None, prompts: str | None) -> dict[str, str]:
    """Of those of the two that are files: what is in them, which their names do not tell."""
    found = {}
    if classes is not None and classes not in _SYNSETS:
        found["classes"] = ledger.digest_json(class_names(classes).names)
    if prompts is not None and prompts not in _TEMPLATES:
        found["templates"] = ledger.digest_json(templates(prompts).texts)
    return found


def checked(texts: Sequence[str], source: str) -> Templates:
    """Templates from outside. Raises ``UserError`` for one that names no class."""
    for number, text in enumerate(texts, start=1):
        if CLASS not in text:
            raise UserError(
                f"Template {number} of {source}, {text[:80]!r}, would be the same for every class. "
                f"Write {CLASS} where the name of the class belongs."
            )
    return Templates(tuple(texts), source)


def canonical(text: str) -> str:
    """Lower case, without punctuation, underscores and repeated space, as big_vision's evaluator has it."""
    text = CLASS.join(part.replace("_", " ").translate(_NO_PUNCTUATION) for part in text.split(CLASS))
    return re.sub(r"\s+", " ", text).strip().lower()


_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def is_synset(name: str) -> bool:
    """Whether it looks like a WordNet id, such as n01440764."""
    return re.fullmatch(r"n\d{8}", name) is not None


def _imagenet(subset: str) -> ClassNames:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    information = importlib.resources.files("timm") / "data" / "_info"
    whole = (information / _SYNSETS["imagenet"]).read_text().split()
    assert len(whole) == len(IMAGENET_CLASSNAMES)
    names = dict(zip(whole, IMAGENET_CLASSNAMES, strict=True))
    synsets = tuple((information / _SYNSETS[subset]).read_text().split())
    return ClassNames(tuple(names[synset] for synset in synsets), f"{subset}: open_clip's names", synsets)


def _openai() -> Templates:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return Templates(tuple(template(CLASS) for template in OPENAI_IMAGENET_TEMPLATES), "openai: open_clip's")


def _simple() -> Templates:
    from open_clip.zero_shot_metadata import SIMPLE_IMAGENET_TEMPLATES

    return Templates(tuple(template(CLASS) for template in SIMPLE_IMAGENET_TEMPLATES), "simple: open_clip's")


def _photo() -> Templates:
    return Templates((f"a photo of a {CLASS}.",), "photo")


def _paper() -> Templates:
    """OpenAI's and the bare name, canonical: ``clip_paper`` of google-research/big_vision, whose evaluator the
    authors of CLIPS use, with all aliases (METHOD §6)."""
    texts = tuple(canonical(text) for text in (*_openai().texts, CLASS))
    about = f"{PAPER}: big_vision's; names and templates in lower case without punctuation, all aliases of a name"
    return Templates(texts, about, canonical=True)


_TEMPLATES: Final[Mapping[str, Callable[[], Templates]]] = {
    DEFAULT_TEMPLATES: _openai,
    "simple": _simple,
    PAPER: _paper,
    "photo": _photo,
}


def _lines(path: Path, what: str) -> list[str]:
    """Stripped; empty ones at the end do not count."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The {what} in {path} could not be read as UTF-8 text ({error}).") from None
    if not lines:
        raise UserError(f"{path} holds no {what}. Write one a line.")
    if "" in lines:
        raise UserError(f"Line {lines.index('') + 1} of {path} is empty, between {what}. Write one a line.")
    return lines
