"""Training samples as tars for other trainers: open_clip's, with a chosen text, and those of DataCompDR."""

from __future__ import annotations

import json
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from clips_data import tars
from clips_data.errors import UserError
from clips_data.shard_samples import Shards, TrainingSample

if TYPE_CHECKING:
    from clips_data.mixing import Mix


# --- open_clip --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The text of each sample: a mix of the columns, drawn as ``clips shard`` and the trainer's loader draw it."""

    mix: Mix
    seed: int
    epoch: int

    @classmethod
    def of(cls, rules: Sequence[str], shards: Shards, epoch: int) -> Chosen:
        from clips_data.mixing import Mix

        return cls(Mix.parse(rules, columns=shards.columns), shards.index["mix"]["seed"], epoch)


def check(sample: TrainingSample, path: Path) -> str:
    """The outcome to count of a sample that open_clip can train on as it is: ``ok``.

    Raises ``UserError`` for an empty text; that columns are strings and images the promised ones was seen to before.
    """
    if not sample.text.strip():
        raise UserError(f"{path}: sample {sample.key} has an empty .txt, which open_clip would train on as a caption.")
    return "ok"


def write_open_clip(samples: Iterable[TrainingSample], chosen: Chosen, path: Path) -> Counter[str]:
    """The same images and ``.json`` members, ``.txt`` and ``provenance.txt`` as chosen. Returns samples by outcome."""
    counts: Counter[str] = Counter()
    with path.open("wb") as file:
        writer = tars.TarWriter(file)
        for sample in samples:
            choice = chosen.mix.choose(
                seed=chosen.seed, epoch=chosen.epoch, key=sample.key, texts=sample.texts, scores=sample.scores
            )
            counts[choice.outcome] += 1
            if choice.column is None:
                raise _no_caption(sample)
            about = {**sample.about, "provenance": {**sample.provenance, "txt": choice.column}}
            writer.add(f"{sample.key}.{sample.image_ext}", sample.image)
            writer.add(f"{sample.key}.txt", sample.texts[choice.column].encode())
            writer.add(f"{sample.key}.json", _json(about, sort_keys=True))
        writer.close()
    return counts


def training_lines(shards: Shards, out: Path) -> list[str]:
    """The command that trains open_clip on the view, its paths and sizes filled in."""
    words = ["python", "-m", "open_clip_train.main", "--dataset-type", "webdataset"]
    for split, option in (("train", "train"), ("heldout", "val")):
        tars = [tar for tar in shards.tars if tar.split == split]
        if tars:
            words += [f"--{option}-data", f"{out.resolve()}/{split}-{_braced([tar.unit for tar in tars])}.tar"]
            words += [f"--{option}-num-samples", str(sum(tar.num_samples for tar in tars))]
    return ["to train on them:", shlex.join([*words, "--model", "ViT-B-32"])]


def _braced(units: Sequence[str]) -> str:
    """The numbers at the ends of the names, as webdataset expands them: ``{00000..00003}`` or ``{00000,00002}``."""
    numbers = [unit.rpartition("-")[2] for unit in units]
    if len(numbers) == 1:
        return numbers[0]
    whole = int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1
    return f"{{{numbers[0]}..{numbers[-1]}}}" if whole else f"{{{','.join(numbers)}}}"


# --- DataCompDR -------------------------------------------------------------------------------------------------------


def write_datacompdr(
    samples: Iterable[TrainingSample], columns: Sequence[str], synthetic: Sequence[str], path: Path
) -> Counter[str]:
    """Tars with the members of DataCompDR, less its teachers' embeddings. Returns samples by outcome.

    ``<key>.url.txt``, the image, ``.txt`` (the web caption), ``.syn.json`` (``{"syn_text": [...]}``, usable captions of
    ``synthetic`` in that order) and ``.json`` (``uid``, ``sha256``), as apple/ml-mobileclip-dr writes them and the
    published set has them. Its trainer draws one of ``syn_text`` and reads ``.txt``, so neither may be empty: where
    one is, the first caption that there is stands in, and is counted.
    """
    counts: Counter[str] = Counter()
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            first = next((text for column in columns if (text := sample.texts[column])), None)
            if first is None:
                raise _no_caption(sample)
            said = [text for column in synthetic if (text := sample.texts[column])]
            web = sample.texts[columns[0]]
            missing = [name for name, there in (("web", web), ("synthetic", said)) if not there]
            counts[f"no_{missing[0]}_caption" if missing else "ok"] += 1
            _add(tar, f"{sample.key}.json", _json({"uid": sample.key, "sha256": sample.sha256}))
            if url := sample.provenance.get("url"):
                _add(tar, f"{sample.key}.url.txt", url.encode())
            if sample.image:
                _add(tar, f"{sample.key}.{sample.image_ext}", sample.image)
            _add(tar, f"{sample.key}.txt", (web or first).encode())
            _add(tar, f"{sample.key}.syn.json", _json({"syn_text": said or [first]}))
    return counts


def _no_caption(sample: TrainingSample) -> UserError:
    return UserError(
        f"Sample {sample.key} has no caption in any column, and `clips shard` writes no such sample: its tar was "
        "changed. Make the shards again."
    )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member with fixed metadata; our own writer refuses names with two dots."""
    about = tarfile.TarInfo(name)
    about.size, about.mode, about.mtime = len(data), 0o644, 0
    tar.addfile(about, BytesIO(data))


def _json(value: object, *, sort_keys: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys).encode()
