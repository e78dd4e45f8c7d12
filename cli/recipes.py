"""``clips recipes``: the systems that come as manifests, what each changes, and what it was measured to buy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import present
from .options import LazyCommand, common_options
from .results import Results, Row, spread

if TYPE_CHECKING:
    from clips_data.executor import Job

    from .manifest import Manifest

SCALE: Final = "demo"
FIRST: Final = "clips"
"""The recipe that the others include, and the first of the table."""
RESULTS: Final = "recipes/results/recipes.json"
PAGE: Final = "recipes/README.md"
FIGURES: Final = {
    "text_to_image_r1": "short t→i", "image_to_text_r1": "short i→t",
    "dense_text_to_image_r1": "dense t→i", "dense_image_to_text_r1": "dense i→t",
    "attributes_top1": "attributes",
    "mllm_fact_precision": "MLLM fact P", "mllm_fact_recall": "MLLM fact R",
    "clips_fact_precision": "own fact P", "clips_fact_recall": "own fact R",
}  # fmt: skip
"""Figure of an evaluation → head of its column; all are shares, shown in %."""
ABOUT: Final = (
    "Without NAME all recipes are listed. `clips run recipe/NAME --data URLS` runs one on your list, `clips run "
    "recipe/NAME --scale demo` on the built-in demo world. --measure runs them all there, at equal samples, resumes "
    "recipe by recipe, and writes the table."
)


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=recipes,
        parameters=_parameters,
        example="clips recipes veclip",
        help=f"{summary}\n\n{ABOUT}",
    )


def _parameters() -> list[click.Parameter]:
    return [
        click.Argument(["name"], metavar="[NAME]", required=False),
        click.Option(["--measure"], is_flag=True, help="Run the recipes on the demo world and write the table."),
        click.Option(["--only"], metavar="A,B,…", help="With --measure: these recipes alone."),
        click.Option(["--seeds"], metavar="A,B,…", default="0", show_default=True, help="With --measure: the seeds."),
        click.Option(
            ["--results"],
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE.json",
            help="Where figures are kept, with the table beside it as README.md one folder up or, for a file of your "
            "own, as FILE.md.  [default: the packaged one]",
        ),
        *common_options(("work", "json", "debug", "quiet")),
    ]


def recipes(
    name: str | None,
    measure: bool,
    only: str | None,
    seeds: str,
    results: Path | None,
    work: Path | None,
    as_json: bool,
    debug: bool,
    quiet: bool,
) -> None:
    """Lists recipes, shows one, or measures them."""
    from clips_data.errors import UsageError

    known = names()
    if name is not None:
        _check([name], known)
        _show(name, as_json=as_json)
        return
    kept = Results(results or packaged_results())
    if measure:
        chosen = [word.strip() for word in only.split(",")] if only else known
        _check(chosen, known)
        numbers = [word.strip() for word in seeds.split(",")]
        if not all(number.isdigit() for number in numbers):
            raise UsageError(f"--seeds {seeds}: seeds are whole numbers from 0, such as 0,1,2.")
        _measure(chosen, [int(number) for number in numbers], kept, work or Path("recipes-demo"), quiet=quiet)
    elif only:
        raise UsageError("--only goes with --measure.")
    _list(known, kept.rows(), as_json=as_json)


def packaged_results() -> Path:
    from .manifest import packaged_file

    return packaged_file(RESULTS)


def names() -> list[str]:
    """All recipes, the one that the others include first."""
    from .manifest import load_manifest, packaged_manifests

    found = [name.removeprefix("recipes/") for name in packaged_manifests() if name.startswith("recipes/")]
    with_recipe = [name for name in found if load_manifest(f"recipe/{name}").recipe]
    return sorted(with_recipe, key=lambda name: (name != FIRST, name))


def _check(chosen: Sequence[str], known: Sequence[str]) -> None:
    from clips_data.errors import UserError, did_you_mean

    for name in chosen:
        if name not in known:
            raise UserError(f"There is no recipe {name!r}. {did_you_mean(name, known)}")


# --- list and details -------------------------------------------------------------------------------------------------


def _list(known: Sequence[str], rows: Mapping[str, Row], *, as_json: bool) -> None:
    from .manifest import load_manifest

    lines = []
    for name in known:
        recipe = load_manifest(f"recipe/{name}").recipe
        own = _rows_of(name, rows)
        figures = _figures(own)
        lines.append(
            {
                "recipe": name,
                "system": recipe["system"],
                "changes": ", ".join(recipe["changes"]) or "nothing: what the others include",
                "inputs": recipe["inputs"],
                "status": f"measured, {len(own)} seeds"
                if len(own) > 1
                else "measured, 1 seed"
                if own
                else "not measured",
                **figures,
            }
        )
    if as_json:
        present.print_json(lines)
        return
    shown = [{**line, "system": _short(line["system"], 34), "changes": _short(line["changes"], 48)} for line in lines]
    print(present.table(shown, ("recipe", "system", "changes", "status", *FIGURES.values())))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _show(name: str, *, as_json: bool) -> None:
    """What a recipe's manifest says of itself, and its stages as they are run."""
    import yaml

    from .manifest import load_manifest

    manifest = load_manifest(f"recipe/{name}")
    stages = {stage: manifest.saved(stage, defaults=False) for stage in manifest.stages}
    if as_json:
        present.print_json({"recipe": name, **manifest.recipe, "stages": stages})
        return
    for key, value in manifest.recipe.items():
        print(f"{key + ':':<10} {', '.join(value) if isinstance(value, list) else ' '.join(str(value).split())}")
    print("stages:")
    print("  " + yaml.safe_dump(stages, sort_keys=False, allow_unicode=True).rstrip().replace("\n", "\n  "))


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(chosen: Sequence[str], seeds: Sequence[int], results: Results, work: Path, *, quiet: bool) -> None:
    """Runs what has no row yet, seed by seed, so that the first table of all is there early."""
    from clips_data.executor import Job, stop_on_sigterm

    stop_on_sigterm()
    results.check_writable()
    wanted = [(name, seed, *_of_demo(name, seed, work)) for seed in seeds for name in chosen]
    missing = [one for one in wanted if one[3] not in results.rows()]
    for number, (name, seed, manifest, digest) in enumerate(missing, start=1):
        present.say(f"recipe {name}, seed {seed} ({number} of {len(missing)}): {manifest.work}", quiet=quiet)
        results.add(digest, _row(name, seed, manifest, Job(work=manifest.work, quiet=quiet)))
        page = write_page(results)
        present.say(f"figures are in {results.path}, the table in {page}", quiet=quiet)


