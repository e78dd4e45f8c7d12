"""``clips score``: how well each caption fits its image, as the cosine similarity of one CLIP model's features.

Beside it, where asked for: of each sentence, how far other captions bear a caption out (``support``), which captions
nearly repeat an earlier one (``near_duplicates``); and always what a caption looks like (``caption_flags``). Labels of
other models take the place of all this (``labels``).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import (
    caption_flags,
    duplicates,
    executor,
    joined,
    labels,
    ledger,
    locks,
    near_duplicates,
    schema,
    score_table,
    split,
    support,
)
from clips_data.config import ScoreConfig
from clips_data.errors import UserError
from clips_data.executor import Job, Report

if TYPE_CHECKING:
    import polars as pl

DEMO_MODEL: Final = Path(__file__).parent / "demo" / "weights" / "clip"
LOCAL: Final = "local-dir:"
RUN: Final = "clips-run:"
"""Before the folder of a checkpoint of ours, in what ``resolve_model`` returns."""
IN_DIGEST: Final = {"pretrained", "columns", "batch", "sentences", "support"}  # the model counts by its digest
MODEL_FILES: Final = (".json", ".safetensors", ".bin", ".pt", ".txt")


def run(config: ScoreConfig, job: Job) -> Report:
    """Scores the shards of ``pairs/`` that are not scored yet.

    Writes per shard ``key, sha256`` and the fields that ``score_table`` names, null where the caption is empty or the
    image was marked as repeating an earlier one. Raises ``UserError`` when torch, the model or a caption column is
    missing, and for columns that are none or named twice.
    """
    if config.labels is not None:
        return labels.run(config, job)
    _check_columns(config.columns)
    started = time.monotonic()
    units = tuple(sorted({path.stem for path in job.only})) if job.only is not None else None
    given = joined.open_inputs(job.work, config.columns, units=units)
    out = job.out or job.work / schema.SCORES / config.name
    model = resolve_model(config)
    about = {**config.model_dump(mode="json", include=IN_DIGEST), "model_digest": model_digest(model)}
    left_out = duplicates.left_out(given.pairs, ledger.finished_units(given.pairs))
    report = Report("score")
    inputs_of = {unit: given.unit_digests(unit) for unit in executor.slice_of(given.units, job.slice)}
    if not job.dry_run:
        _forget_unmarked(out, left_out, list(inputs_of))
    standing = ledger.stand(out, inputs_of, about, overwrite=job.overwrite, dry_run=job.dry_run)
    report.skipped = len(standing.finished)
    report.add(dict(standing.counts))
    if job.dry_run:
        report.facts["shards_to_do"] = len(standing.missing)
    elif standing.missing:
        with locks.alone(out, "scoring", job.slice):
            _score(standing.missing, given, left_out, out, config, about, model, job, report)
    if config.near_duplicates and not job.dry_run:
        near_duplicates.write(given, left_out, config.columns, out, report)
    finished = set(ledger.finished_units(out))
    report.units = [out / f"{unit}.parquet" for unit in given.units if unit in finished]
    report.seconds = time.monotonic() - started
    return report


def _check_columns(columns: Sequence[str]) -> None:
    if not columns:
        raise UserError("There is nothing to score: --columns names no caption column. Name one, for example web.")
    if repeated := [column for place, column in enumerate(columns) if column in columns[:place]]:
        raise UserError(f"--columns has {repeated[0]!r} more than once. Name each column once.")


def resolve_model(config: ScoreConfig) -> str:
    """What ``load_scorer`` is asked for: ``demo`` is the packaged folder, a run's folder means its newest checkpoint.

    A folder that open_clip can load may be named with or without ``local-dir:``.
    """
    from clips_data.recaption import choose

    if config.model == "demo":
        if not (DEMO_MODEL / "open_clip_config.json").exists():
            raise UserError(f"The packaged scoring model is missing at {DEMO_MODEL}. Reinstall clips, or use --model.")
        return f"{LOCAL}{DEMO_MODEL}"
    folder = Path(config.model.removeprefix(LOCAL))
    if choose.is_clips_run(folder):
        return f"{RUN}{choose.model_path(str(folder))}"
    return f"{LOCAL}{folder}" if (folder / "open_clip_config.json").is_file() else config.model


def model_digest(model: str) -> str:
    """Content of a local model, the name of any other."""
    kind = next((kind for kind in (LOCAL, RUN) if model.startswith(kind)), None)
    if kind is None:
        return model
    folder = Path(model.removeprefix(kind))
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}. Name an open_clip model, hf-hub:NAME, a run or local-dir:FOLDER."
        )
    return ledger.digest_model(folder, (".json", ".safetensors") if kind == RUN else MODEL_FILES)


def _forget_unmarked(out: Path, left_out: dict[str, pl.Series], units: Sequence[str]) -> None:
    """Units with rows that were passed over as duplicates and are none any more are missing work again."""
    for unit in units:
        sidecar = ledger.read_sidecar(out, unit, check_files=False)
        if sidecar is not None and sidecar.counts.get("duplicate", 0) > len(left_out.get(unit, ())):
            ledger.forget_unit(out, unit)


# --- one shard --------------------------------------------------------------------------------------------------------


def _score(
    units: list[str],
    given: joined.Inputs,
    left_out: dict[str, pl.Series],
    out: Path,
    config: ScoreConfig,
    about: dict[str, Any],
    model: str,
    job: Job,
    report: Report,
) -> None:
    from tqdm import tqdm

    scorer = load_scorer(model, config.pretrained, name=config.model)
    metadata = {
        **{name: json.dumps(about[name]) for name in ("pretrained", "model_digest")},
        "model": json.dumps(scorer.name),
        "preprocessing": scorer.preprocessing,
        "precision": json.dumps("bf16 autocast"),
    }
    left, scored, started = job.limit, 0, time.monotonic()
    with tqdm(unit="image", desc="score", disable=job.quiet or None) as progress:
        for unit in units:
            table = given.table(unit)
            if left is not None and len(table) > left:
                break  # a shard cut by the limit is not finished
            left = None if left is None else left - len(table)
            kept = table if unit not in left_out else table.filter(~table["key"].is_in(left_out[unit].implode()))
            scores = _score_table(scorer, given.pairs, unit, kept, config, progress)
            if len(kept) < len(table):
                scores = table.select("key", "sha256").join(
                    scores.drop("sha256"), on="key", how="left", maintain_order="left"
                )
            inputs = given.unit_digests(unit)
            report.add(score_table.commit(out, unit, scores, metadata=metadata, inputs=inputs, config=about))
            report.made += 1
            scored += len(kept)
    report.facts["images_per_s"] = round(scored / (time.monotonic() - started), 1)


def _score_table(
    scorer: Scorer, pairs: Path, unit: str, table: pl.DataFrame, config: ScoreConfig, progress: Any
) -> pl.DataFrame:
    """``key``, ``sha256`` and the fields of ``score_table`` for the table's rows."""
    import polars as pl

    kinds = score_table.fields(config.columns, sentences=config.sentences, support=config.support > 0)
    values: dict[str, list[Any]] = {name: [] for name in kinds}
    features: dict[str, list[Any]] = {name: [] for name in ("", *config.columns)}  # "" has those of the images
    for rows, image_NE in _with_features(scorer, pairs, unit, table, config.batch):
        for column in config.columns:
            texts = rows[f"text.{column}"].to_list()
            values[column] += scorer.similarities(image_NE, texts)
            values[column + score_table.FLAGS] += map(caption_flags.flags, texts)
            if config.sentences:
                of_each = _sentence_scores(scorer, image_NE, texts, config.batch)
                values[column + score_table.SENTENCES] += of_each
                values[column + score_table.MIN_SENTENCE] += [min(scores) if scores else None for scores in of_each]
            if config.support:
                features[column].append(scorer.text_features(texts).cpu().numpy())
        if config.support:
            features[""].append(image_NE.cpu().numpy())
        progress.update(len(rows))
    if config.support and len(table):
        for column in config.columns:
            values[column + score_table.SUPPORT] = _supports(features, column, table, config.support)
    return table.select("key", "sha256").hstack(pl.DataFrame(values, schema=kinds))


