"""Start-to-end time of the quickstart by stage, then of the same command again, when there is nothing left to do.

uv run python tests/bench/quickstart_stages.py [--manifest quickstart] [--out quickstart_stages.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="quickstart")
    parser.add_argument("--out", type=Path, default=Path("quickstart_stages.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        first, first_s = run(options.manifest, work)
        _, again_s = run(options.manifest, work)
    stages = {row["stage"]: round(row["seconds"], 1) for row in first["stages"]}
    result = {
        "stages_s": stages,
        "whole_s": round(first_s, 1),
        "start_up_and_stamps_s": round(first_s - sum(stages.values()), 1),
        "again_s": round(again_s, 2),
        "ratio_first_to_again": round(first_s / again_s, 1),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def run(manifest: str, work: str) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    command = [sys.executable, "-m", "clips_cli", "run", manifest, "--work", work, "--json"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    summary: dict[str, Any] = json.loads(process.stdout)
    return summary, time.monotonic() - started


if __name__ == "__main__":
    main()
