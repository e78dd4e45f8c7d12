"""``clips compare``: the same images captioned by several recipes, one table and one page about what they said."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_data import draws, joined, ledger, schema, score
from clips_data.config import RecaptionConfig, ScoreConfig
from clips_data.demo import truth
from clips_data.errors import UserError
from clips_data.recaption import caption_measures, compare_recipes, compare_table, prompts, rows
from clips_data.recaption.compare_recipes import Recipe, Said
from clips_data.recaption.rows import Row

if TYPE_CHECKING:
    from clips_data.demo.scenes import Scene
    from clips_data.recaption.prompts import Prompt

PAGE, TABLE = "index.html", "table.json"


@dataclass(frozen=True)
class Comparison:
    """What is compared: every prompt with every model, on ``num_rows`` images drawn by the settings' seed.

    ``settings`` says how the engines run; its ``prompt``, ``model`` and ``column`` do not count. ``scorer`` is as in
    ``clips score --model``, ``None`` for no similarities. ``gallery`` is the number of images that the page shows.
    """

    prompts: tuple[str, ...]
    models: tuple[str, ...]
    settings: RecaptionConfig = field(default_factory=RecaptionConfig)
    num_rows: int = 200
    scorer: str | None = "demo"
    scorer_pretrained: str | None = None
    usd_per_gpu_hour: float | None = None
    gallery: int = 24


@dataclass
class Shown:
    """An image of the gallery: what the web and what each recipe's outputs say of it.

    ``said`` has per recipe its rows by output. ``difference`` is that of ``caption_measures``, between the recipes
    whose caption was not rejected.
    """

    row: Row
    web: str
    difference: float
    said: list[dict[str, Mapping[str, Any]]]


@dataclass
class Compared:
    """The outcome. ``table`` has a mapping of measures per column of the table, the web captions' first."""

    page: Path
    num_images: int
    table: list[dict[str, Any]]
    said: list[Said]
    notes: list[str]
    different: list[Shown] = field(default_factory=list)
    """The images on which the recipes differ most, most different first."""
    drawn: list[Shown] = field(default_factory=list)
    """Others, drawn by seed."""

    @property
    def failures(self) -> dict[str, str]:
        """Recipes without a single caption, and why."""
        return {one.recipe.name: one.why_failed for one in self.said if one.why_failed}


def run(comparison: Comparison, work: Path, *, out: Path | None = None, quiet: bool = False) -> Compared:
    """Captions what no earlier comparison of the same images has captioned, measures, and writes ``out/index.html``.

    ``out`` defaults to ``work/compare/<recipes>``; what the recipes said is kept under ``work/compare/<digest of the
    images>``. A recipe that fails is told in the table, the others go on. Raises ``UserError`` where nothing can be
    compared: an unknown prompt, no finished pairs, no such scorer.
    """
    recipes = _recipes(comparison, work)
    drawn = recipes[0].rows
    notes = [] if len(drawn) == comparison.num_rows else [f"{len(drawn)} images are all that there are to draw from."]
    digest = ledger.digest_json([(row.key, row.sha256) for row in drawn])[:12]
    scoring = _scoring(comparison, notes)
    said = [compare_recipes.caption(recipe, work / schema.COMPARE / digest, quiet=quiet) for recipe in recipes]
    pairs = _pairs(work, {row.key for row in drawn})
    web = {row.key: pairs[row.key][1] for row in drawn}
    scenes = {row.key: scene for row in drawn if (scene := truth.scene_of(pairs[row.key][0])) is not None}
    table = _table(comparison, said, drawn, web, scenes, scoring)
    _note_costs(comparison, table, notes)
    folder = out or work / schema.COMPARE / _page_name(recipes, digest)
    compared = Compared(folder / PAGE, len(drawn), table, said, notes)
    _choose_gallery(compared, comparison, drawn, web)
    _write(compared, comparison)
    return compared


