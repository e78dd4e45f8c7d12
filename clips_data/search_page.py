"""The page of ``clips search --html``: each query with what it found, as pictures, because retrieval is judged by eye.

One file under ``MAX_BYTES``, whatever was found: the more pictures there are, the smaller they become.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from clips_data import report_html as h
from clips_data.pixels import ImageRefused, decode, open_header, orientation, to_srgb, upright

MAX_BYTES: Final = 5_000_000
MAX_HITS: Final = 1000
"""Results on a page, over all queries; above it the last ones of each query are left to the other outputs."""
MAX_IMAGE_PIXELS: Final = 100_000_000
SIDES_PX: Final = (360, 280, 210, 160, 120, 90)
"""Longer sides that are tried for the pictures, until all fit."""
JPEG_QUALITY: Final = 80
QUERY_CHARS, CAPTION_CHARS, SHORT_CAPTION_CHARS = 600, h.MAX_CAPTION_CHARS, 200
_PAGE_BYTES: Final = 40_000
"""Left for what is not results: style, headings, facts."""
_BYTES_PER_CHAR: Final = 6
"""At most, of escaped text in UTF-8: ``&quot;``."""

STYLE: Final = """
.query { display: flex; gap: 14px; align-items: center; margin: 28px 0 14px; }
.query h2 { margin: 0; overflow-wrap: anywhere; min-width: 0; } .query p { margin: 2px 0 0; }
.query img { width: auto; height: 96px; max-width: 40%; object-fit: contain; border-radius: 8px; flex: none;
  border: 2px solid var(--accent); }
.gallery { grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); align-items: start; }
article img { height: 190px; } article .none { height: 190px; display: grid; place-items: center; margin: 0;
  padding: 12px; background: var(--line); color: var(--soft); text-align: center; font-size: .88rem; }
article h3 { display: flex; gap: 8px; align-items: baseline; padding: 10px 14px 0; margin: 0; }
article h3 b { font-size: 1.05rem; } article h3 span { margin-left: auto; color: var(--accent); font-weight: 600;
  font-variant-numeric: tabular-nums; }
