"""``clips score --labels``: tables of other models' labels, joined to the pairs by what they are keyed by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pyarrow.parquet as pq
import pytest

from cli.main import main
from clips_data import forget, labels, ledger, score
from clips_data.config import ScoreConfig
from clips_data.errors import ResumeRefused, UsageError, UserError
from clips_data.executor import Job, Report
from clips_data.forgotten import Forgotten


def run(work: Path, table: Path, **options: Any) -> Report:
    job = {name: options.pop(name) for name in ("overwrite", "limit", "dry_run", "slice") if name in options}
    return score.run(ScoreConfig(name="nsfw", labels=str(table), **options), Job(work=work, quiet=True, **job))


def rows(work: Path, unit: str = "00000") -> pl.DataFrame:
    return pl.read_parquet(work / "scores" / "nsfw" / f"{unit}.parquet")


def key(number: int) -> str:
    return f"{number // 6:05d}{number % 6:04d}"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    pairsmaker.write_pairs(tmp_path)
    return tmp_path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_columns_become_fields_whatever_the_kind_of_file(work: Path, suffix: str) -> None:
    table = pl.DataFrame({
        "key": [key(n) for n in (7, 1, 0, 2)], "score": [0.25, 1 / 3, 1e-300, None], "faces": [3, 0, 1, None],
        "watermark": [True, False, True, None], "kind": ["a b", "é,\tx", "true story", None],
    })  # fmt: skip
    path = work / f"labels.{suffix}"
    {
        "parquet": table.write_parquet, "csv": table.write_csv, "jsonl": table.write_ndjson,
        "tsv": lambda file: table.write_csv(file, separator="\t"),
    }[suffix](path)  # fmt: skip
    report = run(work, path)
    assert report.counts == {"ok": 3, "no_label": 7} and report.made == 2
    first = rows(work)
    assert first.schema["score"] == first.schema["faces"] == pl.Float64 and first.schema["watermark"] == pl.Boolean
    assert first["score"].to_list() == [1e-300, 1 / 3, None, None, None]
    assert first["faces"].to_list() == [1, 0, None, None, None]
    assert first["watermark"].to_list() == [True, False, None, None, None]
    assert first["kind"].to_list() == ["true story", "é,\tx", None, None, None]
    assert rows(work, "00001")["score"].to_list() == [None, 0.25, None, None, None]


@pytest.mark.parametrize("by", ["sha256", "url"])
def test_labels_are_joined_by_what_identifies_an_image(work: Path, by: str) -> None:
    pairs = pl.read_parquet(work / "pairs" / "00000.parquet").filter(pl.col("status") == "success")
    path = work / "labels.parquet"
    pl.DataFrame({by: pairs[by].reverse(), "nsfw": [0.4, 0.3, 0.2, 0.1, 0.0]}).write_parquet(path)
    assert run(work, path, label_key=by).counts == {"ok": 5, "no_label": 5}
    assert rows(work)["nsfw"].to_list() == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_a_sha256_is_that_of_the_stored_bytes(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(raw_sha256=f"{number:064d}"))
    pairs = pl.read_parquet(tmp_path / "pairs" / "00000.parquet").filter(pl.col("status") == "success")
    path = tmp_path / "labels.csv"
    path.write_text(f"sha256,x\n{pairs['sha256'][1].upper()},5\n{pairs['raw_sha256'][2]},6\n")
    run(tmp_path, path, label_key="sha256")
    assert rows(tmp_path)["x"].to_list() == [None, 5, None, None, None]


def test_single_precision_stays_and_no_number_is_null(work: Path) -> None:
    path = work / "labels.parquet"
    values = pl.Series([0.1, float("nan"), float("inf")], dtype=pl.Float32)
    pl.DataFrame({"key": [key(n) for n in (0, 1, 2)], "x": values}).write_parquet(path)
    run(work, path)
    found = rows(work)["x"]
    assert found.dtype == pl.Float32 and found.to_list()[:3] == [values[0], None, float("inf")]


def test_a_column_of_a_csv_with_one_text_stays_text_with_its_zeros(work: Path) -> None:
    path = work / "labels.csv"
    path.write_text("key,code\n" + "".join(f"{key(n)},{code}\n" for n, code in ((0, "007"), (1, "x"), (7, "1.50"))))
    run(work, path)
    assert rows(work)["code"].to_list()[:2] == ["007", "x"] and rows(work, "00001")["code"].to_list()[1] == "1.50"


def test_the_first_of_two_rows_counts_and_both_are_told(work: Path) -> None:
    path = work / "labels.csv"
    path.write_text(f"key,x\n{key(0)},1\n{key(0)},2\nnobody,3\n")
    facts = run(work, path).facts
    assert rows(work)["x"].to_list()[0] == 1
    assert (facts["table_rows"], facts["table_rows_unused"], facts["table_rows_repeated"]) == (3, 1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("uid,x\n1,2\n", "no column 'key' to join by"),
        ("key,sha256,url\n1,2,3\n", "has no labels"),
        ("key,a-b\n1,2\n", "'a-b' cannot be the name of a score"),
        ("key,x,x\n1,2,3\n", "more than one column called 'x'"),
    ],
)
def test_tables_that_cannot_be_labels_are_refused(work: Path, content: str, message: str) -> None:
    path = work / "labels.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        run(work, path)
    assert not (work / "scores" / "nsfw").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("key,x\nstranger,1\n", r"No row of .*its first key is 'stranger', that of the pairs '000000000'.*--label-key"),
        ("key,x\n0,1\n1,2\n", r"first key is '0', .*'000000000'\. Keys are texts of 9 digits: write them with their"),
        ("key,x\n", "has no row with a key"),
        ("key,x\n,1\n", "has no row with a key"),
    ],
)
def test_a_table_about_no_image_is_refused_and_leaves_no_folder(work: Path, content: str, message: str) -> None:
    path = work / "labels.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        run(work, path)
    assert not (work / "scores" / "nsfw").exists()


def test_keys_that_became_integers_are_refused(work: Path) -> None:
    path = work / "labels.parquet"
    pl.DataFrame({"key": [0, 1, 10000], "x": [1, 2, 3]}).write_parquet(path)
    with pytest.raises(UserError, match="Keys are texts of 9 digits"):
        run(work, path)


def test_a_slice_or_a_later_run_without_a_label_is_none_of_a_strangers_table(work: Path) -> None:
    path = work / "labels.csv"
    path.write_text(f"key,x\n{key(0)},1\n")
    assert run(work, path, slice="1/2").counts == {"no_label": 5}
    assert run(work, path).counts == {"ok": 1, "no_label": 9}
    (work / "scores" / "nsfw" / "00001.done.json").unlink()
    assert run(work, path).counts == {"ok": 1, "no_label": 9}
    assert rows(work)["x"].to_list()[0] == 1 and not list((work / "scores" / "nsfw").glob("_*"))


def test_labels_may_end_like_the_fields_of_similarities(work: Path) -> None:
    path = work / "labels.parquet"
    pl.DataFrame({"key": [key(0), key(1)], "red_flags": ["a", None], "n": [1, 2]}).write_parquet(path)
    assert run(work, path).counts == {"ok": 2, "no_label": 8}
    image = ledger.digest_bytes(pairsmaker.image_bytes(1))
    assert forget.forget(work, Forgotten(images=frozenset({image}))).found
    sidecar = ledger.read_sidecar(work / "scores" / "nsfw", "00000")
    assert sidecar is not None and sidecar.counts == {"ok": 1, "no_label": 3}


def test_what_only_scoring_takes_is_refused_beside_labels(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = work / "labels.csv"
    path.write_text(f"key,x\n{key(0)},1\n")
    given = {"columns": ("web",), "sentences": True, "support": 2, "near_duplicates": True, "model": "x"}
    for name, value in given.items():
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} and --labels do not go together"):
            run(work, path, **{name: value})
    words = ["score", "--labels", str(path), "--columns", "web", "--support", "2", "--work", str(work)]
    assert main(words) == 2 and "--columns, --support and --labels" in capsys.readouterr().err
    assert not (work / "scores").exists()
    saved = ScoreConfig(labels=str(path)).model_dump()  # a manifest with all its defaults
    assert score.run(ScoreConfig(**saved), Job(work=work, quiet=True)).counts == {"ok": 1, "no_label": 9}


def test_lists_and_absent_files_are_refused(work: Path) -> None:
    path = work / "labels.parquet"
    pl.DataFrame({"key": [key(0)], "vector": [[1.0, 2.0]]}).write_parquet(path)
    with pytest.raises(UserError, match=r"'vector' holds values of the type List.* leave it out"):
        run(work, path)
    with pytest.raises(UserError, match=r"nowhere\.csv"):
        run(work, work / "nowhere.csv")


def test_equal_labels_are_equal_bytes_and_others_are_refused(work: Path) -> None:
    path = work / "labels.jsonl"
    path.write_text("".join(json.dumps({"key": key(n), "x": n / 7}) + "\n" for n in range(12)))
    run(work, path, limit=7)
    assert not (work / "scores" / "nsfw" / "00001.done.json").exists()
    assert run(work, path).skipped == 1
    before = (work / "scores" / "nsfw" / "00000.parquet").read_bytes()
    again = run(work, path)
    assert (again.made, again.skipped, again.counts) == (0, 2, {"ok": 10})
    path.write_text(path.read_text().replace('"x": 0.0', '"x": 9.0'))
    with pytest.raises(ResumeRefused, match="config labels_digest"):
        run(work, path)
    run(work, path, overwrite=True)
    assert rows(work)["x"].to_list()[0] == 9 and (work / "scores" / "nsfw" / "00000.parquet").read_bytes() != before


def test_slices_are_disjoint_and_a_dry_run_leaves_nothing(work: Path) -> None:
    path = work / "labels.csv"
    path.write_text(f"key,x\n{key(0)},1\n{key(7)},2\n")
    assert run(work, path, dry_run=True).facts["shards_to_do"] == 2 and not (work / "scores").exists()
    assert run(work, path, slice="1/2").counts == {"ok": 1, "no_label": 4}
    assert not (work / "scores" / "nsfw" / "00000.parquet").exists()
    assert run(work, path).made == 1 and rows(work)["x"].to_list() == [1, None, None, None, None]
    assert not list((work / "scores" / "nsfw").glob("_*"))


def test_the_table_says_that_labels_were_given(work: Path) -> None:
    path = work / "labels.csv"
    path.write_text(f"key,x\n{key(0)},1\n")
    run(work, path)
    metadata = pq.read_schema(work / "scores" / "nsfw" / "00000.parquet").metadata
    assert json.loads(metadata[b"model"]) == "labels" and json.loads(metadata[b"label_key"]) == "key"


def test_no_model_is_loaded(work: Path) -> None:
    path = work / "labels.csv"
    path.write_text(f"key,x\n{key(0)},1\n")
    code = (
        "import sys; from pathlib import Path; from clips_data import score; from clips_data.config import ScoreConfig;"
        "from clips_data.executor import Job;"
        f"score.run(ScoreConfig(labels={str(path)!r}), Job(work=Path({str(work)!r}), quiet=True));"
        "assert not {'torch', 'open_clip', 'transformers', 'spacy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(labels.__file__).parent.parent, check=True)
