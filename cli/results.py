"""The figures of an experiment's runs, in one small file that outlives the runs, and the table made of them.

``FILE.json`` maps the digest of a run's settings to one row of figures; ``FILE.md`` shows those rows that the manifest
asks for. A run whose settings are in the file is never done again, whatever has become of its folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .arms import Run

SHORT: Final = {"captions": "short"}
"""Query sets that the table calls by another name."""
WAYS: Final = {"text_to_image_r1": "t→i", "image_to_text_r1": "i→t"}


@dataclass(frozen=True)
class Column:
    """A column of the table: a figure of the rows, times ``scale``. ``chance`` is the figure of what chance scores."""

    figure: str
    head: str
    chance: str = ""
    scale: float = 100
    digits: int = 1

    def spread(self, figure: str, rows: Sequence[Row]) -> str:
        found = [row["figures"][figure] * self.scale for row in rows if figure in row["figures"]]
        return spread(found, self.digits)


FACTS: Final = (
    Column("clips_fact_precision", "fact precision"),
    Column("clips_fact_recall", "fact recall"),
)
PROBE: Final = "probe"
PROBED: Final = (
    Column("probe_fact_precision", "probe precision", "probe_chance_fact_precision"),
    Column("probe_fact_recall", "probe recall", "probe_chance_fact_recall"),
    Column("probe_token_loss", "probe loss", scale=1, digits=3),
    Column("probe_train_s", "probe minutes", scale=1 / 60),
)
KINDS: Final = ("shape", "colour", "size", "texture", "place", "relation")
LEGEND: Final = (
    "Recall at 1 on held-out images in %, text to image (t→i) and image to text (i→t), for each set of queries; "
    "precision and recall of the facts in the captioner's own captions in %; minutes that the training steps "
    "took where they were run. ± is the standard deviation over seeds. Expected is what others published, at their "
    "scale."
)
PROBE_LEGEND: Final = (
    "Probe precision and recall are those of the facts, in %, in the captions of held-out images that a small language "
    "model wrote, which was trained on the frozen image tower; chance is the same captions held against other images. "
    "Probe loss is its loss on the text that it was to write of these images, in nats per token. Arms whose difference "
    "is smaller than the spreads beside it have not been told apart."
)
METRICS: Final = "metrics.jsonl"

Row = Mapping[str, Any]
"""``arm``, ``seed``, ``samples``, ``train_s``, ``figures`` (name → number, shares in 0…1) and ``settings``."""


class Results:
    """The file of an experiment's figures."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[str, Row]:
        """By digest. Raises ``UserError`` for a file that clips did not write."""
        from clips_data.errors import UserError
        from clips_data.schema import SCHEMA_VERSION

        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, rows = content["schema_version"], dict(content["rows"])
            if version == SCHEMA_VERSION:
                for row in rows.values():
                    row["arm"], row["seed"], row["train_s"], row["figures"].keys()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.path} holds no results that clips wrote ({type(error).__name__}: {error}). Restore it, or name "
                "another file with --set results=FILE.json."
            ) from None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.path} has schema version {version}, this version of clips reads {SCHEMA_VERSION}. Name another "
                "file with --set results=FILE.json."
            )
        return rows

    def check_writable(self) -> None:
        """Raises ``UserError`` where a row could not be written; asked before hours are spent on one."""
        from clips_data.errors import UserError

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.path.parent, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise UserError(f"{self.path} cannot be written. Name another file with --set results=FILE.json.")

    def add(self, digest: str, row: Row) -> None:
        """Puts one row into the file, atomically. What other processes wrote meanwhile stays."""
        from clips_data.ledger import write_json
        from clips_data.schema import SCHEMA_VERSION

        with _locked(self.path.parent):
            write_json(self.path, {"schema_version": SCHEMA_VERSION, "rows": self.rows() | {digest: row}})

    def write_page(self, name: str, runs: Sequence[Run]) -> Path:
        """Writes the table of ``runs`` as Markdown beside the file, where it is not what is there already."""
        from clips_data.ledger import write_bytes

        page, text = self.path.with_suffix(".md"), markdown(name, runs, self.rows())
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            write_bytes(page, text.encode())
        return page


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds ``folder`` itself, so that no lock file is left beside what may be under version control."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def row_of(run: Run) -> Row:
    """The row of a run whose stages have just finished, from the stamps that these left.

    Figures of ``eval`` have their own names, those of the probe begin with its name.
    """
    from . import stamps

    manifest = run.manifest
    facts = stamps.facts_of(manifest, manifest.work, "eval")
    if PROBE in manifest.stages:
        probed = stamps.facts_of(manifest, manifest.work, PROBE)
        facts |= {f"{PROBE}_{name}": value for name, value in probed.items()}
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "samples": stamps.facts_of(manifest, manifest.work, "train").get("samples"),
        "train_s": train_seconds(run.folder),
        "figures": {name: round(value, 6) for name, value in facts.items() if isinstance(value, int | float)},
        "settings": run.settings,
    }


