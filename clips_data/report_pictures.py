"""Pictures inside report pages: small JPEGs of images, made smaller and fewer where a page would grow too large."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from clips_data import report_html as h

THUMBNAIL_PX: Final = 360
QUALITY: Final = 82
MAX_PAGE_BYTES: Final = 5_000_000
"""A page is smaller than this, so that it can be mailed and opened on a phone."""


@dataclass(frozen=True)
class Budget:
    """How large pictures are, and how many samples are shown. The first is what a page has that is not too large."""

    px: int = THUMBNAIL_PX
    quality: int = QUALITY
    samples: int = 1 << 30
    """Most samples of the gallery."""

    def smaller(self, shown: int, times: float) -> Budget | None:
        """The next one to try for a gallery of ``shown`` on a page ``times`` as large as may be; ``None`` at the end.

        That is the largest size of pictures with which the page should fit, and after the smallest size fewer samples.
        """
        sizes = [size for size in _SIZES if size[0] < self.px]
        if sizes:
            should_fit = [(px, quality) for px, quality in sizes if times * (px / self.px) ** 2 < 1]
            return Budget(*(should_fit or sizes[-1:])[0], self.samples)
        return Budget(self.px, self.quality, min(shown - 1, int(0.95 * shown / times))) if shown else None

    def note(self, shown: int, wanted: int) -> str:
        """What was done to keep the page small; nothing where nothing was."""
        told = []
        if self.px < THUMBNAIL_PX:
            told.append(f"pictures are {self.px} pixels wide at most instead of {THUMBNAIL_PX}")
        if shown < wanted:
            told.append(f"{shown} of {wanted} samples are shown")
        return f"To keep this page below {MAX_PAGE_BYTES / 1e6:g} MB, {' and '.join(told)}." if told else ""


_SIZES: Final = ((240, 76), (160, 70), (96, 64))


def thumbnail(image: bytes, alt: str, budget: Budget | None = None) -> str:
    """The image as a small JPEG inside the page."""
    budget = budget or Budget()
    try:
        width, height, data = _jpeg(image, budget.px, budget.quality)
    except (OSError, ValueError, SyntaxError) as error:
        return f"<p>This image cannot be decoded: {h.text(error)}</p>"
    size = f'width="{width}" height="{height}"'
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{h.text(alt[:200])}">'


@lru_cache(maxsize=256)
def _jpeg(image: bytes, px: int, quality: int) -> tuple[int, int, str]:
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        opened.draft("RGB", (px, px))
        small = opened.convert("RGB")
    small.thumbnail((px, px))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return small.width, small.height, base64.b64encode(file.getvalue()).decode()


def card(picture: str, entries: Sequence[tuple[str, str]], *, key: str = "", sha256: str = "", head: str = "") -> str:
    """An article: a picture above labelled texts, which are HTML already. With a key it can be marked."""
    named = f' data-key="{h.text(key)}" data-sha256="{h.text(sha256)}"' if key else ""
    listed = "".join(
        f'<dt>{h.text(name[:1].upper() + name[1:])}</dt><dd dir="auto">{shown}</dd>' for name, shown in entries
    )
    return f"<article{named}>{picture}{head}<dl>{listed}</dl></article>"


def caption_or(value: Any, otherwise: str) -> str:
    return h.caption(str(value)) if value else f'<span class="soft">{h.text(otherwise)}</span>'
