"""A click command whose options are the fields of a config class, read when the command is invoked.

Nothing is written twice: the description of a field is the help of its option, its default is shown from the class.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from clips_data.executor import Job

Call = Callable[["BaseModel", "Job", click.Context], None]


def load(reference: str) -> Any:
    """``"package.module:name"`` → the object of that name."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


class LazyCommand(click.Command):
    """A command whose parameters are built when it is invoked, and whose help ends with an example to paste."""

    def __init__(
        self,
        name: str,
        *,
        callback: Callable[..., None],
        parameters: Callable[[], list[click.Parameter]],
        example: str,
        help: str,
    ) -> None:
        super().__init__(name, callback=callback, help=help)
        self.parameters, self.example = parameters, example

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            self.params = self.parameters()
        return super().get_params(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write(f"Example:\n  {self.example}\n")


class ConfigCommand(LazyCommand):
    """A command that calls ``call(config, job, context)`` with what the user chose.

    ``config`` names the pydantic class; ``positional`` is the field that is given without an option's name, or
    ``"shards"``, which fills ``Job.only``; ``common`` names the options of ``common_options`` that apply.
    """

    def __init__(
        self,
        name: str,
        *,
        config: str,
        call: Call,
        common: Sequence[str],
        example: str,
        help: str,
        positional: str | None = None,
    ) -> None:
        super().__init__(name, callback=self._call, parameters=self._parameters, example=example, help=help)
        self.config, self.call, self.common, self.positional = config, call, tuple(common), positional

    def _parameters(self) -> list[click.Parameter]:
        fields = load(self.config).model_fields
        return [
            *_positionals(self.positional),
            *(option_for(name, field) for name, field in fields.items() if name != self.positional),
            *self.extra_options(),
            *common_options(self.common),
        ]

    def extra_options(self) -> list[click.Parameter]:
        """Options that belong neither to the config nor to ``Job``; a subclass may have some."""
        return []

    def _call(self, **given: Any) -> None:
        context = click.get_current_context()
        config = self._config(given, context)
        self.call(config, job_from(given), context)

    def _config(self, given: dict[str, Any], context: click.Context) -> BaseModel:
        from pydantic import ValidationError

        from .values import validated

        config = load(self.config)
        values = {}
        for name, field in config.model_fields.items():
            value = given.get(name)
            if value is not None and value != ():
                values[name] = from_text(value, field, self._spelt(name))
        try:
            return validated(config, values)
        except ValidationError as error:
            raise click.UsageError(self._refusal(error.errors(include_url=False), values), context) from None

    def _refusal(self, errors: Sequence[Any], values: Mapping[str, Any]) -> str:
        from .values import nearest_inside, what_is_right, written_path

        if not errors[0]["loc"]:
            return f"These options do not go together: {what_is_right(errors[0])}."
        name = str(errors[0]["loc"][0])
        if name not in values:
            return f"{self._spelt(name)} is missing."
        # A value of several types has an error for each of them; what comes deepest was meant.
        within = [found for found in errors if found["loc"][0] == name]
        error = max(within, key=lambda found: len(written_path(values[name], found["loc"][1:])))
        parts = written_path(values[name], error["loc"][1:])
        if error["type"] == "missing":
            return f"{'.'.join([self._spelt(name), *parts])}: {error['input']!r} has no {error['loc'][-1]!r}."
        if error["type"] == "extra_forbidden":
            holder = ".".join([self._spelt(name), *parts[:-1]])
            return f"{holder} has no key {parts[-1]!r}. {nearest_inside(load(self.config), parts[-1])}"
        value = error["input"]
        shown = value if isinstance(value, str) and not parts else repr(value)
        return f"{'.'.join([self._spelt(name), *parts])} is {shown}; {what_is_right(error)}."

    def _spelt(self, name: str) -> str:
        return name.upper() if name == self.positional else option_name(name)


def option_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def option_for(name: str, field: FieldInfo) -> click.Option:
    """The option of one config field. It has no default of its own: what is not given is left to the class."""
    from .values import default_text, kind_of, range_of

    kind = kind_of(field)
    about = "; ".join(part for part in (f"default: {default_text(field)}", range_of(field)) if part)
    text = f"{field.description}  [{about}]"
    spelt = option_name(name)
    if kind.form == "flag":
        return click.Option([f"{spelt}/--no-{spelt[2:]}", name], default=None, help=text)
    if kind.form == "choice":
        choices = [str(choice) for choice in kind.choices] + (["none"] if kind.optional else [])
        return click.Option([spelt, name], type=click.Choice(choices), help=text)
    if kind.form in ("list", "lines"):
        metavar = (",".join(map(str, kind.choices)) or "A,B,…") if kind.form == "list" else "TEXT"
        return click.Option([spelt, name], multiple=True, metavar=metavar, help=text)
    metavar = {"integer": "INTEGER", "number": "NUMBER", "text": "TEXT", "yaml": "YAML"}[kind.form]
    return click.Option([spelt, name], metavar=metavar, help=text)


def from_text(value: Any, field: FieldInfo, spelt: str) -> Any:
    """What the user typed, as the value that pydantic is to check. Raises for what is no YAML, where it should be."""
    from .values import kind_of

    kind = kind_of(field)
    if kind.form in ("list", "lines") and list(value) == ["none"]:
        return ()
    if kind.form == "list":
        return tuple(piece for text in value for piece in text.split(",") if piece)
    if kind.form == "choice":
        return next((choice for choice in kind.choices if str(choice) == value), value)
    if kind.form == "yaml":
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or str(error)
            raise click.UsageError(f"{spelt} is not YAML: {problem}.", click.get_current_context(silent=True)) from None
    return value


def _positionals(name: str | None) -> list[click.Parameter]:
    if name is None:
        return []
    if name == "shards":
        return [click.Argument(["shards"], nargs=-1, required=False, metavar="[-|SHARD...]")]
    return [click.Argument([name], metavar=name.upper())]


def common_options(names: Sequence[str]) -> list[click.Parameter]:
    """The options that say how a command runs, as opposed to what it makes. Defaults are those of ``Job``."""
    from clips_data.executor import Job

    default = {field.name: field.default for field in dataclasses.fields(Job)}
    folder = click.Path(path_type=Path, file_okay=False)
    every = {
        "work": click.Option(
            ["--work"],
            type=folder,
            metavar="DIR",
            help="Work folder, under which every stage keeps its folder.  [default: .]",
        ),
        "out": click.Option(
            ["--out"], type=folder, metavar="DIR", help="Write here instead of the stage's folder under --work."
        ),
        "limit": click.Option(
            ["--limit"], type=click.IntRange(min=1), metavar="ROWS", help="Stop after this many rows, for a trial."
        ),
        "slice": click.Option(
            ["--slice"], metavar="I/N", help="Do only the I-th of N slices of the shards, counted from 0."
        ),
        "processes": click.Option(
            ["--processes"],
            type=click.IntRange(min=0),
            metavar="N",
            help=f"Worker processes.  [default: {default['processes']}]",
        ),
        "executor": click.Option(
            ["--executor"],
            type=click.Choice(["local", "ray"]),
            help="Where worker processes run; ray takes the cluster that RAY_ADDRESS names.  "
            f"[default: {default['executor']}]",
        ),
        "budget": click.Option(
            ["--budget"],
            metavar="GPUHOURS",
            help="Stop, to be resumed later, when this much is spent: 20gpuh, or 90min of one replica.",
        ),
        "append": click.Option(
            ["--append"], is_flag=True, help="Add the list's URLs that were never tried here as further shards."
        ),
        "retry": click.Option(
            ["--retry"],
            multiple=True,
            metavar="CODE,…",
            help="Try the list's rows that failed with these codes again, as further shards.",
        ),
        "overwrite": click.Option(
            ["--overwrite"], is_flag=True, help="Make again what was made from other inputs or another config."
        ),
        "dry-run": click.Option(["--dry-run"], is_flag=True, help="Say what would be done, and do nothing."),
        "json": click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object to stdout."),
        "debug": click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        "quiet": click.Option(["--quiet", "-q"], is_flag=True, help="No progress and no report on stderr."),
    }
    return [every[name] for name in names]


def job_from(given: dict[str, Any]) -> Job:
    """The ``Job`` of a command's parameters; what was not given keeps the default of ``Job``."""
    from clips_data.executor import Job, parse_slice

    names = {field.name for field in dataclasses.fields(Job)} - {"only"}
    chosen = {name: given[name] for name in names if given.get(name) is not None}
    parse_slice(chosen.get("slice"))
    if "retry" in chosen:
        chosen["retry"] = tuple(code.strip() for text in chosen["retry"] for code in text.split(",") if code.strip())
        if given["retry"] and not chosen["retry"]:
            raise click.UsageError("--retry wants failure codes, for example dns,timeout,http_5xx.")
    only = shards_named(given["shards"]) if given.get("shards") else None
    return Job(**chosen, only=only)


def shards_named(words: Sequence[str]) -> tuple[Path, ...]:
    """The finished shards that a command is restricted to: paths, or ``-`` for one path a line on stdin."""
    from clips_data.errors import UserError

    if list(words) == ["-"]:
        words = [line.strip() for line in sys.stdin if line.strip()]
        if not words:
            raise UserError("No finished shards were named on stdin. Did the command before the pipe fail?")
    paths = tuple(Path(word) for word in words)
    for path in paths:
        if not path.exists() and not any(mark in str(path) for mark in "*?[{"):  # train expands tars/{00..99}.tar
            raise UserError(f"{path} is not there. Name finished shards, or `-` to read their names from stdin.")
    return paths
