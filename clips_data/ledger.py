"""The commit protocol: the only code that makes a finished file appear.

A unit of work (a shard, a checkpoint, a report) is written as ``NAME.part`` files in its target folder. ``commit``
flushes them to disk, renames them, and writes the sidecar ``UNIT.done.json`` last. Readers accept only what a sidecar
names, so a kill at any point leaves either a finished unit or orphans that the next run overwrites. Long work inside a
unit goes through a journal (``journal.py``), an append-only file that is flushed to disk per batch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clips_data.errors import ResumeRefused, UserError
from clips_data.schema import SCHEMA_VERSION

PART = ".part"
SIDECAR = ".done.json"
WHOLE_FILE_BYTES = 64 << 20


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_model(folder: Path, suffixes: tuple[str, ...]) -> str:
    """Tells a model's folder from others: small files by their content, large ones by their size and three pieces."""
    about: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in suffixes:
            size = path.stat().st_size
            name = path.relative_to(folder).as_posix()
            about[name] = digest_file(path) if size <= WHOLE_FILE_BYTES else [size, _digest_pieces(path, size)]
    return digest_json(about)


def _digest_pieces(path: Path, size_bytes: int) -> str:
    """Of the first, middle and last MiB: other weights of one shape differ everywhere."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, size_bytes // 2, size_bytes - (1 << 20)):
            file.seek(start)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of the canonical JSON text of ``value``: equal values have equal digests, whatever their key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return digest_bytes(text.encode())


def part(path: Path) -> Path:
    """Where the bytes of ``path`` are written before they are committed."""
    return path.with_name(path.name + PART)


@dataclass(frozen=True)
class Sidecar:
    """What ``UNIT.done.json`` says about a finished unit of work.

    ``files`` maps file names to ``{"bytes", "sha256"}``, ``inputs`` maps input names to digests, ``config`` is the
    resolved config that made the unit, ``counts`` counts its rows by outcome.
    """

    unit: str
    files: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str]
    config: Mapping[str, Any]
    counts: Mapping[str, int]
    tool_version: str

    @property
    def digest(self) -> str:
        """Identifies the unit's content for the stages to the right."""
        return digest_json({name: about["sha256"] for name, about in sorted(self.files.items())})


def sidecar_path(folder: Path, unit: str) -> Path:
    return folder / (unit + SIDECAR)


def read_sidecar(folder: Path, unit: str, *, check_files: bool = True) -> Sidecar | None:
    """The sidecar of ``unit``, or ``None`` when the unit is not finished.

    Raises ``UserError`` for a sidecar that is damaged or has an unknown schema or, with ``check_files``, when its files
    are missing or have another size.
    """
    path = sidecar_path(folder, unit)
    if not path.exists():
        return None
    try:
        content = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from None
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this version of clips reads {SCHEMA_VERSION}. "
            "Use the clips version that wrote it, or make the folder again."
        )
    try:
        sidecar = Sidecar(**content)
        for name, about in sidecar.files.items():
            if Path(name).name != name or not isinstance(about["bytes"], int) or not isinstance(about["sha256"], str):
                raise ValueError(f"{name!r} is no file beside it")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from None
    if check_files:
        _check_files(folder, sidecar)
    return sidecar


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a sidecar that clips wrote ({error}). Restore it, or delete it to make this unit again."
    )


def _check_files(folder: Path, sidecar: Sidecar) -> None:
    path = sidecar_path(folder, sidecar.unit)
    for name, about in sidecar.files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != about["bytes"]:
            found = f"{file.stat().st_size} bytes" if file.exists() else "nothing"
            raise UserError(
                f"{path} promises {name} with {about['bytes']} bytes, but {found} is there. "
                f"Restore the file, or delete {path.name} to make this unit again."
            )


