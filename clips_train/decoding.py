"""How the captioner chooses its words: the settings alone, so that a command can name their defaults without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from clips_data.errors import UserError

Strategy = Literal["greedy", "top_p", "beam"]
STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)

_LOWEST: Final = {"max_tokens": 0, "top_k": 0, "min_p": 0.0, "beams": 1}
_ABOVE_ZERO: Final = ("temperature", "top_p", "repetition_penalty")
_AT_MOST_ONE: Final = ("top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """``greedy`` takes the likeliest token, ``top_p`` draws one, ``beam`` searches for the likeliest caption.

    Raises ``UserError`` for a value that means nothing.
    """

    strategy: Strategy = "greedy"
    temperature: float = 1.0
    """Of ``top_p``: logits are divided by it."""
    top_p: float = 0.9
    """Of ``top_p``: tokens are drawn among the likeliest that make up this share of the probability."""
    top_k: int = 0
    """Of ``top_p``: tokens are drawn among this many; 0 keeps all."""
    min_p: float = 0.0
    """Of ``top_p``: tokens less likely than this share of the likeliest are not drawn."""
    beams: int = 4
    """Of ``beam``: captions followed at a time."""
    length_penalty: float = 1.0
    """Of ``beam``: a caption's score is its log-probability / tokens ** this; 0 favours short captions."""
    max_tokens: int = 0
    """Longest caption in tokens, end token included; 0 takes as many as the captioner was trained on."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that a caption already has become less likely (CTRL's rule, on the caption alone)."""
    seed: int = 0
    """Of ``top_p``: what is drawn is a function of (seed, the image's key)."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(f"Decoding {self.strategy!r} is not known. Choose {', '.join(STRATEGIES)}.")
        for name, lowest in _LOWEST.items():
            self._check(name, "at least", lowest, getattr(self, name) >= lowest)
        for name in _ABOVE_ZERO:
            self._check(name, "above", 0, getattr(self, name) > 0)
        for name in _AT_MOST_ONE:
            self._check(name, "at most", 1, getattr(self, name) <= 1)

    def _check(self, name: str, how: str, bound: float, is_right: bool) -> None:
        if not is_right:
            raise UserError(f"Decoding setting {name} is {getattr(self, name):g}; it should be {how} {bound:g}.")


GREEDY: Final = Decoding()