def _of_demo(name: str, seed: int, work: Path) -> tuple[Manifest, str]:
    """The manifest of a recipe on the demo world with a seed, and the digest of what its figures depend on."""
    from clips_data.ledger import digest_json

    from .manifest import load_manifest
    from .stages import stage_named
    from .stamps import digest_watched

    settings = [f"train.seed={seed}", f"train.name={name}-s{seed}"]
    manifest = load_manifest(f"recipe/{name}", settings, work / name, SCALE)
    about: dict[str, Any] = {}
    for stage, config in manifest.stages.items():
        told = manifest.saved(stage, defaults=False)
        about[stage] = {key: value for key, value in told.items() if key != "name" or not stage_named(stage).of_run}
        watched = stage_named(stage).watches(config)
        about |= {f"{stage}.{key}": digest_watched(path) for key, path in watched.items()}
    return manifest, digest_json(about)


def _row(name: str, seed: int, manifest: Manifest, job: Job) -> Row:
    """Does a recipe's stages, but those that only present a run, and reads its figures."""
    from clips_data import stats

    from . import stamps
    from .arms import ONLY_READ
    from .results import train_seconds
    from .run import do_stage, save_resolved
    from .stages import stage_named

    save_resolved(manifest)
    for stage in manifest.stages:
        if stage_named(stage).name not in ONLY_READ:
            do_stage(manifest, stage, job)
    facts = stamps.facts_of(manifest, manifest.work, "eval")
    costs = [about["cost"] for about in stats.gather(manifest.work).get("captions", {}).values() if about["cost"]]
    figures = {key: round(value, 6) for key, value in facts.items() if isinstance(value, int | float)}
    return {
        "arm": name,
        "seed": seed,
        "samples": stamps.facts_of(manifest, manifest.work, "train").get("samples"),
        "train_s": train_seconds(manifest.work / "runs" / manifest.run_of("train")),
        "figures": figures | {"caption_tokens": sum(cost["tokens"] for cost in costs)},
        "settings": {stage: manifest.saved(stage, defaults=False) for stage in manifest.stages},
        "made_on": _machine(),
    }


