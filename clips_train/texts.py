"""The texts of a sample as tensors: its views, hard negatives, the captioner's condition and target.

As in the authors' code a text that is missing is stood in for: by the first other source that holds one, whole. So a
sample without synthetic caption is trained on its web caption, for the short text and for the target (METHOD §2.2).

Shape suffixes: K texts of a view, M hard negatives, L text slots, Q target slots, R text rows, T kept slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clips_data import draws
from clips_data.errors import UserError, did_you_mean
from clips_train.config import Source, TrainConfig, View
from clips_train.shards import Split
from clips_train.sources import Text, Texts, TextSources, column_text, label_of
from clips_train.tokenizer import Tokenizer
from clips_train.views import SPAN_REDUCTIONS, Draw, NoCaption, Span, reduce_text

SLOTS_ROUNDED_TO = 8
"""Trimmed texts and targets are a multiple of this long, so that few shapes occur."""


class SampleTexts(NamedTuple):
    """What ``TextMaker`` makes of one sample."""

    tensors: dict[str, Tensor]
    """By the names that ``batch.collate`` knows."""
    counts: tuple[str, ...]
    chosen: tuple[str | None, ...]
    """For each view the column whose whole text it took; ``None`` where it was reduced."""


class TextMaker:
    """Makes the texts of samples, each a function of (sample, seed, epoch, key). Picklable.

    Raises ``UserError`` when the config asks for what the shards do not have.
    """

    def __init__(self, split: Split, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._sources = TextSources.open(split, config)
        self._condition_view = condition_view(config)
        self._whole_budget = tokenizer.budget(config.context_length)
        self._streams = [_stream(config.views, number) for number in range(len(config.views))]

    def texts(self, about: Mapping[str, Any], epoch: int, key: str) -> SampleTexts:
        """Raises ``NoCaption`` when no source holds a text, ``ShardError`` for a sample that is not ours."""
        config, tokenizer = self._config, self._tokenizer
        found = self._sources.texts(about, epoch, key)
        stand_ins = _Usable(self._all_sources(found), about)
        tensors: dict[str, Tensor] = {}
        fallbacks: list[str] = []
        chosen: list[str | None] = []
        for number, view in enumerate(config.views):
            source = found.of(view.source, view.walk)
            usable = stand_ins.usable(source)
            whole = source if usable else stand_ins.first
            is_whole = view.reduce in ("none", "truncate") and view.length_of is None
            chosen.append(whole.column if not usable or is_whole else None)
            if not usable:
                fallbacks.append(f"fallback.{label_of(view.source)}_empty")
            draw = Draw(config.seed, epoch, key + self._streams[number])
            ids = self._view(view, source, stand_ins, about, draw)
            tensors |= self._tensors_of(number, view, ids, about, epoch, key)
        if config.decoder != "none":
            target = found.of(config.target)
            if not stand_ins.usable(target):
                fallbacks.append(f"fallback.{label_of(config.target)}_empty")
            labels_1Q, mask_1Q = tokenizer.targets([stand_ins.text_for(target)], config.target_length)
            tensors |= {"labels": labels_1Q[0], "mask": mask_1Q[0]}
            if config.condition is not None and self._condition_view is None:
                condition = stand_ins.text_for(found.of(config.condition))
                tensors["condition"] = tokenizer.text_ids([condition], config.context_length)[0]
        else:
            tensors |= {"labels": torch.zeros(0, dtype=torch.long), "mask": torch.zeros(0, dtype=torch.bool)}
        dropped = config.condition_drop > 0 and (
            draws.uniform(config.seed, "condition_drop", epoch, key) < config.condition_drop
        )
        tensors["dropped"] = torch.tensor(dropped)
        return SampleTexts(tensors, found.counts + tuple(dict.fromkeys(fallbacks)), tuple(chosen))

    def _all_sources(self, found: Texts) -> list[Text]:
        """In the order in which they stand in for each other."""
        config = self._config
        texts = [found.of(view.source, view.walk) for view in config.views]
        if config.decoder != "none":
            texts.append(found.of(config.target))
            if config.condition is not None:
                texts.append(found.of(config.condition))
        return texts

    def _view(
        self, view: View, source: Text, stand_ins: _Usable, about: Mapping[str, Any], draw: Draw
    ) -> list[list[int]]:
        """Token ids of 1 to ``count`` texts."""
        budget = self._tokenizer.budget(_length(view, self._config))
        if not stand_ins.usable(source):
            return [self._tokenizer.pieces(stand_ins.text_for(source))[:budget]]
        if view.length_of is not None and (of := column_text(about, view.length_of).strip()):
            budget = min(budget, self._tokenizer.num_tokens(of))
        spans: Sequence[Span] = ()
        if view.reduce in SPAN_REDUCTIONS:
            spans = _spans(source, view, about)
        return reduce_text(source.text, spans, view, budget=budget, tokenizer=self._tokenizer, draw=draw)

    def _tensors_of(
        self, number: int, view: View, ids: list[list[int]], about: Mapping[str, Any], epoch: int, key: str
    ) -> dict[str, Tensor]:
        length = self._config.context_length
        missing = view.count - len(ids)
        negatives = self._negatives(view, about, epoch, key)
        return {
            f"view.{number}.ids": self._tokenizer.from_pieces([*ids, *[[]] * missing], length),
            f"view.{number}.there": torch.tensor([True] * len(ids) + [False] * missing),
            f"view.{number}.negatives": self._tokenizer.from_pieces(
                [self._tokenizer.pieces(text)[: self._whole_budget] for text in negatives], length
            ),
            f"view.{number}.negatives_there": torch.tensor([bool(text) for text in negatives], dtype=torch.bool),
        }

    def _negatives(self, view: View, about: Mapping[str, Any], epoch: int, key: str) -> list[str]:
        """All of them, "" where one is missing, or the one that counts."""
        texts = [column_text(about, name).strip() for name in view.negatives]
        if not texts or view.choose_negatives in ("all", "hardest"):
            return texts
        there = [text for text in texts if text] or [""]
        if view.choose_negatives == "first":
            return there[:1]
        return [there[draws.integer(len(there), self._config.seed, "negatives", epoch, key)]]


class _Usable:
    """Which texts of a sample can be used, and which stands in for one that cannot."""

    def __init__(self, texts: Sequence[Text], about: Mapping[str, Any]) -> None:
        """Raises ``NoCaption`` when none can be used."""
        self._about = about
        # The authors' rule counts pieces; a text without any, such as "...", is still better than none.
        found = [text for text in texts if self.usable(text)] or [text for text in texts if text.text.strip()]
        if not found:
            raise NoCaption
        self.first = found[0]

    def usable(self, text: Text) -> bool:
        """Whether it has a piece, where its column was split, or else any character."""
        sub_captions = self._about.get("sub_captions", {})
        if text.column in sub_captions:
            return bool(sub_captions[text.column])
        return bool(text.text.strip())

    def text_for(self, text: Text) -> str:
        return text.text if self.usable(text) else self.first.text


def _spans(source: Text, view: View, about: Mapping[str, Any]) -> Sequence[Span]:
    """Raises ``UserError`` when the one column of a view was not split. In a mix such a text is one piece."""
    known = about.get("sub_captions", {})
    if source.column in known:
        return [(start, end) for start, end in known[source.column]]
    if label_of(view.source) == "mix":
        return [(0, len(source.text))]
    raise UserError(
        f"The shards hold no sub-captions of column {source.column!r}, which reduce={view.reduce} needs. "
        f"{did_you_mean(str(source.column), known)} Shard that column again, or choose reduce=truncate."
    )


def _stream(views: Sequence[View], number: int) -> str:
    """What tells the draws of equal views apart: nothing for the first of them."""
    view = views[number]
    before = sum((other.source, other.reduce) == (view.source, view.reduce) for other in views[:number])
    return f".{before}" if before else ""


def condition_view(config: TrainConfig) -> int | None:
    """The view whose text is the captioner's condition, so that the text tower reads it once; ``None`` without one."""
    if config.decoder == "none" or config.condition is None:
        return None
    for number, view in enumerate(config.views):
        is_cut = view.reduce not in ("none", "truncate") or view.length_of is not None
        whole = not is_cut and _length(view, config) == config.context_length and not view.walk
        if whole and _same(view.source, config.condition):
            return number
    return None


