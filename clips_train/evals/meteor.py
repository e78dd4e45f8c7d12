"""METEOR 1.5 of tokenized captions, by the Java program that comes with pycocoevalcap.

The program aligns words and gives counts for each caption; the score of many captions is a function of the sums of
their counts, so that resampling needs no second alignment.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from clips_data.errors import UserError
from clips_train.evals import caption_tokens
from clips_train.evals.outcome import Figure

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
"""The program's own, for English (Denkowski and Lavie 2014)."""
STAGES: Final = (1.0, 0.6, 0.8, 0.6)
"""Weights of exact words, stems, synonyms and paraphrases."""
SEPARATOR: Final = "|||"


def figure(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Figure:
    """Of captions as words, against the reference that suits each best. Raises ``UserError`` where Java fails."""
    program = caption_tokens.jar("meteor", "meteor-1.5.jar")
    command = [str(caption_tokens.java()), "-Xmx2G", "-jar", program.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = "".join(_lines(captions, references))
    done = subprocess.run(command, cwd=program.parent, input=lines.encode(errors="replace"), capture_output=True)
    rows = [[float(number) for number in line.split()] for line in done.stdout.decode().splitlines()]
    if len(rows) != len(captions):
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(
            f"METEOR answered {len(rows)} of {len(captions)} captions: {said}. Repair Java, or take it off PATH."
        )
    return Figure(counted(torch.tensor(rows, dtype=torch.float64)), score)


def counted(units_UD: Tensor) -> Tensor:
    """With no chunk where a caption is its reference word for word: it is not scattered, in one chunk or in none."""
    whole_U = (units_UD[:, 21:23] == units_UD[:, 0:2]).all(1) & (units_UD[:, 20] == 1)
    units_UD = units_UD.clone()
    units_UD[whole_U, 20] = 0
    return units_UD


def _lines(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Iterator[str]:
    for words, given in zip(captions, references, strict=True):
        texts = [" ".join(word for word in one if SEPARATOR not in word) for one in (*given, words)]
        yield f"SCORE {SEPARATOR} {f' {SEPARATOR} '.join(texts)}\n"


def score(sums_RD: Tensor) -> Tensor:
    """float64 [R] of sums of ``counted`` [R, 23], of captions and references in turn: words, function words; matched
    content words and function words of each stage; then chunks, and matched words."""
    function_R2 = sums_RD[:, 2:4]
    length_R2 = DELTA * (sums_RD[:, 0:2] - function_R2) + (1 - DELTA) * function_R2
    matched_R422 = sums_RD[:, 4:20].unflatten(1, (4, 2, 2))
    kinds = torch.tensor([DELTA, 1 - DELTA], dtype=torch.float64)
    matched_R2 = torch.einsum("rskt,s,k->rt", matched_R422, torch.tensor(STAGES, dtype=torch.float64), kinds)
    share_R2 = torch.where(length_R2 > 0, matched_R2 / length_R2, 0.0)
    precision_R, recall_R = share_R2.unbind(1)
    mean_R = precision_R * recall_R / (ALPHA * precision_R + (1 - ALPHA) * recall_R)
    scattered_R = sums_RD[:, 20] / sums_RD[:, 21:23].mean(1)
    return torch.where((precision_R > 0) & (recall_R > 0), mean_R * (1 - GAMMA * scattered_R**BETA), 0.0)