def _machine() -> dict[str, Any]:
    """The commit of a checkout, and what the machine has; nothing that names it."""
    import os
    import platform
    import subprocess

    here = Path(__file__).resolve().parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    commit = found.stdout.strip() if found.returncode == 0 else None
    return {
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }


# --- the table --------------------------------------------------------------------------------------------------------


def _rows_of(name: str, rows: Mapping[str, Row]) -> list[Row]:
    return sorted((row for row in rows.values() if row["arm"] == name), key=lambda row: int(row["seed"]))


def _figures(rows: Sequence[Row]) -> dict[str, str]:
    """Means and spreads over seeds."""
    return {
        head: spread([100 * row["figures"][key] for row in rows if key in row["figures"]])
        for key, head in FIGURES.items()
    }


def write_page(results: Results) -> Path:
    """The table as Markdown: ``README.md`` of the recipes for the packaged results, else beside the file."""
    from clips_data.ledger import write_bytes

    from .manifest import load_manifest, packaged_file

    rows = results.rows()
    packaged = results.path == packaged_results()
    page = packaged_file(PAGE) if packaged else results.path.with_suffix(".md")
    heads = ["recipe", "system", *FIGURES.values(), "tokens generated", "train min", "seeds"]
    lines = []
    for name in names():
        own = _rows_of(name, rows)
        tokens = spread([row["figures"]["caption_tokens"] for row in own]) if own else ""
        minutes = spread([row["train_s"] / 60 for row in own if row["train_s"] is not None])
        system = load_manifest(f"recipe/{name}").recipe["system"]
        cells = {"recipe": name, "system": system, **_figures(own), "tokens generated": tokens.removesuffix(".0")}
        lines.append(cells | {"train min": minutes, "seeds": str(len(own)) if own else "not measured"})
    made = sorted({json.dumps(row.get("made_on"), sort_keys=True) for row in rows.values()})
    table = [heads, ["---"] * len(heads), *([line.get(head, "") for head in heads] for line in lines)]
    text = [INTRO, *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table), ""]
    if made:
        text += ["Measured with: " + "; ".join(_made_text(json.loads(one)) for one in made) + ".", ""]
    write_bytes(page, "\n".join(text).encode())
    return page


def _made_text(made: Mapping[str, Any]) -> str:
    return f"commit {made['commit']} on {made['machine']}, Python {made['python']}"


INTRO: Final = """\
# Recipes

One manifest for each system: `clips recipes NAME` shows what it does, `clips run recipe/NAME --data urls.parquet`
runs it on your list, `clips run recipe/NAME --scale demo` on the built-in demo world.

This table is written by `clips recipes --measure`: every recipe on the demo world, start to end, with a tiny model and
25,600 samples; so at equal samples and not at equal cost. Recall at 1 in % among 500 held-out images, by short
human-like captions and by dense descriptions, text to image (t→i) and image to text (i→t); zero-shot classification of
attributes; precision and recall (P, R) of the facts in the MLLM's captions and in the trained captioner's own; ± is the
standard deviation over seeds. It says how the recipes work on small synthetic scenes with a captioner that makes few
mistakes, and nothing of their rank on the web.
"""
