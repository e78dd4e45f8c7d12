"""Lengths of captions and pieces in tokens: figures by hand, the trainer's own tokenizers, every kind of folder."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import goldens
import pairsmaker
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from clips_data import lengths, schema, shard, stats
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_data.lengths import Lengths, Tokens, build_tokens, gather
from clips_train.tokenizer import build_tokenizer

DEMO_CLIP = Path(lengths.__file__).parent / "demo" / "weights" / "clip"
WORDS = Tokens(lambda texts: [len(text.split()) for text in texts], num_special=2)
TEXTS = ("a photo of a dog", "", "Wow!!! It's 50 &amp; more…", "unbelievableness [CLS] 一只猫 🐕", "café " * 40)
needs_bert_vocab = pytest.mark.skipif(not goldens.BERT_VOCAB.is_file(), reason="the BERT vocabulary is not here")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve URLs of which two failed; of the ten synthetic captions two were refused, and one has no piece."""

    def spoil(number: int, row: pairsmaker.Row) -> None:
        if number in (1, 2):
            pairsmaker.reject(row)
            row["caption"] = "I cannot describe this. Sorry."  # a rejected caption counts as none, whatever is left
        if number == 4:
            row["caption"] = "..."

    folder = tmp_path_factory.mktemp("work")
    pairsmaker.write_pairs(folder)
    pairsmaker.write_captions(folder, change=spoil)
    shard.run(ShardConfig(shard_rows=4, heldout_ratio=0.4, heldout_max=3), Job(work=folder, quiet=True))
    return folder


def test_a_columns_lengths_are_those_counted_by_hand() -> None:
    column = Lengths()
    column.add(["one two. three", " ", "one"], [[(0, 7), (9, 14)], [], []], WORDS)
    column.add(["x " * 76], [[(0, 150)]], WORDS)
    found = column.summary(WORDS.num_special)
    assert (found["captions"], found["without_text"]) == (3, 1)
    assert found["caption_tokens"] == {"num": 3, "min": 1, "max": 76, "mean": 26.6667, "median": 3, "p95": 76}
    assert found["pieces_per_caption"] == {"num": 3, "min": 0, "max": 2, "mean": 1, "median": 1, "p95": 2}
    assert found["without_piece_percent"] == 33.3333
    assert found["piece_tokens"]["num"] == 3 and found["piece_tokens"]["max"] == 75
    shares = {row["context"]: (row["captions_percent"], row["pieces_percent"]) for row in found["over_context"]}
    assert shares == {77: (33.3333, 0), 80: (0, 0), 128: (0, 0), 248: (0, 0)}, "76 words and two marks are 78 slots"


def test_a_column_that_is_not_cut_tells_nothing_of_pieces() -> None:
    column = Lengths()
    column.add(["one two"], None, WORDS)
    assert set(column.summary(2)) == {"captions", "without_text", "caption_tokens", "over_context"}
    assert set(column.summary(2)["over_context"][0]) == {"context", "captions_percent"}


@given(st.lists(st.integers(0, 300), max_size=60))
def test_spreads_and_shares_are_those_of_the_list(values: list[int]) -> None:
    histogram = Counter(values)
    expected = stats.spread([float(value) for value in values])
    assert lengths._spread(histogram) == pytest.approx(expected)
    if values:
        assert lengths._over(histogram, 75) == pytest.approx(100 * statistics.mean(v > 75 for v in values), abs=1e-3)


def test_bpe_counts_what_the_trainer_sees() -> None:
    ours, theirs = build_tokens("bpe"), build_tokenizer("bpe")
    assert ours.count(TEXTS) == [theirs.num_tokens(text) for text in TEXTS]
    assert ours.num_special == 77 - theirs.budget(77)
    assert ours.count(["\ud800 x"])[0] > 0


def test_words_that_bpe_remembers_are_bounded_and_lengths_do_not_depend_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"unheardof{number}word ünheard" for number in range(20)]
    expected = build_tokens("bpe").count(texts)
    monkeypatch.setattr(lengths, "_MAX_CACHED_WORDS", 0)
    tokens = build_tokens("bpe")
    assert [tokens.count([text])[0] for text in texts] == expected


