from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import executor
from clips_data.errors import UsageError, UserError


@given(st.integers(0, 50), st.integers(1, 12))
def test_slices_are_disjoint_and_complete(num_units: int, of: int) -> None:
    units = [f"{i:05d}" for i in range(num_units)]
    slices = [executor.slice_of(units, f"{i}/{of}") for i in range(of)]
    assert sorted(unit for each in slices for unit in each) == units


@pytest.mark.parametrize("text", ["3/3", "-1/2", "a/b", "1", "1/0"])
def test_a_bad_slice_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="slice"):
        executor.parse_slice(text)


def pid_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), number * number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_tasks_run_in_worker_processes_and_all_come_back() -> None:
    results = list(executor.map_units(pid_and_square, range(6), num_processes=2))
    assert sorted(square for _, square in results) == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {pid for pid, _ in results}


def test_without_processes_tasks_run_here_in_order() -> None:
    assert list(executor.map_units(pid_and_square, [2, 3], num_processes=0)) == [(os.getpid(), 4), (os.getpid(), 9)]


def test_a_dead_worker_is_one_sentence() -> None:
    with pytest.raises(UserError, match="worker process died"):
        list(executor.map_units(die, [1], num_processes=1))


PARENT = """
import sys, time
from clips_data import executor
def work(seconds):
    import os
    print(os.getpid(), flush=True)
    time.sleep(seconds)
if __name__ == "__main__":
    list(executor.map_units(work, [60], num_processes=1))
"""


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} outlived its parent")
