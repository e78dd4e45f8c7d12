"""CLIP_benchmark's webdataset layout, read in place: the headers of the tars are walked, nothing is extracted.

A folder has ``test/0.tar`` and so on, how many they are in ``test/nshards.txt``, and beside the splits
``dataset_type.txt``, ``classnames.txt`` and ``zeroshot_classification_templates.txt``. Samples have an image and
``.txt``, a caption a line, or ``.cls``, a class from 0. A folder of such tars without these files is read as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from clips_data.errors import UserError, did_you_mean
from clips_train import foreign
from clips_train.evals import listed
from clips_train.evals.collect import Reads, Row, collect
from clips_train.evals.items import DataSet
from clips_train.shards import ShardError, TarFile
from clips_train.use_config import Benchmark

TEST: Final = "test"
NUM_SHARDS, TYPE = "nshards.txt", "dataset_type.txt"
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
RETRIEVAL, CLASSIFICATION = "retrieval", "classification"
IMAGES: Final = ("webp", "png", "jpg", "jpeg")
"""CLIP_benchmark takes the first of these that a sample has."""
TXT, CLS = "txt", "cls"
MAX_TEXT_BYTES: Final = 1 << 26


@dataclass
class Sample:
    """Where the members of one key lie: extension → (offset, bytes)."""

    key: str
    tar: Path
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def image(self) -> tuple[int, int] | None:
        return next((self.places[ext] for ext in IMAGES if ext in self.places), None)


def is_one(root: Path) -> bool:
    """Whether a folder has this layout, or tars at all."""
    return root.is_dir() and (any(root.glob(f"*/{NUM_SHARDS}")) or any(root.glob("*.tar")) or any(root.glob("*/0.tar")))


def open(benchmark: Benchmark) -> DataSet:
    """The samples in the order of their tars.

    Raises ``UserError`` for an absent split or tar, a damaged tar, a data set of another type than the task asks for, a
    class that is no number or has no name, and a sample without a text where texts are asked for.
    """
    root = Path(benchmark.data)
    tars, split = _tars(root, benchmark.split)
    kind = _kind(root, benchmark, tars)
    member = TXT if kind == RETRIEVAL else CLS
    classes = _lines(root / CLASSES) if kind == CLASSIFICATION else []
    templates = _lines(root / TEMPLATES) if kind == CLASSIFICATION else []
    left_out: Counter[str] = Counter()
    sample_of: dict[str, Sample] = {}

    def rows() -> Iterator[Row]:
        for sample in _with_image(_samples(tars), left_out):
            key = f"{sample.tar.name}/{sample.key}"
            sample_of[key] = sample
            text = _text(sample, member)
            if kind == RETRIEVAL:
                yield Row(key, text.splitlines())
            else:
                yield Row(key, label=_label(text, classes, sample))

    def reads(keys: Sequence[str]) -> Reads:
        files = {tar: TarFile(tar) for tar in tars}
        return {key: _reader(files, sample_of[key]) for key in keys}

    return collect(
        benchmark,
        rows(),
        reads,
        form="webdataset",
        about={"split": split, "tars": len(tars), "type": kind},
        left_out=left_out,
        classes=classes,
        templates=templates,
    )


# --- which tars -------------------------------------------------------------------------------------------------------


def _tars(root: Path, split: str | None) -> tuple[list[Path], str | None]:
    """The tars of a split, and its name; a folder of tars has no splits."""
    if root.is_file():
        return [root], split
    splits = sorted({path.parent.name for path in root.glob("*/*.tar")})
    if not splits and any(root.glob("*.tar")):
        return sorted(root.glob("*.tar"), key=_number), split
    name = split or TEST
    if name not in splits:
        raise UserError(f"{root} has no tars of split {name!r}. {did_you_mean(name, splits) if splits else ''}".strip())
    counted = root / name / NUM_SHARDS
    if not counted.is_file():
        return sorted((root / name).glob("*.tar"), key=_number), name
    number = listed.text_of(counted).strip()
    if not number.isascii() or not number.isdigit() or not 0 < int(number) < 1_000_000:
        raise UserError(f"{counted} should be the number of tars, but says {number[:80]!r}. Restore it.")
    tars = [root / name / f"{place}.tar" for place in range(int(number))]
    if absent := [tar.name for tar in tars if not tar.is_file()]:
        raise UserError(
            f"{counted} promises {len(tars)} tars, of which {len(absent)} are not there: {', '.join(absent[:5])}. "
            "Restore them."
        )
    return tars, name


def _number(tar: Path) -> tuple[int, str]:
    return (int(tar.stem) if tar.stem.isascii() and tar.stem.isdigit() else 0, tar.name)


def _kind(root: Path, benchmark: Benchmark, tars: Sequence[Path]) -> str:
    """As ``dataset_type.txt`` says, else as the first sample is."""
    path = root / TYPE
    if path.is_file():
        kind = listed.text_of(path).strip().lower()
        if kind not in (RETRIEVAL, CLASSIFICATION):
            raise UserError(f"{path} says {kind[:80]!r}; clips reads {RETRIEVAL} and {CLASSIFICATION}.")
    else:
        first = next(_samples(tars[:1]), None)
        kind = RETRIEVAL if first is not None and TXT in first.places and CLS not in first.places else CLASSIFICATION
    wanted = CLASSIFICATION if benchmark.task == "zero_shot" else RETRIEVAL
    if benchmark.task is not None and kind != wanted:
        raise UserError(
            f"{root} is a data set for {kind}, and the benchmark {benchmark.name} is of the task {benchmark.task}. "
            f"Give it another task, or write {wanted} into {path} where its tars are so."
        )
    return kind


def _lines(path: Path) -> list[str]:
    """Stripped, as CLIP_benchmark does; none where there is no file."""
    return [line.strip() for line in listed.text_of(path).splitlines()] if path.is_file() else []


# --- what is in them --------------------------------------------------------------------------------------------------


def _samples(tars: Sequence[Path]) -> Iterator[Sample]:
    """Grouped as webdataset does it: members that follow one another and agree up to the first dot of the name."""
    for tar in tars:
        sample: Sample | None = None
        with tar.open("rb") as file:
            for member in foreign.members(file, tar):
                name = foreign.MEMBER_NAME.fullmatch(member.name)
                if name is None or not member.isreg():
                    continue
                if sample is None or name[1] != sample.key:
                    if sample is not None:
                        yield sample
                    sample = Sample(name[1], tar)
                if sample.places.setdefault(name[2].lower(), place := (member.offset_data, member.size)) != place:
                    raise UserError(f"{tar} has the member {member.name!r} twice. Leave one of them out.")
        if sample is not None:
            yield sample


def _with_image(samples: Iterator[Sample], left_out: Counter[str]) -> Iterator[Sample]:
    for sample in samples:
        if sample.image is None:
            left_out["samples.without_image"] += 1
        else:
            yield sample


def _text(sample: Sample, ext: str) -> str:
    if ext not in sample.places:
        raise UserError(
            f"{sample.tar}: the sample {sample.key!r} has no .{ext} but {', '.join(sorted(sample.places))}. "
            "Complete it or leave it out."
        )
    offset, num_bytes = sample.places[ext]
    if num_bytes > MAX_TEXT_BYTES:
        raise UserError(f"{sample.tar}: {sample.key}.{ext} has {num_bytes} bytes, which is no text. Leave it out.")
    try:
        return TarFile(sample.tar).read(offset, num_bytes).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{sample.tar}: {sample.key}.{ext} is no UTF-8 text ({error}). Mend it.") from None


def _label(text: str, classes: Sequence[str], sample: Sample) -> int:
    number = text.strip()
    if not number.isascii() or not number.isdigit():
        raise UserError(f"{sample.tar}: {sample.key}.{CLS} is {number[:80]!r} and no class from 0. Mend it.")
    if classes and int(number) >= len(classes):
        raise UserError(
            f"{sample.tar}: {sample.key}.{CLS} is class {int(number)}, but {CLASSES} names {len(classes)}. Mend either."
        )
    return int(number)


def _reader(files: Mapping[Path, TarFile], sample: Sample) -> listed.Sized:
    offset, num_bytes = sample.image or (0, 0)
    return listed.Sized(partial(_read, files[sample.tar], offset, num_bytes), num_bytes)


def _read(tar: TarFile, offset: int, num_bytes: int) -> bytes:
    try:
        return tar.read(offset, num_bytes)
    except ShardError as error:
        raise OSError(error.reason) from error
