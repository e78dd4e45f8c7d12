"""One recipe of a comparison: it captions the drawn images once, and what it said is kept for later comparisons."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import joined, ledger, schema
from clips_data.config import RecaptionConfig
from clips_data.errors import UserError
from clips_data.journal import Journal
from clips_data.recaption import choose
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, Build
from clips_data.recaption.rows import Item, Row
from clips_data.recaption.rows import Recipe as Finisher

if TYPE_CHECKING:
    from clips_data.recaption.prompts import Prompt

COLUMN: Final = "caption"
"""Column name that all recipes of a comparison caption for: draws and seeds depend on it, and it names no folder."""
STATS: Final = "_stats.json"
LINES_AT_ONCE: Final = 32
_DECIDES: Final = ("seed", "max_model_tokens", "trust_remote_code")


@dataclass(frozen=True)
class Recipe:
    """A prompt with a model. ``rows`` are the drawn images with the texts that this prompt takes in."""

    name: str
    prompt: Prompt
    config: RecaptionConfig
    rows: Sequence[Row]

    def finisher(self, model_digest: str, special_tokens: Sequence[str] = ()) -> Finisher:
        return Finisher(
            self.prompt,
            column=COLUMN,
            seed=self.config.seed,
            model_digest=model_digest,
            special_tokens=special_tokens,
            gate_min=self.config.gate_min,
        )


@dataclass
class Said:
    """What became of a recipe. With ``error`` there is nothing else.

    ``columns`` maps the names of its outputs (``""`` where there is one) to their rows, one per drawn image, in key
    order, as in a caption table. ``stats`` are the figures of the run: ``rows``, ``seconds``, ``tokens``, ``device``, …
    """

    recipe: Recipe
    error: str = ""
    columns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    was_kept: bool = False

    @property
    def why_failed(self) -> str:
        """The engine's error, or what became of the captions where not one is usable; "" for a recipe that worked."""
        codes = Counter(row["code"] for column in self.columns.values() for row in column)
        if self.error or codes["ok"]:
            return self.error
        why = ", ".join(f"{num} {code}" for code, num in codes.most_common())
        return f"None of {codes.total()} captions is usable: {why}."


def caption(recipe: Recipe, folder: Path, *, quiet: bool) -> Said:
    """What ``recipe`` says of its rows: read from ``folder`` where it lies there, else asked of an engine and kept.

    A kill loses at most the answers since the last flush. An engine that does not start, or dies for good, is told in
    ``error``.
    """
    try:
        engine, build = choose.build(recipe.config, recipe.prompt)
        asked = _Asked(recipe, folder, engine, build, choose.model_digest(recipe.config))
        kept = ledger.is_done(folder, asked.unit, inputs=asked.inputs, config=asked.about, overwrite=False)
        if not kept:
            asked.ask(quiet=quiet)
    except UserError as error:
        return Said(recipe, error=str(error))
    return Said(recipe, columns=asked.columns(), stats=asked.stats(), was_kept=kept)


