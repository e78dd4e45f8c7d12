"""Median wall time of ``clips --help`` in fresh processes. Run: ``python tests/bench/help_latency.py --out FILE``.

Prints the median and the spread in milliseconds beside those of a bare interpreter, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path


def wall_ms(command: list[str], num_runs: int) -> list[float]:
    times = []
    for _ in range(num_runs + 1):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append((time.perf_counter() - started) * 1000)
    return sorted(times[1:])  # the first run warms the file cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("help_latency.json"))
    options = parser.parse_args()
    beside = Path(sys.executable).with_name("clips")
    clips = str(beside) if beside.exists() else shutil.which("clips")
    if clips is None:
        sys.exit("The `clips` command is not installed. Install the project first: pip install -e .")
    result = {"runs": options.runs}
    for name, command in {"clips_help": [clips, "--help"], "bare_python": [sys.executable, "-c", "pass"]}.items():
        times = wall_ms(command, options.runs)
        result[f"{name}_median_ms"] = round(statistics.median(times), 1)
        result[f"{name}_p90_ms"] = round(times[int(len(times) * 0.9)], 1)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        print(f"{name:<24} {value}")


if __name__ == "__main__":
    main()
