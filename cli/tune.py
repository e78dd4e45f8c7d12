"""``clips tune``: short proxy runs over a grid, to find the mix, the length or the number of texts for your own shards.

The grid becomes an experiment like any other: each value is an arm, so it resumes run by run and keeps its figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import arms, present
from .options import LazyCommand, common_options
from .results import Results, Row

if TYPE_CHECKING:
    from .arms import Run
    from .manifest import Manifest

FOLDER: Final = "tune"
PLAIN: Final[Mapping[str, Any]] = {"decoder": "none", "caption_weight": 0}
CURVES: Final = {
    "text_to_image_r1": "text → image R@1", "image_to_text_r1": "image → text R@1",
    "dense_text_to_image_r1": "dense text → image R@1", "attributes_top1": "attributes, top-1",
}  # fmt: skip
"""Figures that the page draws beside those of benchmarks."""


@dataclass(frozen=True)
class Grid:
    """What is tried. ``train`` maps a value to the training keys that it means."""

    about: str
    values: tuple[float, ...]
    unit: str
    train: Callable[[float, str, str], dict[str, Any]]
    check: Callable[[float], bool]
    wants: str


def _ratio(value: float, web: str, synthetic: str) -> dict[str, Any]:
    weights = {web: value, synthetic: round(1 - value, 10)}
    source: Any = {name: weight for name, weight in weights.items() if weight}
    return {**PLAIN, "views": [{"from": source if len(source) > 1 else next(iter(source))}]}


def _length(value: float, web: str, synthetic: str) -> dict[str, Any]:
    return {**PLAIN, "views": [web, {"from": synthetic, "reduce": "sub_caption", "tokens": int(value)}]}


def _views(value: float, web: str, synthetic: str) -> dict[str, Any]:
    several: dict[str, Any] = {"from": synthetic, "reduce": "one_piece"}
    if value > 1:
        several["count"] = int(value)
    return {**PLAIN, "views": [web, several]}


def _is_count(least: int) -> Callable[[float], bool]:
    return lambda value: value == int(value) and value >= least


GRIDS: Final[Mapping[str, Grid]] = {
    "ratio": Grid(
        "the share of samples that show their web caption, the others their synthetic one",
        (1, 0.9, 0.8, 0.5, 0.2, 0), "web captions", _ratio, lambda value: 0 <= value <= 1, "shares from 0 to 1",
    ),
    "length": Grid(
        "the tokens of a sub-caption, beside the web caption in every step",
        (16, 32, 48, 64, 80), "tokens", _length, _is_count(4), "whole numbers from 4",
    ),
    "views": Grid(
        "the number of sub-captions of an image that are positives together, beside its web caption",
        (1, 2, 4, 8), "sub-captions", _views, _is_count(1), "whole numbers from 1",
    ),
}  # fmt: skip


def build(name: str, summary: str) -> click.Command:
    every = "; ".join(f"{kind}: {grid.about}" for kind, grid in GRIDS.items())
    return LazyCommand(
        name,
        callback=tune,
        parameters=_parameters,
        example="clips tune ratio --work quickstart --samples 12800",
        help=f"{summary}\n\nWhat is tried: {every}. The proxies are trained without captioner, on the shards under "
        "--work, and scored on their held-out samples. Running it again goes on where it stopped.",
    )


def _parameters() -> list[click.Parameter]:
    return [
        click.Argument(["kind"], type=click.Choice(list(GRIDS)), metavar="|".join(GRIDS)),
        click.Option(["--grid"], metavar="A,B,…", help="Values to try instead of the usual ones."),
        click.Option(
            ["--like"],
            default="quickstart",
            show_default=True,
            metavar="MANIFEST",
            help="Manifest whose train and eval stages the proxies take over: size, resolution, batch, learning rate.",
        ),
        click.Option(["--samples"], type=click.IntRange(min=1), metavar="N", help="Samples of a proxy run."),
        click.Option(["--seeds"], metavar="A,B,…", default="0", show_default=True, help="Training seeds."),
        click.Option(["--web"], default="web", show_default=True, metavar="COLUMN", help="Column of web captions."),
        click.Option(
            ["--synthetic"], default="synthetic", show_default=True, metavar="COLUMN", help="The other column."
        ),
        click.Option(
            ["--set", "settings"],
            multiple=True,
            metavar="STAGE.KEY=VALUE",
            help="Override one value of the proxies' train or eval; may be repeated.",
        ),
        *common_options(("work", "json", "debug", "quiet")),
    ]


def tune(
    kind: str,
    grid: str | None,
    like: str,
    samples: int | None,
    seeds: str,
    web: str,
    synthetic: str,
    settings: Sequence[str],
    work: Path | None,
    as_json: bool,
    debug: bool,
    quiet: bool,
) -> None:
    """Runs the grid, draws it, and prints the line to paste into a manifest."""
    from clips_data.executor import Job, stop_on_sigterm

    stop_on_sigterm()
    where = work or Path()
    values = _values(kind, grid)
    manifest = experiment(kind, values, _numbers("--seeds", seeds), like, (web, synthetic), samples, settings, where)
    runs = arms.runs_of(manifest)
    arms.do_runs(manifest, runs, Job(work=where, quiet=quiet), as_json=as_json)
    assert manifest.results is not None
    found = Results(manifest.results).rows()
    page = manifest.results.with_suffix(".html")
    best = _best(kind, values, runs, found)
    _write_page(page, kind, values, runs, found)
    present.say(f"the plot is in {page}", quiet=quiet)
    if best is None:
        present.say("no value found more than chance does: give the proxies more --samples", quiet=quiet)
    else:
        line = _pasted(GRIDS[kind].train(best, web, synthetic)["views"])
        present.say(f"best mean of both ways' R@1: {best:g} {GRIDS[kind].unit}. For a manifest:", quiet=quiet)
        present.say(f"  train: {{{line}}}", quiet=quiet)


def experiment(
    kind: str,
    values: Sequence[float],
    seeds: Sequence[int],
    like: str,
    columns: tuple[str, str],
    samples: int | None,
    settings: Sequence[str],
    work: Path,
) -> Manifest:
    """The grid as a manifest with an arm for each value; its shards are those under ``work``."""
    import yaml

    from clips_data.errors import UserError

    from .manifest import load_manifest
    from .manifest_reader import Reader

    if not (work / "shards" / "index.json").is_file():
        raise UserError(f"{work / 'shards'} holds no finished shards to tune on. Run `clips shard`, or give --work.")
    base = load_manifest(like)
    if base.arms or not {"train", "eval"} <= set(base.stages):
        raise UserError(f"--like {like}: it should be a manifest with train and eval, and without arms.")
    train = base.saved("train", defaults=False)
    for key in ("name", "seed", "views", "condition", "target", "teacher"):
        train.pop(key, None)
    train |= {"stages": []} if samples else {}
    if samples:
        train |= {"samples": samples, "warmup_samples": min(train.get("warmup_samples", samples // 20), samples // 20)}
    grid = GRIDS[kind]
    text = {
        "name": f"{FOLDER}-{kind}",
        "seeds": list(seeds),
        "stages": {"train": train, "eval": base.saved("eval", defaults=False)},
        "arms": {_arm(kind, value): {"train": grid.train(value, *columns)} for value in values},
    }
    written = yaml.safe_dump(text, sort_keys=False, allow_unicode=True)
    results = [f"results={work / FOLDER / kind}.json"]
    return Reader(f"clips tune {kind}", work).manifest(written, [*results, *settings], work)


def _arm(kind: str, value: float) -> str:
    """A name of letters and digits: ``ratio-0_8``."""
    return f"{kind}-{value:g}".replace(".", "_")


def _values(kind: str, text: str | None) -> tuple[float, ...]:
    from clips_data.errors import UsageError

    grid = GRIDS[kind]
    if text is None:
        return grid.values
    try:
        found = tuple(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(grid.check(value) for value in found):
        raise UsageError(
            f"--grid {text}: {kind} takes {grid.wants}, such as {','.join(f'{v:g}' for v in grid.values)}."
        )
    return found


def _numbers(option: str, text: str) -> list[int]:
    from clips_data.errors import UsageError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise UsageError(f"{option} {text}: seeds are whole numbers from 0, such as 0,1,2.")
    return [int(word) for word in words]


# --- what came out ----------------------------------------------------------------------------------------------------


def _of_values(
    kind: str, values: Sequence[float], runs: Sequence[Run], rows: Mapping[str, Row]
) -> dict[float, list[Row]]:
    """Value → its finished rows, one for each seed."""
    by_arm: dict[str, list[Row]] = {}
    for run in runs:
        if run.digest in rows:
            by_arm.setdefault(run.arm.name, []).append(rows[run.digest])
    names = {run.arm.name for run in runs}
    arms_of = {
        value: next(name for name in names if name.endswith(f"-{value:g}".replace(".", "_"))) for value in values
    }
    return {value: by_arm.get(arm, []) for value, arm in arms_of.items()}


def _best(kind: str, values: Sequence[float], runs: Sequence[Run], rows: Mapping[str, Row]) -> float | None:
    """The value with the highest mean of both ways' recall at 1, over seeds; ``None`` where none is above chance."""
    ways = ("text_to_image_r1", "image_to_text_r1")
    means = {
        value: statistics.fmean(
            row["figures"][way] - row["figures"].get(f"chance_{way}", 0.0)
            for row in own
            for way in ways
            if way in row["figures"]
        )
        for value, own in _of_values(kind, values, runs, rows).items()
        if own
    }
    best = max(means, key=lambda value: means[value], default=None)
    return best if best is not None and means[best] > 0 else None


