"""The commit protocol: finished or absent, never in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError
from clips_data.journal import Journal


def commit(folder: Path, text: str = "hello", **config: int) -> ledger.Sidecar:
    folder.mkdir(exist_ok=True)
    ledger.part(folder / "a.txt").write_text(text)
    return ledger.commit(folder, "a", ["a.txt"], inputs={"list": "d1"}, config=config, counts={"ok": 1})


def done(folder: Path, *, list_digest: str = "d1", overwrite: bool = False, **config: int) -> bool:
    return ledger.is_done(folder, "a", inputs={"list": list_digest}, config=config, overwrite=overwrite)


def test_a_unit_is_done_after_commit_and_not_before(tmp_path: Path) -> None:
    assert not done(tmp_path)
    commit(tmp_path)
    assert done(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "hello"
    assert not list(tmp_path.glob("*.part"))


def test_equal_content_has_equal_digest(tmp_path: Path) -> None:
    one, two = commit(tmp_path / "1"), commit(tmp_path / "2")
    other = commit(tmp_path / "3", "other")
    assert one.digest == two.digest != other.digest


def test_changed_config_or_input_is_refused_with_the_difference(tmp_path: Path) -> None:
    commit(tmp_path, seed=1)
    with pytest.raises(ResumeRefused, match="config seed: 1 before, 2 now"):
        done(tmp_path, seed=2)
    with pytest.raises(ResumeRefused, match="input list: d1 before, d2 now"):
        done(tmp_path, list_digest="d2", seed=1)


def test_overwrite_makes_the_unit_missing_work(tmp_path: Path) -> None:
    commit(tmp_path, seed=1)
    assert not done(tmp_path, seed=2, overwrite=True)
    assert ledger.finished_units(tmp_path) == []


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    commit(tmp_path)
    (tmp_path / "a.txt").write_text("hel")
    with pytest.raises(UserError, match=r"a\.txt with 5 bytes, but 3 bytes"):
        done(tmp_path)


def test_a_sidecar_of_another_schema_version_is_named(tmp_path: Path) -> None:
    commit(tmp_path)
    path = ledger.sidecar_path(tmp_path, "a")
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        ledger.read_sidecar(tmp_path, "a")


def test_a_journal_resumes_and_drops_its_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {"config": 1})
    journal.append([{"key": "1"}, {"key": "2"}])
    journal.close()
    path.write_bytes(path.read_bytes() + b'{"key": "3", "capt')
    again = Journal(path, {"config": 1})
    assert [row["key"] for row in again.rows] == ["1", "2"]
    again.append([{"key": "3"}])
    again.close()
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == ["1", "2", "3"]


def test_a_journal_of_another_config_is_refused_unless_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {"config": 1})
    journal.append([{"key": "1"}])
    journal.close()
    with pytest.raises(ResumeRefused):
        Journal(path, {"config": 2})
    fresh = Journal(path, {"config": 2}, overwrite=True)
    assert fresh.rows == []
    fresh.close()


WRITER = """
import sys
from pathlib import Path
from clips_data import ledger
folder = Path(sys.argv[1])
for i in range(10_000):
    name = f"{i:05d}"
    ledger.part(folder / f"{name}.bin").write_bytes(bytes([i % 251]) * 50_000)
    ledger.commit(folder, name, [f"{name}.bin"], inputs={}, config={}, counts={"ok": i})
    print(i, flush=True)
"""


@pytest.mark.parametrize("num_units", [1, 4, 9])
def test_after_sigkill_every_named_unit_is_whole(tmp_path: Path, num_units: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(num_units):
        process.stdout.readline()
    time.sleep(0.003)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    units = ledger.finished_units(tmp_path)
    assert len(units) >= num_units
    for unit in units:
        sidecar = ledger.read_sidecar(tmp_path, unit)
        assert sidecar is not None
        for name, about in sidecar.files.items():
            assert ledger.digest_file(tmp_path / name) == about["sha256"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"), ledger.readable_disk_errors(tmp_path):
        raise OSError(28, "No space left on device")


def test_a_dry_run_with_overwrite_says_what_would_be_made_again_and_removes_nothing(tmp_path: Path) -> None:
    for unit in ("a", "b"):
        ledger.part(tmp_path / f"{unit}.txt").write_text(unit)
        ledger.commit(tmp_path, unit, [f"{unit}.txt"], inputs={"list": unit}, config={}, counts={"ok": 2, "dns": 1})
    inputs_of = {"a": {"list": "a"}, "b": {"list": "changed"}, "c": {"list": "c"}}
    dry = ledger.stand(tmp_path, inputs_of, {}, overwrite=True, dry_run=True)
    assert (dry.finished, dry.missing, dry.counts) == (["a"], ["b", "c"], {"ok": 2, "dns": 1})
    assert ledger.finished_units(tmp_path) == ["a", "b"]
    ledger.stand(tmp_path, inputs_of, {}, overwrite=True, dry_run=False)
    assert ledger.finished_units(tmp_path) == ["a"]


def test_a_journal_that_its_holder_removes_is_begun_anew_by_who_waited_for_it(tmp_path: Path) -> None:
    path, header = tmp_path / "00000.journal.jsonl", {"inputs": {}}
    holder = Journal(path, header)
    holder.append([{"key": "1"}])
    waiting: list[Journal] = []
    thread = threading.Thread(target=lambda: waiting.append(Journal(path, header, lock_wait_s=30.0)))
    thread.start()
    time.sleep(0.3)
    assert not waiting
    holder.close(remove=True)
    thread.join()
    waiting[0].append([{"key": "2"}])
    waiting[0].close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [header, {"key": "2"}]