def train_seconds(run: Path) -> float | None:
    """Time that a run's steps took, by the rates that it logged, however often it was stopped and resumed."""
    total, known = 0.0, False
    for path in [run / METRICS, *run.glob(f"stages/*/{METRICS}")]:
        samples = 0
        for line in path.read_text().splitlines() if path.is_file() else ():
            row = json.loads(line)
            total += (row["samples"] - samples) / row["samples_per_s"]
            samples, known = row["samples"], True
    return round(total, 1) if known else None


# --- the table --------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run], rows: Mapping[str, Row]) -> list[dict[str, str]]:
    """One line for each arm that has results, in the order of ``runs``; every figure is a mean ± spread over seeds."""
    by_arm = _by_arm(runs, rows)
    if not by_arm:
        return []
    every = [row for own in by_arm.values() for row in own]
    columns = _columns(runs, every)
    expected = {run.arm.name: run.arm.expected for run in runs}
    lines = [_line(arm, columns, own) | {"expected": expected[arm]} for arm, own in by_arm.items()]
    by_chance = {column.head: column.spread(column.chance, every) for column in columns}
    return [{**dict.fromkeys(lines[0], ""), "arm": "(chance)", **by_chance}, *lines]


def kinds_table(runs: Sequence[Run], rows: Mapping[str, Row]) -> list[dict[str, str]]:
    """For each arm that was probed precision and recall of every kind of fact; empty where the truth was not known."""
    lines = []
    for arm, own in _by_arm(runs, rows).items():
        line = {}
        for kind in KINDS:
            both = [Column(f"{PROBE}_{kind}_{score}", kind) for score in ("precision", "recall")]
            shown = [column.spread(column.figure, own) for column in both]
            line[kind] = " / ".join(text or "none" for text in shown) if any(shown) else ""
        if any(line.values()):
            lines.append({"arm": arm, **line})
    return lines


def _by_arm(runs: Sequence[Run], rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    by_arm: dict[str, list[Row]] = {}
    for run in runs:
        if run.digest in rows:
            by_arm.setdefault(run.arm.name, []).append(rows[run.digest])
    return by_arm


def _line(arm: str, columns: Sequence[Column], rows: Sequence[Row]) -> dict[str, str]:
    figures = {column.head: column.spread(column.figure, rows) for column in columns}
    minutes = spread([row["train_s"] / 60 for row in rows if row["train_s"] is not None])
    return {"arm": arm, **figures, "minutes": minutes, "seeds": str(len(rows))}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``"12.3 ± 0.4"``: mean and standard deviation. Equal values and single ones have no deviation to show."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else mean


def _columns(runs: Sequence[Run], rows: Sequence[Row]) -> list[Column]:
    """Those of the table that any row has a figure for.

    Scores of the first query set have its name in no figure's name (``clips_train.evals.run.figures``).
    """
    sets = {"": runs[0].queries[0]} | {f"{name}_": name for run in runs for name in run.queries[1:]}
    retrieval = [
        Column(f"{start}{score}", f"{SHORT.get(queries, queries)} {way}", f"{start}chance_{score}")
        for start, queries in sets.items()
        for score, way in WAYS.items()
    ]
    return [column for column in (*retrieval, *FACTS, *PROBED) if any(column.figure in row["figures"] for row in rows)]


def markdown(name: str, runs: Sequence[Run], rows: Mapping[str, Row]) -> str:
    lines, kinds = table(runs, rows), kinds_table(runs, rows)
    there = sum(run.digest in rows for run in runs)
    probed = any(line.get(column.head) for line in lines for column in PROBED)
    legend = f"{LEGEND} {PROBE_LEGEND}" if probed else LEGEND
    text = [f"# {name}", "", f"{there} of {len(runs)} runs, arms × seeds. {legend}"]
    if lines:
        text += ["", *_as_markdown(lines)]
    if kinds:
        text += ["", "Facts of the probe's captions by kind, precision / recall in %:", "", *_as_markdown(kinds)]
    return "\n".join(text) + "\n"


def _as_markdown(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """A table; columns without any value are left out."""
    shown = [head for head in lines[0] if any(line[head] for line in lines)]
    cells = [shown, ["---"] * len(shown), *([line[head] for head in shown] for line in lines)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
