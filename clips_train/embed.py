"""``clips embed``: the features of teachers for augmented images and for captions, stored beside the shards.

A training run can then distil from large teachers without running them (MobileCLIP, RECIPES §1.3). An augmentation is
what ``transforms.training_view`` draws for (seed, number of the augmentation, key), so nothing of it need be stored:
the training run draws the same again. Several teachers are one: their unit features stand side by side.

Shape suffixes: R rows of a chunk, A augmentations, N images, C channels, H and W pixels, E width of all teachers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_data.schema import SCHEMA_VERSION
from clips_train import encoders, features
from clips_train.embed_load import Chunk, Loader, Task, loaded
from clips_train.encoders import Encoder
from clips_train.features import IMAGE, TEXT, THERE, FeatureWriter
from clips_train.shards import ShardReader, Split, open_split
from clips_train.use_config import EmbedConfig

IN_CONFIG = {"columns", "num_augmentations", "augment", "seed", "precision"}
"""What makes other features, beside the teachers themselves."""
NO_CAPTION, OK = "caption_missing", "ok"


@dataclass
class Embedded:
    """What a call did."""

    files: list[Path] = field(default_factory=list)
    """Of all finished shards that were asked for, in their order."""
    made: int = 0
    skipped: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by outcome: ``ok``, ``caption_missing`` (in some column), or why there is no image."""
    facts: dict[str, float | int | str] = field(default_factory=dict)


