"""The only randomness of the data side: every draw is a function of (seed, purpose, epoch, key).

So a draw depends neither on the order in which samples are visited nor on how many workers visit them.
"""

from __future__ import annotations

import hashlib
import random


def _word(seed: int, purpose: str, epoch: int, key: str) -> int:
    text = f"{seed}\x1f{purpose}\x1f{epoch}\x1f{key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def uniform(seed: int, purpose: str, epoch: int, key: str) -> float:
    """A float in [0, 1) with 53 random bits."""
    return (_word(seed, purpose, epoch, key) >> 11) / (1 << 53)


def integer(n: int, seed: int, purpose: str, epoch: int, key: str) -> int:
    """An integer in [0, n)."""
    assert n > 0
    return _word(seed, purpose, epoch, key) * n >> 64


def permutation(n: int, seed: int, purpose: str, epoch: int, key: str = "") -> list[int]:
    """The numbers 0 … n - 1 in an order drawn for this purpose."""
    order = list(range(n))
    random.Random(_word(seed, purpose, epoch, key)).shuffle(order)
    return order
