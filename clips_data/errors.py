"""What can go wrong in a way that a person can act on.

    ClipsError              exit code
    ├── UserError           1    a file, a value or an environment that the user can mend
    ├── UsageError          2    a command line that makes no sense
    ├── ResumeRefused       4    inputs or config differ from those of the work already done
    └── EndedShort
        ├── TooFewSucceeded 3    the stage finished, but fewer samples than --min-success succeeded
        └── Interrupted     130  stopped by a signal or a spent budget; running the same command again resumes

Each message is one or more full sentences: what happened, where, and what to do next. Anything that is not a
``ClipsError`` is our own mistake and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ClipsError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1


class UserError(ClipsError):
    """Something outside the program is wrong and the user can mend it."""


class UsageError(ClipsError):
    """The command line makes no sense."""

    exit_code = 2


class EndedShort(ClipsError):
    """A stage ended otherwise than wished. ``report`` is its ``executor.Report``, to be shown all the same."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class TooFewSucceeded(EndedShort):
    """A stage finished, but the share of samples that succeeded is below ``min_success``."""

    exit_code = 3


class ResumeRefused(ClipsError):
    """Finished work in the target folder was made from other inputs or another config."""

    exit_code = 4


class Interrupted(EndedShort):
    """SIGINT, SIGTERM or a spent budget stopped the work at a point from which it resumes."""

    exit_code = 130


SHOWN = 20
"""Most right words that a message lists."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that ``word`` was most likely meant to be, or ``None`` when nothing is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence to append to a message: the nearest right word, or the known ones where none is near."""
    known = list(choices)
    near = nearest(word, known)
    if near:
        return f"Did you mean {near!r}?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"Known are: {', '.join(known[:SHOWN]) or 'none'}{more}."
