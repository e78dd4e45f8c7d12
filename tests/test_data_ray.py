"""The executor on a real Ray cluster of this machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from clips_data import executor, ledger
from clips_data.config import DownloadConfig
from clips_data.demo import web
from clips_data.errors import UserError
from clips_data.executor import Job


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # the workers import this module's functions
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here)
    yield
    ray.shutdown()


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def refuse(number: int) -> int:
    raise UserError(f"{number} will not do.")


def die_once(folder: Path, number: int) -> int:
    marker = folder / str(number)
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return number


def test_tasks_run_in_workers_of_the_cluster() -> None:
    results = list(executor.map_units(square, range(6), num_processes=2, on="ray"))
    assert sorted(value for value, _ in results) == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {pid for _, pid in results}


def test_what_a_task_says_to_the_user_arrives_as_it_was() -> None:
    with pytest.raises(UserError, match=r"^3 will not do\.$"):
        list(executor.map_units(refuse, [3], num_processes=2, on="ray"))


def test_a_task_whose_worker_died_is_done_again(tmp_path: Path) -> None:
    work = functools.partial(die_once, tmp_path)
    assert sorted(executor.map_units(work, range(3), num_processes=2, on="ray")) == [0, 1, 2]


def test_a_download_on_the_cluster_makes_the_bytes_of_a_local_one(tmp_path: Path) -> None:
    from clips_data import download

    with web.serve() as (host, port):
        urls = [f"http://{host}:{port}/scenes/3/{number}.jpg" for number in range(12)]
        pl.DataFrame({"url": urls, "caption": ["c"] * 12}).write_parquet(tmp_path / "list.parquet")
        config = DownloadConfig(source=str(tmp_path / "list.parquet"), shard_rows=4, allow_network=("127.0.0.1/32",))
        found = []
        for where in ("local", "ray"):
            work = tmp_path / where
            report = download.run(config, Job(work=work, quiet=True, processes=2, executor=where))
            assert report.counts == {"ok": 12}
            files = sorted([*(work / "pairs").glob("*.tar"), *(work / "pairs").glob("*.parquet")])
            found.append({path.name: ledger.digest_file(path) for path in files})
    assert len(found[0]) == 6
    assert found[0] == found[1]
