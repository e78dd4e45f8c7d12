"""Images with a class: a folder for each class, or one folder and a list of labels.

ImageNet's folders are known by their WordNet ids, those of ImageNet-V2 by their numbers, and ObjectNet's by the maps
that it comes with. Any other folder is named as its class is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data.errors import UserError, did_you_mean
from clips_train.evals import list_rows, listed, prompts
from clips_train.evals.collect import Reads, Row, collect
from clips_train.evals.items import DataSet
from clips_train.evals.prompts import ClassNames
from clips_train.use_config import Benchmark

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's ImageFolder, and with it CLIP_benchmark, takes for an image."""
SPLITS: Final = ("test", "val", "validation", "valid", "train")
"""Names of folders that are splits and not classes, in the order in which they are taken."""
FILE_HEADS: Final = ("image", "file", "filename", "file_name", "filepath", "path")
LABEL_HEADS: Final = ("label", "class", "class_name", "cls")
OBJECTNET_FOLDERS: Final = "folder_to_objectnet_label.json"
OBJECTNET_CLASSES: Final = "objectnet_to_imagenet_1k.json"


def open(benchmark: Benchmark) -> DataSet:
    """Items in the order of their paths, or of the list.

    Raises ``UserError`` where there is no image, where a folder or label is none of the classes, or where a listed
    image is missing.
    """
    root = Path(benchmark.data)
    if not root.is_dir():
        raise UserError(f"{root} is no folder. Give the folder of the images of {benchmark.name}.")
    if benchmark.annotations is not None:
        return _listed(benchmark, root)
    if (maps := _objectnet_maps(root)) is not None and benchmark.classes is None:
        return _objectnet(benchmark, root, maps)
    return _foldered(benchmark, root)


# --- a folder for each class ------------------------------------------------------------------------------------------


def _foldered(benchmark: Benchmark, root: Path) -> DataSet:
    root, split = _split_folder(benchmark, root)
    folders, other = _folders(root)
    if not folders:
        raise UserError(
            f"{root} has no folders of classes. Put the images of each class into a folder with its name, or give the "
            "labels of its files with annotations."
        )
    if benchmark.classes is None:
        classes = _named_by_folders(root, folders)
        labels = {folder: label for label, folder in enumerate(folders)}
    else:
        classes = prompts.class_names(benchmark.classes)
        labels = {folder: _label_of_folder(folder, classes, root) for folder in folders}
    rows: list[Row] = []
    for folder in folders:
        found, others = _images(root, folder, labels[folder])
        rows += found
        other += others
    if not rows:
        raise UserError(f"The {len(folders)} folders in {root} hold no images ({', '.join(IMAGE_SUFFIXES)}).")
    about = {"split": split, "classes": classes.source, "num_folders": len(folders), "other_files": other}
    return _collected(benchmark, rows, root, about, classes.names)


def _split_folder(benchmark: Benchmark, root: Path) -> tuple[Path, str | None]:
    """The folder that holds those of the classes, and the split that it is."""
    inside = [name for name in SPLITS if (root / name).is_dir()]
    holds_splits = bool(inside) and all(path.name in SPLITS for path in _subfolders(root))
    if benchmark.split is not None and (root / benchmark.split).is_dir():
        return root / benchmark.split, benchmark.split
    if benchmark.split is not None and holds_splits:
        raise UserError(f"{root} has no split {benchmark.split!r}. {did_you_mean(benchmark.split, inside)}")
    return (root / inside[0], inside[0]) if holds_splits else (root, benchmark.split)


def _subfolders(root: Path) -> list[Path]:
    """Sorted by name; hidden ones are tools' own."""
    return sorted(
        (path for path in root.iterdir() if path.is_dir() and path.name[0] != "."), key=lambda path: path.name
    )


def _folders(root: Path) -> tuple[list[str], int]:
    """Names of the folders in ``root``, and how many files lie beside them."""
    return [path.name for path in _subfolders(root)], sum(path.is_file() for path in root.iterdir())


def _images(root: Path, folder: str, label: int) -> tuple[list[Row], int]:
    """Those anywhere below, in the order in which ImageFolder has them, and the number of other files."""
    paths = sorted(path for path in (root / folder).rglob("*") if path.is_file())
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    return [Row(path.relative_to(root).as_posix(), label=label) for path in images], len(paths) - len(images)


def _collected(
    benchmark: Benchmark, rows: Iterable[Row], root: Path, about: Mapping[str, Any], classes: Sequence[str]
) -> DataSet:
    def reads(keys: Sequence[str]) -> Reads:
        return listed.readers(root, keys, Path(benchmark.annotations or root))

    return collect(benchmark, rows, reads, form="folder", about=about, classes=classes)