def embed(
    config: EmbedConfig,
    *,
    shards: Path,
    out: Path,
    runs: Path,
    only: Sequence[str] | None = None,
    part: tuple[int, int] = (0, 1),
    limit: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Embedded:
    """Stores the features of the shards that have none yet, one file each, under ``out``.

    ``only`` names the tars to do, without ending; ``part`` is the i-th of n slices of them; ``limit`` is the number of
    rows after which to stop, before a shard that has more. ``runs`` is where ``run:NAME`` is looked for. Raises
    ``ResumeRefused`` when finished files were made of other shards, by other teachers or another config, ``UserError``
    for columns and models that are not there.
    """
    split = open_split(shards, config.split)
    _check_columns(config, split)
    teachers = encoders.find(config.model, config.pretrained, runs)
    about = {**config.model_dump(mode="json", include=IN_CONFIG), "teachers": [named.digest for named in teachers]}
    inputs_of = split.inputs_by_unit
    units = [unit for unit in inputs_of if only is None or unit in only][part[0] :: part[1]]
    asked = {unit: inputs_of[unit] for unit in units}
    standing = ledger.stand(out, asked, about, overwrite=overwrite, dry_run=dry_run)
    done = Embedded(skipped=len(standing.finished), counts=Counter(standing.counts))
    missing = _within(limit, standing.missing, split)
    if dry_run:
        done.facts["shards_to_do"] = len(missing)
        return done
    with ledger.readable_disk_errors(out):
        if missing:
            out.mkdir(parents=True, exist_ok=True)
            work = _Work(
                split, config, [encoders.load(named, config.device, config.precision) for named in teachers], out
            )
            started = time.monotonic()
            for counts in work.do(missing, asked, about, quiet=quiet):
                done.made += 1
                done.counts.update(counts)
            done.facts["augmented_images_per_s"] = round(work.num_pictures / (time.monotonic() - started), 1)
        _write_index(out, split, config, about, inputs_of)
    finished = set(ledger.finished_units(out))
    done.files = [out / (unit + features.SUFFIX) for unit in units if unit in finished]
    return done


def _check_columns(config: EmbedConfig, split: Split) -> None:
    for column in config.columns:
        if column not in split.columns:
            raise UserError(
                f"The shards in {split.folder} have no column {column!r}. {did_you_mean(column, split.columns)} "
                "Name others with --columns, or make shards with that one."
            )


def _within(limit: int | None, units: Sequence[str], split: Split) -> list[str]:
    """The first units whose rows are within the limit together. Raises ``UserError`` where not even one is."""
    if limit is None:
        return list(units)
    num_rows = dict(zip(split.inputs_by_unit, split.num_samples_by_shard, strict=True))
    kept = []
    for unit in units:
        limit -= num_rows[unit]
        if limit < 0:
            break
        kept.append(unit)
    if units and not kept:
        raise UserError(
            f"limit {limit + num_rows[units[0]]} is less than the {num_rows[units[0]]} samples of {units[0]}, and only "
            "whole shards are embedded. Give a larger one, or none."
        )
    return kept


# --- embedding --------------------------------------------------------------------------------------------------------


class _Work:
    """Embeds shard after shard into files of their own."""

    def __init__(self, split: Split, config: EmbedConfig, teachers: Sequence[Encoder], out: Path) -> None:
        self._split, self._config, self._teachers, self._out = split, config, teachers, out
        self._dtype = features.TYPES[config.precision]
        self._width = sum(teacher.width for teacher in teachers)
        self.num_pictures = 0

    def do(
        self, units: Sequence[str], inputs_of: Mapping[str, Mapping[str, str]], about: Mapping[str, Any], *, quiet: bool
    ) -> Iterator[Counter[str]]:
        """Yields the rows by outcome of each unit, once it is finished."""
        number_of = {name.removesuffix(".tar"): number for number, name in enumerate(self._split.files)}
        rows_of = {unit: self._split.num_samples_by_shard[number_of[unit]] for unit in units}
        tasks = [task for unit in units for task in self._tasks(number_of[unit], rows_of[unit])]
        loader = Loader(self._split, self._config, [teacher.image_px for teacher in self._teachers])
        chunks = loaded(loader, tasks, self._config.num_workers)
        with tqdm(total=sum(rows_of.values()), unit="image", desc="embed", disable=quiet or None, mininterval=1) as bar:
            for unit in units:
                file = _UnitFile(self, unit, number_of[unit], rows_of[unit])
                try:
                    while file.num_rows_left:
                        chunk = next(chunks)
                        file.add(chunk)
                        bar.update(len(chunk.keys))
                    file.finish()
                finally:
                    file.close()
                name = unit + features.SUFFIX
                ledger.commit(self._out, unit, [name], inputs=inputs_of[unit], config=about, counts=file.counts)
                yield file.counts
        left_over = next(chunks, None)  # lets the workers end
        assert left_over is None, left_over

    def _tasks(self, shard: int, num_rows: int) -> Iterator[Task]:
        step = max(1, self._config.batch // self._config.num_augmentations)
        for first in range(0, num_rows, step):
            yield Task(shard, first, min(first + step, num_rows))

    def image_features(self, pixels_NCHW: Mapping[int, Tensor]) -> Tensor:
        """Float32 [N, E]."""
        parts = []
        for teacher in self._teachers:
            batches = pixels_NCHW[teacher.image_px].split(self._config.batch)
            parts.append(torch.cat([teacher.image_features(batch).cpu() for batch in batches]))
        self.num_pictures += len(parts[0])
        return torch.cat(parts, dim=1)

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Float32 [N, E]; NaN where there is no caption."""
        there = [row for row, text in enumerate(captions) if text]
        found = torch.full((len(captions), self._width), torch.nan)
        for first in range(0, len(there), self._config.batch):
            rows = there[first : first + self._config.batch]
            some = [captions[row] for row in rows]
            found[rows] = torch.cat([teacher.text_features(some).cpu() for teacher in self._teachers], dim=1)
        return found

    def open_file(self, unit: str, shard: int, num_rows: int) -> tuple[FeatureWriter, list[str]]:
        reader = ShardReader(self._split)
        keys = [reader.key(shard, row) for row in range(num_rows)]
        tensors = features.layout(
            keys,
            self._config.columns,
            num_augmentations=self._config.num_augmentations,
            width=self._width,
            dtype=self._dtype,
        )
        about = {"teachers": json.dumps([teacher.about for teacher in self._teachers], sort_keys=True)}
        path = ledger.part(self._out / (unit + features.SUFFIX))
        return FeatureWriter(path, tensors, about), keys


class _UnitFile:
    """The file of one shard while it is being filled. Captions wait for its end, to be embedded in whole batches."""

    def __init__(self, work: _Work, unit: str, shard: int, num_rows: int) -> None:
        self._work = work
        self._writer, self._keys = work.open_file(unit, shard, num_rows)
        self._captions: dict[str, list[str]] = {column: [] for column in work._config.columns}
        self._reasons: list[str | None] = []
        self.num_rows_left = num_rows
        self.counts: Counter[str] = Counter()

    def add(self, chunk: Chunk) -> None:
        image_NE = self._work.image_features(chunk.pixels_NCHW)
        image_RAE = image_NE.unflatten(0, (len(chunk.keys), -1))
        image_RAE[[row for row, reason in enumerate(chunk.reasons) if reason]] = torch.nan
        self._writer.write(IMAGE, chunk.task.first_row, image_RAE)
        for column, texts in chunk.captions.items():
            self._captions[column] += texts
        self._reasons += chunk.reasons
        self.num_rows_left -= len(chunk.keys)

    def finish(self) -> None:
        """Writes all that is not images."""
        self._writer.write_keys(self._keys)
        self._writer.write(THERE + IMAGE, 0, torch.tensor([reason is None for reason in self._reasons]))
        for column, texts in self._captions.items():
            self._writer.write(TEXT + column, 0, self._work.text_features(texts))
            self._writer.write(THERE + column, 0, torch.tensor([bool(text) for text in texts]))
        for row, reason in enumerate(self._reasons):
            is_whole = all(texts[row] for texts in self._captions.values())
            self.counts[reason or (OK if is_whole else NO_CAPTION)] += 1

    def close(self) -> None:
        self._writer.close()


# --- the index --------------------------------------------------------------------------------------------------------


def _write_index(
    out: Path, split: Split, config: EmbedConfig, about: Mapping[str, Any], inputs_of: Mapping[str, Mapping[str, str]]
) -> None:
    """Once all shards of the split are finished, by whichever slice finishes last.

    Raises ``ResumeRefused`` when one of them is of other shards, or was made by another config.
    """
    for unit, inputs in inputs_of.items():
        if not ledger.is_done(out, unit, inputs=inputs, config=about, overwrite=False):
            return
    made_by = {"columns": list(config.columns), **{name: about[name] for name in IN_CONFIG - {"columns"}}}
    known = _index(out)
    splits: dict[str, Any] = {}
    if known.get("shards") == split.digest and all(known.get(name) == value for name, value in made_by.items()):
        splits |= known["splits"]
    splits[split.name] = {
        "num_samples": split.num_samples,
        "files": [unit + features.SUFFIX for unit in inputs_of],
    }
    index = {
        "schema_version": SCHEMA_VERSION,
        "shards": split.digest,
        **made_by,
        "teachers": _teachers_of(out, next(iter(inputs_of), None)),
        "splits": splits,
    }
    if index != known:
        ledger.write_json(out / features.INDEX_FILE, index)


def _index(out: Path) -> dict[str, Any]:
    """The index that is there, or an empty one."""
    return features.read_index(out) if (out / features.INDEX_FILE).is_file() else {}


def _teachers_of(out: Path, unit: str | None) -> list[dict[str, Any]]:
    """What a finished file says of the teachers, so that an index needs no model."""
    from safetensors import safe_open

    if unit is None:
        return []
    with safe_open(out / (unit + features.SUFFIX), "pt") as file:
        found: list[dict[str, Any]] = json.loads(file.metadata()["teachers"])
    return found