def _with_features(
    scorer: Scorer, pairs: Path, unit: str, table: pl.DataFrame, batch: int
) -> Iterator[tuple[pl.DataFrame, Any]]:
    """The rows of each batch with their images' features, made one batch ahead of what is asked for."""
    images = joined.read_images(pairs, unit, table)
    ahead: list[tuple[pl.DataFrame, Any]] = []
    with ThreadPoolExecutor(1) as worker:
        for first in range(0, len(table), batch):
            rows = table.slice(first, batch)
            data = [next(images) for _ in range(len(rows))]
            ahead.append((rows, worker.submit(scorer.image_features, data, rows["key"].to_list())))
            if len(ahead) > 1:
                done, features = ahead.pop(0)
                yield done, features.result()
        for done, features in ahead:
            yield done, features.result()


def _sentence_scores(scorer: Scorer, image_NE: Any, texts: list[str], batch: int) -> list[list[float] | None]:
    """The cosine of each of a text's sentences; ``None`` without text. What has no sentence is one as a whole."""
    pieces: list[tuple[int, str]] = []
    for row, text in enumerate(texts):
        spans = split.split(text, "sentence") or ([(0, len(text))] if text else [])
        pieces += [(row, text[start:end]) for start, end in spans]
    found: list[list[float] | None] = [[] if text else None for text in texts]
    for first in range(0, len(pieces), batch):
        some = pieces[first : first + batch]
        cosines = scorer.similarities(image_NE[[row for row, _ in some]], [piece for _, piece in some])
        for (row, _), cosine in zip(some, cosines, strict=True):
            scores = found[row]
            assert scores is not None and cosine is not None
            scores.append(cosine)
    return found


