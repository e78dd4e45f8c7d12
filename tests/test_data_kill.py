"""SIGKILL at twenty random moments of ``clips download``: the end is as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest

from clips_data import ledger, tars
from clips_data.demo import web

NUM_URLS, SHARD_ROWS, KILLS_PER_FOLDER = 168, 12, 5
WAIT_S = 0.08


class Handler(BaseHTTPRequestHandler):
    """Takes its time, so that most of a run is downloading; every seventh picture is missing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        number = int(self.path.strip("/").removesuffix(".jpg"))
        time.sleep(WAIT_S)
        body = b"" if number % 7 == 0 else web.jpeg(6, number % 40)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever asked was killed
            self.wfile.write(body)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.server_address[1]}/{number}.jpg" for number in range(NUM_URLS)]
    path = tmp_path_factory.mktemp("list") / "list.parquet"
    pl.DataFrame({"url": urls, "caption": [f"caption {number}" for number in range(NUM_URLS)]}).write_parquet(path)
    yield path
    server.shutdown()
    server.server_close()


def start(source: Path, work: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "clips_cli", "download", str(source), "--work", str(work), "--processes", "2",
        "--threads", "4", "--shard-rows", str(SHARD_ROWS), "--allow-network", "127.0.0.0/8", "--retries", "0",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def content(work: Path) -> dict[str, str]:
    """Digests of everything that is promised to be the same bytes."""
    files = [path for kind in ("tar", "parquet") for path in (work / "pairs").glob(f"*.{kind}")]
    return {path.name: ledger.digest_file(path) for path in files}


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    work = tmp_path_factory.mktemp("undisturbed")
    process = start(source, work)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return content(work)


def kill_when(num_finished: int, source: Path, work: Path, chance: random.Random) -> None:
    """Kills a run some moments after so many of its shards are finished."""
    process = start(source, work)
    while len(list((work / "pairs").glob("*.done.json"))) < num_finished and process.poll() is None:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    if chance.random() < 0.5 and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # the machine's end: all processes at once
    else:
        process.kill()  # only the parent: its workers must notice
    process.communicate()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_folders", [1, pytest.param(4, marks=pytest.mark.long)])
def test_many_kills_leave_rows_and_bytes_of_an_undisturbed_run(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, num_folders: int
) -> None:
    wanted = undisturbed
    num_shards = NUM_URLS // SHARD_ROWS
    assert len(wanted) == 2 * num_shards
    chance = random.Random(0)
    unfinished = 0
    for folder in range(num_folders):
        work = tmp_path / str(folder)
        for turn in range(KILLS_PER_FOLDER):
            kill_when(num_shards * turn // KILLS_PER_FOLDER + chance.randrange(3), source, work, chance)
            found = content(work)
            unfinished += found != wanted
            assert found.items() <= wanted.items(), "a file under its final name is whole"
        again = start(source, work)
        _, said = again.communicate()
        assert again.returncode == 0, said
        assert content(work) == wanted
        table = pl.concat([pl.read_parquet(path) for path in sorted((work / "pairs").glob("*.parquet"))])
        assert len(table) == NUM_URLS
        keys = [sample.key for path in sorted((work / "pairs").glob("*.tar")) for sample in tars.read_samples(path)]
        assert keys == table.filter(pl.col("code") == "ok")["key"].to_list()
    assert unfinished >= 3 * num_folders, "kills that come after the end show nothing"


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path)
    while not list((tmp_path / "pairs").glob("*.done.json")):
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "pairs").glob("_list-*")), "the cut list, which may hold secrets, is gone"