article dl { padding-top: 4px; } article dd { max-height: 9em; } dd.facts { color: var(--soft); font-size: .82rem; }
.scroll { margin-top: 40px; }
@media (max-width: 520px) { main { padding: 20px 12px 48px; }
  .gallery { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  article img, article .none { height: 130px; } article h3, article dl { padding-left: 10px; padding-right: 10px; } }
"""


@dataclass(frozen=True)
class Found:
    """One result."""

    rank: int
    score: float
    key: str
    image: bytes
    captions: Mapping[str, str]
    """By column, the one that was searched first."""
    facts: Sequence[str] = ()
    """Where it comes from."""


@dataclass(frozen=True)
class Asked:
    """A query, as a text, a picture or both, and its results, best first."""

    text: str
    image: bytes | None
    image_name: str
    found: Sequence[Found]


def render(asked: Sequence[Asked], about: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The page's HTML. It loads nothing and runs no script; whatever models and the web said is escaped.

    ``about`` are facts for its end; ``num_searched``, ``searched`` and ``model`` among them also stand at its head.
    """
    each = max(1, MAX_HITS // max(1, len(asked)))
    shown = [(one, one.found[:each]) for one in asked[:MAX_HITS]]
    num_pictures = sum(len(found) + (one.image is not None) for one, found in shown)
    share_bytes = (MAX_BYTES - _PAGE_BYTES) // max(1, num_pictures + len(shown))
    body = [
        f"<h1>{'Search' if len(asked) == 1 else h.text(_title(asked))}</h1>",
        f'<p class="soft">{h.text(_summary(asked, shown, about))}</p>',
        *(f'<p class="soft">{h.text(note)}</p>' for note in notes),
        *(_query(one, found, share_bytes) for one, found in shown),
        h.table(["<What", "<Value"], [[h.text(name), h.text(value)] for name, value in about.items()]),
        "<footer>Made by clips. This page is one file: it loads nothing and runs no script.</footer>",
    ]
    return h.page(_title(asked), "\n".join(body), STYLE)


def _title(asked: Sequence[Asked]) -> str:
    if len(asked) == 1:
        return f"Search: {_name(asked[0])[:80]}"
    return f"Search: {len(asked)} queries"


def _name(one: Asked) -> str:
    return " + ".join(filter(None, (one.text, one.image_name)))


def _summary(asked: Sequence[Asked], shown: Sequence[tuple[Asked, Sequence[Found]]], about: Mapping[str, Any]) -> str:
    num_found, num_shown = sum(len(one.found) for one in asked), sum(len(found) for _, found in shown)
    left_out = f"; the first {num_shown} of {num_found} are on this page" if num_shown < num_found else ""
    among = f"{h.number(about['num_searched'])} {about['searched']}, as {about['model']} sees them"
    return f"Among {among}: best first, by cosine similarity{left_out}."


def _query(one: Asked, found: Sequence[Found], share_bytes: int) -> str:
    picture = "" if one.image is None else _picture(one.image, share_bytes, f"query {one.image_name}")
    most_chars = min(QUERY_CHARS, share_bytes // 4 // _BYTES_PER_CHAR)
    words = h.text(one.text[:most_chars]) + ("…" if len(one.text) > most_chars else "")
    name = f'<p class="soft">{h.text(one.image_name[:most_chars])}</p>' if one.image is not None else ""
    head = f'<div class="query">{picture}<div><h2 dir="auto">{words or "Like this picture"}</h2>{name}</div></div>'
    cards = "".join(_card(hit, share_bytes) for hit in found)
    return f'<section>{head}<div class="gallery">{cards}</div></section>'


def _card(hit: Found, share_bytes: int) -> str:
    most_chars = CAPTION_CHARS
    if len(hit.captions) * CAPTION_CHARS * _BYTES_PER_CHAR > share_bytes // 2:
        most_chars = min(SHORT_CAPTION_CHARS, share_bytes // 2 // _BYTES_PER_CHAR // max(1, len(hit.captions)))
    entries = "".join(
        f'<dt>{h.text(column)}</dt><dd dir="auto">{_caption(text, most_chars)}</dd>'
        for column, text in hit.captions.items()
    )
    entries += (
        f'<dt>From</dt><dd class="facts">{h.bar_figures([fact[:SHORT_CAPTION_CHARS] for fact in hit.facts])}</dd>'
    )
    alt = next(iter(hit.captions.values()), hit.key)
    head = f"<h3><b>{hit.rank}</b> {h.text(hit.key)}<span>{hit.score:.3f}</span></h3>"
    room_bytes = share_bytes - len(entries.encode()) - len(head) - 2 * SHORT_CAPTION_CHARS * _BYTES_PER_CHAR
    return f"<article>{_picture(hit.image, room_bytes, alt)}{head}<dl>{entries}</dl></article>"


def _caption(text: str, most_chars: int) -> str:
    if most_chars >= CAPTION_CHARS or len(text) <= most_chars:
        return h.caption(text)
    return f'{h.text(text[:most_chars])} <span class="soft">… {h.number(len(text) - most_chars)} more characters</span>'


def _picture(data: bytes, room_bytes: int, alt: str) -> str:
    """The image as a JPEG inside the page, upright, as large as there is room for; a sentence where there is none."""
    try:
        header = open_header(data, MAX_IMAGE_PIXELS)
        pixels = decode(header, data, max(1.0, max(header.size) / SIDES_PX[0]))
        pixels = upright(to_srgb(pixels, header), orientation(header))
    except ImageRefused as error:
        return f'<p class="none">No picture: {h.text(error.code)}</p>'
    for side_px in SIDES_PX:
        jpeg, width_px, height_px = _small(pixels, side_px)
        if len(jpeg) * 4 / 3 + len(alt) <= room_bytes:
            code = base64.b64encode(jpeg).decode()
            size = f'width="{width_px}" height="{height_px}"'
            return f'<img src="data:image/jpeg;base64,{code}" {size} alt="{h.text(alt[:SHORT_CAPTION_CHARS])}">'
    return '<p class="none">No room for this picture: ask for fewer results.</p>'


def _small(pixels: Any, side_px: int) -> tuple[bytes, int, int]:
    """A JPEG of blue-green-red pixels, its longer side at most ``side_px``, and its width and height."""
    from PIL import Image

    picture = Image.fromarray(pixels[:, :, ::-1])
    picture.thumbnail((side_px, side_px))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue(), picture.width, picture.height
