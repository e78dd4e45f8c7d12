"""Training shards in the formats of others: what is read back from them is what the shards hold."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pairsmaker
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shardmaker
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from clips_data import convert, convert_tables, ledger, shard, shard_samples
from clips_data.config import ShardConfig
from clips_data.convert import Conversion
from clips_data.convert_tables import Layout
from clips_data.errors import ResumeRefused, UsageError, UserError
from clips_data.executor import Job, Report
from clips_data.mixing import Mix

FORMATS = tuple(convert.FORMATS)
FORMULA = "=cmd|' /C calc'!A0"
ODD_TEXTS = {0: FORMULA, 1: 'says "so", twice\nand\tonce', 3: "'quoted", 4: "－全角"}
SAMPLES = 20


def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Samples as ``clips shard`` writes them, some of them odd."""
    about["web"] = ODD_TEXTS.get(number, about["web"])
    if number == 5:
        about |= {"synthetic": "", "sub_captions": {"synthetic": []}}
    about["scores"] = {"web": 0.25 + number / 100, "nsfw": number % 2 == 0, "num_faces": number}
    if number == 6:
        del about["scores"]["web"]
    code = "ok" if about["synthetic"] else "refused"
    url = f"http://images.test/{number}.jpg"
    about["provenance"] = {"pairs": "00000", "url": url, "txt": "web", "codes": {"synthetic": code}}
    return image, about


def write_shards(folder: Path, **options: Any) -> Path:
    """Seventeen training samples in two tars and three held-out ones in one."""
    return shardmaker.write_shards(folder, num_train=17, num_heldout=3, shard_rows=12, change=change, **options)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def run(shards: Path, to: str, *, overwrite: bool = False, **choices: Any) -> tuple[Path, Report]:
    out = shards.parent / f"{to}-out"
    return out, convert.run(Conversion(to, **choices), shards, Job(out=out, quiet=True, overwrite=overwrite))


def samples_of(shards: Path) -> list[shard_samples.TrainingSample]:
    opened = shard_samples.open_shards(shards)
    return [sample for tar in opened.tars for sample in shard_samples.read(opened, tar)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- tables -----------------------------------------------------------------------------------------------------------


def test_parquet_has_every_sample_with_its_image_and_texts(shards: Path) -> None:
    out, report = run(shards, "parquet")
    names = ["train-00000-of-00002", "train-00001-of-00002", "heldout-00000-of-00001"]
    assert report.units == [out / "data" / f"{name}.parquet" for name in names]
    assert report.counts == {"ok": SAMPLES}
    rows = [row for path in report.units for row in pq.read_table(path).to_pylist()]
    for row, sample in zip(rows, samples_of(shards), strict=True):
        assert row["image"] == {"bytes": sample.image, "path": f"{sample.key}.jpg"}
        assert (row["key"], row["sha256"], row["text"]) == (sample.key, sample.sha256, sample.text)
        assert {name: row[name] for name in sample.texts} == sample.texts
        spans = row["sub_captions"]["synthetic"]
        assert [[span["start"], span["end"]] for span in spans] == sample.about["sub_captions"]["synthetic"]
        assert {name: value for name, value in row["scores"].items() if value is not None} == sample.scores
        assert row["codes"] == sample.codes and json.loads(row["extra"]) == sample.about["extra"]


def test_the_schema_of_parquet_is_pinned() -> None:
    table = Layout(("web", "synthetic"), (("nsfw", "bool"), ("web", "double"), ("why", "json")), True)
    schema = convert_tables.parquet_schema(table)
    assert {field.name: str(field.type) for field in schema} == {
        "key": "string",
        "sha256": "string",
        "tar": "string",
        "url": "string",
        "image": "struct<bytes: binary, path: string>",
        "text": "string",
        "text_from": "string",
        "web": "string",
        "synthetic": "string",
        "sub_captions": "struct<synthetic: list<item: struct<start: int32, end: int32>>>",
        "codes": "struct<synthetic: string>",
        "scores": "struct<nsfw: bool, web: double, why: string>",
        "extra": "string",
    }
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["image"] == {"_type": "Image"} and features["key"] == {"dtype": "string", "_type": "Value"}
    assert features["sub_captions"]["synthetic"][0]["start"] == {"dtype": "int32", "_type": "Value"}
    assert features["scores"]["web"] == {"dtype": "float64", "_type": "Value"}


def test_hugging_face_datasets_reads_splits_images_and_features(shards: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out, _ = run(shards, "parquet")
    found = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 17, "heldout": 3}
    assert found["train"][7]["image"].size == (48, 40)
    assert found["train"][7]["sub_captions"]["synthetic"][0]["start"] == 0


def test_without_images_parquet_has_no_image_column(shards: Path) -> None:
    _, report = run(shards, "parquet", images=False)
    schema = pq.read_schema(report.units[0])
    assert "image" not in schema.names and b"Image" not in schema.metadata[b"huggingface"]
    assert {"url", "sha256"} <= set(schema.names)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, False], "bool"),
        ([1, 2], "int64"),
        ([1, 0.5], "double"),
        (["a"], "string"),
        ([True, 1], "json"),
        ([[0.1]], "json"),
    ],
)
def test_a_score_gets_the_type_that_holds_all_its_values(tmp_path: Path, values: list[Any], kind: str) -> None:
    def score(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        about["scores"] = {"label": values[number % len(values)]} if number else {}
        return image, about

    folder = shardmaker.write_shards(tmp_path / "shards", num_train=4, num_heldout=0, change=score)
    opened = shard_samples.open_shards(folder)
    layout = convert_tables.layout(opened, opened.columns, images=False)
    assert layout.scores == (("label", kind),)
    _, report = run(folder, "parquet")
    scores = pq.read_table(report.units[0])["scores"].to_pylist()
    expected = [values[number % len(values)] for number in range(1, 4)]
    assert (
        [row["label"] for row in scores] == [None, *map(json.dumps, expected)] if kind == "json" else [None, *expected]
    )


def test_jsonl_has_a_line_a_sample_and_no_bytes(shards: Path) -> None:
    _, report = run(shards, "jsonl")
    rows = [json.loads(line) for path in report.units for line in path.read_text().splitlines()]
    assert [path.name for path in report.units] == ["train-00000.jsonl", "train-00001.jsonl", "heldout-00000.jsonl"]
    for row, sample in zip(rows, samples_of(shards), strict=True):
        assert row["text"] == sample.text and row["scores"] == sample.scores and "image" not in row
        assert row["sub_captions"] == sample.about["sub_captions"] and row["extra"] == sample.about["extra"]
        assert row["tar"] in ("train-00000.tar", "train-00001.tar", "heldout-00000.tar")
        assert row["url"] == sample.provenance["url"]


def test_only_the_columns_asked_for_are_written(shards: Path) -> None:
    _, report = run(shards, "jsonl", columns=("synthetic",))
    row = json.loads(report.units[0].read_text().splitlines()[0])
    assert "synthetic" in row and "web" not in row


def test_a_column_named_twice_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="--column web is given twice"):
        run(shards, "csv", columns=("web", "synthetic", "web"))


