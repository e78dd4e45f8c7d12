"""Captioning metrics: pycocoevalcap's where it has an answer, defined where it has none, with and without Java."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import runmaker
import shardmaker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from clips_data.demo import scenes
from clips_data.errors import UserError
from clips_train import encoders
from clips_train.encoders import Encoder
from clips_train.evals import caption_metrics, caption_tokens, captioning, meteor
from clips_train.evals.caption_tokens import RULES, STANFORD
from clips_train.evals.items import DataSet, Item
from clips_train.evals.outcome import Figure
from clips_train.use_config import Benchmark, EvalConfig

needs_java = pytest.mark.skipif(caption_tokens.java() is None, reason="there is no Java here")
BENCHMARK = Benchmark(name="mine", data="here", task="captioning")
CONFIG = EvalConfig(batch=3, device="cpu")
HOSTILE = [
    "x" * 100_000,
    "dog " * 25_000,
    "'" * 10_000,
    "\x00\x1b[31m\x85\u2028\u202edog\r\n cat\ud800",
    "😀 <script>",
    "|||",
]
words = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "on", "the", "grass", "red"]), max_size=9)
judged = st.lists(st.tuples(words, st.lists(words.filter(bool), min_size=1, max_size=3)), min_size=2, max_size=6)


def tokens(*texts: str) -> list[str]:
    return [" ".join(found) for found in RULES.tokens(texts)]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog can't (really) run -- it's \"nice\".", "a man 's dog ca n't -lrb- really -rrb- run it 's nice"),
        ("Two men; a 12-inch pizza/pie on the U.S. flag.", "two men a 12-inch pizza/pie on the u.s. flag"),
        ("“Quoted” ‘single’ … – — don’t", "quoted single do n't"),
        ("I cannot see Mr. Smith's dog, gonna wait...", "i can not see mr. smith 's dog gon na wait"),
        ("5:00pm, $5.00, 50% off, 1/2 cup & 1,000 R&B fans", "5:00 pm $ 5.00 50 % off 1/2 cup & 1,000 r&b fans"),
        ("£5 €6 ½ cup of café 20°C [x] {y}", "# 5 $ 6 1/2 cup of café 20 ° c -lsb- x -rsb- -lcb- y -rcb-"),
        ("wow!!! really?! no. 5 #1 #tag :)", "wow !!! really ?! no. 5 # 1 #tag :-rrb-"),
        ("see http://a.b/c, www.a.b. or you@a.com!", "see http://a.b/c www.a.b or you@a.com"),
        ("rock 'n' roll of the '90s, 'tis o'clock", "rock 'n' roll of the '90s 't is o'clock"),
        ("&lt;b&gt; AT&amp;T <b>bold</b>", "<b> at&t <b> bold </b>"),
        (" \n\t", ""),
    ],
)  # fmt: skip
def test_words_are_those_of_the_penn_treebank(text: str, expected: str) -> None:
    assert tokens(text) == [expected]


PIECES = (
    "a dog|two men's|the t-shirt|didn't|(left)|\"big\"|12-inch|and/or|U.S.A.|St. Louis|p.m.|5:30pm|$9.99|50%|1990s|"
    "'90s|Q&A|#1|mother-in-law|it's|cats'|well-known|e.g.|etc.|No. 5|3/4|1,000|…|– sale –|“deal”|w/ box|C++|:)|"
    "www.shop.com|me@shop.com|cannot|gonna|Mr. Bean|J. K. Rowling|ice-cream.|wow!!|?!|[new]|½ price|café|日本|Привет|"
    "2x4|5'10\"|A+|iPhone-6|& more|* best *|free_shipping|x=1|over-the-top,|red; blue:|...|!|I'm|we've|y'all"
)
"""What a tokenizer has to think about."""


def odd_captions(count: int) -> list[str]:
    """As people write them into web pages, in any order."""
    rng, pieces = random.Random(0), PIECES.split("|")
    return [" ".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(count)]


@needs_java
def test_our_words_are_stanfords_on_captions_and_on_odd_ones() -> None:
    made = [scenes.make_scene(3, number) for number in range(300)]
    plain = [text for scene in made for text in (*scenes.five_captions(scene), scenes.describe(scene))]
    plain += [scenes.web_caption(scene) for scene in made]
    odd = odd_captions(1000)
    assert RULES.tokens(plain) == STANFORD.tokens(plain)
    differ = [pair for pair in zip(odd, RULES.tokens(odd), STANFORD.tokens(odd), strict=True) if pair[1] != pair[2]]
    assert len(differ) <= 10, differ[:5]


@needs_java
def test_stanfords_words_are_what_pycocoevalcap_gets_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    texts = [*odd_captions(200), "no dog"]
    theirs = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    assert STANFORD.tokens(texts) == [theirs[number][0].split() for number in range(len(texts))]


@needs_java
def test_no_caption_can_shift_the_others() -> None:
    assert len(STANFORD.tokens([*HOSTILE[2:], "a dog"])) == len(HOSTILE) - 1
    assert STANFORD.tokens([*HOSTILE[2:], "", "a dog"])[-2:] == [[], ["a", "dog"]]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_words_that_splitting_at_blanks_keeps(text: str) -> None:
    (found,) = RULES.tokens([text])
    assert " ".join(found).split() == found
    assert not set(found) & caption_tokens.PUNCTUATION


def test_texts_that_invite_endless_search_have_words_too() -> None:
    for part in ("a,", "a.1.", "<a b ", "'", "http://a.!", "n't", "a_", "1/", "A&", "(12 ", "a-", "www.a.", "aa'"):
        text = part * (20_000 // len(part))
        letters = sum(character.isalnum() for character in text)
        assert letters <= sum(len(word) for word in RULES.tokens([text])[0]) + text.count("n't") <= 6 * len(text)


# --- figures ----------------------------------------------------------------------------------------------------------


def theirs(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given_by = {number: [" ".join(one) for one in some] for number, some in enumerate(references)}
    found_by = {number: [" ".join(one)] for number, one in enumerate(captions)}
    bleu, _ = Bleu().compute_score(given_by, found_by, verbose=0)
    return {
        **{f"bleu{n}": value for n, value in enumerate(bleu, start=1)},
        "rouge_l": float(Rouge().compute_score(given_by, found_by)[0]),
        "cider": float(Cider().compute_score(given_by, found_by)[0]),
    }


@settings(deadline=None)
@given(judged)
def test_cider_bleu_and_rouge_are_pycocoevalcaps(pairs: list[tuple[list[str], list[list[str]]]]) -> None:
    captions, references = [one for one, _ in pairs], [some for _, some in pairs]
    figures = caption_metrics.bleu(captions, references)
    figures["rouge_l"] = caption_metrics.rouge_l(captions, references)
    figures["cider"] = caption_metrics.cider(captions, references)
    expected = theirs(captions, references)
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected, abs=1e-12, rel=1e-12)


@given(words, words)
def test_the_common_subsequence_is_as_long_as_the_table_says(one: list[str], other: list[str]) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    assert caption_metrics.common_length(one, other) == table[-1][-1]


METEOR = (
    ("6 3 3 1 2 2 1 1 0 0 0 0 0 0 0 0 0 0 0 0 2 3 3", 0.4035028092615153),
    ("0 2 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", 0.0),
    ("1 5 0 2 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1", 0.12244897959183675),
    ("4 4 1 1 3 3 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 4 4", 1.0),
    ("4 4 1 2 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 2 2 2", 0.19277108433734938),
)
"""Counts of captions, and what the program said their score was; of all together it said 0.2920782646760716."""


def test_meteor_is_a_function_of_the_programs_counts() -> None:
    counts = torch.tensor([[float(number) for number in row.split()] for row, _ in METEOR], dtype=torch.float64)
    counts = meteor.counted(counts)
    assert meteor.score(counts).tolist() == pytest.approx([score for _, score in METEOR], abs=1e-15)
    assert Figure(counts, meteor.score).value == pytest.approx(0.2920782646760716, abs=1e-15)


@needs_java
@pytest.mark.long  # the program reads a table of 60 MB whenever it starts
def test_meteor_of_all_captions_is_the_programs_own() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    made = [scenes.make_scene(5, number) for number in range(40)]
    captions = RULES.tokens([scenes.five_captions(scene)[0] for scene in made])
    references = [RULES.tokens(scenes.five_captions(scene)[1:]) for scene in made]
    captions += [[], ["dogs", "sprinted"], ["a", "cat"]]
    references += [[["a", "cat"]], [["a", "dog", "ran", "quickly"], ["the", "hound"]], [["a", "cat"]]]
    whole, each = Meteor().compute_score(
        {number: [" ".join(one) for one in some] for number, some in enumerate(references)},
        {number: [" ".join(one)] for number, one in enumerate(captions)},
    )
    figure = meteor.figure(captions, references)
    assert figure.value == pytest.approx(whole, abs=1e-12)
    assert meteor.score(figure.units_UD).tolist() == pytest.approx(each, abs=1e-12)


def test_captions_and_references_without_words_are_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "java", lambda: None)
    outcome = caption_metrics.measure(["", "a dog", "a cat"], [["a dog"], ["a dog", " ", "..."], ["", "."]])
    assert outcome.counts["captions.empty"] == 1
    assert outcome.counts["images.without_references"] == 1
    assert outcome.counts["references"] == 2
    assert outcome.figures["rouge_l"].value == 0.5
    assert outcome.about["tokenizer"] == RULES.name
    assert "meteor" not in outcome.figures and "Java" in outcome.about["meteor"]


def test_one_image_has_no_cider_and_none_has_only_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "java", lambda: None)
    one = caption_metrics.measure(["a dog"], [["a dog"]])
    assert one.figures["bleu1"].value == pytest.approx(1) and "cider" not in one.figures
    assert "one image" in one.about["cider"]
    assert set(caption_metrics.measure(["a dog"], [[]]).figures) == {"mean_words", "distinct_1", "distinct_2"}


def test_distinct_counts_different_ngrams_over_all() -> None:
    figures = caption_metrics.diversity([["a", "dog"], ["a", "dog", "a", "cat"], []])
    assert figures["distinct_1"].value == pytest.approx(3 / 6)
    assert figures["distinct_2"].value == pytest.approx(3 / 4)
    assert figures["distinct_3"].value == pytest.approx(2 / 2)
    assert figures["mean_words"].value == 2


def test_hostile_captions_and_references_are_measured(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_tokens, "java", lambda: None)
    outcome = caption_metrics.measure([*HOSTILE, "a dog"], [[text, "a dog"] for text in (*HOSTILE[::-1], "dog")])
    for name, figure in outcome.figures.items():
        low, high = figure.interval(resamples=20)
        assert low <= high, name
    assert capfd.readouterr() == ("", "")


def test_clip_scores_are_those_of_the_paper() -> None:
    image = functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), dim=1)
    caption = functional.normalize(torch.tensor([[0.6, 0.8], [-1.0, 0.0]]), dim=1)
    references = functional.normalize(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), dim=1)
    figures = caption_metrics.clip_scores(image, caption, references, torch.tensor([0, 0, 1]))
    assert figures["clip_score"].value == pytest.approx(2.5 * 0.6 / 2)
    assert figures["ref_clip_score"].value == pytest.approx(2 * 1.5 * 0.8 / (1.5 + 0.8) / 2)
    without = caption_metrics.clip_scores(image, caption, references[:0], torch.zeros(0, dtype=torch.long))
    assert set(without) == {"clip_score"}


# --- the task ---------------------------------------------------------------------------------------------------------


def encoder(folder: Path, **change: object) -> Encoder:
    run = runmaker.write_run(folder, spread=8, **change)
    (named,) = encoders.find([str(run)], (), folder.parent)
    return encoders.load(named, "cpu", "fp32")


def picture(number: int) -> bytes:
    image, _ = shardmaker.sample(number)
    return image


def data_set(count: int = 5) -> DataSet:
    items = []
    for number in range(count):
        texts = [f"a dog {number}", "a red cat"]
        items.append(Item(f"{number}", functools.partial(picture, number), texts, about={"web": f"web {number}"}))
    return DataSet(items, {"path": "here", "left_out": {"images.without_text": 2}})


def failing() -> bytes:
    raise FileNotFoundError


def test_captions_are_the_captioners_own_whatever_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "java", lambda: None)
    from clips_train import generate, transforms

    model, data = encoder(tmp_path / "run"), data_set()
    outcome = captioning.score(model, data, CONFIG, BENCHMARK)
    assert model.trained is not None
    pixels = torch.stack([transforms.squash(transforms.decode_whole(picture(number)), 16) for number in range(5)])
    expected = generate.caption_images(model.trained, pixels, [f"web {number}" for number in range(5)])
    rows = outcome.details["captions"]
    assert [row["caption"] for row in rows] == expected and len(set(expected)) > 1
    assert rows[1]["key"] == "1" and rows[1]["references"] == ["a dog 1", "a red cat"]
    assert {"cider", "bleu4", "rouge_l", "clip_score", "ref_clip_score", "distinct_1", "mean_tokens"} <= set(
        outcome.figures
    )
    assert outcome.about["clip_score"]["own_towers"] and outcome.about["decoding"] == "greedy"
    assert outcome.counts["images.without_text"] == 2
    json.dumps([outcome.about, outcome.details, dict(outcome.counts)])


def test_images_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "java", lambda: None)
    data = data_set(3)
    bad = [Item("gone", failing, ["a dog"]), Item("broken", lambda: b"no image", ["a dog"])]
    outcome = captioning.score(encoder(tmp_path / "run"), DataSet([*data.items, *bad], data.about), CONFIG, BENCHMARK)
    assert outcome.counts["images.scored"] == outcome.counts["captions"] == 3
    assert outcome.counts["images.bad.missing"] == outcome.counts["images.bad.not_an_image"] == 1
    with pytest.raises(UserError, match="None of 2 images can be captioned"):
        captioning.score(encoder(tmp_path / "other"), DataSet(bad, data.about), CONFIG, BENCHMARK)


def test_another_model_can_be_the_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "java", lambda: None)
    model, judge = encoder(tmp_path / "run"), encoder(tmp_path / "judge", seed=1, image_px=32)
    outcome = captioning.score(model, data_set(), CONFIG, BENCHMARK, judge)
    own = captioning.score(model, data_set(), CONFIG, BENCHMARK)
    assert outcome.about["clip_score"]["digest"] == judge.about["digest"]
    assert outcome.figures["clip_score"].value != own.figures["clip_score"].value
    assert outcome.figures["bleu4"].value == own.figures["bleu4"].value


def test_a_model_without_captioner_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no captioner.*--model run:NAME"):
        captioning.score(encoder(tmp_path / "run", decoder="none", caption_weight=0), data_set(), CONFIG, BENCHMARK)


def test_absent_web_captions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "java", lambda: None)
    items = [Item(item.key, item.read, item.texts) for item in data_set().items]
    outcome = captioning.score(encoder(tmp_path / "run"), DataSet(items, {"path": "here"}), CONFIG, BENCHMARK)
    assert "0 of 5" in outcome.about["condition"] and "never trained without a text" in outcome.about["condition"]
