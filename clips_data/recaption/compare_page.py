"""The page of a comparison: the table, the recipes, and images with what each recipe said of them, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from clips_data import report_html as h
from clips_data import report_pictures
from clips_data.recaption import compare_table

if TYPE_CHECKING:
    from clips_data.recaption.compare import Compared, Comparison, Shown
    from clips_data.recaption.compare_recipes import Recipe, Said

STYLE: Final = """
main { max-width: 1480px; }
.measures table { width: auto; min-width: 60%; } .measures th small { display: block; font-weight: 400;
  color: var(--soft); font-size: .8rem; max-width: 34ch; line-height: 1.35; }
.measures td, .measures th { padding-right: 22px; }
.measures td small { display: block; color: var(--soft); font-size: .8rem; }
.measures thead th { overflow-wrap: anywhere; max-width: 22ch; white-space: normal; vertical-align: bottom; }
.failed { color: #b3261e; } @media (prefers-color-scheme: dark) { .failed { color: #f2a49e; } }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px;
  margin: 0 0 8px; }
summary { cursor: pointer; } details dl { font-size: .92rem; } details dd { max-height: none; white-space: pre-wrap; }
.samples { display: grid; gap: 16px; }
article.sample { display: grid; grid-template-columns: minmax(200px, 250px) 1fr; }
.sample .source { border-right: 1px solid var(--line); } .sample .source img { height: auto; max-height: 250px; }
.sample .source dl { padding: 10px 12px; }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.said section { padding: 10px 14px 12px; border-left: 1px solid var(--line); margin-left: -1px; font-size: .92rem; }
.said h3 { font-size: .85rem; overflow-wrap: anywhere; } .said h4 { margin: 8px 0 0; font-size: .8rem; font-weight: 500;
  color: var(--soft); } .said p { margin: 0; overflow-wrap: anywhere; }
.flag { display: inline-block; border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; margin: 4px 4px 0 0;
  font-size: .75rem; color: var(--soft); }
@media (max-width: 640px) { article.sample { grid-template-columns: 1fr; } .sample .source { border-right: 0; } }
"""


def render(compared: Compared, comparison: Comparison) -> str:
    """The page's HTML. It loads nothing and runs no script; whatever models and the web said is escaped."""
    sections = [
        "<h1>Recipes compared</h1>",
        f'<p class="soft">{_intro(compared, comparison)}</p>',
        *(f'<p class="soft">{h.text(note)}</p>' for note in compared.notes),
        _measures(compared),
        _recipes(compared.said),
        _gallery(compared),
        "<footer>Made by clips. This page is one file: it loads nothing and runs no script.</footer>",
    ]
    return h.page("clips compare", "\n".join(section for section in sections if section), STYLE)


def _intro(compared: Compared, comparison: Comparison) -> str:
    num = len(compared.said)
    drawn = f"{h.number(compared.num_images)} images drawn from all finished shards by seed {comparison.settings.seed}"
    scorer = (
        f"Similarities by the scorer {comparison.scorer}."
        if any("similarity" in column for column in compared.table)
        else ""
    )
    return f"{num} {'recipe' if num == 1 else 'recipes'} on the same {drawn}. {h.text(scorer)}"


# --- the table --------------------------------------------------------------------------------------------------------


def _measures(compared: Compared) -> str:
    rows = [
        [f"{h.text(line.label)}<small>{h.text(line.about)}</small>", *(_cell(*cell) for cell in line.cells)]
        for line in compare_table.lines(compared.table)
    ]
    table = h.table(["", *(column["name"] for column in compared.table)], rows)
    failed = [
        f'<p class="failed"><b>{h.text(name)}</b> failed: {h.text(why)}</p>' for name, why in compared.failures.items()
    ]
    return f'<h2>Measures</h2>{"".join(failed)}<div class="measures">{table}</div>'


def _cell(figure: str, of: str) -> str:
    return f"{h.text(figure)}<small>{h.text(of)}</small>" if figure else '<span class="soft">–</span>'


# --- the recipes ------------------------------------------------------------------------------------------------------


def _recipes(said: Sequence[Said]) -> str:
    shown = "".join(
        f"<details><summary>{h.text(one.recipe.name)}</summary>{_listed(_about(one))}</details>" for one in said
    )
    return f"<h2>Recipes</h2>{shown}"


