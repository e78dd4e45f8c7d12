"""Search: embedded once and only what is new, exact against brute force, an index that can be lost, and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shardmaker
import torch
from hypothesis import given
from hypothesis import strategies as st

from clips_data import ledger
from clips_data.errors import UserError
from clips_train import search_index, search_store
from clips_train.encoders import Encoder
from clips_train.search_run import Hit, Query, Search, default_model
from clips_train.search_store import FEATURES, OK, THERE_TENSOR, Store
from clips_train.shards import Split
from clips_train.use_config import SearchConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def work(tmp_path: Path) -> Path:
    shardmaker.write_shards(tmp_path / "shards", num_train=30, num_heldout=6)
    return tmp_path


def opened(work: Path, **given: Any) -> Search:
    config = SearchConfig(**{"device": "cpu", "batch": 5, **given})
    return Search(config, model="demo", shards=work / "shards", work=work, quiet=True)


def files(work: Path) -> dict[str, tuple[int, bytes]]:
    found = sorted((work / "search").rglob("*.safetensors"))
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def keys(hits: list[Hit]) -> list[str]:
    return [hit.key for hit in hits]


# --- embedding --------------------------------------------------------------------------------------------------------


def test_features_are_made_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(work)
    made = files(work)
    assert list(made) == ["train-00000.safetensors", "train-00001.safetensors", "train-00002.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "image_features", lambda *_: pytest.fail("an image was embedded again"))
        again = opened(work)
    assert files(work) == made and again.store.notes == []
    asked = [Query("a red circle")]
    assert keys(again.answers(asked, 5)[0]) == keys(first.answers(asked, 5)[0])


def test_a_picture_of_the_shards_finds_itself_first_with_a_score_of_one(work: Path) -> None:
    found = opened(work)
    [hits] = found.answers([Query(image=shardmaker.sample(17)[0], image_name="17.jpg")], 3)
    assert hits[0].key == "000000017" and hits[0].score == pytest.approx(1, abs=2e-3)
    assert found.image(hits[0]) == shardmaker.sample(17)[0] and hits[0].about["web"] == "green bar photo 17"


def test_a_text_with_a_picture_is_looked_for_halfway_between_both(work: Path) -> None:
    found = opened(work)
    picture = shardmaker.sample(3)[0]
    text, image, both = found._features([Query("a blue bar"), Query(image=picture), Query("a blue bar", picture)])
    assert torch.allclose(both, torch.nn.functional.normalize(text + image, dim=0), atol=1e-5)


def test_captions_of_a_column_are_searched_by_what_they_say(work: Path) -> None:
    found = opened(work, text="web")
    [hits] = found.answers([Query("purple circle photo 6")], 1)
    assert keys(hits) == ["000000006"] and hits[0].score == pytest.approx(1, abs=2e-3)


def test_models_columns_and_ways_to_resize_have_folders_of_their_own(work: Path) -> None:
    for settings in ({}, {"text": "web"}, {"text": "synthetic"}, {"resize": "crop"}, {"split": "heldout"}):
        opened(work, **settings)
    folders = sorted(path.name.rpartition("-")[0] for path in (work / "search").iterdir())
    assert folders == ["demo", "demo", "demo-synthetic", "demo-web"]


def test_features_of_the_same_model_with_other_settings_are_named(work: Path) -> None:
    first = opened(work)
    second = opened(work, resize="crop")
    assert len(second.store.notes) == 1 and str(first.store.folder) in second.store.notes[0]
    assert opened(work, resize="crop").store.notes == []


def test_images_that_cannot_be_read_are_counted_and_never_found(work: Path) -> None:
    def spoil(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return (image[: len(image) * 3 // 4] if number == 4 else b"no picture" if number == 5 else image), about

    shardmaker.write_shards(work / "shards", num_train=30, change=spoil)
    found = opened(work)
    assert found.counts == {OK: 28, "decode_failed": 1, "not_an_image": 1}
    assert sorted(keys(found.answers([Query("a picture")], 100)[0])) == [
        f"{number:09d}" for number in range(30) if number not in (4, 5)
    ]


def test_a_split_without_any_readable_image_is_an_error_that_says_why(work: Path) -> None:
    shardmaker.write_shards(work / "shards", num_train=3, change=lambda *given: (b"no picture", given[3]))
    with pytest.raises(UserError, match=r"No image .* can be searched: 3 not_an_image"):
        opened(work)


def test_rows_without_a_caption_are_counted(work: Path) -> None:
    def silence(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return image, {**about, "synthetic": "" if number % 3 else about["synthetic"]}

    shardmaker.write_shards(work / "shards", num_train=30, change=silence)
    assert opened(work, text="synthetic").counts == {OK: 10, "caption_missing": 20}


def test_new_tars_are_added_and_changed_ones_are_embedded_again(work: Path) -> None:
    sidecars(work)
    opened(work)
    before = files(work)
    shardmaker.write_shards(work / "shards", num_train=36, num_heldout=6)
    sidecars(work)
    found = opened(work)
    after = files(work)
    assert "1 of 3 shards have changed" in found.store.notes[0] and found.counts[OK] == 36
    same = [name for name in before if before[name] == after[name]]
    assert same == ["train-00000.safetensors", "train-00001.safetensors"]
    shardmaker.write_shards(work / "shards", num_train=48, num_heldout=6)
    sidecars(work)
    found = opened(work)
    assert "1 of 4 shards were not embedded yet" in found.store.notes[0] and found.counts[OK] == 48
    assert {name: files(work)[name] for name in after} == after


def sidecars(work: Path) -> None:
    """As `clips shard` writes them."""
    for tar in (work / "shards").glob("*.tar"):
        about = {tar.name: {"bytes": tar.stat().st_size, "sha256": ledger.digest_file(tar)}}
        content = {"unit": tar.stem, "files": about, "inputs": {}, "config": {}, "counts": {}, "tool_version": "0"}
        ledger.write_json(ledger.sidecar_path(tar.parent, tar.stem), {"schema_version": 1, **content})


def test_after_a_kill_the_finished_shards_are_kept_and_the_end_is_the_same(work: Path) -> None:
    undisturbed = work / "other"
    shardmaker.write_shards(undisturbed / "shards", num_train=30, num_heldout=6)
    opened(undisturbed)
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from clips_data import ledger; from clips_train import search_run; from clips_train.use_config import *\n"
        "commit = ledger.commit\n"
        "def once(folder, unit, *rest, **more):\n"
        "    if unit == 'train-00001': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return commit(folder, unit, *rest, **more)\n"
        "ledger.commit = once\n"
        "work = Path(sys.argv[1])\n"
        "config = SearchConfig(device='cpu', batch=5)\n"
        "search_run.Search(config, model='demo', shards=work / 'shards', work=work, quiet=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(work)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = files(work)
    assert list(kept) == ["train-00000.safetensors"]
    opened(work)
    after = files(work)
    assert after["train-00000.safetensors"] == kept["train-00000.safetensors"]
    assert {name: data for name, (_, data) in after.items()} == {
        name: data for name, (_, data) in files(undisturbed).items()
    }


def test_worker_processes_make_the_same_features(work: Path) -> None:
    by_threads = {name: data for name, (_, data) in contents(work, {}).items()}
    other = work / "other"
    shardmaker.write_shards(other / "shards", num_train=30, num_heldout=6)
    assert {name: data for name, (_, data) in contents(other, {"num_workers": 1}).items()} == by_threads


def contents(work: Path, given: dict[str, Any]) -> dict[str, tuple[int, bytes]]:
    opened(work, **given)
    return files(work)


def test_two_searches_at_one_time_do_not_write_into_each_other(work: Path) -> None:
    """The second one waits at the lock, and then finds all done."""
    import fcntl

    found = opened(work)
    for path in found.store.folder.iterdir():
        if path.name != search_store.LOCK:
            path.unlink()
    with ThreadPoolExecutor() as pool:
        with (found.store.folder / search_store.LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            second = pool.submit(opened, work)
            while not _waits_at(found.store.folder / search_store.LOCK):
                assert not second.done()
                time.sleep(0.01)
            assert files(work) == {}
        second.result()
    assert len(files(work)) == 3


def _waits_at(path: Path) -> bool:
    """Whether somebody waits for the lock of a file: such lines of /proc/locks have an arrow."""
    inode = f":{path.stat().st_ino} "
    return any(inode in line and "->" in line for line in Path("/proc/locks").read_text().splitlines())


# --- the nearest ------------------------------------------------------------------------------------------------------


def store_of(folder: Path, sizes: list[int], width: int, *, seed: int = 0, holes: bool = False) -> Store:
    """Random unit features, mapped from nowhere."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1) for n in sizes]
    there = [torch.rand(n, generator=generator) > (0.3 if holes else -1.0) for n in sizes]
    for rows, are in zip(features, there, strict=True):
        rows[~are] = 0
    split = Split(folder, "train", tuple(f"train-{i:05d}.tar" for i in range(len(sizes))), tuple(sizes), (), "")
    counts = Counter({OK: sum(int(are.sum()) for are in there)})
    digests = {f"train-{i:05d}": f"{seed}{i}" for i in range(len(sizes))}
    return Store(folder, split, [rows.half() for rows in features], there, digests, counts)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    num=st.integers(1, 60),
    block_rows=st.integers(1, 12),
    holes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exact_finds_what_brute_force_finds_whatever_the_shards_and_blocks(
    sizes: list[int], num: int, block_rows: int, holes: bool, seed: int
) -> None:
    store = store_of(Path(), sizes, 4, seed=seed, holes=holes)
    queries_QE = np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_index, "BLOCK_ROWS", block_rows)
        found = search_index.exact(store, queries_QE, num)
    all_NE, there_N = torch.cat(list(store.features_NE)).float().numpy(), torch.cat(list(store.there_N)).numpy()
    scores_QN = np.where(there_N, queries_QE @ all_NE.T, -np.inf)
    for scores_N, scores_K, positions_K in zip(scores_QN, *found, strict=True):
        best = [position for position in np.argsort(-scores_N, kind="stable") if there_N[position]][:num]
        assert list(positions_K) == best
        assert np.allclose(scores_K, scores_N[best], atol=1e-5)
    for position in range(sum(sizes)):
        shard, row = store.place(position)
        assert store.starts[shard] + row == position and row < sizes[shard]


