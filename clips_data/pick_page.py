"""The page of ``clips sample --gallery``: each sample's image, small, with its captions, codes, flags and scores."""

from __future__ import annotations

from typing import Any, Final

from clips_data import joined, report_pictures
from clips_data import report_html as h
from clips_data.pick import Picked, Picks

STYLE: Final = """
.gallery { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); align-items: start; }
dt .flag, dt .code { display: inline-block; border: 1px solid var(--line); border-radius: 9px; padding: 0 7px;
  margin-left: 5px; font-size: .72rem; color: var(--soft); }
dt .code { border-color: #b3261e; color: #b3261e; } article h3 { padding: 10px 14px 0; margin: 0; font-weight: 600;
  font-variant-numeric: tabular-nums; }
article h3 small { float: right; font-weight: 500; color: var(--accent); }
article dd { max-height: none; overflow: visible; }
dd .raw { color: var(--soft); } dd.facts { color: var(--soft); font-size: .82rem; }
@media (prefers-color-scheme: dark) { dt .code { border-color: #f2a49e; color: #f2a49e; } }
"""


def render(picks: Picks, title: str) -> str:
    """The page's HTML. It loads nothing and runs no script; whatever models and the web said is escaped."""
    cards = "".join(_card(one) for one in picks.samples)
    body = [
        f"<h1>{h.text(title)}</h1>",
        f'<p class="soft">{h.text(counted(picks))}</p>',
        f'<div class="gallery">{cards}</div>' if cards else "<p>No sample is left to show.</p>",
        "<footer>Made by clips. This page is one file: it loads nothing and runs no script.</footer>",
    ]
    return h.page(title, "\n".join(body), STYLE)


def counted(picks: Picks) -> str:
    """How the samples came about, with the denominators."""
    left = f", {picks.num_left} left by --where" if picks.num_left != picks.num_rows else ""
    fitting = f", {picks.num_fitting} with what is asked for" if picks.num_fitting != picks.num_left else ""
    return f"{len(picks.samples)} samples, {picks.by} (of {picks.num_rows} rows{left}{fitting})"


def _card(one: Picked) -> str:
    value = f"<small>{h.number(one.value)}</small>" if one.value is not None else ""
    entries = "".join(_caption(column, about, one) for column, about in one.captions.items())
    scores = [f"{name} {_figure(value)}" for name, value in sorted(one.scores.items())]
    if scores:
        entries += f'<dt>Scores</dt><dd class="facts">{h.bar_figures(scores)}</dd>'
    facts = [one.place.name, *([f".txt is {one.txt}"] if one.txt else []), *([one.url] if one.url else [])]
    entries += f'<dt>From</dt><dd class="facts">{h.bar_figures(facts)}</dd>'
    alt = next((about["caption"] for about in one.captions.values() if about["caption"]), "")
    picture = report_pictures.thumbnail(one.image, alt)
    return f"<article>{picture}<h3>{h.text(one.key)}{value}</h3><dl>{entries}</dl></article>"


def _figure(value: Any) -> str:
    """A number, a text, or the list of a caption's flags or of its sentences' similarities, to be escaped yet."""
    if isinstance(value, list):
        return ", ".join(map(_figure, value)) or "none"
    return value if isinstance(value, str) else h.number(value)


def _caption(column: str, about: dict[str, Any] | Any, one: Picked) -> str:
    code = "" if about["code"] == "ok" else f'<span class="code">{h.text(about["code"])}</span>'
    flags = "".join(f'<span class="flag">{h.text(flag)}</span>' for flag in about["flags"])
    if spans := one.sub_captions.get(column):
        shown = h.marked_caption(about["caption"], spans)
    elif about["caption"]:
        shown = h.caption(about["caption"])
    else:
        shown = (
            f'<span class="raw">{h.caption(about["raw"])}</span>'
            if about.get("raw")
            else '<span class="soft">none</span>'
        )
    label = "Web caption" if column == joined.WEB else f"{column} caption"
    return f'<dt>{h.text(label)}{code}{flags}</dt><dd dir="auto">{shown}</dd>'
