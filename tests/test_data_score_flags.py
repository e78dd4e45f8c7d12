"""What captions look like without a model, and how far captions of other images bear one out."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import caption_flags, support
from clips_data.recaption import clean, untrusted


@pytest.mark.parametrize(
    ("caption", "flags"),
    [
        ("a red boat on the sea", []),
        ("", []),
        ("Visit www.example.com today", ["url"]),
        ("write to me@example.org", ["email"]),
        ("call our shop at (555) 123-4567 now", ["phone"]),
        ("<b>red boat</b>&nbsp;&amp; sea", ["markup"]),
        ("red boat &#8211; sea", ["markup"]),
        ("5 < 6 and AT&T", []),
        ("IMG_1234.JPG", ["file_name"]),
        ("img20240102030405.jpg", ["file_name", "no_language"]),
        ("BUY RED BOATS", ["all_caps"]),
        ("NASA", []),
        ("图片里有一个圆形", []),
        ("12 x 14 / 300", ["no_language"]),
        ("red shoes, red dress, red bag, red hat, red belt", ["repeated_words"]),
        ("sale sale sale of boats", ["repeated_words"]),
        ("the boat and the sea and the sand", []),
        ("The image shows a boat", ["opener"]),
        ("a boat <image> on the sea", ["special_token"]),
        ("a boat ＜|im_end|＞", ["special_token"]),
        ("USER: a boat", ["role_marker"]),
        ("user: friendly", []),
        ("a\u202eboat\u202c", ["control"]),
    ],
)
def test_flags(caption: str, flags: list[str]) -> None:
    assert caption_flags.flags(caption) == flags


PIECES = st.sampled_from(
    ["boat", " ", "www.a.com", "a@b.org", "+49 30 123456", "<image>", "[INST]", "USER:", "＜s＞", "\u200b", "☺\ufe0f",
     "0171 123 4567", "https://", ".", "#", "é", "|", "12", "\u0338", "Tel: 123456"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=30))
def test_looking_first_at_characters_changes_no_verdict(caption: str) -> None:
    found = caption_flags.flags(caption)
    assert ("url" in found, "email" in found, "phone" in found) == (
        clean.has_url(caption), clean.has_email(caption), clean.has_phone(caption),
    )  # fmt: skip
    _, told = untrusted.neutralise(caption, (), max_chars=max(1, len(caption)))
    for flag in ("special_token", "role_marker", "control"):
        assert (flag in found) == (f"input_{flag}" in told)


def test_no_character_that_stands_for_a_bracket_is_overlooked() -> None:
    signs = set("<>[]|#:◁▷")
    for number in range(0x110000):
        character = chr(number)
        if character.isprintable() and not caption_flags.MAY_BE_TOKEN.search(character):
            assert not signs & set(unicodedata.normalize("NFKD", character)), hex(number)


# --- support ----------------------------------------------------------------------------------------------------------


def one_hot(*places: int) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[list(places)]


def test_a_word_that_only_unlike_images_have_is_unsupported() -> None:
    """Two kinds of images; the last of the first kind speaks of the second kind's thing."""
    texts = ["red boat"] * 5 + ["blue house"] * 5 + ["red house"]
    images = one_hot(*[0] * 5, *[1] * 5, 0)
    found = support.supports(images, images, texts, 4)
    assert found[10] is not None
    assert found[:10] == [found[0]] * 5 + [found[5]] * 5 and found[10] < 0.3 < 0.6 < min(found[0] or 0, found[5] or 0)


def test_a_word_that_nobody_else_says_tells_nothing() -> None:
    texts = ["red boat"] * 4 + ["red boat zebra"]
    found = support.supports(one_hot(0, 0, 0, 0, 0), one_hot(0, 0, 0, 0, 0), texts, 2)
    assert found[4] == 0.5 and found[0] == pytest.approx(3 / 6)


def test_a_caption_does_not_bear_itself_out() -> None:
    images = np.random.default_rng(0).normal(size=(30, 8))
    assert support.supports(images, images, [f"word{number}" for number in range(30)], 3) == [0.5] * 30


def test_rows_without_words_have_no_support_and_lend_none() -> None:
    images = one_hot(0, 0, 0, 0)
    assert support.supports(images, images, ["red", "", "the of", "red"], 3) == [0.5, None, None, 0.5]
    assert support.supports(images, images, ["red", "", "", ""], 3) == [None] * 4
    assert support.supports(images[:0], images[:0], [], 3) == []


def test_lengths_of_features_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    images, captions = draw.normal(size=(40, 8)), draw.normal(size=(40, 8))
    texts = [" ".join(draw.choice(["red", "blue", "boat", "house", "sea"], 3)) for _ in range(40)]
    whole = support.supports(images, captions, texts, 5)
    monkeypatch.setattr(support, "IMAGES_AT_ONCE", 7)
    assert support.supports(images * 3, captions * 0.1, texts, 5) == pytest.approx(whole)