def test_equal_features_come_in_the_order_of_the_shards(tmp_path: Path) -> None:
    store = store_of(tmp_path, [50, 50], 8)
    for features_NE in store.features_NE:
        features_NE[:] = store.features_NE[0][0]
    found = search_index.exact(store, store.features_NE[0][:1].float().numpy(), 7)
    assert list(found.positions_QK[0]) == list(range(7))


def test_the_index_finds_what_exact_finds_when_it_looks_into_all_lists(tmp_path: Path) -> None:
    store = store_of(tmp_path, [700, 0, 900], 16, holes=True)
    queries_QE = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    exact = search_index.exact(store, queries_QE, 10)
    num_lists = search_index.opened(store).nlist
    found = search_index.approximate(store, queries_QE, 10, num_probed=num_lists)
    assert np.array_equal(found.positions_QK, exact.positions_QK)
    assert np.allclose(found.scores_QK, exact.scores_QK, atol=1e-4)
    fewer = search_index.approximate(store, queries_QE, 10, num_probed=1)
    assert not np.array_equal(fewer.positions_QK, exact.positions_QK)


def test_asking_for_more_than_there_are_gives_all(tmp_path: Path) -> None:
    store = store_of(tmp_path, [20], 8)
    queries_QE = np.ones((1, 8), dtype=np.float32)
    for look in (search_index.exact, search_index.approximate):
        found = look(store, queries_QE, 1000)
        positions = [position for position in found.positions_QK[0] if position >= 0]
        assert len(positions) == len(set(positions)) and (look is search_index.approximate or len(positions) == 20)


