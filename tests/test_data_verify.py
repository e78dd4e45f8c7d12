"""``clips verify``: where a changed file is damaged, whether intact files fit together, what may be cleared away."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest

from cli.main import main
from clips_data import damage, ledger, locks, schema, shard, tars, verify
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_data.journal import Journal

BATCH = {
    "schema_version": 1, "number": 0, "kind": "list", "fingerprint": "", "codes": [], "first_shard": 0,
    "num_shards": 2, "num_rows": 12, "shard_rows": 6, "list_rows": True,
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two shards of pairs and captions, training shards with held-out samples."""
    pairsmaker.write_pairs(tmp_path)
    write_captions(tmp_path)
    shard.run(ShardConfig(shard_rows=4, heldout_ratio=0.4, heldout_max=3), Job(work=tmp_path, quiet=True))
    return tmp_path


def write_captions(work: Path, column: str = "synthetic", config: dict[str, Any] | None = None) -> Path:
    """A column whose sidecars name the pairs as they are."""
    folder = pairsmaker.write_captions(work, column)
    for unit in ledger.finished_units(folder):
        pairs = ledger.read_sidecar(work / "pairs", unit)
        assert pairs is not None
        change_sidecar(folder, unit, inputs={"pairs": pairs.digest}, config=config or {"seed": 0})
    return folder