class _Asked:
    """A recipe with the engine chosen for it, and its file: ``<unit>.parquet`` with one line per image and sample."""

    def __init__(self, recipe: Recipe, folder: Path, engine: str, build: Build, model_digest: str) -> None:
        self.recipe, self.folder, self.engine, self.build = recipe, folder, engine, build
        self.finisher = recipe.finisher(model_digest)
        self.inputs = {
            "rows": ledger.digest_json([[row.key, row.sha256, dict(row.texts), row.score] for row in recipe.rows])
        }
        self.about = {
            **recipe.config.model_dump(mode="json", include=set(_DECIDES)),
            "engine": engine,
            "model_digest": model_digest,
            "prompt_digest": recipe.prompt.digest,
            "gate_min": self.finisher.gate_min,
        }
        # The digest in its name makes every recipe a unit of its own: none is ever refused or overwritten.
        digest = ledger.digest_json([self.inputs, self.about])[:12]
        self.unit = f"{slug(recipe.prompt.name)}-{slug(recipe.config.model)}-{digest}"

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, *, quiet: bool) -> None:
        journal = Journal(self.folder / f"{self.unit}.journal.jsonl", {"inputs": self.inputs, "config": self.about})
        log = self.folder / "log" / f"{self.unit}.log"
        engine = EngineProcess(self.build, log=log, deadline_s=self.recipe.config.batch_deadline_s)
        whole = False
        try:
            engine.start()
            if not quiet:
                version, device = engine.about["engine_version"], engine.about["device"]
                up = f"{self.engine} {version} on {device} up in {engine.startup_s:.1f} s"
                print(f"compare: {self.recipe.name}: {up}", file=sys.stderr, flush=True)
            self._answers(engine, journal, quiet=quiet)
            self._commit(journal.rows, engine)
            whole = True
        finally:
            engine.close()
            journal.close(remove=whole)

    def _answers(self, engine: EngineProcess, journal: Journal, *, quiet: bool) -> None:
        """Appends to the journal what it lacks, each line with the seconds since the answer before it."""
        from tqdm import tqdm

        finisher = self.recipe.finisher(self.about["model_digest"], engine.about["special_tokens"])
        done = {(line["key"], line["sample"]) for line in journal.rows}
        items = [item for row in self.recipe.rows for item in finisher.items(row)]
        items = [item for item in items if (item.key, item.sample) not in done]
        lines = [self._line(item, item.answer, 0.0) for item in items if item.answer is not None]
        requests = ((item, item.request) for item in items if item.request is not None)
        total = len(done) + len(items)
        with tqdm(
            total=total, unit="caption", desc=self.recipe.name, disable=quiet or None, file=sys.stderr
        ) as progress:
            progress.update(len(done) + len(lines))
            last = time.monotonic()
            try:
                for item, answer in engine.stream(requests):
                    now = time.monotonic()
                    lines.append(self._line(item, answer, now - last))
                    last = now
                    progress.update(1)
                    if len(lines) >= LINES_AT_ONCE:
                        journal.append(lines)
                        lines = []
            finally:
                if lines:
                    journal.append(lines)

    def _line(self, item: Item, answer: Answer, seconds: float) -> dict[str, Any]:
        return {**self.finisher.line(item, answer, self.engine), "seconds": round(seconds, 6)}

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _commit(self, lines: list[dict[str, Any]], engine: EngineProcess) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        prompt, config = self.recipe.prompt, self.recipe.config
        version = engine.about["engine_version"]
        metadata = schema.caption_metadata(
            model=config.model, model_revision=self.about["model_digest"], engine=self.engine, engine_version=version,
            prompt=prompt.name, prompt_digest=prompt.digest, sampling=prompt.sampling.model_dump(mode="json"),
            seed=config.seed,
        )  # fmt: skip
        kinds = {
            "key": pa.string(), "sha256": pa.string(), "sample": pa.int32(), "code": pa.string(),
            "finish_reason": pa.string(), "num_tokens": pa.int32(), "num_prompt_tokens": pa.int32(), "raw": pa.string(),
            "flags": pa.list_(pa.string()), "seed": pa.int64(), "variant": pa.string(), "instruction": pa.string(),
            "request": pa.string(), "engine": pa.string(),
        }  # fmt: skip
        ordered = sorted(lines, key=lambda line: (line["key"], line["sample"]))
        said = [{name: line[name] for name in kinds} for line in ordered]
        stats = self._figures(lines, engine)
        with ledger.readable_disk_errors(self.folder):
            table = pa.Table.from_pylist(said, schema=pa.schema(kinds, metadata=metadata))
            pq.write_table(table, ledger.part(self.folder / f"{self.unit}.parquet"))
            # Before the sidecar, so that a finished unit has its figures; they carry clocks and are in no digest.
            ledger.write_json(self.folder / f"{self.unit}{STATS}", stats)
            counts = Counter(line["code"] for line in lines)
            files = [f"{self.unit}.parquet"]
            ledger.commit(self.folder, self.unit, files, inputs=self.inputs, config=self.about, counts=counts)

    def _figures(self, lines: list[dict[str, Any]], engine: EngineProcess) -> dict[str, Any]:
        """What the captions cost, over all sessions that made them. Start-up is beside ``seconds``, not in it."""
        return {
            "schema_version": schema.SCHEMA_VERSION,
            "rows": len({line["key"] for line in lines}),
            "captions": len(lines),
            "seconds": round(sum(line["seconds"] for line in lines), 3),
            "tokens": sum(line["num_tokens"] for line in lines),
            "prompt_tokens": sum(line["num_prompt_tokens"] for line in lines),
            "startup_s": round(engine.startup_s, 1),
            "engine": self.engine,
            "engine_version": engine.about["engine_version"],
            "engine_deaths": engine.num_deaths,
            "device": engine.about["device"],
            "num_gpus": engine.about.get("num_gpus", 0),
        }

    def columns(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {_output(name): [] for name in self.finisher.columns}
        for line in joined.read_table(self.folder / f"{self.unit}.parquet").iter_rows(named=True):
            for name, row in self.finisher.column_rows(line).items():
                found[_output(name)].append(row)
        return found

    def stats(self) -> dict[str, Any]:
        path = self.folder / f"{self.unit}{STATS}"
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read {path} ({error}). Delete {self.unit}.done.json to caption again.") from None
        return found


def slug(name: str) -> str:
    """The last part of a name, as a part of file names: letters, digits and single dashes."""
    last = name.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", last).strip("-.")[:40] or "unnamed"


def _output(column: str) -> str:
    return column.removeprefix(COLUMN).removeprefix("_")
