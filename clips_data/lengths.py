"""How long captions and their pieces are in the tokens of a text tower, and how many a context would cut.

Reads finished ``shards/`` or ``captions/<column>/``, a batch of texts at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data import ledger, schema
from clips_data.errors import UserError, did_you_mean
from clips_data.split import RULES, Rule, Span, split_many

CONTEXTS: Final = (77, 80, 128, 248)
"""Slots of the text towers in use: CLIP, CLIPS, captioners and LiT, Long-CLIP."""
TOKENIZERS: Final = ("bpe", "bert:PATH", "hf:FOLDER")
_BATCH: Final = 1000
_MAX_CACHED_WORDS: Final = 1 << 17


@dataclass(frozen=True)
class Tokens:
    """``count`` gives the number of each text's tokens; a text tower adds ``num_special`` to each."""

    count: Callable[[Sequence[str]], list[int]]
    num_special: int


@dataclass
class Lengths:
    """What has been counted of one column, as histograms: memory holds lengths, not texts."""

    without_text: int = 0
    captions: Counter[int] = field(default_factory=Counter)
    pieces: Counter[int] = field(default_factory=Counter)
    pieces_of_caption: Counter[int] = field(default_factory=Counter)

    def add(self, texts: Sequence[str], spans: Sequence[Sequence[Span]] | None, tokens: Tokens) -> None:
        """``spans`` is ``None`` for a column that is not cut."""
        full = [number for number, text in enumerate(texts) if text.strip()]
        self.without_text += len(texts) - len(full)
        self.captions.update(tokens.count([texts[number] for number in full]))
        if spans is not None:
            self.pieces_of_caption.update(len(spans[number]) for number in full)
            pieces = [texts[number][start:end] for number in full for start, end in spans[number]]
            self.pieces.update(tokens.count(pieces))

    def summary(self, num_special: int) -> dict[str, Any]:
        num_captions = self.captions.total()
        about: dict[str, Any] = {"captions": num_captions, "without_text": self.without_text}
        about["caption_tokens"] = _spread(self.captions)
        over: list[dict[str, Any]] = [{"context": context} for context in CONTEXTS]
        for row in over:
            row["captions_percent"] = _over(self.captions, row["context"] - num_special)
        if self.pieces_of_caption:
            about["pieces_per_caption"] = _spread(self.pieces_of_caption)
            about["without_piece_percent"] = round(100 * self.pieces_of_caption[0] / num_captions, 4)
            about["piece_tokens"] = _spread(self.pieces)
            for row in over:
                row["pieces_percent"] = _over(self.pieces, row["context"] - num_special)
        return {**about, "over_context": over}


def gather(folder: Path, tokenizer: str, rule: Rule | None = None) -> dict[str, Any]:
    """Lengths by column of a ``shards/`` folder, a caption column or several, or a work folder (its shards, else its
    caption columns), ready for JSON.

    ``tokenizer`` is one of ``TOKENIZERS``. ``rule`` cuts the captions anew; without it shards show the pieces they hold
    and caption columns are cut as ``clips shard`` would by default. Lengths leave special tokens out, shares over a
    context count them in. Raises ``UserError`` for another folder, an unknown tokenizer or one whose package is absent.
    """
    if rule is not None and rule not in RULES:
        raise UserError(f"There is no splitting rule {rule!r}. {did_you_mean(rule, RULES)}")
    batches = _batches(folder, rule)
    tokens = build_tokens(tokenizer)
    columns: dict[str, Lengths] = {}
    for column, texts, spans in batches:
        columns.setdefault(column, Lengths()).add(texts, spans, tokens)
    return {
        "tokenizer": tokenizer,
        "special_tokens": tokens.num_special,
        "columns": {column: found.summary(tokens.num_special) for column, found in sorted(columns.items())},
    }


_Batch = tuple[str, list[str], Sequence[Sequence[Span]] | None]


def _batches(folder: Path, rule: Rule | None) -> Iterator[_Batch]:
    """Columns, texts and their pieces, whatever kind of folder it is."""
    for shards in (folder, folder / schema.SHARDS):
        if (shards / "index.json").exists():
            return _of_shards(shards, rule)
    inside = [folder, *_folders(folder), *_folders(folder / schema.CAPTIONS)]
    columns = [column for column in inside if _is_column(column)]
    if not columns:
        raise UserError(
            f"{folder} holds neither finished shards nor caption columns, so there are no captions to measure. Point "
            "`clips stats --tokenizer` at shards/, at captions/ or captions/NAME, or at a work folder with these."
        )
    return (batch for column in columns for batch in _of_column(column, rule))


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _is_column(folder: Path) -> bool:
    from clips_data import measure

    units = ledger.finished_units(folder) if folder.is_dir() else []
    table = folder / f"{units[0]}.parquet" if units else None
    return table is not None and table.exists() and "finish_reason" in measure.columns_of(table)


