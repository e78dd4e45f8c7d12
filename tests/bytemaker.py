"""A tokenizer whose pieces are the bytes of a text: ids show what exactly was taken, and a model of it is small."""

from __future__ import annotations

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