# --- what is compared -------------------------------------------------------------------------------------------------


def _recipes(comparison: Comparison, work: Path) -> list[Recipe]:
    settings = comparison.settings
    loaded = [prompts.load(name) for name in dict.fromkeys(comparison.prompts)]
    models = list(dict.fromkeys(comparison.models))
    found: list[Recipe] = []
    names = _names([prompt.name for prompt in loaded], [_model_name(model) for model in models])
    for (prompt, model), name in zip(itertools.product(loaded, models), names, strict=True):
        same = next((recipe.rows for recipe in found if recipe.prompt is prompt), None)
        drawn = same if same is not None else _draw(work, prompt, comparison)
        config = settings.model_copy(update={"prompt": prompt.name, "model": model, "column": compare_recipes.COLUMN})
        found.append(Recipe(name, prompt, config, drawn))
    keys = {tuple(row.key for row in recipe.rows) for recipe in found}
    assert len(keys) == 1, "the draw depends on seed and key alone"
    return found


def _draw(work: Path, prompt: Prompt, comparison: Comparison) -> list[Row]:
    settings = comparison.settings
    found = rows.sample_rows(work, prompt, comparison.num_rows, seed=settings.seed, scores=settings.scores)
    if not found:
        raise UserError(f"No shard under {work / schema.PAIRS} has an image to caption. Run clips download first.")
    return found