Harm = Callable[[Path], object]


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        lambda path: ledger.sidecar_path(path.parent, "train.ivf").write_text("{}"),
    ],
    ids=["missing", "cut", "zeros", "sidecar"],
)
def test_an_index_that_is_lost_or_damaged_is_built_again(tmp_path: Path, harm: Harm) -> None:
    store = store_of(tmp_path, [300], 8)
    queries_QE = np.ones((1, 8), dtype=np.float32)
    before = search_index.approximate(store, queries_QE, 5)
    path = tmp_path / "train.ivf.faiss"
    data = path.read_bytes()
    harm(path)
    again = search_index.approximate(store, queries_QE, 5)
    assert np.array_equal(before.positions_QK, again.positions_QK) and path.read_bytes() == data


def test_an_index_of_other_features_is_built_again(tmp_path: Path) -> None:
    search_index.opened(store_of(tmp_path, [300], 8, seed=1))
    other = store_of(tmp_path, [300], 8, seed=2)
    query_QE = other.features_NE[0][7:8].float().numpy()
    assert search_index.approximate(other, query_QE, 1).positions_QK[0, 0] == 7


def test_an_intact_index_is_opened_and_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, [300], 8)
    search_index.opened(store)
    monkeypatch.setattr(search_index, "_built", lambda *_: pytest.fail("built again"))
    search_index.opened(store)