def _pasted(views: Sequence[Any]) -> str:
    import yaml

    return yaml.safe_dump({"views": list(views)}, default_flow_style=True, sort_keys=False, width=1000).strip()[1:-1]


def _write_page(page: Path, kind: str, values: Sequence[float], runs: Sequence[Run], rows: Mapping[str, Row]) -> None:
    from clips_data import report_html as h
    from clips_data.ledger import write_bytes

    by_value = _of_values(kind, values, runs, rows)
    shown = {name for own in by_value.values() for row in own for name in row["figures"]}
    heads = CURVES | {name: name.replace("_", " ") for name in sorted(shown) if name.endswith(("_top1", "_accuracy"))}
    figures = []
    for name, title in heads.items():
        points = [
            (value, [100 * row["figures"][name] for row in own if name in row["figures"]])
            for value, own in sorted(by_value.items())
        ]
        points = [(value, found) for value, found in points if found]
        if points:
            figures.append(dots(title, points, GRIDS[kind].unit))
    body = [
        f"<h1>{h.text(f'clips tune {kind}')}</h1>",
        f'<p class="soft">Proxy runs over {h.text(GRIDS[kind].about)}. In %; a dot for each seed, a line through their '
        "means. Differences below the spread of the seeds say nothing.</p>",
        f'<div class="curves">{"".join(figures)}</div>',
    ]
    write_bytes(page, h.page(f"clips tune {kind}", "\n".join(body), STYLE).encode())


STYLE: Final = "svg .dot { fill: var(--accent, currentColor); }"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 44, 14, 10, 40


def dots(title: str, points: Sequence[tuple[float, Sequence[float]]], unit: str) -> str:
    """An inline SVG: a dot for each seed of each value, and their means joined. Values stand at equal distances."""
    from clips_data import report_html as h

    ticks = h.ticks(min(min(found) for _, found in points), max(max(found) for _, found in points))
    low, high = ticks[0], ticks[-1]

    def across(number: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (number + 0.5) / len(points)

    def down(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {down(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, (value, found) in enumerate(points):
        x = across(number)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{down(one):.1f}" r="3"/>' for one in found]
    means = [(across(number), down(statistics.fmean(found))) for number, (_, found) in enumerate(points)]
    parts.append(f'<path class="mean" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in means)}"/>')
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{h.text(unit)}</text>')
    told = ", ".join(f"{value:g}: {statistics.fmean(found):.1f} %" for value, found in points)
    shape = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{h.text(f"{title}. {told}")}"'
    return f"<figure><h3>{h.text(title)}</h3><svg {shape}>{''.join(parts)}</svg></figure>"
