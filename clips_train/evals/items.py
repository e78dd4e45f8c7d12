"""What evaluations read: images with texts, with a class, or several of both, whatever the files they come from.

Formats differ, tasks do not: a format is a function from a ``Benchmark`` to one of these data sets, a task takes a data
set and an encoder. Bytes are read when they are needed, so that a data set of any size costs its table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One image. ``read`` gives its bytes and raises ``OSError`` where it cannot."""

    key: str
    """Unique in its data set: a path, a file name, or the key of a sample."""
    read: Callable[[], bytes]
    texts: Sequence[str] = ()
    """Its captions: queries of retrieval, references of captioning."""
    label: int | None = None
    """Its class, counted from 0."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else is known: ``web`` for the text that a captioner is conditioned on."""


@dataclass(frozen=True)
class Pairing:
    """Images and texts where image *i* belongs to text *i* and to no other (Winoground, SugarCrepe).

    SugarCrepe has one image and two texts, the second one wrong.
    """

    key: str
    images: Sequence[Callable[[], bytes]]
    texts: Sequence[str]
    tags: Sequence[str] = ()
    """Groups that get figures of their own, such as ``replace_att``."""


@dataclass(frozen=True)
class DataSet:
    """Items or pairings in a fixed order, and what a result file says of where they come from."""

    items: Sequence[Item]
    about: Mapping[str, Any]
    """``path``, ``format``, ``split``, ``digest`` (of the table of keys, texts and labels) and what the format adds."""
    pairings: Sequence[Pairing] = ()
    classes: Sequence[str] = ()
    """Names by label, as the data set itself has them."""
    templates: Sequence[str] = ()
    """Prompts that came with the data, with ``{c}`` for the class."""
