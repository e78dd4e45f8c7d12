"""``clips caption``: the captioner of a trained run describes images."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import present
from .caption_inputs import IMAGE_COLUMN, WEB_COLUMN, Inputs, Opened, ahead, read
from .options import LazyCommand, common_options, load
from .stages import DEFAULT_RUN
from .stats import printable

if TYPE_CHECKING:
    from clips_train.decoding import Decoding
    from clips_train.generate import Caption, Trained

ABOUT: Final = (
    "IMAGE is an image file, a folder, a glob, a list (.txt with one path a line, or - for stdin) or a table (parquet, "
    "csv, tsv, jsonl) with a column of paths. Prints one line per image to stdout, its path, a tab, the caption; with "
    "--json one object a line. An image that cannot be read is a line on stderr."
)
DECODING: Final = "clips_train.decoding:Decoding"
BATCH: Final = 16
MIN_SUCCESS: Final = 0.95
ONLY_FOR: Final = {
    "temperature": "top_p", "top_p": "top_p", "top_k": "top_p", "min_p": "top_p", "seed": "top_p",
    "beams": "beam", "length_penalty": "beam",
}  # fmt: skip
"""Decoding settings that one strategy alone knows."""


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=caption,
        parameters=_parameters,
        example="clips caption photos/ --name first --work quickstart --decoding beam --json",
        help=f"{summary}\n\n{ABOUT}",
    )


def _parameters() -> list[click.Parameter]:
    return [
        click.Argument(["images"], nargs=-1, required=True, metavar="IMAGE..."),
        click.Option(
            ["--name"],
            default=DEFAULT_RUN,
            metavar="TEXT",
            help=f"Name of the training run, a folder under runs/.  [default: {DEFAULT_RUN}]",
        ),
        click.Option(
            ["--web"],
            metavar="TEXT",
            help="Web caption that the captioner is given beside each image.  [default: the table's, else none]",
        ),
        click.Option(
            ["--web-column"],
            metavar="NAME",
            help=f"Column of a table that holds web captions.  [default: {WEB_COLUMN}, where there is one]",
        ),
        click.Option(
            ["--image-column"],
            metavar="NAME",
            help="Column of a table that holds paths of images, as seen from here or from the table.  "
            f"[default: {IMAGE_COLUMN}]",
        ),
        *_decoding_options(),
        click.Option(
            ["--batch"],
            type=click.IntRange(min=1),
            default=BATCH,
            show_default=True,
            metavar="IMAGES",
            help="Images per forward pass.",
        ),
        click.Option(
            ["--min-success"],
            type=click.FloatRange(0, 1),
            default=MIN_SUCCESS,
            show_default=True,
            metavar="SHARE",
            help="Least share of images that must get a caption; below it the exit code is 3.",
        ),
        click.Option(
            ["--device"],
            default="auto",
            metavar="TEXT",
            help="Torch device; auto takes the GPU where there is one.  [default: auto]",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object a line."),
        *common_options(("work", "debug", "quiet")),
    ]


def _decoding_options() -> list[click.Parameter]:
    """``none`` stands for what was not given: then the default of ``Decoding`` counts, which is shown."""
    default = {field.name: field.default for field in fields(load(DECODING))}
    above_zero = click.FloatRange(min=0, min_open=True)
    found: list[click.Parameter] = [
        click.Option(
            ["--decoding", "strategy"],
            type=click.Choice(load("clips_train.decoding:STRATEGIES")),
            help="greedy takes the likeliest token each time, top_p draws, beam searches for the likeliest caption.  "
            f"[default: {default['strategy']}]",
        )
    ]
    for name, kind, metavar, text in (
        ("beams", click.IntRange(min=1), "N", "beam: captions followed at a time."),
        (
            "length_penalty", click.FLOAT, "NUMBER",
            "beam: captions are compared by log-probability / tokens ** this; 0 favours short ones.",
        ),
        ("temperature", above_zero, "NUMBER", "top_p: below 1 draws likely tokens more often, above 1 less."),
        (
            "top_p", click.FloatRange(0, 1, min_open=True), "SHARE",
            "top_p: draws among the likeliest tokens that make up this share of the probability.",
        ),
        ("top_k", click.IntRange(min=0), "N", "top_p: draws among this many tokens; 0 keeps all."),
        (
            "min_p", click.FloatRange(0, 1), "SHARE",
            "top_p: draws no token that is less likely than this share of the likeliest.",
        ),
        ("seed", click.INT, "INTEGER", "top_p: seeds the draws, together with the image's content."),
        (
            "repetition_penalty", above_zero, "NUMBER",
            "Above 1, tokens that a caption already has become less likely.",
        ),
        (
            "max_tokens", click.IntRange(min=0), "TOKENS",
            "Longest caption, end token included; 0 takes as many as the captioner was trained on.",
        ),
    ):  # fmt: skip
        shown = f"{text}  [default: {default[name]:g}]"
        found.append(click.Option([f"--{name.replace('_', '-')}"], type=kind, metavar=metavar, help=shown))
    return found


def caption(images: tuple[str, ...], name: str, work: Path | None, quiet: bool, **given: Any) -> None:
    from clips_data.executor import stop_on_sigterm
    from clips_train import generate

    decoding = _decoding(given)
    if given["web"] is not None and given["web_column"] is not None:
        raise click.UsageError("--web and --web-column both say what the web captions are. Give one of them.")
    columns = {option: given[option] for option in ("web", "web_column", "image_column")}
    inputs = Inputs(images, **columns)
    stop_on_sigterm()
    trained = generate.load_trained((work or Path()) / "runs" / name, given["device"])
    _check(trained, decoding, given)
    present.say(f"caption: with {trained.folder}", quiet=quiet)
    counts = _caption_all(trained, inputs, decoding, batch=given["batch"], as_json=given["as_json"], quiet=quiet)
    for note in inputs.notes:
        present.say(f"  {note}", quiet=quiet)
    if counts is not None:
        _conclude(counts, given["min_success"], quiet=quiet)


def _decoding(given: dict[str, Any]) -> Decoding:
    settings = load(DECODING)
    chosen = {field.name: given[field.name] for field in fields(settings) if given.get(field.name) is not None}
    strategy = chosen.get("strategy", settings().strategy)
    for name in chosen:
        if ONLY_FOR.get(name, strategy) != strategy:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for --decoding {ONLY_FOR[name]}, and this is {strategy}."
            )
    made: Decoding = settings(**chosen)
    return made


def _check(trained: Trained, decoding: Decoding, given: dict[str, Any]) -> None:
    from clips_data.errors import UserError
    from clips_train import generate

    generate.check(trained, decoding)
    if not trained.reads_text and (given["web"] is not None or given["web_column"] is not None):
        raise UserError(
            f"The captioner of {trained.folder} reads the image alone. Leave --web and --web-column out, or train one "
            "with --condition web."
        )


def _caption_all(
    trained: Trained, inputs: Iterable[Any], decoding: Decoding, *, batch: int, as_json: bool, quiet: bool
) -> Counter[str] | None:
    """Captions in the order of the images. The images by outcome; ``None`` where the reader of stdout left."""
    from tqdm import tqdm

    from clips_data.recaption.clips import SPECIAL_TOKENS
    from clips_data.recaption.untrusted import neutralise
    from clips_train import generate

    counts: Counter[str] = Counter()
    special_tokens = SPECIAL_TOKENS[trained.config.tokenizer]
    is_warned = False
    stdout = _stdout()
    side_px = trained.config.image_px
    with (
        tqdm(unit="image", desc="caption", disable=quiet or None, file=sys.stderr) as progress,
        contextlib.closing(ahead(inputs, lambda one: read(one, side_px), num_ahead=2 * batch)) as opened,
    ):

        def tell(line: str) -> None:
            if not quiet:
                progress.write(line, file=sys.stderr)

        for pictures in _batches(_readable(opened, counts, tell), batch):
            texts = [neutralise(one.picture.web, special_tokens)[0] for one in pictures]  # as `clips recaption` does
            if not is_warned and (warning := generate.missing_text(trained, texts)):
                progress.write(f"clips: {warning}", file=sys.stderr)
                is_warned = True
            for one, found in zip(pictures, _captions(trained, pictures, texts, decoding), strict=True):
                progress.write(_line(one, found, as_json=as_json, reads_text=trained.reads_text), file=sys.stdout)
            sys.stdout.flush()
            if _stdout() != stdout:
                return None
            counts["ok"] += len(pictures)
            progress.update(len(pictures))
    return counts


def _readable(opened: Iterable[Opened], counts: Counter[str], tell: Any) -> Iterator[Opened]:
    for one in opened:
        if one.pixels is None:
            counts[one.failure] += 1
            tell(f"{printable(one.picture.path)}\t{one.failure}")
        else:
            yield one


def _batches(items: Iterable[Opened], size: int) -> Iterator[list[Opened]]:
    batch: list[Opened] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _captions(trained: Trained, pictures: list[Opened], texts: list[str], decoding: Decoding) -> list[Caption]:
    import torch

    from clips_train import generate

    pixels_BCHW = torch.stack([one.pixels for one in pictures if one.pixels is not None])
    keys = [one.sha256 for one in pictures]
    return generate.captions(trained, pixels_BCHW, texts, decoding=decoding, keys=keys)


def _line(one: Opened, found: Caption, *, as_json: bool, reads_text: bool) -> str:
    # Names of files may hold bytes that are no text.
    path = os.fsencode(one.picture.path).decode("utf-8", "replace")
    if not as_json:
        return f"{path}\t{printable(' '.join(found.text.split()))}"
    about = {
        "path": path,
        "caption": found.text,
        "web": one.picture.web if reads_text else "",
        "finish": found.finish,
        "tokens": found.num_tokens,
        "log_probability": round(found.log_probability, 4),
    }
    return json.dumps(about, ensure_ascii=False)


def _stdout() -> tuple[int, int] | None:
    """Which file stdout is. It changes when the reader of a pipe leaves: what comes then goes nowhere (``main``)."""
    try:
        about = os.fstat(sys.stdout.fileno())
    except (OSError, ValueError):  # no file at all
        return None
    return about.st_dev, about.st_ino


def _conclude(counts: Counter[str], min_success: float, *, quiet: bool) -> None:
    from clips_data.errors import TooFewSucceeded, UserError

    total = sum(counts.values())
    if not total:
        raise UserError("There was no image to caption. Name image files, folders, a table, or - for paths on stdin.")
    others = [f"{number} of {total} {reason}" for reason, number in counts.most_common() if reason != "ok"]
    present.say(
        "\n".join([f"caption: {counts['ok']} of {total} images captioned", *map("  {}".format, others)]), quiet=quiet
    )
    if counts["ok"] < min_success * total:
        raise TooFewSucceeded(
            f"{counts['ok']} of {total} images got a caption, less than --min-success {min_success:g}. "
            f"The others: {', '.join(others)}."
        )
