"""How the transformers engine chooses tokens: vLLM's settings, in vLLM's order, as logits processors of ``generate``.

Penalties first, then temperature, min-p, top-k, top-p. Of what is left one token is taken: that at which the cumulative
probability passes a number in [0, 1), drawn for this row and position from the row's own seed.

Shape suffixes: B rows, P prompt slots, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from clips_data.recaption.engines import Decoding

if TYPE_CHECKING:
    import torch

GREEDY_BELOW: Final = 1e-5
"""Temperatures colder than this are greedy, as in vLLM."""


def processors(decoding: Decoding, prompt_BP: torch.Tensor, mask_BP: torch.Tensor, seeds: Sequence[int]) -> Any:
    """A ``LogitsProcessorList`` for greedy ``generate``. ``mask_BP`` is 0 on padding; ``seeds`` are the rows'."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found: Any = LogitsProcessorList()
    if decoding.repetition_penalty != 1 or decoding.presence_penalty or decoding.frequency_penalty:
        found.append(_Penalties(decoding, prompt_BP, mask_BP))
    if decoding.temperature < GREEDY_BELOW:
        return found
    if decoding.temperature != 1:
        found.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.min_p:
        found.append(MinPLogitsWarper(decoding.min_p))
    if decoding.top_k:
        found.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        found.append(TopPLogitsWarper(decoding.top_p))
    found.append(_Draw(seeds, decoding.max_tokens, prompt_BP.shape[1]))
    return found


class _Penalties:
    """Repetition counts prompt and answer, presence and frequency the answer only, as in vLLM; padding never counts."""

    def __init__(self, decoding: Decoding, prompt_BP: torch.Tensor, mask_BP: torch.Tensor) -> None:
        self._decoding, self._prompt_BP, self._mask_BP = decoding, prompt_BP, mask_BP

    def __call__(self, ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        import torch

        decoding, answer = self._decoding, ids_BT[:, self._prompt_BP.shape[1] :]
        counts_BV = torch.zeros_like(scores_BV)
        counts_BV.scatter_add_(1, answer, torch.ones_like(answer, dtype=scores_BV.dtype))
        if decoding.repetition_penalty != 1:
            # Markers of images may lie beyond the vocabulary of the logits.
            known = self._mask_BP.bool() & (self._prompt_BP < scores_BV.shape[1])
            in_prompt_BV = torch.zeros_like(scores_BV)
            in_prompt_BV.scatter_add_(1, self._prompt_BP.where(known, 0), known.to(scores_BV.dtype))
            penalty = decoding.repetition_penalty
            punished = torch.where(scores_BV > 0, scores_BV / penalty, scores_BV * penalty)
            scores_BV = torch.where(counts_BV + in_prompt_BV > 0, punished, scores_BV)
        return scores_BV - decoding.frequency_penalty * counts_BV - decoding.presence_penalty * (counts_BV > 0)


class _Draw:
    """Leaves one token of each row alive."""

    def __init__(self, seeds: Sequence[int], max_tokens: int, num_prompt_slots: int) -> None:
        rows = [random.Random(seed) for seed in seeds]
        self._uniform = [[row.random() for _ in range(max_tokens)] for row in rows]
        self._num_prompt_slots = num_prompt_slots

    def __call__(self, ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        import torch

        position = ids_BT.shape[1] - self._num_prompt_slots
        uniform = torch.tensor([row[position] for row in self._uniform], dtype=torch.float64, device=scores_BV.device)
        cumulative_BV = scores_BV.double().softmax(dim=-1).cumsum(dim=-1)
        wanted = uniform.unsqueeze(1) * cumulative_BV[:, -1:]
        # Tokens of no probability do not raise the sum, so that the first above it is never one of them.
        chosen = torch.searchsorted(cumulative_BV, wanted, right=True)
        return torch.full_like(scores_BV, float("-inf")).scatter_(1, chosen, 0.0)


class Stops:
    """Ends a row at the first of its stop strings. ``ended``: by row, how many tokens it had, and the text before."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], num_prompt_slots: int) -> None:
        self._tokenizer, self._strings, self._num_prompt_slots = tokenizer, strings, num_prompt_slots
        self.ended: dict[int, tuple[int, str]] = {}

    def __call__(self, ids_BT: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        import torch

        for row, ids in enumerate(ids_BT[:, self._num_prompt_slots :].tolist()):
            if row in self.ended:
                continue
            text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found = [at for at in map(text.find, self._strings) if at >= 0]
            if found:
                self.ended[row] = (len(ids), text[: min(found)])
        return torch.tensor([row in self.ended for row in range(len(ids_BT))], device=ids_BT.device)
