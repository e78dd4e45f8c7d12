"""``clips score``: how well each caption fits its image, as the cosine similarity of one CLIP model's features."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import executor, joined, ledger, schema
from clips_data.config import ScoreConfig
from clips_data.errors import UserError
from clips_data.executor import Job, Report

if TYPE_CHECKING:
    import polars as pl

DEMO_MODEL: Final = Path(__file__).parent / "demo" / "weights" / "clip"
LOCAL: Final = "local-dir:"
NOT_IN_DIGEST: Final = {"name", "model"}  # the model counts by its digest, wherever its folder lies


def run(config: ScoreConfig, job: Job) -> Report:
    """Scores the shards of ``pairs/`` that are not scored yet.

    Writes per shard ``key, sha256`` and one float32 column per caption column, null where the caption is empty. Raises
    ``UserError`` when torch, the model or a caption column is missing.
    """
    started = time.monotonic()
    units = tuple(sorted({path.stem for path in job.only})) if job.only is not None else None
    given = joined.open_inputs(job.work, config.columns, units=units)
    out = job.out or job.work / schema.SCORES / config.name
    model = resolve_model(config)
    about = {**config.model_dump(mode="json", exclude=NOT_IN_DIGEST), "model_digest": model_digest(model)}
    report = Report("score")
    inputs_of = {unit: given.unit_digests(unit) for unit in executor.slice_of(given.units, job.slice)}
    standing = ledger.stand(out, inputs_of, about, overwrite=job.overwrite, dry_run=job.dry_run)
    report.skipped = len(standing.finished)
    report.add(dict(standing.counts))
    if job.dry_run:
        report.facts["shards_to_do"] = len(standing.missing)
    elif standing.missing:
        _score(standing.missing, given, out, config, about, model, job, report)
    finished = set(ledger.finished_units(out))
    report.units = [out / f"{unit}.parquet" for unit in given.units if unit in finished]
    report.seconds = time.monotonic() - started
    return report


def resolve_model(config: ScoreConfig) -> str:
    """What open_clip is asked for; ``demo`` is the packaged folder."""
    if config.model != "demo":
        return config.model
    if not (DEMO_MODEL / "open_clip_config.json").exists():
        raise UserError(f"The packaged scoring model is missing at {DEMO_MODEL}. Reinstall clips, or name a --model.")
    return f"{LOCAL}{DEMO_MODEL}"


def model_digest(model: str) -> str:
    """Content of a local model, the name of any other."""
    if not model.startswith(LOCAL):
        return model
    folder = Path(model.removeprefix(LOCAL))
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Name an open_clip model, hf-hub:NAME or local-dir:FOLDER.")
    return ledger.digest_model(folder, (".json", ".safetensors", ".bin", ".pt", ".txt"))


def _score(
    units: list[str],
    given: joined.Inputs,
    out: Path,
    config: ScoreConfig,
    about: dict[str, Any],
    model: str,
    job: Job,
    report: Report,
) -> None:
    from tqdm import tqdm

    scorer = load_scorer(model, config.pretrained, name=config.model)
    left, scored, started = job.limit, 0, time.monotonic()
    with tqdm(unit="image", desc="score", disable=job.quiet or None) as progress:
        for unit in units:
            table = given.table(unit)
            if left is not None and len(table) > left:
                break  # a shard cut by the limit is not finished
            left = None if left is None else left - len(table)
            scores = _score_table(scorer, given.pairs, unit, table, config, progress)
            with ledger.readable_disk_errors(out):
                counts = _commit(out, unit, scores, given.unit_digests(unit), about, scorer)
            report.add(counts)
            report.made += 1
            scored += len(table)
    report.facts["images_per_s"] = round(scored / (time.monotonic() - started), 1)


def _score_table(
    scorer: Scorer, pairs: Path, unit: str, table: pl.DataFrame, config: ScoreConfig, progress: Any
) -> pl.DataFrame:
    """``key``, ``sha256`` and a similarity for each column of the table's rows."""
    import polars as pl

    scores: dict[str, list[float | None]] = {column: [] for column in config.columns}
    images = joined.read_images(pairs, unit, table)
    for first in range(0, len(table), config.batch):
        rows = table.slice(first, config.batch)
        image_NE = scorer.image_features([next(images) for _ in range(len(rows))], rows["key"].to_list())
        for column in config.columns:
            scores[column] += scorer.similarities(image_NE, rows[f"text.{column}"].to_list())
        progress.update(len(rows))
    kinds = dict.fromkeys(config.columns, pl.Float32)
    return table.select("key", "sha256").hstack(pl.DataFrame(scores, schema=kinds))