def _of_shards(folder: Path, rule: Rule | None) -> Iterator[_Batch]:
    import json

    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for split in index["splits"].values():
        for shard in split["shards"]:
            for samples in _chunks(_json_members(folder / shard["file"])):
                for column in index["columns"]:
                    texts = [about[column] for about in samples]
                    if rule is not None:
                        yield column, texts, split_many(texts, rule)
                    elif all(column in about["sub_captions"] for about in samples):
                        yield column, texts, [about["sub_captions"][column] for about in samples]
                    else:
                        yield column, texts, None


def _json_members(path: Path) -> Iterator[dict[str, Any]]:
    import json

    from clips_data import tars

    with tars.open_tar(path) as file:
        for member in tars.read_members(path):
            if member.ext == "json":
                yield json.loads(tars.read_at(file, path, member.offset, member.size_bytes))


def _of_column(folder: Path, rule: Rule | None) -> Iterator[_Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clips_data.config import ShardConfig

    rule = rule or ShardConfig.model_fields["split"].default
    assert rule is not None
    for unit in ledger.finished_units(folder):
        path = folder / f"{unit}.parquet"
        try:
            with pq.ParquetFile(path) as table:
                for rows in table.iter_batches(batch_size=_BATCH, columns=["caption", "status"]):
                    pairs = zip(rows["caption"].to_pylist(), rows["status"].to_pylist(), strict=True)
                    texts = [text or "" if status == schema.STATUS_SUCCESS else "" for text, status in pairs]
                    yield folder.name, texts, split_many(texts, rule)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"Cannot read {path}: {error}. Restore it, or delete its .done.json and make it again."
            ) from None


def _chunks(samples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == _BATCH:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _spread(histogram: Mapping[int, int]) -> dict[str, float | int]:
    """Number, smallest, largest, mean, median and 95th percentile (nearest rank) of whole numbers."""
    num = sum(histogram.values())
    if not num:
        return {"num": 0}
    lengths = sorted(histogram)

    def rank(share: float) -> int:
        left = min(num - 1, int(share * num))
        for length in lengths:
            left -= histogram[length]
            if left < 0:
                break
        return length

    mean = round(sum(length * number for length, number in histogram.items()) / num, 4)
    return {
        "num": num, "min": lengths[0], "max": lengths[-1], "mean": mean, "median": rank(0.5), "p95": rank(0.95),
    }  # fmt: skip


def _over(histogram: Counter[int], room: int) -> float:
    """Per cent of the texts that are longer than ``room`` tokens."""
    over = sum(number for length, number in histogram.items() if length > room)
    return round(100 * over / max(1, histogram.total()), 4)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def build_tokens(name: str) -> Tokens:
    """``bpe`` is open_clip's own, ``bert:PATH`` the paper's with a file of one entry a line, ``hf:FOLDER`` any other.

    ``bpe`` and ``bert`` count what ``clips train`` does with the tokenizers of these names.
    """
    kind, _, where = name.partition(":")
    if name == "bpe":
        return _byte_pairs()
    if kind == "bert" and where:
        return _word_pieces(Path(where))
    if kind == "hf" and where:
        return _hugging_face(Path(where))
    raise UserError(f"There is no tokenizer {name!r}. {did_you_mean(name, TOKENIZERS)}")


def _byte_pairs() -> Tokens:
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise _absent("bpe", "open_clip", "open_clip_torch") from None
    tokenizer: Any = SimpleTokenizer()
    known = dict(tokenizer.cache)

    def count(texts: Sequence[str]) -> list[int]:
        if len(tokenizer.cache) > _MAX_CACHED_WORDS:  # it remembers every word for as long as the process lives
            tokenizer.cache = dict(known)
        return [len(tokenizer.encode(_encodable(text))) for text in texts]

    return Tokens(count, num_special=2)


def _word_pieces(vocab: Path) -> Tokens:
    if not vocab.is_file():
        raise UserError(f"The BERT vocabulary {vocab} does not exist. Give the path of BERT-base-uncased's vocab.txt.")
    try:
        from open_clip.tokenizer import get_clean_fn
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        raise _absent("bert", "open_clip or tokenizers", "open_clip_torch tokenizers") from None
    entries = {entry: number for number, entry in enumerate(vocab.read_text(encoding="utf-8").splitlines())}
    tokenizer: Any = Tokenizer(models.WordPiece(entries, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    clean = get_clean_fn("whitespace")

    def count(texts: Sequence[str]) -> list[int]:
        cleaned = [clean(_encodable(text)) for text in texts]
        return [len(found.ids) for found in tokenizer.encode_batch(cleaned, add_special_tokens=False)]

    return Tokens(count, num_special=3)


def _hugging_face(folder: Path) -> Tokens:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise _absent("hf", "transformers", "transformers") from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no tokenizer that can be read: {str(error).splitlines()[0]} Give the folder that "
            "save_pretrained wrote, with tokenizer.json or the vocabulary in it."
        ) from None

    def count(texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        found = tokenizer([_encodable(text) for text in texts], add_special_tokens=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    return Tokens(count, num_special=tokenizer.num_special_tokens_to_add(pair=False))


def _encodable(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _absent(name: str, package: str, to_install: str) -> UserError:
    return UserError(f"The tokenizer {name!r} needs {package}, which is not installed. Run: pip install {to_install}")
