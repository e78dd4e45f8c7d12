"""The page of results: under 5 MB whatever was found, and inert and readable in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shardmaker
from PIL import Image

from clips_data import search_page
from clips_data.search_page import Asked, Found

ABOUT: dict[str, Any] = {"model": "run:default", "searched": "images", "num_searched": 2906, "split": "train"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def noise(side_px: int, seed: int = 0) -> bytes:
    """A picture that JPEG cannot make small."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side_px, side_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def found(number: int, image: bytes, **captions: str) -> list[Found]:
    return [Found(rank, 0.5, f"{rank:09d}", image, captions, ["train-00000.tar"]) for rank in range(1, number + 1)]


def test_few_pictures_are_large_and_have_their_captions() -> None:
    hits = found(3, shardmaker.sample(0, size_px=800)[0], synthetic="a long description", web="a circle")
    html = search_page.render([Asked("a red circle", None, "", hits)], ABOUT)
    assert html.count('width="360"') == 3 and "a long description" in html and "0.500" in html and "000000002" in html
    assert "2\u2009906 images, as run:default sees them" in html


@pytest.mark.parametrize(("num_queries", "num_hits"), [(1, 12), (1, 300), (40, 100)])
def test_the_page_stays_below_its_limit_whatever_was_found(num_queries: int, num_hits: int) -> None:
    quotes = '"' * 5000
    hits = found(num_hits, noise(100), synthetic=quotes, web=quotes, third=quotes)
    asked = [Asked(quotes, None, "", hits) for _ in range(num_queries)]
    html = search_page.render(asked, ABOUT)
    assert len(html.encode()) <= search_page.MAX_BYTES
    shown = html.count("<article>")
    assert shown == min(num_queries * num_hits, search_page.MAX_HITS)
    if shown < num_queries * num_hits:
        assert f"the first {shown} of {num_queries * num_hits} are on this page" in html


def test_what_is_no_picture_is_said_and_a_turned_one_is_shown_upright() -> None:
    turned = Image.new("RGB", (200, 100), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    hits = [*found(1, b""), *found(1, b"no picture"), *found(1, file.getvalue())]
    html = search_page.render([Asked("", b"nothing", "query.bmp", hits)], ABOUT)
    assert html.count("No picture: not_an_image") == 3 and 'width="100" height="200"' in html
    assert "Like this picture" in html and "query.bmp" in html


def test_pictures_carry_none_of_the_files_metadata() -> None:
    picture = Image.new("RGB", (80, 60), "blue")
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif, comment=b"a secret place")
    html = search_page.render([Asked("x", None, "", found(1, file.getvalue()))], ABOUT)
    [code] = re.findall(r"base64,([^\"]+)", html)
    assert b"secret" not in base64.b64decode(code)


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width_px", [1200, 500])
def test_a_browser_shows_the_page_without_running_what_strangers_wrote(
    tmp_path: Path, width_px: int, dark: bool
) -> None:
    """The title is what it was, the pictures are there, and nothing is wider than the window."""
    rename = "document.title=['own','ed'].join('')"
    hostile = f'<script>{rename}</script><img src=x onerror="{rename}">' + "w" * 5000
    hits = found(6, shardmaker.sample(0, size_px=400)[0], synthetic=hostile, web=hostile)
    page = tmp_path / "found.html"
    page.write_text(search_page.render([Asked(hostile, shardmaker.sample(1)[0], "q.jpg", hits)], ABOUT))
    shot = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'user'}"]
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    size = [f"--window-size={width_px},1400", f"--screenshot={shot}"]
    assert BROWSER is not None
    done = subprocess.run([BROWSER, *flags, *theme, *size, page.as_uri()], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width_px
    background = pixels[2, 2]
    assert (background.sum() < 150) == dark and (pixels[:, -8:] == background).all()
    dom = subprocess.run([BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>Search: &lt;script&gt;document.title" in dom.stdout and "owned" not in dom.stdout
