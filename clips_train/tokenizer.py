"""Text to ids: open_clip's own byte-pair encoding, or the paper's BERT word pieces in the CLIPS layout (METHOD §1.4).

Both lay a text of L slots out as start, pieces, end, padding. ``bert`` puts [CLS] into the last slot, which the text
tower pools. ``bpe`` has no such token: its last slot is padding (the end token where a text fills all slots, as in
stock open_clip). The tower attends in both directions and masks no padding, so that slot sees the whole text, and its
position embedding tells it apart from other padding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from clips_data.errors import UserError

CACHED_TEXTS = 1 << 16


class _Vocabulary(Protocol):
    """What differs between the two tokenizers."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    last_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_target(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """Lays texts out for the towers and for the captioner. Build with ``build_tokenizer``.

    Shape suffixes: N texts, L slots of a text, Q slots of a target.
    """

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.vocab_size, self.bos_id = vocabulary.vocab_size, vocabulary.bos_id
        self.eos_id, self.pad_id = vocabulary.eos_id, vocabulary.pad_id
        self._pieces = functools.lru_cache(CACHED_TEXTS)(vocabulary.encode)
        self._target_pieces = functools.lru_cache(CACHED_TEXTS)(vocabulary.encode_target)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[_Vocabulary]]:
        return Tokenizer, (self._vocabulary,)  # caches stay behind when it is sent to a worker process

    def pieces(self, text: str) -> list[int]:
        """Ids of the text itself, without special tokens and without limit."""
        return list(self._pieces(text))

    def num_tokens(self, text: str) -> int:
        return len(self._pieces(text))

    def budget(self, length: int) -> int:
        """How many pieces fit beside the special tokens of a text of ``length`` slots."""
        return length - 2 - (self._vocabulary.last_id is not None)

    def text_ids(self, texts: Sequence[str], length: int) -> Tensor:
        """int64 [N, L]; over-long texts are cut and keep their end token."""
        return self.from_pieces([self.pieces(text) for text in texts], length)

    def from_pieces(self, pieces: Sequence[Sequence[int]], length: int) -> Tensor:
        """As ``text_ids``, from ids without special tokens."""
        ids_NL = torch.full((len(pieces), length), self.pad_id, dtype=torch.long)
        for row, ids in enumerate(pieces):
            laid_out = [self.bos_id, *ids[: self.budget(length)], self.eos_id]
            ids_NL[row, : len(laid_out)] = torch.tensor(laid_out)
        if self._vocabulary.last_id is not None:
            ids_NL[:, -1] = self._vocabulary.last_id
        return ids_NL

    def target_ids(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Start, pieces, end, padding: ids int64 [N, Q] and bool [N, Q], true on all but padding."""
        ids_NQ = torch.full((len(texts), length), self.pad_id, dtype=torch.long)
        mask_NQ = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            pieces = self._target_pieces(text)[: length - 2]
            laid_out = [self.bos_id, *pieces, self.eos_id]
            ids_NQ[row, : len(laid_out)] = torch.tensor(laid_out)
            mask_NQ[row, : len(laid_out)] = True
        return ids_NQ, mask_NQ

    def targets(self, texts: Sequence[str], length: int = 128) -> tuple[Tensor, Tensor]:
        """What each query predicts: labels int64 [N, Q], shifted left by one, and the mask of those that count.

        The mask comes from lengths, not from ids: in ``bpe`` the padding's id is also that of "!" (METHOD §2.2).
        """
        ids_NQ, mask_NQ = self.target_ids(texts, length)
        labels_NQ = torch.cat([ids_NQ[:, 1:], torch.full((len(texts), 1), self.pad_id)], dim=1)
        counts_NQ = torch.cat([mask_NQ[:, 1:], torch.zeros(len(texts), 1, dtype=torch.bool)], dim=1)
        return labels_NQ, counts_NQ

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first end token, special tokens left out."""
        kept = []
        for number in ids:
            if number == self.eos_id:
                break
            if number not in (self.bos_id, self._vocabulary.last_id):
                kept.append(int(number))
        return self._vocabulary.decode(kept)


def build_tokenizer(kind: Literal["bpe", "bert"], bert_vocab: str | None = None) -> Tokenizer:
    """``bpe`` needs no file. ``bert`` reads ``bert_vocab``, one entry a line, as published with BERT-base-uncased."""
    if kind == "bpe":
        return Tokenizer(_BytePairs())
    if bert_vocab is None or not Path(bert_vocab).is_file():
        raise UserError(
            f"The BERT vocabulary {bert_vocab!r} does not exist. Give the path of BERT-base-uncased's vocab.txt as "
            "--bert-vocab, or use --tokenizer bpe, which needs no file."
        )
    return Tokenizer(_WordPieces(Path(bert_vocab)))


class _BytePairs:
    """open_clip's ``SimpleTokenizer``: the ids that stock open_clip gives."""

    last_id: int | None = None
    pad_id = 0

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenizer = SimpleTokenizer()
        self.vocab_size = self._tokenizer.vocab_size
        self.bos_id, self.eos_id = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def encode_target(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        for mark in (".", ",", ";", ":", "?", "!"):
            text = text.replace(f" {mark}", mark)
        return text.strip()


class _WordPieces:
    """BERT word pieces with the ids of the released CLIPS checkpoints."""

    vocab_size = 32_000
    pad_id, bos_id, eos_id = 0, 1, 2
    last_id: int | None = 101

    def __init__(self, vocab: Path) -> None:
        try:
            from tokenizers import Tokenizer as HfTokenizer
            from tokenizers import decoders, models, normalizers, pre_tokenizers
        except ImportError:
            raise UserError(
                "The BERT tokenizer needs the package tokenizers, which is not installed. Run: pip install tokenizers, "
                "or use --tokenizer bpe, which needs nothing more."
            ) from None

        def build() -> Any:
            entries = {entry: number for number, entry in enumerate(vocab.read_text(encoding="utf-8").splitlines())}
            tokenizer: Any = HfTokenizer(models.WordPiece(entries, unk_token="[UNK]", max_input_chars_per_word=100))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
            return tokenizer

        self._plain = build()
        self._tokenizer = build()
        self._tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])

    def encode(self, text: str) -> list[int]:
        """As the released PyTorch code: a literal "[CLS]" in a text becomes the special id."""
        ids: list[int] = self._tokenizer.encode(_clean(text), add_special_tokens=False).ids
        return ids

    def encode_target(self, text: str) -> list[int]:
        """As the JAX code that trains the captioner: special names are text like any other."""
        ids: list[int] = self._plain.encode(_clean(text), add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._plain.decode(ids)
        return text


def _clean(text: str) -> str:
    """open_clip's cleaning: mojibake and HTML entities repaired, white space folded."""
    from open_clip.tokenizer import get_clean_fn

    cleaned: str = get_clean_fn("whitespace")(text)
    return cleaned
