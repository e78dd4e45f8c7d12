"""``clips stats``: what a work folder holds, stage by stage."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from . import present
from .options import LazyCommand, common_options


def build(name: str, summary: str) -> click.Command:
    about = (
        "FOLDER is a work folder, or one stage's folder in it (pairs/, captions/NAME, scores/NAME, shards/). Reads "
        "tables and sidecars of finished shards, no images. Figures that have a usual range are shown beside it. With "
        "--tokenizer the lengths of captions and their pieces are shown instead, and how many a text tower would cut."
    )
    return LazyCommand(
        name,
        callback=stats,
        parameters=_parameters,
        example="clips stats quickstart/pairs --top 10",
        help=f"{summary}\n\n{about}",
    )


def _parameters() -> list[click.Parameter]:
    return [
        click.Argument(["folder"], required=False, type=click.Path(path_type=Path), metavar="[FOLDER]"),
        click.Option(
            ["--top"],
            type=click.IntRange(min=1),
            default=20,
            show_default=True,
            metavar="N",
            help="Number of hosts to show, those with most attempts first.",
        ),
        click.Option(
            ["--tokenizer"],
            metavar="NAME",
            help="Show lengths in these tokens: bpe (open_clip's own), bert:PATH (with BERT's vocab.txt) or hf:FOLDER "
            "(any Hugging Face tokenizer).",
        ),
        click.Option(
            ["--split"],
            metavar="RULE",
            help="With --tokenizer: cut captions into pieces by this rule (period, sentence or authors). Default: "
            "shards as they are cut, caption columns as `clips shard` cuts by default.",
        ),
        *common_options(("work", "json", "debug")),
    ]


def stats(
    folder: Path | None,
    work: Path | None,
    top: int,
    tokenizer: str | None,
    split: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    from clips_data.errors import UsageError, UserError

    if folder is not None and work is not None:
        raise UsageError(f"FOLDER {folder} and --work {work} both name what to count. Give one of them.")
    root = folder or work or Path()
    if split is not None and tokenizer is None:
        raise UsageError(f"--split {split} is about pieces, which are measured with --tokenizer. Give that, too.")
    found = _counts(root, top) if tokenizer is None else _lengths(root, tokenizer, split)
    if not found:
        raise UserError(f"{root} holds no finished work. Point --work at the folder of a run.")
    if as_json:
        present.print_json(found)
    else:
        for line in indented(found):
            print(printable(line))


def _counts(root: Path, top: int) -> dict[str, Any]:
    from clips_data.stats import gather

    return gather(root, top)


def _lengths(root: Path, tokenizer: str, split: Any) -> dict[str, Any]:
    from clips_data.lengths import gather

    return {"lengths": gather(root, tokenizer, split)}


def indented(values: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Nested counts as indented lines; successes and failures carry the number of attempts as their denominator."""
    attempted = values.get("attempted")
    width = max((len(name) for name, value in values.items() if _is_line(value)), default=0)
    margin = "  " * depth
    for name, value in values.items():
        if name == "bands":
            yield from (margin + line for line in band_lines(value))
        elif _is_line(value):
            of = f" of {attempted}" if name == "succeeded" else ""
            yield f"{margin}{name:<{width}}  {_figures(value)}{of}"
        elif value:
            yield margin + name
            if isinstance(value, list):
                yield from (f"{margin}  {line}" for line in present.table(value, list(value[0])).splitlines())
            else:
                nested = {f"{code} (of {attempted})": number for code, number in value.items()}
                yield from indented(nested if name in ("failures", "flags") else value, depth + 1)


def _is_line(value: Any) -> bool:
    return not isinstance(value, Mapping | list) or (isinstance(value, Mapping) and "p95" in value)


def _figures(value: Any) -> str:
    """A figure, or a spread as ``mean 9.1, median 9, 95 % 14, 1 to 31 (of 2300)``."""
    if value is None:
        return "-"
    if not isinstance(value, Mapping):
        return present.figure(value)
    mean, median, p95, low, high = (present.figure(value[name]) for name in ("mean", "median", "p95", "min", "max"))
    return f"mean {mean}, median {median}, 95 % {p95}, {low} to {high} (of {value['num']})"


def band_lines(bands: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """``web_caption_words_mean  6.1 (of 12) - band 8 to 20, below``; what lies outside is for a person to judge."""
    width = max((len(name) for name in bands), default=0)
    for name, about in bands.items():
        low, high = about["low"], about["high"]
        band = f"at most {high:g}" if low is None else f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
        yield f"{name:<{width}}  {about['value']:.4g} (of {about['of']}) - band {band}, {about['mark']}"


def printable(text: str) -> str:
    """``text`` without what could steer a terminal: host names and codes may come from anybody's tables."""
    return "".join("�" if unicodedata.category(character) in ("Cc", "Cf", "Cs") else character for character in text)