def _names(prompt_names: Sequence[str], model_names: Sequence[str]) -> list[str]:
    """A name per recipe, in the product's order: by prompt, by model or by both, whichever tells them apart."""
    pairs = list(itertools.product(prompt_names, model_names))
    names = [prompt if len(model_names) == 1 else f"{prompt} · {model}" for prompt, model in pairs]
    if len(prompt_names) == 1 and len(model_names) > 1:
        names = [model for _, model in pairs]
    return [f"{name} #{i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _model_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2] or model


def _pairs(work: Path, keys: set[str]) -> dict[str, tuple[str | None, str]]:
    """URL and web caption of each key."""
    import polars as pl

    inputs = joined.open_inputs(work, ())
    found = {}
    for unit in inputs.units:
        for row in inputs.pair_rows(unit).filter(pl.col("key").is_in(sorted(keys))).iter_rows(named=True):
            found[row["key"]] = (row.get("url"), (row.get("caption") or "").strip())
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def _scoring(comparison: Comparison, notes: list[str]) -> ScoreConfig | None:
    """How similarities are made, checked as far as that goes without loading a model; ``None`` for none."""
    if comparison.scorer is None:
        return None
    for package in ("torch", "open_clip"):
        if importlib.util.find_spec(package) is None:
            notes.append(f"No similarities: {package} is not installed. Install it with: pip install 'clips[train]'")
            return None
    config = ScoreConfig(model=comparison.scorer, pretrained=comparison.scorer_pretrained)
    score.model_digest(score.resolve_model(config))
    return config


def _table(
    comparison: Comparison,
    said: list[Said],
    drawn: Sequence[Row],
    web: Mapping[str, str],
    scenes: Mapping[str, Scene],
    scoring: ScoreConfig | None,
) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = [{"name": "web caption", "captions": len(drawn)}]
    table[0] |= compare_table.of_captions([text for text in web.values() if text])
    captions = [dict(web)]
    for one in said:
        for column, rows_of in _columns(one, comparison.usd_per_gpu_hour):
            table.append(column)
            captions.append({row["key"]: row["caption"] for row in rows_of})
    usable = [(column, texts) for column, texts in zip(table, captions, strict=True) if texts]
    for column, texts in usable:
        if facts := compare_table.of_scenes(texts, scenes):
            column["demo_facts"] = facts
    if scoring is not None:
        scorer = score.load_scorer(score.resolve_model(scoring), scoring.pretrained, name=scoring.model)
        found = compare_table.similarities(scorer, drawn, [texts for _, texts in usable])
        for (column, _), similarity in zip(usable, found, strict=True):
            column["similarity"] = similarity
    return table


def _columns(one: Said, usd_per_gpu_hour: float | None) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The columns of the table that a recipe fills, one per output, each with its rows; what it cost is the first's."""
    about = {"recipe": one.recipe.name, "prompt": one.recipe.prompt.name, "model": one.recipe.config.model}
    if one.error:
        yield {"name": one.recipe.name, **about, "error": one.error}, []
    for number, (output, rows_of) in enumerate(one.columns.items()):
        column: dict[str, Any] = {
            "name": " / ".join(filter(None, (one.recipe.name, output))),
            **about,
            "output": output,
        }
        column |= compare_table.of_rows(rows_of)
        if number == 0 and not one.why_failed:  # what useless captions cost says nothing
            column["run"] = compare_table.of_run(one.stats, usd_per_gpu_hour) | {"was_kept": one.was_kept}
        yield column, rows_of


def _note_costs(comparison: Comparison, table: list[dict[str, Any]], notes: list[str]) -> None:
    runs = [column["run"] for column in table if "run" in column]
    if comparison.usd_per_gpu_hour and (others := {run["hours_are_of"] for run in runs} - {"GPU"}):
        notes.append(f"--price is of a GPU-hour: {' and '.join(sorted(others))}-hours have no price here.")
    if any(run["was_kept"] for run in runs):
        kept = [column["recipe"] for column in table if column.get("run", {}).get("was_kept")]
        notes.append(f"Captioned by an earlier comparison, rates as measured then: {', '.join(kept)}.")


# --- the page ---------------------------------------------------------------------------------------------------------


def _page_name(recipes: Sequence[Recipe], digest: str) -> str:
    words = "+".join(compare_recipes.slug(recipe.name.replace(" · ", "-")) for recipe in recipes)
    about = [[recipe.prompt.digest, recipe.config.model_dump(mode="json")] for recipe in recipes]
    return f"{words[:60]}-{ledger.digest_json([digest, about])[:8]}"


def _choose_gallery(compared: Compared, comparison: Comparison, drawn: Sequence[Row], web: Mapping[str, str]) -> None:
    """Half of the gallery are the images on which the recipes differ most, the others are drawn: extremes alone would
    mislead whoever judges a recipe by them."""
    by_key: list[dict[str, dict[str, Mapping[str, Any]]]] = [
        {output: {row["key"]: row for row in column} for output, column in one.columns.items()}
        for one in compared.said
        if not one.error
    ]
    shown = []
    for row in drawn:
        said = [{output: found[row.key] for output, found in columns.items()} for columns in by_key]
        texts = [" ".join(about["caption"] for about in outputs.values()).strip() for outputs in said]
        shown.append(Shown(row, web[row.key], caption_measures.difference([text for text in texts if text]), said))
    seed = comparison.settings.seed
    shown.sort(key=lambda one: draws.uniform(seed, "compare_gallery", 0, one.row.key))
    num_different = comparison.gallery // 2 if len(by_key) > 1 else 0
    most = sorted((one for one in shown if one.difference), key=lambda one: -one.difference)[:num_different]
    taken = {one.row.key for one in most}
    compared.different = most
    rest = [one for one in shown if one.row.key not in taken]
    compared.drawn = rest[: max(0, comparison.gallery - len(most))]


def _write(compared: Compared, comparison: Comparison) -> None:
    from clips_data.recaption import compare_page

    ledger.write_json(compared.page.with_name(TABLE), as_json(compared))
    ledger.write_bytes(compared.page, compare_page.render(compared, comparison).encode())


def as_json(compared: Compared) -> dict[str, Any]:
    """What a program may want to know, beside where the page is."""
    return {
        "images": compared.num_images,
        "columns": compared.table,
        "failures": compared.failures,
        "notes": compared.notes,
    }
