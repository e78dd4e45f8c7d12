"""``clips compare``: the same images captioned by several recipes, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click

from . import present
from .options import LazyCommand, common_options, from_text, load, option_for, option_name

if TYPE_CHECKING:
    from clips_data.config import RecaptionConfig
    from clips_data.recaption.compare import Compared

CONFIG: Final = "clips_data.config:RecaptionConfig"
COMPARISON: Final = "clips_data.recaption.compare:Comparison"
SETTINGS: Final = (
    "seed", "engine", "endpoint", "endpoint_key_env", "concurrency", "trust_remote_code", "scores", "gate_min",
    "batch_rows", "max_model_tokens", "gpu_memory_share", "cpu_cache_gib", "batch_deadline_s",
)  # fmt: skip
"""Options of ``clips recaption`` that mean the same here."""
NONE: Final = "none"


def build(name: str, summary: str) -> click.Command:
    about = (
        "Every PROMPT (a packaged name or a .yaml file) is tried with every --model on the same images. Prints a table "
        "to stderr and the path of a page with the captions side by side to stdout. What a recipe said is kept, so "
        "that a further comparison of the same images asks only the new recipes. Exit code 3 when a recipe failed."
    )
    return LazyCommand(
        name,
        callback=compare,
        parameters=_parameters,
        example="clips compare describe recap-v1 --model demo --limit 200 --work quickstart",
        help=f"{summary}\n\n{about}",
    )


def _parameters() -> list[click.Parameter]:
    fields = load(CONFIG).model_fields
    default = {name: field.default for name, field in load(COMPARISON).__dataclass_fields__.items()}
    model = fields["model"]
    return [
        click.Argument(["prompts"], nargs=-1, required=True, metavar="PROMPT..."),
        click.Option(
            ["--model", "models"],
            multiple=True,
            metavar="TEXT",
            help=f"{model.description} Give it once per model.  [default: {model.default}]",
        ),
        click.Option(
            ["--limit"],
            type=click.IntRange(min=1),
            default=default["num_rows"],
            show_default=True,
            metavar="IMAGES",
            help="Number of images, drawn by --seed from all finished shards.",
        ),
        click.Option(
            ["--price"],
            type=click.FloatRange(min=0, min_open=True),
            metavar="USD",
            help="Price of a GPU-hour, for the cost of a million images.",
        ),
        click.Option(
            ["--scorer"],
            default=default["scorer"],
            show_default=True,
            metavar="TEXT",
            help="Model for image-text similarities, as in `clips score --model`; none for no similarities.",
        ),
        click.Option(["--scorer-pretrained"], metavar="TEXT", help="Pretrained tag of an open_clip name."),
        click.Option(
            ["--gallery"],
            type=click.IntRange(min=0),
            default=default["gallery"],
            show_default=True,
            metavar="N",
            help="Number of images on the page.",
        ),
        *(option_for(name, fields[name]) for name in SETTINGS),
        *common_options(("work", "out", "json", "debug", "quiet")),
    ]


def compare(prompts: tuple[str, ...], models: tuple[str, ...], quiet: bool, **given: Any) -> None:
    from clips_data.errors import TooFewSucceeded
    from clips_data.executor import stop_on_sigterm
    from clips_data.recaption.compare import Comparison, as_json, run

    stop_on_sigterm()
    settings = _settings(given)
    comparison = Comparison(
        prompts,
        models or (settings.model,),
        settings,
        num_rows=given["limit"],
        scorer=None if given["scorer"] == NONE else given["scorer"],
        scorer_pretrained=given["scorer_pretrained"],
        usd_per_gpu_hour=given["price"],
        gallery=given["gallery"],
    )
    compared = run(comparison, given["work"] or Path(), out=given["out"], quiet=quiet)
    present.say("\n".join(lines(compared)), quiet=quiet)
    if given["as_json"]:
        present.print_json({"page": str(compared.page), **as_json(compared)})
    else:
        print(compared.page)
    if compared.failures:
        failed = "; ".join(f"{name}: {why}" for name, why in compared.failures.items())
        raise TooFewSucceeded(f"{len(compared.failures)} of {len(compared.said)} recipes failed. {failed}")


def _settings(given: dict[str, Any]) -> RecaptionConfig:
    from pydantic import ValidationError

    from .values import validated, what_is_right

    config = load(CONFIG)
    values = {
        name: from_text(given[name], config.model_fields[name], option_name(name))
        for name in SETTINGS
        if given.get(name) is not None
    }
    try:
        return cast("RecaptionConfig", validated(config, values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise click.UsageError(f"{option_name(name)} is {first['input']}; {what_is_right(first)}.") from None


def lines(compared: Compared) -> list[str]:
    """The table as text, measures down and recipes across, then what is to be said of it."""
    from clips_data.recaption import compare_table

    names = [column["name"] for column in compared.table]
    rows = []
    for line in compare_table.lines(compared.table):
        cells = [" ".join(filter(None, cell)) for cell in line.cells]
        rows.append({f"{compared.num_images} images": line.label, **dict(zip(names, cells, strict=True))})
    return [present.table(rows, list(rows[0])), *compared.notes]