def _length(view: View, config: TrainConfig) -> int:
    """Slots of a view's longest text."""
    return config.context_length if view.tokens is None else min(view.tokens, config.context_length)


def _same(one: Source, other: Source) -> bool:
    return type(one) is type(other) and one == other


def trim(ids_RL: Tensor, eos_id: int, *, keep_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Texts cut to the longest of them: ids [R, T], which slots are no padding [R, T], and their positions [T].

    With ``keep_last`` the last slot stays and is no padding, because the tower pools it (METHOD §1.3). Without, one
    slot more stays than the longest text has, because the captioner is shown all but the last.
    """
    length = ids_RL.shape[1]
    slots_L = torch.arange(length)
    is_end_RL = ids_RL == eos_id
    num_used_R = torch.where(is_end_RL.any(1), is_end_RL.int().argmax(1) + 1, length)
    longest = int(num_used_R.max()) if len(ids_RL) else 1
    num_kept = min(length, rounded_up(longest + 1))
    kept = torch.cat([slots_L[: num_kept - 1], slots_L[-1:]]) if keep_last else slots_L[:num_kept]
    mask_RT = kept < num_used_R[:, None]
    if keep_last:
        mask_RT[:, -1] = True
    return ids_RL[:, kept], mask_RT, kept


def rounded_up(length: int) -> int:
    """The next multiple of ``SLOTS_ROUNDED_TO``."""
    return -(-length // SLOTS_ROUNDED_TO) * SLOTS_ROUNDED_TO