def _about(one: Said) -> dict[str, str]:
    """What a recipe is, as HTML: enough to say why its captions are as they are."""
    recipe, stats = one.recipe, one.stats
    prompt = recipe.prompt
    about = {
        "Prompt": f"{h.text(prompt.name)}, digest <code>{prompt.digest[:12]}</code>",
        "Model": h.text(recipe.config.model),
        "Decoding": h.text(_decoding(recipe)),
        "System text": _lines(prompt.system or ""),
    }
    for number, variant in enumerate(prompt.user):
        name = "User text" if len(prompt.user) == 1 else f"User text {number}, weight {variant.weight:g}"
        about[name] = _lines(variant.user)
    if prompt.output:
        about["Outputs"] = h.bar_figures(list(prompt.output))
    if stats:
        ran = f"{stats['engine']} {stats['engine_version']} on {stats['device']}"
        rate = (
            f"{h.number(stats['rows'])} images in {stats['seconds']:.1f} s after {stats['startup_s']:.1f} s of start-up"
        )
        deaths = f", {stats['engine_deaths']} deaths of the engine" if stats["engine_deaths"] else ""
        about["Run"] = f"{h.text(ran)}: {rate}{deaths}"
    return {name: value for name, value in about.items() if value}


def _decoding(recipe: Recipe) -> str:
    """The settings that the prompt file gives; the others are at their defaults."""
    given = recipe.prompt.sampling.model_dump(mode="json", exclude_defaults=True)
    named = [f"{name} {value}" for name, value in given.items()]
    greedy = [] if recipe.prompt.sampling.temperature else ["greedy"]
    return ", ".join([*greedy, *named])


def _lines(value: str) -> str:
    """Text with its line breaks, which ``h.text`` alone would fold."""
    return "\n".join(h.text(line) for line in value.strip().splitlines())


def _listed(entries: Mapping[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f'<dt>{h.text(name)}</dt><dd dir="auto">{shown}</dd>' for name, shown in entries.items())
        + "</dl>"
    )


# --- the gallery ------------------------------------------------------------------------------------------------------


def _gallery(compared: Compared) -> str:
    names = [one.recipe.name for one in compared.said if not one.error]
    shown = ""
    if compared.different:
        about = (
            "Images on which the recipes' captions have the fewest words in common: the mean, over pairs of recipes, "
            "of the share of words that only one of the two has. Rejected captions do not count."
        )
        shown += f'<h2>Most different</h2><p class="soft">{about}</p>{_samples(compared.different, names)}'
    if compared.drawn:
        about = "Drawn by seed: what the recipes are like on an ordinary image."
        shown += f'<h2>Drawn images</h2><p class="soft">{about}</p>{_samples(compared.drawn, names)}'
    return shown


def _samples(samples: Sequence[Shown], names: Sequence[str]) -> str:
    return f'<div class="samples">{"".join(_sample(one, names) for one in samples)}</div>'


def _sample(one: Shown, names: Sequence[str]) -> str:
    sample = [one.row.key] + ([f"difference {one.difference:.2f}"] if len(names) > 1 else [])
    entries = {
        "Web caption": h.caption(one.web) or '<span class="soft">none</span>',
        "Sample": h.bar_figures(sample),
    }
    source = f'<div class="source">{report_pictures.thumbnail(one.row.image, one.web)}{_listed(entries)}</div>'
    cells = "".join(_said(name, outputs) for name, outputs in zip(names, one.said, strict=True))
    return f'<article class="sample">{source}<div class="said">{cells}</div></article>'


def _said(name: str, outputs: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for output, row in outputs.items():
        head = f"<h4>{h.text(output)}</h4>" if output else ""
        shown = h.caption(row["caption"]) if row["code"] == "ok" else _rejected(row)
        flags = "".join(f'<span class="flag">{h.text(flag)}</span>' for flag in row["flags"])
        parts.append(f'{head}<p dir="auto">{shown}</p>{flags}')
    return f"<section><h3>{h.text(name)}</h3>{''.join(parts)}</section>"


def _rejected(row: Mapping[str, Any]) -> str:
    raw = f': <span class="soft">{h.caption(row["raw"])}</span>' if row["raw"] else ""
    return f'<span class="failed">{h.text(row["code"])}</span>{raw}'
