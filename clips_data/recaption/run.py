"""``clips recaption``: one caption column for the pairs, journalled per batch and committed per shard."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_data import caption_table, draws, executor, joined, ledger, schema
from clips_data.config import RecaptionConfig
from clips_data.errors import TooFewSucceeded, UserError
from clips_data.executor import Job, Report
from clips_data.forgotten import refuse_unfinished
from clips_data.recaption import clean, prompts
from clips_data.recaption.engines import Answer, EngineProcess, Request

if TYPE_CHECKING:
    import polars as pl

NOT_IN_DIGEST = {
    "batch_rows",
    "gpu_memory_share",
    "cpu_cache_gib",
    "batch_deadline_s",
    "min_success",
    "prompt",
    "model",
}
WHOLE_FILE_DIGEST_BYTES = 64 << 20
DEMO_MODEL = Path(__file__).parent.parent / "demo" / "weights" / "captioner"


def run(config: RecaptionConfig, job: Job) -> Report:
    """Captions the shards of ``pairs/`` that this column lacks. Raises ``TooFewSucceeded`` below ``min_success``."""
    started = time.monotonic()
    prompt = prompts.load(config.prompt)
    if config.column in prompt.inputs or config.column == "web":
        raise UserError(
            f"Column {config.column!r} is an input; columns are never overwritten. Name another with --column."
        )
    model = _resolve_model(config.model)
    pairs, out = job.work / schema.PAIRS, job.out or job.work / schema.CAPTIONS / config.column
    if job.only:
        pairs = job.only[0].parent
    refuse_unfinished(pairs)
    units = _units(pairs, job)
    digested = {
        **config.model_dump(mode="json", exclude=NOT_IN_DIGEST),
        "prompt_digest": prompt.digest,
        "model_digest": _model_digest(model),
    }
    report = Report("recaption")
    work = _Column(config, prompt, model, pairs, out, digested)
    inputs_of = {unit: work.inputs(unit) for unit in units}
    standing = ledger.stand(out, inputs_of, digested, overwrite=job.overwrite, dry_run=job.dry_run)
    report.skipped, totals = len(standing.finished), standing.counts
    if job.dry_run:
        report.facts["shards_to_do"] = len(standing.missing)
    elif standing.missing:
        work.caption(standing.missing, job, report, totals)
    report.units = [out / f"{unit}.parquet" for unit in units if unit in set(ledger.finished_units(out))]
    report.add(dict(totals))
    report.seconds = time.monotonic() - started
    _check_success(config, totals, report)
    return report


def _units(pairs: Path, job: Job) -> list[str]:
    units = [path.stem for path in job.only] if job.only is not None else ledger.finished_units(pairs)
    if not units:
        raise UserError(f"{pairs} holds no finished shards. Run clips download first, or point --work at its folder.")
    return executor.slice_of(units, job.slice)


def _resolve_model(name: str) -> str:
    if name != "demo":
        return name
    if not (DEMO_MODEL / "model.safetensors").exists():
        raise UserError(f"The packaged captioner is missing at {DEMO_MODEL}. Reinstall clips, or name a --model.")
    return str(DEMO_MODEL)


def _model_digest(model: str) -> str:
    """Content of a local model; the name of one from a hub. Files too large to hash in passing count by size."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    about = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            size = path.stat().st_size
            about[path.name] = ledger.digest_file(path) if size <= WHOLE_FILE_DIGEST_BYTES else f"{size} bytes"
    return ledger.digest_json(about)


def _check_success(config: RecaptionConfig, totals: Counter[str], report: Report) -> None:
    rows = sum(totals.values())
    if rows and totals["ok"] < config.min_success * rows:
        others = ", ".join(f"{code} {number}" for code, number in totals.most_common() if code != "ok")
        raise TooFewSucceeded(
            f"{totals['ok']} of {rows} rows got a caption, less than --min-success {config.min_success:g}. "
            f"The others: {others}. The column is finished; look at the code and raw columns of its parquet files.",
            report,
        )