def test_names_of_shards_on_stdin_are_refused_with_what_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-", "--to", "csv", "--out", "never"]) == 2
    assert "takes a whole folder" in capsys.readouterr().err


def test_csv_gives_back_every_text_and_no_cell_is_a_formula(shards: Path) -> None:
    _, report = run(shards, "csv")
    rows = []
    for path in report.units:
        with path.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    for row, sample in zip(rows, samples_of(shards), strict=True):
        assert convert_tables.unescape(row["web"]) == sample.texts["web"]
        assert convert_tables.unescape(row["synthetic"]) == sample.texts["synthetic"]
        assert json.loads(row["sub_captions.synthetic"]) == sample.about["sub_captions"]["synthetic"]
        assert float(row["scores.web"] or "nan") == pytest.approx(sample.scores.get("web", float("nan")), nan_ok=True)
        assert row["scores.nsfw"] == str(sample.scores["nsfw"])
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row.values())
    assert rows[0]["web"] == "'" + FORMULA


STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
TEXTS = st.builds(
    str.__add__, st.sampled_from(("", "'", "''", *STARTS)), st.text(st.characters(exclude_categories=["Cs"]))
)


@given(texts=st.lists(TEXTS, min_size=1))
def test_csv_cells_come_back_and_begin_with_nothing_that_runs(texts: list[str]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_NONNUMERIC).writerow([convert_tables.escape(text) for text in texts])
    file.seek(0)
    (cells,) = csv.reader(file)
    assert [convert_tables.unescape(cell) for cell in cells] == texts
    assert not any(cell.startswith(STARTS) for cell in cells)


# --- tars -------------------------------------------------------------------------------------------------------------


def read_by_webdataset(files: list[Path]) -> Iterator[dict[str, Any]]:
    yield from webdataset.WebDataset([str(path) for path in files], shardshuffle=False)