def _supports(features: dict[str, list[Any]], column: str, table: pl.DataFrame, count: int) -> list[float | None]:
    import numpy as np

    texts = table[f"text.{column}"].to_list()
    return support.supports(np.concatenate(features[""]), np.concatenate(features[column]), texts, count)


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass
class Scorer:
    """A CLIP model with its own preprocessing and tokenizer. Shapes: N images or texts, E features."""

    name: str
    model: Any
    preprocess: Any
    read: Any
    """Texts → features."""
    device: str
    preprocessing: str
    """What is done to an image, for the tables' metadata."""

    def image_features(self, images: list[bytes], keys: list[str]) -> Any:
        """Features of any length, float32 [N, E]."""
        import torch

        pixels_NCHW = torch.stack([self._pixels(image, key) for image, key in zip(images, keys, strict=True)])
        with self._inference():
            return self.model.encode_image(pixels_NCHW.to(self.device), normalize=False).float()

    def text_features(self, texts: list[str]) -> Any:
        """Features of any length, float32 [N, E]."""
        with self._inference():
            return self.read(texts).float()

    def similarities(self, image_NE: Any, texts: list[str]) -> list[float | None]:
        """The cosine of each image with its text, ``None`` where the text is empty."""
        import torch

        rows = [row for row, text in enumerate(texts) if text]
        found: list[float | None] = [None] * len(texts)
        if rows:
            text_ME = self.text_features([texts[row] for row in rows])
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
    """Loads what ``resolve_model`` returns: a run of ours, or any model by stock open_clip.

    Raises ``UserError`` where open_clip is not installed or refuses the name.
    """
    try:
        import open_clip
        import torch
    except ImportError as error:
        raise UserError(
            f"clips score needs {error.name}, which is not installed. Install it with: pip install 'clips[train]'"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if model.startswith(RUN):
        return _load_run(Path(model.removeprefix(RUN)), name, device)
    if pretrained is None and ":" not in model:
        raise UserError(
            f"--model {model} names an architecture without weights. Add --pretrained TAG (open_clip lists the tags), "
            "or use hf-hub:NAME, local-dir:FOLDER or the folder of a run of yours."
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
    return Scorer(
        name,
        loaded,
        preprocess,
        lambda texts: loaded.encode_text(tokenize(texts).to(device), normalize=False),
        device,
        about,
    )


def _load_run(folder: Path, name: str, device: str) -> Scorer:
    """A checkpoint of ``clips train``, with the preprocessing that its export has too."""
    from clips_train import generate, transforms

    trained = generate.load_trained(folder, device)
    side_px = trained.config.image_px
    about = {
        "size": [side_px, side_px], "resize_mode": transforms.RESIZE_MODE, "interpolation": transforms.INTERPOLATION,
        "mean": transforms.IMAGE_MEAN, "std": transforms.IMAGE_STD,
    }  # fmt: skip
    return Scorer(
        name,
        trained.model.towers,
        lambda image: transforms.normalise(transforms.squash(image, side_px)),
        lambda texts: trained.encode_texts(texts)[0],
        device,
        json.dumps(about, sort_keys=True),
    )