@needs_bert_vocab
def test_bert_counts_what_the_trainer_sees() -> None:
    ours = build_tokens(f"bert:{goldens.BERT_VOCAB}")
    theirs = build_tokenizer("bert", str(goldens.BERT_VOCAB))
    assert ours.count(TEXTS) == [theirs.num_tokens(text) for text in TEXTS]
    assert ours.num_special == 80 - theirs.budget(80)
    assert ours.count(["\ud800 x"])[0] > 0


def test_a_hugging_face_folder_counts_as_its_tokenizer_does() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_CLIP))
    ours = build_tokens(f"hf:{DEMO_CLIP}")
    assert ours.count(TEXTS) == [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert ours.num_special == len(tokenizer("")["input_ids"])
    assert ours.count([]) == [] and ours.count(["\ud800 x"])[0] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpo", "Did you mean 'bpe'"),
        ("bert", "bert:PATH"),
        ("bert:nowhere.txt", "nowhere.txt does not exist"),
        ("hf:nowhere", "nowhere holds no tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_named_with_what_is_right(name: str, message: str, work: Path) -> None:
    with pytest.raises(UserError, match=message):
        gather(work, name)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("bpe", "open_clip.tokenizer", "open_clip_torch"), ("hf:x", "transformers", "transformers")],
)
def test_an_absent_package_is_told_with_its_install_line(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"not installed. Run: pip install {package}"):
        build_tokens(name)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words in the place of tokens, and batches smaller than a shard."""
    monkeypatch.setattr(lengths, "build_tokens", lambda name: WORDS)
    monkeypatch.setattr(lengths, "_BATCH", 3)


@pytest.mark.usefixtures("words")
def test_shards_show_every_column_and_the_pieces_that_they_hold(work: Path) -> None:
    found = gather(work / schema.SHARDS, "words")
    assert json.loads(json.dumps(found)) == found
    web, synthetic = found["columns"]["web"], found["columns"]["synthetic"]
    assert (web["captions"], web["caption_tokens"]["mean"]) == (10, 4) and "piece_tokens" not in web
    assert (synthetic["captions"], synthetic["without_text"]) == (8, 2)
    assert synthetic["pieces_per_caption"]["mean"] == 2.625 and synthetic["without_piece_percent"] == 12.5
    assert synthetic["piece_tokens"]["num"] == 21
    assert gather(work, "words") == found, "a work folder shows its shards"


@pytest.mark.usefixtures("words")
def test_a_rule_cuts_shards_anew_and_the_web_caption_too(work: Path) -> None:
    found = gather(work / schema.SHARDS, "words", "authors")["columns"]
    assert found["web"]["pieces_per_caption"]["mean"] == 1
    assert found["synthetic"]["pieces_per_caption"]["mean"] == 2.625
    with pytest.raises(UserError, match="Did you mean 'sentence'"):
        gather(work, "words", "sentences")  # type: ignore[arg-type]


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("where", ["captions/synthetic", "captions"])
def test_caption_columns_are_cut_as_shards_would_be(work: Path, where: str) -> None:
    of_shards = gather(work / schema.SHARDS, "words")["columns"]["synthetic"]
    assert gather(work / where, "words")["columns"] == {"synthetic": of_shards}


def test_other_folders_and_damaged_tables_are_refused(work: Path, tmp_path: Path) -> None:
    for folder in (work / schema.PAIRS, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="neither finished shards nor caption columns"):
            gather(folder, "bpe")
    column = pairsmaker.write_work(tmp_path) / schema.CAPTIONS / "synthetic"
    table = column / "00001.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"Cannot read .*00001.parquet"):
        gather(column, "bpe")


def test_the_command_prints_lengths_in_place_of_counts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        return (main(["stats", str(work), *words]), *capsys.readouterr())

    code, out, _ = run("--tokenizer", "bpe", "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0 and found == {"lengths": gather(work, "bpe")}
    code, out, _ = run("--tokenizer", "bpe")
    assert code == 0 and "caption_tokens" in out and "context  captions_percent  pieces_percent" in out
    code, _, err = run("--split", "period")
    assert code == 2 and "Give that, too" in err