def test_the_way_follows_the_number_of_features() -> None:
    assert search_index.way("auto", search_index.EXACT_UP_TO) == "exact"
    assert search_index.way("auto", search_index.EXACT_UP_TO + 1) == "ivf"
    assert search_index.way("ivf", 3) == "ivf" and search_index.way("exact", 10**9) == "exact"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_split_without_samples_a_wrong_column_and_no_run_are_sentences(work: Path) -> None:
    shardmaker.write_shards(work / "shards", num_train=4, num_heldout=0)
    with pytest.raises(UserError, match=r"'heldout' .* has no samples"):
        opened(work, split="heldout")
    with pytest.raises(UserError, match=r"no column 'synthetc'.*'synthetic'"):
        opened(work, text="synthetc")
    with pytest.raises(UserError, match=r"There is no run under .*--model"):
        default_model(work / "runs", "default")


def test_the_default_model_is_the_run_default_else_the_newest(tmp_path: Path) -> None:
    for age, name in enumerate(("a", "c", "b")):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        os.utime(folder, ns=(10**18 + age, 10**18 + age))
    assert default_model(tmp_path, "default") == "run:b"
    assert default_model(tmp_path, "a") == "run:a"


def test_without_faiss_the_line_to_install_it_is_said_before_anything_is_embedded(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'clips\[search\]'"):
        opened(work, index="ivf")
    assert not (work / "search").exists()
    assert opened(work).way == "exact"


def test_damaged_features_are_named_with_what_to_do(work: Path) -> None:
    folder = opened(work).store.folder
    path = folder / "train-00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"train-00001.safetensors is damaged .* Delete"):
        opened(work)


def test_stored_tensors_are_mapped_and_in_fp16(work: Path) -> None:
    store = opened(work).store
    assert {features_NE.dtype for features_NE in store.features_NE} == {torch.float16}
    lengths_N = torch.cat(list(store.features_NE)).float().norm(dim=1)
    assert torch.allclose(lengths_N, torch.ones_like(lengths_N), atol=2e-3)
    assert str(store.folder) in Path("/proc/self/maps").read_text()


def test_a_query_that_is_no_picture_is_refused(work: Path) -> None:
    with pytest.raises(UserError, match=r"--image notes.txt is no picture \(not_an_image\)"):
        opened(work).answers([Query(image=b"hello", image_name="notes.txt")], 1)


def test_the_layout_of_a_file_is_what_its_reader_expects(work: Path) -> None:
    from safetensors import safe_open

    folder = opened(work).store.folder
    with safe_open(folder / "train-00000.safetensors", "pt") as file:
        assert sorted(file.keys()) == [FEATURES, THERE_TENSOR]
    sidecar = json.loads((folder / "train-00000.done.json").read_text())
    assert sidecar["config"]["preprocessing"]["resize_mode"] == "squash" and sidecar["counts"] == {OK: 12}