def change_sidecar(folder: Path, unit: str, **fields: Any) -> None:
    path = ledger.sidecar_path(folder, unit)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite_table(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Commits a changed table as if it had been made so."""
    table = change(pl.read_parquet(path))
    table.write_parquet(path)
    unit = path.name.removesuffix(".parquet").removesuffix(".index")
    files = json.loads(ledger.sidecar_path(path.parent, unit).read_text())["files"]
    files[path.name] = {"bytes": path.stat().st_size, "sha256": ledger.digest_file(path)}
    change_sidecar(path.parent, unit, files=files)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["pairs/00001.tar", "shards/train-00000.tar"])
def test_any_flipped_byte_of_a_tar_is_found_where_it_is(work: Path, folder: str) -> None:
    tar = work / folder
    good = tar.read_bytes()
    members = list(tars.read_members(tar))
    end = members[-1].offset + members[-1].size_bytes
    for at in range(0, len(good), 97):
        flip(tar, at)
        said = damage.in_tar(tar)
        member = next((m for m in members if m.offset <= at < m.offset + m.size_bytes), None)
        if member is not None and member.ext not in ("json", "txt"):
            assert f"member {member.name!r}, whose data begin at byte {member.offset}" in said
        elif member is None and at < end:
            assert any(f"at byte {place} " in said for place in (at, at // 512 * 512)), (at, said)
        elif member is None:
            assert "at byte" in said
        tar.write_bytes(good)


def test_the_captions_of_a_tar_of_pairs_are_compared_with_its_table(work: Path) -> None:
    tar = work / "pairs" / "00000.tar"
    for ext, said in (("txt", "is not the caption that its row has"), ("json", "than its row")):
        member = next(m for m in tars.read_members(tar) if m.name == f"000000002.{ext}")
        good = tar.read_bytes()
        flip(tar, good.index(b"photo 2", member.offset))
        assert verify.verify(work).corrupt == {
            "pairs/00000.tar": "has another content than when it was finished: member "
            f"'000000002.{ext}', whose data begin at byte {member.offset}, "
            + (said if ext == "txt" else "has another 'caption' than its row")
        }
        tar.write_bytes(good)


def test_the_row_group_and_column_of_a_damaged_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pl.DataFrame({"key": [f"{n:09d}" for n in range(300)], "text": [f"caption {n * n}" for n in range(300)]})
    table.write_parquet(path, row_group_size=100, compression="uncompressed")
    assert "all of its 3 row groups (300 rows) can be read" in damage.in_parquet(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"caption 22500")
    data[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert damage.in_parquet(path).startswith("row group 1 of 3 (rows 100 to 199) has a damaged column 'text'")
    path.write_bytes(data[:-20])
    assert damage.in_parquet(path).startswith("its footer cannot be read")


# --- whether files fit together ---------------------------------------------------------------------------------------


def test_a_sound_folder_has_nothing_to_tell_even_when_looked_at_closely(work: Path) -> None:
    for processes in (1, 2):
        found = verify.verify(work, deep=True, processes=processes)
        assert found.is_sound and found.num_intact == found.num_files > 8 and found.num_bytes > 0
        assert not (found.contradictions or found.missing or found.stale or found.orphans)


def test_tables_are_compared_with_their_tars_and_with_the_pairs(work: Path) -> None:
    rewrite_table(work / "pairs" / "00000.parquet", lambda table: table.filter(pl.col("key") != "000000001"))
    zeros = pl.when(pl.col("key") == "000010002").then(pl.lit("0" * 64)).otherwise("sha256").alias("sha256")
    rewrite_table(work / "captions" / "synthetic" / "00001.parquet", lambda table: table.with_columns(zeros))
    found = verify.verify(work)
    assert not found.corrupt
    right = ledger.digest_bytes(pairsmaker.image_bytes(8))
    assert found.contradictions == {
        "pairs/00000.parquet": [
            "its rows are {'ok': 4, 'http_4xx': 1} by code and its sidecar counts {'http_4xx': 1, 'ok': 5}"
        ],
        "pairs/00000.tar": [found.contradictions["pairs/00000.tar"][0]],
        "captions/synthetic/00000.parquet": ["has key 000000001, of which the pairs have no image"],
        "captions/synthetic/00001.parquet": [f"key 000010002 is about image {'0' * 64}, and the pairs have {right}"],
        "shards": ["1 keys of its tars have no image in the pairs; the first is 000000001"],
    }
    assert "has an image '000000001' without row" in found.contradictions["pairs/00000.tar"][0]


def test_an_image_that_was_wrong_from_the_start_shows_when_looked_at_closely(work: Path) -> None:
    wrong = pl.when(pl.col("key") == "000010002").then(pl.lit("0" * 64)).otherwise("sha256").alias("sha256")
    rewrite_table(work / "pairs" / "00001.parquet", lambda table: table.with_columns(wrong))
    assert "pairs/00001.tar" not in verify.verify(work).contradictions
    (said,) = verify.verify(work, deep=True).contradictions["pairs/00001.tar"]
    assert "the image of key 000010002 has sha256" in said and said.startswith("at byte ")


def test_offsets_of_training_shards_are_compared_with_the_tar(work: Path) -> None:
    moved = (pl.col("json_offset") + 512 * (pl.col("key").rank() == 1)).cast(pl.Int64)
    rewrite_table(work / "shards" / "train-00000.index.parquet", lambda table: table.with_columns(moved))
    (said,) = verify.verify(work).contradictions["shards/train-00000.index.parquet"]
    assert "has its json at byte" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda index: index["splits"]["train"]["shards"][0].update(sha256="0" * 64),
            "train-00000.tar with sha256 0000",
        ),
        (lambda index: index["splits"]["train"].update(num_samples=70), "promises 70 train samples"),
        (lambda index: index["splits"]["train"]["shards"].pop(), "another number"),
        (lambda index: index.update(digest="0"), "digest"),
        (lambda index: index.update(splits=[]), "not an index that clips wrote"),
    ],
)
def test_the_index_of_training_shards_is_compared_with_the_sidecars(
    work: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    path = work / "shards" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert any(said in text for text in verify.verify(work).contradictions["shards/index.json"])


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_an_index_that_is_no_json_is_damage_and_no_contradiction(
    work: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = verify.verify(work).num_intact
    (work / "shards" / "index.json").write_bytes(content)
    found = verify.verify(work)
    assert list(found.corrupt) == ["shards/index.json"] and not found.contradictions
    assert "run `clips shard` again" in found.corrupt["shards/index.json"]
    assert (found.num_intact, found.num_files) == (intact, intact + 1)
    assert main(["verify", "--work", str(work)]) == 1
    assert "1 of" in (said := capsys.readouterr().err) and "contradict" not in said


def test_an_image_on_both_sides_of_the_heldout_split_is_told(work: Path) -> None:
    held = pl.read_parquet(work / "shards" / "heldout-00000.index.parquet")["sha256"][0]
    first = pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(held)).otherwise("sha256").alias("sha256")
    rewrite_table(work / "shards" / "train-00000.index.parquet", lambda table: table.with_columns(first))
    assert any("both in train and in heldout" in text for text in verify.verify(work).contradictions["shards"])


def test_unfinished_shards_and_columns_of_other_pairs_are_told_and_are_no_damage(work: Path) -> None:
    ledger.sidecar_path(work / "captions" / "synthetic", "00000").unlink()
    change_sidecar(work / "captions" / "synthetic", "00001", inputs={"pairs": "another"})
    found = verify.verify(work)
    assert found.is_sound
    assert found.missing == {"captions/synthetic": ["00000"]}
    assert found.stale == {"captions/synthetic/00001.done.json": "was made from another pairs/00001 than is there now"}


def test_shards_planned_and_tars_that_no_index_names_are_told_as_unfinished(work: Path) -> None:
    (work / "pairs" / "_batches").mkdir()
    plan = work / "pairs" / "_batches" / "00000.json"
    plan.write_text(json.dumps(BATCH | {"num_shards": 4}))
    (work / "shards" / "index.json").unlink()
    found = verify.verify(work)
    assert found.is_sound and found.missing == {"pairs": ["00002", "00003"], "shards": ["index.json"]}
    plan.write_text("[]")
    with pytest.raises(UserError, match=r"_batches holds an intake that clips did not write"):
        verify.verify(work)


def test_damaged_checkpoints_are_named(work: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = work / "runs" / "first" / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(8, 8)}, folder / "model.safetensors")
    torch.save({"step": 10}, folder / "state.pt")
    (folder / "checkpoint.json").write_text(json.dumps({"schema_version": schema.SCHEMA_VERSION, "step": 10}))
    (folder.parent / "latest").write_text("step-00000010\n")
    assert verify.verify(work).is_sound
    where = "runs/first/checkpoints/"
    weights, state = folder / "model.safetensors", folder / "state.pt"
    weights.write_bytes(weights.read_bytes()[:-4])
    flip(state, state.read_bytes().index(b"step"))
    (folder / "checkpoint.json").unlink()
    (folder.parent / "latest").write_text("step-00000020\n")
    found = verify.verify(work).contradictions
    assert found[where + "latest"] == ["names step-00000020, which is not there"]
    assert "its tensors end at byte" in found[where + "step-00000010/model.safetensors"][0]
    assert "damaged" in found[where + "step-00000010/state.pt"][0]
    assert found[where + "step-00000010/checkpoint.json"] == ["is missing"]


def test_damaged_optimiser_states_and_checkpoints_of_stages_are_named(work: Path) -> None:
    import torch
    from safetensors.torch import save_file

    run = work / "runs" / "first"
    for folder in (run / "checkpoints" / "step-00000010", run / "stages" / "0" / "checkpoints" / "step-00000010"):
        (folder / "state").mkdir(parents=True)
        for name in ("model.safetensors", "ema.safetensors", "state/shard-00001-model-00001-of-00001.safetensors"):
            save_file({"weight": torch.zeros(8, 8)}, folder / name)
        (folder / "checkpoint.json").write_text(json.dumps({"schema_version": schema.SCHEMA_VERSION, "step": 10}))
        (folder.parent / "latest").write_text("step-00000010\n")
    assert verify.verify(work).is_sound
    early = "runs/first/stages/0/checkpoints/step-00000010/"
    late = "runs/first/checkpoints/step-00000010/"
    (state,) = (work / early / "state").iterdir()
    state.write_bytes(state.read_bytes()[:-4])
    for path in (work / late / "state").iterdir():
        path.unlink()
    (work / late / "ema.safetensors").write_bytes(b"")
    found = verify.verify(work).contradictions
    assert "its tensors end at byte" in found[early + f"state/{state.name}"][0]
    assert found[late + "state/*.safetensors"] == ["is missing"]
    assert "damaged header" in found[late + "ema.safetensors"][0]


# --- what killed runs left --------------------------------------------------------------------------------------------


def journal_of(folder: Path, unit: str, **header: Any) -> Path:
    """A journal with one caption, of the inputs and config that the sidecar of its shard has, or of others."""
    sidecar = ledger.read_sidecar(folder, unit)
    about = {"inputs": dict(sidecar.inputs), "config": dict(sidecar.config)} if sidecar else {}
    journal = Journal(folder / f"{unit}.journal.jsonl", about | header)
    journal.append([{"key": f"{unit}0000", "raw": "text"}])
    journal.close()
    return journal.path


def test_a_journal_goes_once_its_captions_are_committed_in_every_column(work: Path) -> None:
    folder = work / "captions" / "synthetic"
    path = journal_of(folder, "00000")
    assert verify.verify(work, gc=True).removed == ["captions/synthetic/00000.journal.jsonl"] and not path.exists()
    path = journal_of(folder, "00000", config={"seed": 7})
    assert verify.verify(work, gc=True).removed == [], "it is the work of another recipe"
    path.unlink()
    beside = write_captions(work, "synthetic_long")
    path = journal_of(folder, "00000")
    ledger.sidecar_path(beside, "00000").unlink()
    assert verify.verify(work, gc=True).removed == ["captions/synthetic_long/00000.parquet"], (
        "the recipe's second column lacks this shard, and the journal has its captions"
    )
    assert path.exists()


def test_a_journal_stays_where_nothing_tells_which_columns_its_recipe_makes(work: Path) -> None:
    for unit in ("00000", "00001"):
        journal_of(work / "captions" / "synthetic", unit)
    assert verify.verify(work, gc=True).removed == []


def test_gc_removes_folders_of_killed_runs_and_intakes_that_never_began(work: Path) -> None:
    left = ["shards/_plan/all/plan.arrow", "pairs/_list-0-of-1/list.parquet", "captions/synthetic/_import/a.parquet",
            "pairs/_batches/00004.parquet", "pairs/00009.tar.link"]  # fmt: skip
    kept = ["pairs/_batches/00003.parquet", "pairs/_batches/00003.json", "shards/_mine/x", "pairs/.slicing"]
    for name in (*left, *kept):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(json.dumps(BATCH) if name.endswith(".json") else "x")
    (work / "pairs" / "00009.tar.link").unlink()
    (work / "pairs" / "00009.tar.link").symlink_to("/nowhere")
    found = verify.verify(work, gc=True)
    assert found.removed == found.orphans == [
        "captions/synthetic/_import", "pairs/00009.tar.link", "pairs/_batches/00004.parquet", "pairs/_list-0-of-1",
        "shards/_plan",
    ]  # fmt: skip
    assert all((work / name).exists() for name in kept) and verify.verify(work).orphans == []


def test_gc_without_the_right_to_write_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder of its own: those of pytest can be entered by their owner only."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pairsmaker.write_pairs(work)
        with locks.locked(work / "pairs", "slicing"):
            pass
        paths = [work, *work.rglob("*")]
        before = os.geteuid()
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            if before == 0:  # root has all rights
                os.seteuid(65534)
            assert verify.verify(work, gc=True).removed == []
            os.seteuid(before)
            (work / "pairs").chmod(0o755)
            (work / "pairs" / "00009.tar.part").write_text("x")
            (work / "pairs").chmod(0o555)
            if before == 0:
                os.seteuid(65534)
            assert main(["verify", "--gc", "--work", str(work)]) == 1
        finally:
            os.seteuid(before)
            for path in paths:
                path.chmod(0o755)
    assert "you have no right to write there" in capsys.readouterr().err


def test_gc_is_refused_while_a_stage_holds_a_lock_or_a_journal(work: Path) -> None:
    left = work / "shards" / "train-00009.tar.part"
    left.write_text("x")
    with locks.shared(work / "pairs", "slicing", "slices of 1"):
        with pytest.raises(UserError, match=r"at work in .*pairs \(it holds \.slicing\)"):
            verify.verify(work, gc=True)
        with locks.shared(work / "pairs", "slicing", "slices of 1"):
            pass  # what the lock file says was left alone
    journal = Journal(work / "captions" / "synthetic" / "00007.journal.jsonl", {"inputs": {}, "config": {}})
    with pytest.raises(UserError, match=r"00007\.journal\.jsonl"):
        verify.verify(work, gc=True)
    assert left.exists() and verify.verify(work).orphans == ["shards/train-00009.tar.part"]
    journal.close()
    assert verify.verify(work, gc=True).removed == ["shards/train-00009.tar.part"]


def test_gc_leaves_what_appeared_while_it_looked_and_young_checkpoints(work: Path) -> None:
    new, checkpoint = work / "shards" / "new.tar.part", work / "runs" / "first" / "checkpoints" / "step-00000010.part"
    new.write_text("x")
    checkpoint.mkdir(parents=True)
    os.utime(new, (time.time() + 60,) * 2)
    found = verify.verify(work, gc=True)
    assert found.removed == [] and len(found.orphans) == 2
    for path in (new, checkpoint):
        os.utime(path, (time.time() - 7200,) * 2)
    assert len(verify.verify(work, gc=True).removed) == 2


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_all_of_it(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--work", str(work), "--deep", "--processes", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_sound"] and found["num_intact"] == found["num_files"]
    ledger.sidecar_path(work / "captions" / "synthetic", "00001").unlink()
    (work / "shards" / "index.json").write_text("{")
    flip(work / "pairs" / "00000.tar", 600)
    assert main(["verify", "--work", str(work)]) == 1
    out, err = capsys.readouterr()
    assert "pairs/00000.tar: has another content than when it was finished: member '000000000.jpg'" in out
    assert "shards/index.json: is not an index that clips wrote" in out
    assert "captions/synthetic: 1 not finished yet (00001)" in out
    assert "2 of 12 files are not what was committed" in err and "contradict" not in err