def _commit(
    out: Path, unit: str, scores: pl.DataFrame, inputs: dict[str, str], about: dict[str, Any], scorer: Scorer
) -> dict[str, int]:
    import pyarrow.parquet as pq

    metadata = {
        "clips_schema_version": str(schema.SCHEMA_VERSION),
        **{name: json.dumps(value) for name, value in about.items() if name in ("pretrained", "model_digest")},
        "model": json.dumps(scorer.name),
        "preprocessing": scorer.preprocessing,
        "precision": json.dumps("bf16 autocast"),
    }
    out.mkdir(parents=True, exist_ok=True)
    table = scores.to_arrow().replace_schema_metadata(metadata)
    pq.write_table(table, ledger.part(out / f"{unit}.parquet"))
    empty = sum(any(value is None for value in row[2:]) for row in scores.iter_rows())
    counts = {"ok": len(scores) - empty, "caption_missing": empty}
    counts = {name: number for name, number in counts.items() if number}
    ledger.commit(out, unit, [f"{unit}.parquet"], inputs=inputs, config=about, counts=counts)
    return counts


@dataclass
class Scorer:
    """A CLIP model with its own preprocessing and tokenizer. Shapes: N images, E features."""

    name: str
    model: Any
    preprocess: Any
    tokenize: Any
    device: str
    preprocessing: str
    """What is done to an image, for the tables' metadata."""

    def image_features(self, images: list[bytes], keys: list[str]) -> Any:
        """Features of any length, float32 [N, E]."""
        import torch

        pixels_NCHW = torch.stack([self._pixels(image, key) for image, key in zip(images, keys, strict=True)])
        with self._inference():
            return self.model.encode_image(pixels_NCHW.to(self.device), normalize=False).float()

    def similarities(self, image_NE: Any, texts: list[str]) -> list[float | None]:
        """The cosine of each image with its text, ``None`` where the text is empty."""
        import torch

        rows = [row for row, text in enumerate(texts) if text]
        found: list[float | None] = [None] * len(texts)
        if rows:
            with self._inference():
                ids = self.tokenize([texts[row] for row in rows]).to(self.device)
                text_ME = self.model.encode_text(ids, normalize=False).float()
                cosines = torch.nn.functional.cosine_similarity(image_NE[rows], text_ME, dim=-1)
            for row, cosine in zip(rows, cosines.tolist(), strict=True):
                found[row] = cosine
        return found

    def _pixels(self, image: bytes, key: str) -> Any:
        import io

        from PIL import Image

        try:
            with Image.open(io.BytesIO(image)) as opened:
                return self.preprocess(opened.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"Image {key} cannot be decoded ({error}). Download its shard again.") from None

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        import torch

        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16):
            yield


def load_scorer(model: str, pretrained: str | None, *, name: str) -> Scorer:
    """Loads a model by stock open_clip. Raises ``UserError`` where that is not installed or refuses the name."""
    try:
        import open_clip
        import torch
    except ImportError as error:
        raise UserError(
            f"clips score needs {error.name}, which is not installed. Install it with: pip install 'clips[train]'"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if pretrained is None and ":" not in model:
        raise UserError(
            f"--model {model} names an architecture without weights. Add --pretrained TAG (open_clip lists the tags), "
            "or use hf-hub:NAME or local-dir:FOLDER."
        )
    try:
        loaded, preprocess = open_clip.create_model_from_pretrained(model, pretrained=pretrained, device=device)
        tokenize = open_clip.get_tokenizer(model)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"open_clip could not load --model {model}: {reason}. Check its name, tag and files."
        ) from error
    loaded.eval()
    about = json.dumps(getattr(loaded.visual, "preprocess_cfg", {}), sort_keys=True, default=str)
    return Scorer(name, loaded, preprocess, tokenize, device, about)
