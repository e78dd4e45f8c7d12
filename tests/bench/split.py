"""Captions a second on one core by splitting rule; beside `sentence` the same rule by spaCy alone, and plain spaCy.

    uv run python tests/bench/split.py [--num-captions 200000] [--rounds 3] [--json OUT]

Half of the captions describe scenes of the demo world, half are drawn from sentences as captioners write them, with
quotations, abbreviations, decimals, addresses and lists among them. Each rule is timed over all captions in batches,
spaCy over a sample; rounds of one after the other, so that a busy machine is busy for all, and the best counts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import spacy

from clips_data import split
from clips_data.demo import scenes

BATCH = 1000
SPACY_EVERY = 11
EASY = (
    "The image shows a {colour} {thing} standing on a {colour} table near a large window.",
    "In the background, there are several trees and a {colour} building with a flat roof.",
    "A person wearing a {colour} jacket is holding a {thing} while looking at the camera.",
    "To the left of the {thing}, a small {colour} {thing} can be seen resting on the floor.",
    "The lighting is soft and natural, which gives the scene a calm and warm atmosphere.",
    "The overall style of the photograph is modern, with a focus on texture and contrast.",
    "The {thing}, which is partly hidden by a {colour} curtain, appears to be quite old.",
    "It is surrounded by a well-kept garden (mostly {colour} flowers), and the sky is clear.",
    "Next to the {colour} {thing} of {name} stands another one that looks much like it.",
    "The person's expression is neutral; their hands are folded in front of the {thing}.",
)
HARD = (
    'A sign above the {thing} reads "Open daily." in {colour} letters on a plain background.',
    "The {thing} is about 3.5 m tall, i.e. twice the height of the {colour} fence behind it.",
    "The label says “No. {number}” and shows the St. Mary logo in a {colour} circle.",
    "The photograph was taken in the U.S. in {number} by J. Smith, as the caption tells.",
    "A watermark in the corner reads https://www.example.com/{thing}?id={number} in {colour}.",
    "The text continues... and the {colour} {thing} is cut off at the edge of the frame.",
    'The headline reads "Is it {colour}?" and below it stands a picture of a {thing}.',
)
LIST = "The image contains the following:\n- a {colour} {thing}\n- a small {thing}\n\nThey stand side by side."
COLOURS = ("red", "dark blue", "green", "white", "yellow", "gray")
SYLLABLES = ("b", "kr", "l", "st", "v")
THINGS = ("chair", "bicycle", "lamp", "vase", "car", "statue", "bottle", "clock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-captions", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(captions(options.num_captions), options.rounds)
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


def captions(num: int, seed: int = 0) -> list[str]:
    """``num`` captions of about 55 words, equal for equal seeds."""
    rng = random.Random(f"captions/{seed}")
    return [
        scenes.describe(scenes.make_scene(seed, number)) if number % 2 else varied_caption(rng) for number in range(num)
    ]


def varied_caption(rng: random.Random) -> str:
    """Three or four sentences; every seventh is hard, and one caption in fifty holds a list."""
    texts = [rng.choice(HARD if rng.random() < 1 / 7 else EASY) for _ in range(rng.randint(3, 4))]
    if rng.random() < 1 / 50:
        texts[-1] = LIST
    filled = (
        text.format(
            colour=rng.choice(COLOURS), thing=rng.choice(THINGS), number=rng.randint(2, 2025), name=rare_name(rng)
        )
        for text in texts
    )
    return " ".join(filled)


def rare_name(rng: random.Random) -> str:
    """One of 15,625 names, so that no tokenizer knows all words from before."""
    return "".join(rng.choice(SYLLABLES) + rng.choice("aeiou") for _ in range(3)).title()


def measure(texts: Sequence[str], rounds: int) -> dict[str, Any]:
    sample = texts[::SPACY_EVERY]
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")

    def plain_spacy() -> None:
        for text in sample:
            list(nlp(text).sents)

    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for rule in split.RULES:
            seconds.setdefault(rule, []).append(timed(lambda rule=rule: in_batches(texts, rule)) / len(texts))
        by_spacy = timed(lambda: [split.sentences_by_spacy(text) for text in sample])
        seconds.setdefault("sentence_by_spacy", []).append(by_spacy / len(sample))
        seconds.setdefault("plain_spacy", []).append(timed(plain_spacy) / len(sample))
    best = {name: min(values) for name, values in seconds.items()}
    pieces = [split.split_many(sample, rule) for rule in split.RULES]
    return {
        "captions": len(texts),
        "words_mean": round(statistics.mean(len(text.split()) for text in sample), 1),
        "pieces_mean": {
            rule: round(statistics.mean(map(len, found)), 2) for rule, found in zip(split.RULES, pieces, strict=True)
        },
        "captions_per_s": {name: round(1 / value) for name, value in best.items()},
        "us_per_caption": {name: round(value * 1e6, 1) for name, value in best.items()},
        "sentence_to_plain_spacy": round(best["plain_spacy"] / best["sentence"], 2),
        "sentence_to_sentence_by_spacy": round(best["sentence_by_spacy"] / best["sentence"], 2),
    }


def in_batches(texts: Sequence[str], rule: split.Rule) -> None:
    for first in range(0, len(texts), BATCH):
        split.split_many(texts[first : first + BATCH], rule)


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