def _named_by_folders(root: Path, folders: Sequence[str]) -> ClassNames:
    if all(prompts.is_synset(folder) for folder in folders):
        raise UserError(
            f"The folders in {root} are named by WordNet ids, such as {folders[0]}, which no text tower knows. Set "
            "classes to imagenet, to imagenet-a or imagenet-r for those sets, or to a file with a name a line."
        )
    return ClassNames(tuple(folder.replace("_", " ") for folder in folders), "names of the folders")


def _label_of_folder(folder: str, classes: ClassNames, root: Path) -> int:
    label = classes.label(folder)
    if label is None:
        near = "" if classes.synsets else f"{did_you_mean(folder, classes.names)} "
        raise UserError(
            f"The folder {folder!r} in {root} is none of the {len(classes.names)} classes of {classes.source}. "
            f"{near}Name it by its class, or set other classes."
        )
    return label


# --- ObjectNet --------------------------------------------------------------------------------------------------------


def _objectnet_maps(root: Path) -> Path | None:
    """The folder of ObjectNet's maps, as its archive has it or as CLIP_benchmark copies it."""
    for folder in (root, root / "mappings", root / "objectnet-1.0" / "mappings"):
        if (folder / OBJECTNET_FOLDERS).is_file() and (folder / OBJECTNET_CLASSES).is_file():
            return folder
    return None


def _objectnet(benchmark: Benchmark, root: Path, maps: Path) -> DataSet:
    """The classes that ObjectNet shares with ImageNet, under ObjectNet's own names, as CLIP_benchmark scores them."""
    name_of_folder: dict[str, str] = _map(maps / OBJECTNET_FOLDERS)
    shared: dict[str, Any] = _map(maps / OBJECTNET_CLASSES)
    root = next((path for path in (root / "objectnet-1.0" / "images", root / "images") if path.is_dir()), root)
    present, _ = _folders(root)
    folders = sorted(folder for folder, name in name_of_folder.items() if name in shared)
    rows = [row for label, folder in enumerate(folders) for row in _images(root, folder, label)[0]]
    if not rows:
        raise UserError(
            f"{root} has images in none of ObjectNet's {len(folders)} folders that are classes of ImageNet. "
            "Unpack its archive there."
        )
    about = {
        "split": None,
        "classes": "ObjectNet's own names of the classes that ImageNet has, in lower case",
        "num_folders": len(present),
        "folders_of_other_classes": len(set(present) - set(folders)),
        "border": "the red border of ObjectNet's images is kept, as in CLIP_benchmark",
    }
    return _collected(benchmark, rows, root, about, [name_of_folder[folder].lower() for folder in folders])


# --- one folder and a list --------------------------------------------------------------------------------------------


def _listed(benchmark: Benchmark, root: Path) -> DataSet:
    assert benchmark.annotations is not None
    path = Path(benchmark.annotations)
    words = list(_words(path))
    classes = _classes_of_labels(benchmark, path, [word for _, word in words])
    rows = [Row(file, label=_label(word, classes, path)) for file, word in words]
    about = {"split": benchmark.split, "classes": classes.source, "annotations": benchmark.annotations}
    return _collected(benchmark, rows, root, about, classes.names)


def _words(path: Path) -> Iterator[tuple[str, str]]:
    """File and label of each row of a list with heads, or of each line that ends in a label."""
    if path.suffix in list_rows.SUFFIXES:
        for number, row in enumerate(list_rows.rows(path), start=1):
            where = f"Row {number} of {path}"
            yield _under(FILE_HEADS, "image", row, where), _under(LABEL_HEADS, "label", row, where)
        return
    for number, line in enumerate(listed.text_of(path).splitlines(), start=1):
        words = line.strip().rsplit(maxsplit=1)
        if len(words) == 1:
            raise UserError(f"Line {number} of {path} has no label. Write a file, a space and its label in each line.")
        if words:
            yield words[0], words[1]


def _under(heads: Sequence[str], what: str, row: Mapping[str, Any], where: str) -> str:
    for head in heads:
        if row.get(head) not in (None, ""):
            return str(row[head])
    raise UserError(f"{where} names no {what}; it should stand under one of {', '.join(heads)}.")


def _classes_of_labels(benchmark: Benchmark, path: Path, labels: Sequence[str]) -> ClassNames:
    if benchmark.classes is not None:
        return prompts.class_names(benchmark.classes)
    if labels and all(label.isdecimal() for label in labels):
        raise UserError(
            f"The labels in {path} are numbers, and nothing names their classes. Set classes to imagenet, or to a file "
            "with the name of each class in a line, the first being class 0."
        )
    return ClassNames(tuple(label.replace("_", " ") for label in sorted(set(labels))), "labels of the list")


def _label(word: str, classes: ClassNames, path: Path) -> int:
    label = classes.label(word)
    if label is None:
        raise UserError(
            f"The label {word!r} in {path} is none of the {len(classes.names)} classes of {classes.source}. "
            f"{did_you_mean(word, classes.names)} Numbers count from 0."
        )
    return label


def _map(path: Path) -> dict[str, Any]:
    found = listed.json_of(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold a JSON object.")
    return found
