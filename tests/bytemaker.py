"""A tokenizer whose pieces are the bytes of a text: ids show what exactly was taken, and a model of it is small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clips_train import tokenizer, towers
from clips_train.tokenizer import Tokenizer


class Bytes:
    """A vocabulary in the layout of ``bpe``."""

    vocab_size, bos_id, eos_id, pad_id, last_id = 259, 256, 257, 258, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_target = encode

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


TOKENIZER = Tokenizer(Bytes())


def install(patch: pytest.MonkeyPatch) -> None:
    """From now on ``bpe`` means these bytes: models shrink from 13 million parameters to one, and so do checkpoints."""
    patch.setitem(towers.VOCAB_SIZES, "bpe", Bytes.vocab_size)
    patch.setattr(tokenizer, "_BytePairs", Bytes)


@pytest.fixture(scope="module", autouse=True)
def small_vocabulary() -> Iterator[None]:
    """For all tests of a module that imports it."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield
