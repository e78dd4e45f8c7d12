"""Who may work in a folder at one time: file locks among the processes of a machine, which end with their holder."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from clips_data.errors import UserError


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be made: {error.strerror}. Name another --work or --out."
        ) from None


@contextlib.contextmanager
def locked(folder: Path, name: str = "lock", *, wait: bool = True) -> Iterator[None]:
    """Holds an exclusive lock in ``folder`` among processes of this machine; it ends with its holder.

    Without ``wait`` a lock that another process holds is a ``UserError``, and so is a folder that cannot be made.
    """
    _make(folder)
    with (folder / f".{name}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another clips process is at work in {folder} ({name}). Wait for it, or give this one another --out."
            ) from None
        yield


def alone(folder: Path, use: str, part: str | None) -> contextlib.AbstractContextManager[None]:
    """One process of this machine at a time does a slice (``i/n``, ``None``: all) of a stage's work in ``folder``."""
    return locked(folder, f"{use}-{slice_name(part)}", wait=False)


def slice_name(part: str | None) -> str:
    """``0/2`` → ``0-of-2``, for names of files."""
    return (part or "all").replace("/", "-of-")


@contextlib.contextmanager
def shared(folder: Path, name: str, use: str) -> Iterator[None]:
    """Lets processes of this machine into ``folder`` together that make the same ``use`` of it, and no others.

    Raises ``UserError`` while somebody is at work there who named another use.
    """
    _make(folder)
    path = folder / f".{name}"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.write_text(use)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_SH)  # waits while somebody writes the use, which is no time
        fcntl.flock(file, fcntl.LOCK_SH)
        if path.read_text() != use:
            raise UserError(
                f"Another clips process is at work in {folder} ({path.read_text()}; this one: {use}). Wait for it, or "
                "give this one another --out."
            )
        yield


@contextlib.contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """``folder/_NAME``, empty, for as long as this process works: readable by its owner only, removed in any case.

    A second process that asks for the same name is refused; what a killed one left is removed first.
    """
    with locked(folder, name, wait=False):
        path = folder / f"_{name}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path)
