"""The words of a caption, one after the other or all at once: greedy, drawn, searched for, or one for each slot.

Nothing here knows a model: a ``Writer`` gives the logits of the next token for a batch of captions. What is drawn for a
caption depends on (seed, key, position) alone, so batches of any size and order give the same captions.

Shape suffixes: B rows, R rows that stay, Q slots, K beams, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clips_data import draws
from clips_train.decoding import Decoding

SLOTS_PER_PASS = 16
"""Slots whose logits exist at the same time; samples that have ended leave before the next ones."""
LEAVING_SHARE = 1 / 8
"""Ended captions leave the batch when they are this share of it: taking them out copies the cache of all others."""


LIKELIEST = 1024
"""Tokens that are put in order first; where the cuts of ``top_p`` leave more than these, all are."""


class Writer(Protocol):
    """Captions in the writing."""

    def next(self, ids_B: Tensor) -> Tensor:
        """Each row goes on by one token; logits [B, V] of the one after it."""

    def keep(self, rows_R: Tensor) -> None:
        """Goes on with these rows, in this order; a row may be taken several times."""


@dataclass(frozen=True)
class Written:
    """A caption's tokens without the end token, and the sum of their log-probabilities, with the end token's.

    The log-probabilities are the model's own, before temperature, penalties and cuts.
    """

    ids: list[int]
    ended: bool
    log_probability: float

    @property
    def num_predicted(self) -> int:
        """Tokens that the log-probability is the sum of."""
        return len(self.ids) + self.ended


def write(
    writer: Writer, *, start_id: int, end_id: int, keys: Sequence[str], max_tokens: int, decoding: Decoding
) -> list[Written]:
    """A caption for each key, of at most ``max_tokens`` tokens, end token included; ``decoding`` does not say that."""
    if decoding.strategy == "beam":
        return _search(writer, start_id, end_id, len(keys), max_tokens, decoding)
    return _one_by_one(writer, start_id, end_id, keys, max_tokens, decoding)


# --- greedy and drawn -------------------------------------------------------------------------------------------------


def _one_by_one(
    writer: Writer, start_id: int, end_id: int, keys: Sequence[str], max_tokens: int, decoding: Decoding
) -> list[Written]:
    ids: list[list[int]] = [[] for _ in keys]
    ended = [False] * len(keys)
    sums = [0.0] * len(keys)
    rows = list(range(len(keys)))  # the captions that are in the batch
    last_B = torch.full((len(keys),), start_id)
    for position in range(max_tokens):
        logits_BV = writer.next(last_B).float()
        wanted_BV = punished(logits_BV, [ids[row] for row in rows], decoding.repetition_penalty)
        if decoding.strategy == "greedy":
            chosen_B = wanted_BV.argmax(dim=-1)
        else:
            uniform = [draws.uniform(decoding.seed, f"caption.{position}", 0, keys[row]) for row in rows]
            chosen_B = drawn(wanted_BV, torch.tensor(uniform, dtype=torch.float64), decoding)
        gained_B = logits_BV.gather(1, chosen_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
        for row, token, gained in zip(rows, chosen_B.tolist(), gained_B.tolist(), strict=True):
            if ended[row]:
                continue
            sums[row] += gained
            ended[row] = token == end_id
            if not ended[row]:
                ids[row].append(token)
        staying = [place for place, row in enumerate(rows) if not ended[row]]
        if not staying:
            break
        last_B = chosen_B
        if len(rows) - len(staying) >= LEAVING_SHARE * len(rows):
            staying_R = torch.tensor(staying, device=last_B.device)
            writer.keep(staying_R)
            last_B = last_B[staying_R]
            rows = [rows[place] for place in staying]
    return [Written(*one) for one in zip(ids, ended, sums, strict=True)]


def punished(logits_BV: Tensor, said: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits where tokens that a row has ``said`` are divided by the penalty, or multiplied where they are negative."""
    if penalty == 1:
        return logits_BV
    said_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, ids in enumerate(said):
        said_BV[row, list(ids)] = True
    return torch.where(said_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def drawn(logits_BV: Tensor, uniform_B: Tensor, decoding: Decoding) -> Tensor:
    """One token a row: temperature, then min-p, top-k, top-p, each among what the one before has left.

    Of these it is the token at which the cumulative probability, likeliest first, passes the row's number in [0, 1).
    """
    share_BV = (logits_BV.double() / decoding.temperature).softmax(dim=-1)
    uniform_B = uniform_B.to(share_BV)
    if decoding.top_p == 1 and not decoding.top_k and not decoding.min_p:
        return _place_of(share_BV, uniform_B)  # nothing is cut: any order will do
    chosen_B, is_cut_B = _drawn_among(*share_BV.topk(min(LIKELIEST, share_BV.shape[1]), dim=-1), uniform_B, decoding)
    if not is_cut_B.all() and share_BV.shape[1] > LIKELIEST:
        rows_B = ~is_cut_B
        in_order = share_BV[rows_B].sort(dim=-1, descending=True, stable=True)
        chosen_B[rows_B], _ = _drawn_among(*in_order, uniform_B[rows_B], decoding)
    return chosen_B


def _drawn_among(share_BN: Tensor, token_BN: Tensor, uniform_B: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """What is drawn among a row's likeliest N tokens, and whether the cuts leave no more than these."""
    share_BN = share_BN.where(share_BN >= decoding.min_p * share_BN[:, :1], 0)
    if decoding.top_k:
        share_BN = share_BN.where(torch.arange(share_BN.shape[1], device=share_BN.device) < decoding.top_k, 0)
    is_cut_B = share_BN[:, -1] == 0
    # What the first cuts leave is only known where they cut among these N; without a cut so far the whole is 1.
    whole_B = share_BN.sum(dim=-1) if decoding.top_k or decoding.min_p else torch.ones_like(uniform_B)
    passed_before_BN = share_BN.cumsum(dim=-1) - share_BN
    share_BN = share_BN.where(passed_before_BN < decoding.top_p * whole_B[:, None], 0)
    if not decoding.top_k and not decoding.min_p:
        is_cut_B = share_BN[:, -1] == 0
    return token_BN.gather(1, _place_of(share_BN, uniform_B)[:, None])[:, 0], is_cut_B


def _place_of(share_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """Where the cumulative share passes the row's number, as a part of the row's whole."""
    passed_BN = share_BN.cumsum(dim=-1)
    place_B1 = torch.searchsorted(passed_BN, uniform_B[:, None] * passed_BN[:, -1:], right=True)
    # Rounding may carry the number to the very end, behind the last token that is left.
    last_B1 = torch.where(share_BN > 0, torch.arange(share_BN.shape[1], device=share_BN.device), 0).amax(-1, True)
    return place_B1.minimum(last_B1)[:, 0]


# --- searched for -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A caption that the search follows. ``score`` is ``log_probability`` but for the repetition penalty."""

    ids: list[int]
    score: float = 0.0
    log_probability: float = 0.0
    is_greedy: bool = False
    ended: bool = False

    def normalised(self, length_penalty: float) -> float:
        length: float = (len(self.ids) + self.ended) ** length_penalty
        return self.score / length

    def best_to_come(self, length_penalty: float, max_tokens: int) -> float:
        """What its normalised score can become at most: further tokens add nothing to a log-probability."""
        shortest = min(len(self.ids) + 1, max_tokens)
        length: float = (max_tokens if length_penalty >= 0 else shortest) ** length_penalty
        return self.score / length


def _search(
    writer: Writer, start_id: int, end_id: int, num_rows: int, max_tokens: int, decoding: Decoding
) -> list[Written]:
    """Beam search. An ended line keeps its place among the ``beams`` of its image, and the search goes on with fewer.

    The greedy line is never given up for a better one, so the caption found scores no lower than the greedy one.
    """
    running = [[_Line([], is_greedy=True)] for _ in range(num_rows)]
    ended: list[list[_Line]] = [[] for _ in range(num_rows)]
    last_B = torch.full((num_rows,), start_id)
    for _ in range(max_tokens):
        lines = [line for of_image in running for line in of_image]
        logits_BV = writer.next(last_B).float()
        told_BV = logits_BV.log_softmax(dim=-1)
        wanted_BV = told_BV
        if decoding.repetition_penalty != 1:
            said = [line.ids for line in lines]
            wanted_BV = punished(logits_BV, said, decoding.repetition_penalty).log_softmax(dim=-1)
        best_BK, token_BK = wanted_BV.topk(min(decoding.beams, wanted_BV.shape[1]), dim=-1)
        told_BK = told_BV.gather(1, token_BK)
        steps = list(zip(best_BK.tolist(), token_BK.tolist(), told_BK.tolist(), strict=True))
        parents: list[int] = []
        first = 0
        for image, of_image in enumerate(running):
            grown = _grown(of_image, steps[first : first + len(of_image)], end_id)
            kept = _kept(grown, decoding.beams - len(ended[image]))
            ended[image] += [line for _, line in kept if line.ended]
            going_on = [(parent, line) for parent, line in kept if not line.ended]
            if not _can_win(going_on, ended[image], decoding.length_penalty, max_tokens):
                going_on = []
            running[image] = [line for _, line in going_on]
            parents += [first + parent for parent, _ in going_on]
            first += len(of_image)
        if not parents:
            break
        if parents != list(range(len(lines))):
            writer.keep(torch.tensor(parents, device=logits_BV.device))
        last_B = torch.tensor([line.ids[-1] for of_image in running for line in of_image])
    return [_best([*ended[image], *running[image]], decoding.length_penalty) for image in range(num_rows)]


def _grown(
    lines: Sequence[_Line], steps: Sequence[tuple[list[float], list[int], list[float]]], end_id: int
) -> list[tuple[int, _Line]]:
    """Each line with each of its likeliest next tokens, best first, with the place of the line it comes from."""
    found = []
    for place, (line, (scores, tokens, told)) in enumerate(zip(lines, steps, strict=True)):
        for rank, (score, token, own) in enumerate(zip(scores, tokens, told, strict=True)):
            is_end = token == end_id
            grown = _Line(
                line.ids if is_end else [*line.ids, token],
                line.score + score,
                line.log_probability + own,
                line.is_greedy and rank == 0,
                is_end,
            )
            found.append((place, grown))
    return sorted(found, key=lambda one: -one[1].score)  # stable: among equals the earlier line and token


def _kept(grown: Sequence[tuple[int, _Line]], width: int) -> list[tuple[int, _Line]]:
    kept = list(grown[:width])
    greedy = [one for one in grown[width:] if one[1].is_greedy]
    return [*kept[: width - len(greedy)], *greedy]


def _can_win(
    running: Sequence[tuple[int, _Line]], ended: Sequence[_Line], length_penalty: float, max_tokens: int
) -> bool:
    if not ended:
        return True
    reached = max(line.normalised(length_penalty) for line in ended)
    return any(line.best_to_come(length_penalty, max_tokens) > reached for _, line in running)


def _best(lines: Sequence[_Line], length_penalty: float) -> Written:
    best = max(lines, key=lambda line: line.normalised(length_penalty))
    return Written(best.ids, best.ended, best.log_probability)


# --- one for each slot ------------------------------------------------------------------------------------------------


def slot_by_slot(states_BQD: Tensor, head_weight_VD: Tensor, end_id: int) -> list[Written]:
    """The likeliest token of each slot, per sample up to the first end token."""
    num_rows, num_slots = states_BQD.shape[:2]
    ids: list[list[int]] = [[] for _ in range(num_rows)]
    ended = [False] * num_rows
    sums = [0.0] * num_rows
    for start in range(0, num_slots, SLOTS_PER_PASS):
        rows = [row for row in range(num_rows) if not ended[row]]
        if not rows:
            break
        logits_BQV = states_BQD[rows, start : start + SLOTS_PER_PASS].float() @ head_weight_VD.float().T
        best_BQ, token_BQ = logits_BQV.max(dim=-1)
        gained_BQ = best_BQ - logits_BQV.logsumexp(dim=-1)
        for row, tokens, gained in zip(rows, token_BQ.tolist(), gained_BQ.tolist(), strict=True):
            ended[row] = end_id in tokens
            num_said = tokens.index(end_id) if ended[row] else len(tokens)
            ids[row] += tokens[:num_said]
            sums[row] += sum(gained[: num_said + ended[row]])
    return [Written(*one) for one in zip(ids, ended, sums, strict=True)]