def finished_units(folder: Path) -> list[str]:
    """Names of the units in ``folder`` that have a sidecar, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path.name.removesuffix(SIDECAR) for path in folder.glob("*" + SIDECAR))


def digests_of(folder: Path) -> dict[str, str]:
    """The digest of every finished unit."""
    found = {}
    for unit in finished_units(folder):
        sidecar = read_sidecar(folder, unit)
        assert sidecar is not None
        found[unit] = sidecar.digest
    return found


def is_done(
    folder: Path,
    unit: str,
    *,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    overwrite: bool,
    dry_run: bool = False,
    has_out: bool = True,
) -> bool:
    """Whether ``unit`` is finished and was made from just these inputs and this config.

    Raises ``ResumeRefused`` with the difference when it was made from others; with ``overwrite`` the old sidecar is
    removed instead (``dry_run`` leaves it), which makes the unit missing work again. ``has_out`` says whether the
    command has ``--out``, which is then named as the other way out.
    """
    sidecar = read_sidecar(folder, unit, check_files=False)
    if sidecar is None:
        return False
    changes = differences("input", sidecar.inputs, inputs) + differences("config", sidecar.config, config)
    if not changes:
        _check_files(folder, sidecar)
        return True
    if overwrite:
        if not dry_run:
            forget_unit(folder, unit)
        return False
    raise ResumeRefused(
        f"{folder / unit} was finished with other inputs or another config:\n  "
        + "\n  ".join(changes)
        + "\nUse --overwrite to make it again"
        + (", or --out with a new folder to keep both." if has_out else ".")
    )


def forget_unit(folder: Path, unit: str) -> None:
    """Removes the sidecar of ``unit``: its files are orphans from now on, and the unit is missing work."""
    sidecar_path(folder, unit).unlink(missing_ok=True)
    fsync_folder(folder)


def remove_unit(folder: Path, unit: str) -> None:
    """Removes a finished unit with its files, the sidecar first; damaged files are no obstacle."""
    sidecar = read_sidecar(folder, unit, check_files=False)
    if sidecar is not None:
        forget_unit(folder, unit)
        for name in sidecar.files:
            (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Standing:
    """Which units are missing and which are finished, in the order asked, and the finished ones' rows by outcome."""

    missing: list[str]
    finished: list[str]
    counts: Counter[str]


def stand(
    folder: Path,
    inputs_of: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    *,
    overwrite: bool,
    dry_run: bool,
) -> Standing:
    """Sorts the units of ``inputs_of`` into missing and finished ones. Raises as ``is_done`` does."""
    standing = Standing([], [], Counter())
    for unit, inputs in inputs_of.items():
        if is_done(folder, unit, inputs=inputs, config=config, overwrite=overwrite, dry_run=dry_run):
            sidecar = read_sidecar(folder, unit)
            assert sidecar is not None
            standing.counts.update(sidecar.counts)
            standing.finished.append(unit)
        else:
            standing.missing.append(unit)
    return standing


def differences(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each name whose value differs."""
    lines = []
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name, "(absent)"), new.get(name, "(absent)")
        if before != after:
            lines.append(f"{kind} {name}: {_short(before)} before, {_short(after)} now")
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:24] + "…" + text[-12:]


def commit(
    folder: Path,
    unit: str,
    files: list[str],
    *,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    counts: Mapping[str, int],
    links: Mapping[str, Path] | None = None,
) -> Sidecar:
    """Makes the ``*.part`` files of ``unit`` appear under their names, then its sidecar; on return all is on disk.

    ``links`` are files of the unit that stay where they are, with the names of the links to them that are made here.
    """
    from clips_data import __version__

    about: dict[str, dict[str, Any]] = {}
    for name in files:
        path = part(folder / name)
        fsync_file(path)
        about[name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    for name, target in (links or {}).items():
        about[name] = {"bytes": target.stat().st_size, "sha256": digest_file(target)}
        _link(folder / name, target)
    for name in files:
        part(folder / name).replace(folder / name)
    fsync_folder(folder)
    sidecar = Sidecar(unit, about, dict(inputs), dict(config), dict(counts), __version__)
    write_json(sidecar_path(folder, unit), {"schema_version": SCHEMA_VERSION, **sidecar.__dict__})
    return sidecar


def _link(path: Path, target: Path) -> None:
    """Not by way of ``*.part``: a killed run's would be written through by the next writer of that name."""
    new = path.with_name(path.name + ".link")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as sorted, indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that it is either absent (or old) or complete, also after a power cut."""
    with readable_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part(path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part(path).replace(path)
        fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Puts renames and removals in ``folder`` on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def readable_disk_errors(where: Path) -> Iterator[None]:
    """Turns a full disk, a read-only folder or missing rights into one sentence."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "you have no right to write there",
            errno.EFBIG: "the file size limit was reached",
            errno.EPERM: "that is not permitted there",
            errno.ENOTDIR: "a part of the path is a file",
        }
        if error.errno not in reasons:
            raise
        raise UserError(
            f"Could not write under {where}: {reasons[error.errno]}. Finished work is kept; "
            "mend this and run the same command again."
        ) from error