def test_datacompdr_tars_have_the_members_that_its_trainer_takes(tmp_path: Path) -> None:
    def no_web(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        image, about = change(split, number, image, about)
        return image, {**about, "web": "" if number == 2 else about["web"]}

    shards = shardmaker.write_shards(tmp_path / "shards", num_train=17, num_heldout=3, change=no_web)
    _, report = run(shards, "datacompdr")
    found = list(read_by_webdataset(report.units))
    assert report.counts == {"ok": SAMPLES - 2, "no_web_caption": 1, "no_synthetic_caption": 1}
    for read, sample in zip(found, samples_of(shards), strict=True):
        assert {name for name in read if not name.startswith("__")} == {"json", "url.txt", "jpg", "txt", "syn.json"}
        assert json.loads(read["json"]) == {"uid": sample.key, "sha256": sample.sha256}
        assert hashlib.sha256(read["jpg"]).hexdigest() == sample.sha256
        web, synthetic = sample.texts["web"], sample.texts["synthetic"]
        assert read["txt"].decode() == (web or synthetic)
        assert json.loads(read["syn.json"]) == {"syn_text": [synthetic or web]}
        assert read["url.txt"].decode() == sample.provenance["url"]


def test_datacompdr_without_images_is_text_only(shards: Path) -> None:
    _, report = run(shards, "datacompdr", images=False)
    with tarfile.open(report.units[0]) as tar:
        assert not [name for name in tar.getnames() if name.endswith(".jpg")]


def test_the_view_for_open_clip_is_the_shards_and_their_sizes(shards: Path) -> None:
    open_clip_data = pytest.importorskip("open_clip_train.data")
    out, report = run(shards, "open_clip")
    assert [path.read_bytes() for path in report.units] == [(shards / path.name).read_bytes() for path in report.units]
    words = shlex.split(report.notes[-1])
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert open_clip_data.get_dataset_size(given["--train-data"]) == (17, 2)
    assert open_clip_data.get_dataset_size(given["--val-data"]) == (3, 1)
    assert (given["--train-num-samples"], given["--val-num-samples"]) == ("17", "3")
    assert out.resolve() in Path(given["--val-data"]).parents


def test_a_chosen_column_becomes_the_text_and_an_empty_one_gives_way(shards: Path) -> None:
    _, report = run(shards, "open_clip", columns=("synthetic",))
    assert report.counts == {"synthetic": SAMPLES - 1, "web_for_missing_synthetic": 1}
    for read, sample in zip(read_by_webdataset(report.units), samples_of(shards), strict=True):
        about = json.loads(read["json"])
        assert read["txt"].decode() == (sample.texts["synthetic"] or sample.texts["web"])
        assert about["provenance"]["txt"] == ("synthetic" if sample.texts["synthetic"] else "web")
        assert {name: about[name] for name in sample.texts} == sample.texts
        assert hashlib.sha256(read["jpg"]).hexdigest() == about["sha256"]


def test_a_mix_is_drawn_as_the_loader_draws_it(shards: Path) -> None:
    rules = ("web=0.5,synthetic=0.5", "score.web<0.3: synthetic=1")
    _, report = run(shards, "open_clip", mix=rules, epoch=3)
    mix = Mix.parse(rules, columns=("web", "synthetic"))
    chosen = set()
    for read, sample in zip(read_by_webdataset(report.units), samples_of(shards), strict=True):
        choice = mix.choose(seed=0, epoch=3, key=sample.key, texts=sample.texts, scores=sample.scores)
        assert choice.column is not None and read["txt"].decode() == sample.texts[choice.column]
        chosen.add(choice.outcome)
    assert {"web", "synthetic"} <= chosen <= set(report.counts)


def test_an_empty_text_is_refused_for_open_clip(tmp_path: Path) -> None:
    def empty(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return image, {**about, "web": "" if number == 3 else about["web"]}

    folder = shardmaker.write_shards(tmp_path / "shards", change=empty)
    with pytest.raises(UserError, match=r"000000003 has an empty \.txt"):
        run(folder, "open_clip")


def test_what_clips_shard_writes_is_converted_whole(tmp_path: Path) -> None:
    def no_web(number: int, row: pairsmaker.Row) -> None:
        row["caption"] = "" if number == 5 else row["caption"]

    work = tmp_path / "work"
    pairsmaker.write_pairs(work, change=no_web)
    pairsmaker.write_captions(work, change=lambda n, row: pairsmaker.reject(row) if n == 1 else None)
    shard.run(ShardConfig(shard_rows=4, heldout_ratio=0.3), Job(work=work, quiet=True))
    texts = {sample.key: dict(sample.texts) for sample in samples_of(work / "shards")}
    assert len(texts) == 10 and texts["000000005"]["web"] == "" and texts["000000001"]["synthetic"] == ""
    _, report = run(work / "shards", "parquet")
    rows = {row["key"]: row for path in report.units for row in pq.read_table(path).to_pylist()}
    assert {key: {"web": row["web"], "synthetic": row["synthetic"]} for key, row in rows.items()} == texts
    assert rows["000000005"]["text_from"] == "synthetic" and rows["000000001"]["codes"] == {"synthetic": "refused"}
    assert "scores" not in rows["000000001"] and json.loads(rows["000000001"]["extra"])["scene"] == "0/1"
    for to, counts in (
        ("open_clip", {"ok": 10}),
        ("datacompdr", {"ok": 8, "no_web_caption": 1, "no_synthetic_caption": 1}),
    ):
        assert run(work / "shards", to)[1].counts == counts


# --- back again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, {"columns": ("synthetic",)}])
def test_adopt_takes_back_the_tars_and_the_columns_that_were_converted(
    shards: Path, tmp_path: Path, choices: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = run(shards, "open_clip", **choices)
    work = tmp_path / "adopted"
    assert main(["adopt", str(out), "--work", str(work), "--quiet"]) == 0
    table = pa.concat_tables([pq.read_table(path) for path in sorted((work / "pairs").glob("*.parquet"))])
    captions = {row["source_key"]: (row["caption"], row["sha256"]) for row in table.to_pylist()}
    texts = {read["__key__"]: read["txt"].decode() for read in read_by_webdataset(report.units)}
    assert captions == {sample.key: (texts[sample.key], sample.sha256) for sample in samples_of(shards)}

    lines, _ = run(shards, "jsonl")
    joined = tmp_path / "all.jsonl"
    joined.write_text("".join(path.read_text() for path in sorted(lines.glob("*.jsonl"))))
    # Equal pictures have equal hashes, and are told the same: shardmaker repeats itself after 48 samples only.
    words = ["adopt", str(joined), "--captions", "synthetic", "--as", "again", "--by", "sha256", "--work", str(work)]
    assert main([*words, "--quiet"]) == 0
    columns = [pq.read_table(path).to_pylist() for path in sorted((work / "captions" / "again").glob("*.parquet"))]
    said = {row["sha256"]: row["caption"] or "" for rows in columns for row in rows}
    assert said == {sample.sha256: sample.texts["synthetic"] for sample in samples_of(shards)}


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_a_second_run_does_nothing_and_a_lost_file_comes_back_with_the_same_bytes(shards: Path, to: str) -> None:
    out, first = run(shards, to)
    before = contents(out)
    assert (first.made, first.skipped) == (3, 0)
    _, again = run(shards, to)
    assert (again.made, again.skipped, again.units) == (0, 3, first.units)
    assert contents(out) == before
    ledger.sidecar_path(first.units[1].parent, f"{to}-train-00001").unlink()
    first.units[1].unlink()
    _, mended = run(shards, to)
    assert (mended.made, mended.skipped) == (1, 2)
    assert contents(out) == before


def test_worker_processes_and_slices_make_the_same_files(shards: Path, tmp_path: Path) -> None:
    out, _ = run(shards, "parquet")
    for number in range(2):
        job = Job(out=tmp_path / "sliced", quiet=True, slice=f"{number}/2", processes=2 - 2 * number)
        report = convert.run(Conversion("parquet"), shards, job)
    assert "files_missing" not in report.facts
    assert contents(tmp_path / "sliced") == contents(out)


def test_other_choices_are_refused_and_overwriting_leaves_no_file_of_the_old(shards: Path) -> None:
    out, _ = run(shards, "parquet")
    with pytest.raises(ResumeRefused, match="images"):
        run(shards, "parquet", images=False)
    fewer = shard_samples.open_shards(write_shards(shards.parent / "other")).folder
    index = json.loads((fewer / "index.json").read_text())
    index["splits"]["train"]["shards"].pop()
    (fewer / "index.json").write_text(json.dumps(index))
    job = Job(out=out, quiet=True)
    with pytest.raises(ResumeRefused, match=r"does not make|of-00002.*of-00001"):
        convert.run(Conversion("parquet"), fewer, job)
    made = convert.run(Conversion("parquet"), fewer, Job(out=out, quiet=True, overwrite=True))
    assert sorted((out / "data").glob("*.parquet")) == sorted(made.units) and len(made.units) == 2


def test_two_formats_do_not_share_a_folder(shards: Path) -> None:
    out, _ = run(shards, "datacompdr")
    with pytest.raises(ResumeRefused, match="does not make"):
        convert.run(Conversion("open_clip"), shards, Job(out=out, quiet=True))


def test_conversions_are_not_taken_for_training_shards(shards: Path) -> None:
    from clips_data.forget_plan import shard_folders

    for to in FORMATS:
        run(shards, to)
    assert shards not in shard_folders(shards.parent)  # shardmaker commits no sidecars
    assert shard_folders(shards.parent) == []


@pytest.mark.parametrize(
    ("to", "choices", "says"),
    [
        ("csv", {"images": False}, "images"),
        ("jsonl", {"mix": ("web=1",)}, "--mix"),
        ("open_clip", {"columns": ("web", "synthetic")}, "one text"),
        ("open_clip", {"columns": ("web",), "mix": ("web=1",)}, "one text"),
        ("open_clip", {"images": False}, "needs the images"),
        ("open_clip", {"epoch": 1}, "--epoch"),
    ],
)
def test_choices_that_a_format_does_not_have_are_refused(shards: Path, to: str, choices: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(shards, to, **choices)
    assert not (shards.parent / f"{to}-out").exists()


def test_an_unknown_column_and_a_folder_without_shards_are_named(shards: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'synthetic'"):
        run(shards, "parquet", columns=("sinthetic",))
    with pytest.raises(UserError, match=r"index\.json"):
        convert.run(Conversion("jsonl"), shards / "nothing", Job(out=shards.parent / "out", quiet=True))
    with pytest.raises(UserError, match="lies in the shards"):
        convert.run(Conversion("jsonl"), shards, Job(out=shards / "out", quiet=True))


# --- damage -----------------------------------------------------------------------------------------------------------


def _cut(shards: Path) -> str:
    tar = shards / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    return r"train-00001\.tar.*byte"


def _swap(shards: Path) -> str:
    (shards / "train-00000.tar").replace(shards / "heldout-00000.tar")
    return r"heldout-00000\.tar|train-00000\.tar"


def _flip(shards: Path) -> str:
    tar = shards / "train-00000.tar"
    row = pq.read_table(shards / "train-00000.index.parquet").to_pylist()[4]
    data = bytearray(tar.read_bytes())
    data[row["image_offset"] + 30] ^= 1
    tar.write_bytes(data)
    return f"Image {row['key']} in .*sha256"


def _short_index(shards: Path) -> str:
    path = shards / "train-00000.index.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    return "promises 12 samples"


def _version(shards: Path) -> str:
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, "schema_version": 99}))
    return "schema version 99"


def _no_json(shards: Path) -> str:
    (shards / "index.json").write_text("{")
    return "not valid JSON"


def test_a_view_is_no_view_of_a_tar_whose_text_was_changed(shards: Path) -> None:
    tar = shards / "train-00000.tar"
    row = pq.read_table(shards / "train-00000.index.parquet").to_pylist()[4]
    data = bytearray(tar.read_bytes())
    data[row["txt_offset"]] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000\.tar is not the tar that .*index\.json promises"):
        run(shards, "open_clip")


@pytest.mark.parametrize("damage", [_cut, _swap, _flip, _short_index, _version, _no_json])
@pytest.mark.parametrize("to", ["parquet", "open_clip"])
def test_damaged_shards_are_refused_and_no_file_appears_for_them(shards: Path, damage: Any, to: str) -> None:
    says = damage(shards)
    with pytest.raises(UserError, match=says):
        run(shards, to)
    out = shards.parent / f"{to}-out"
    finished = ledger.finished_units(out / "data") + ledger.finished_units(out)
    assert len(finished) < 3
    assert not (out / "sizes.json").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_takes_a_work_folder_and_prints_the_files(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = shards.parent
    assert main(["convert", "--work", str(work), "--to", "csv", "--out", str(work / "csv")]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(work / "csv" / f"{u}.csv") for u in ("train-00000", "train-00001", "heldout-00000")]
    assert "20 of 20 succeeded" in said.err
    assert main(["convert", str(shards), "--to", "csv", "--column", "web", "--out", str(work / "csv")]) == 4
    assert main(["convert", str(shards), "--work", str(work), "--to", "csv", "--out", str(work / "csv")]) == 2


def test_a_dry_run_writes_nothing(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shards.parent / "dry"
    assert main(["convert", str(shards), "--to", "open_clip", "--out", str(out), "--dry-run"]) == 0
    assert not out.exists() and "files_to_do" in capsys.readouterr().err