class _Column:
    """One column in the making."""

    def __init__(
        self,
        config: RecaptionConfig,
        prompt: prompts.Prompt,
        model: str,
        pairs: Path,
        out: Path,
        digested: dict[str, Any],
    ) -> None:
        self.config, self.prompt, self.model = config, prompt, model
        self.pairs, self.out, self.digested = pairs, out, digested

    def inputs(self, unit: str) -> dict[str, str]:
        """Digests of what the unit's captions are made from. Raises ``UserError`` where an input column is missing."""
        digests = {}
        folders = {"pairs": self.pairs} | {c: self.out.parent / c for c in self.prompt.columns if c != "web"}
        for name, folder in folders.items():
            sidecar = ledger.read_sidecar(folder, unit)
            if sidecar is None:
                raise UserError(
                    f"Shard {unit} of {folder} is not finished, and prompt {self.prompt.name!r} needs it. "
                    f"Make {name} first."
                )
            digests[name] = sidecar.digest
        return digests

    def caption(self, units: list[str], job: Job, report: Report, totals: Counter[str]) -> None:
        """Starts the engine, captions the units in order, and notes start-up and throughput in the report."""
        from tqdm import tqdm

        engine = self._engine()
        left = job.limit if job.limit is not None else sys.maxsize
        try:
            engine.start()
            report.facts["startup_s"] = round(engine.startup_s, 1)
            if not job.quiet:
                about = f"{self.config.engine} {engine.about['engine_version']} on {engine.about['device']}"
                print(f"recaption: {about} up in {engine.startup_s:.1f} s", file=sys.stderr)
            generating = time.monotonic()
            tokens = rows = 0
            with tqdm(unit="caption", desc="recaption", disable=job.quiet or None, file=sys.stderr) as progress:
                for unit in units:
                    if left <= 0:
                        break
                    new = self._shard(unit, engine, left, job.overwrite, progress)
                    left -= len(new.rows)
                    rows += len(new.rows)
                    tokens += sum(row["num_tokens"] for row in new.rows)
                    totals.update(new.counts)
                    report.made += new.whole
            elapsed = time.monotonic() - generating
            report.facts.update(
                captions_per_s=round(rows / elapsed, 1),
                tokens_per_s=round(tokens / elapsed),
                engine_deaths=engine.num_deaths,
            )
        except BaseException:
            engine.close()
            raise
        engine.close(patience_s=10)

    def _engine(self) -> EngineProcess:
        from clips_data.recaption.vllm import BuildVllm

        config = self.config
        build = BuildVllm(
            model=self.model,
            revision=config.model_revision,
            sampling=self.prompt.sampling,
            seed=config.seed,
            max_model_tokens=config.max_model_tokens,
            gpu_memory_share=config.gpu_memory_share,
            cpu_cache_gib=config.cpu_cache_gib,
            max_batch_rows=config.batch_rows,
        )
        return EngineProcess(build, log=self.out / "log" / "engine.log", deadline_s=config.batch_deadline_s)

    def _shard(self, unit: str, engine: EngineProcess, limit: int, overwrite: bool, progress: Any) -> _Done:
        """Captions one shard from where its journal ends, and commits it unless ``limit`` cuts it."""
        header = {"inputs": self.inputs(unit), "config": self.digested}
        journal = ledger.Journal(self.out / f"{unit}.journal.jsonl", header, overwrite=overwrite)
        done = {row["key"] for row in journal.rows}
        progress.update(len(done))
        table = self._table(unit)
        todo = itertools.islice(self._rows(unit, table.filter([key not in done for key in table["key"]])), limit)
        new: list[dict[str, Any]] = []
        while batch := list(itertools.islice(todo, self.config.batch_rows)):
            rows = self._batch(batch, engine)
            journal.append(rows)
            new += rows
            progress.update(len(rows))
        with_captions = {row["key"]: row for row in journal.rows}
        ordered = [with_captions.get(key) for key in table["key"]]
        whole = None not in ordered
        if whole:
            self._commit(unit, ordered, engine, header["inputs"])
        journal.close(remove=whole)
        return _Done(new, Counter(row["code"] for row in (journal.rows if whole else new)), whole)

    def _table(self, unit: str) -> pl.DataFrame:
        """The unit's successful pairs with the texts that the prompt takes in."""
        folders = {f"{schema.CAPTIONS}/{c}": self.out.parent / c for c in self.prompt.columns if c != joined.WEB}
        return joined.Inputs(self.pairs, (unit,), folders).table(unit)

    def _rows(self, unit: str, table: pl.DataFrame) -> Iterator[dict[str, Any]]:
        """Key, sha256, image bytes and input texts of each row, in order, one image in memory at a time."""
        images = joined.read_images(self.pairs, unit, table)
        for row, image in zip(table.iter_rows(named=True), images, strict=True):
            texts = {column: row[f"text.{column}"] for column in self.prompt.columns}
            yield {"key": row["key"], "sha256": row["sha256"], "image": image, "texts": texts}

    def _batch(self, batch: list[dict[str, Any]], engine: EngineProcess) -> list[dict[str, Any]]:
        requests, flags, users = [], [], []
        for row in batch:
            safe, flagged = {}, []
            for column, text in row["texts"].items():
                safe[column], new_flags = clean.neutralise(text, engine.about["special_tokens"])
                flagged += new_flags
            system, user = self.prompt.render(safe)
            image = row["image"] if prompts.IMAGE in self.prompt.inputs else None
            seed = draws.integer(1 << 31, self.config.seed, f"caption/{self.config.column}", 0, row["key"])
            requests.append(Request(image, system, user, seed))
            flags.append(flagged)
            users.append(user)
        answers = engine.answer(requests)
        return [
            _row(row, answer, user, flagged, request.seed)
            for row, answer, user, flagged, request in zip(batch, answers, users, flags, requests, strict=True)
        ]

    def _commit(self, unit: str, rows: list[Any], engine: EngineProcess, inputs: dict[str, str]) -> None:
        metadata = schema.caption_metadata(
            model=self.config.model,
            model_revision=self.digested["model_digest"],
            engine=self.config.engine,
            engine_version=engine.about["engine_version"],
            prompt=self.prompt.name,
            prompt_digest=self.prompt.digest,
            sampling=self.prompt.sampling.model_dump(),
            seed=self.config.seed,
        )
        engined = [{**row, "engine": self.config.engine} for row in rows]
        caption_table.commit(self.out, unit, engined, metadata=metadata, inputs=inputs, config=self.digested)


class _Done:
    """What one pass over a shard did: its new rows, the counts to report, whether the shard is finished."""

    def __init__(self, rows: list[dict[str, Any]], counts: Counter[str], whole: bool) -> None:
        self.rows, self.counts, self.whole = rows, counts, whole


def _row(row: dict[str, Any], answer: Answer, user: str, flags: list[str], seed: int) -> dict[str, Any]:
    caption = " ".join(answer.text.split())
    code = clean.judge(caption, user) if answer.code == "ok" else answer.code
    if answer.finish_reason == "length":
        flags = [*flags, "hit_token_cap"]
    return {
        "key": row["key"],
        "sha256": row["sha256"],
        "caption": caption if code == "ok" else "",
        "status": "success" if code == "ok" else "failed",
        "code": code,
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
        "flags": flags,
        "raw": answer.text,
        "seed": seed,
    }


def describe_metadata(parquet: Path) -> dict[str, Any]:
    """Who made the captions in ``parquet``: model, engine, prompt, sampling, seed."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(parquet).metadata or {}
    return {key.decode(): json.loads(value) for key, value in metadata.items() if not key.startswith(b"ARROW")}
