"""``clips download`` beside the img2dataset command line: same server, list, processes, threads and target size.

uv run python tests/bench/download.py [--num-urls 2000] [--num-urls-memory 20000] [--out download.json]

Total seconds are those of the whole command. Steady images per second are those between the first shard's start and the
last one's end, as both tools write them into ``*_stats.json``. Peak memory is the largest sum of all processes'
proportional set sizes, sampled five times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SHARD_ROWS, IMAGE_PX, NUM_IMAGES = 500, 256, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-urls", type=int, default=2000)
    parser.add_argument("--num-urls-memory", type=int, default=20_000, help="second run for memory; 0 leaves it out")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--mixes", default="small,large")
    parser.add_argument("--out", type=Path, default=Path("download.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"num_urls": options.num_urls, "processes": options.processes, "threads": options.threads}
    for mix in options.mixes.split(","):
        with served(mix) as port, tempfile.TemporaryDirectory() as folder:
            result[mix] = compare(port, Path(folder), options.num_urls, options)
            if mix == "small" and options.num_urls_memory:
                result["memory"] = memory(port, Path(folder), result[mix], options)
        print(json.dumps({mix: result[mix]}, indent=1), flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def compare(port: int, folder: Path, num_urls: int, options: Any) -> dict[str, Any]:
    ours = clips(port, folder / "ours", num_urls, options)
    peer = img2dataset(port, folder / "peer", num_urls, options)
    return {
        "clips": ours,
        "img2dataset": peer,
        "ratio_total_time": round(ours["total_s"] / peer["total_s"], 2),
        "ratio_steady_rate": round(ours["images_per_s"] / peer["images_per_s"], 2),
    }


def memory(port: int, folder: Path, few: dict[str, Any], options: Any) -> dict[str, Any]:
    many = clips(port, folder / "many", options.num_urls_memory, options)
    before = few["clips"]["peak_mb"]
    return {
        "peak_mb_few": before,
        "peak_mb_many": many["peak_mb"],
        "num_urls_many": options.num_urls_memory,
        "ratio": round(many["peak_mb"] / before, 3),
        "images_per_s_many": many["images_per_s"],
    }


def clips(port: int, folder: Path, num_urls: int, options: Any) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "clips_cli", "download", str(write_list(port, folder, num_urls)), "--work", str(folder),
        "--processes", str(options.processes), "--threads", str(options.threads), "--shard-rows", str(SHARD_ROWS),
        "--resize", "keep_ratio", "--image-px", str(IMAGE_PX), "--allow-network", "127.0.0.0/8",
        "--host-connections", str(options.processes * options.threads), "--quiet",
    ]  # fmt: skip
    return measured(command, folder / "pairs", num_urls)


def img2dataset(port: int, folder: Path, num_urls: int, options: Any) -> dict[str, Any]:
    command = [
        sys.executable, "-c", "from img2dataset import main; main()", "--url_list",
        str(write_list(port, folder, num_urls)), "--input_format", "parquet", "--url_col", "url", "--caption_col",
        "caption", "--output_format", "webdataset", "--output_folder", str(folder / "out"), "--processes_count",
        str(options.processes), "--thread_count", str(options.threads), "--number_sample_per_shard", str(SHARD_ROWS),
        "--image_size", str(IMAGE_PX), "--resize_mode", "keep_ratio", "--compute_hash", "sha256",
    ]  # fmt: skip
    return measured(command, folder / "out", num_urls)


def write_list(port: int, folder: Path, num_urls: int) -> Path:
    folder.mkdir(parents=True)
    urls = [f"http://127.0.0.1:{port}/{number % NUM_IMAGES}.jpg?n={number}" for number in range(num_urls)]
    captions = [f"picture {number}" for number in range(num_urls)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "list.parquet")
    return folder / "list.parquet"


def measured(command: list[str], out: Path, num_urls: int) -> dict[str, Any]:
    started = time.monotonic()
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    with (out.parent / "output.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        peaks: list[float] = []
        watcher = threading.Thread(target=watch, args=(process, peaks))
        watcher.start()
        code = process.wait()
    total_s = time.monotonic() - started
    watcher.join()
    stats = [json.loads(path.read_text()) for path in sorted(out.glob("*_stats.json"))]
    successes = sum(shard["successes"] for shard in stats)
    if code or successes != num_urls:
        raise SystemExit(
            f"{command[2:4]} ended with {code} and {successes} images:\n{(out.parent / 'output.log').read_text()}"
        )
    steady_s = max(shard["end_time"] for shard in stats) - min(shard["start_time"] for shard in stats)
    return {
        "total_s": round(total_s, 1),
        "before_first_shard_and_after_last_s": round(total_s - steady_s, 1),
        "images_per_s": round(successes / steady_s, 1),
        "peak_mb": round(max(peaks) / 1e6, 1),
    }


def watch(process: subprocess.Popen[Any], peaks: list[float]) -> None:
    while process.poll() is None:
        peaks.append(sum(proportional_bytes(pid) for pid in family(process.pid)))
        time.sleep(0.2)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def proportional_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def served(mix: str) -> Iterator[int]:
    command = [sys.executable, str(Path(__file__).parent / "image_server.py"), mix]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.stdin.close()
            server.wait()


if __name__ == "__main__":
    main()
