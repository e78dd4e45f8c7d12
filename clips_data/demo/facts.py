"""Counts what a caption says of a scene against what is true.

A fact is (object, attribute, value) for shape, colour, size, texture and place, or a relation between an object and
its predecessor in reading order. Precision counts every claim made, recall every fact there is. Claims about the
background and the number of objects are counted as kinds of their own, outside the headline.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from clips_data.demo import scenes
from clips_data.demo.scenes import Scene, SceneObject

ATTRIBUTES = ("shape", "colour", "size", "texture", "place")
HEADLINE = (*ATTRIBUTES, "relation")
OTHER = ("background", "number")

_VALUES = {
    # Of things that the world does not have: claims all the same, and never true.
    **dict.fromkeys(("rectangle", "oval", "hexagon", "pentagon", "arrow", "moon"), "shape"),
    **dict.fromkeys((*scenes.BACKGROUNDS, "brown", "gold", "silver"), "colour"),
    **dict.fromkeys(scenes.SHAPES, "shape"),
    **dict.fromkeys(scenes.COLOURS, "colour"),
    **dict.fromkeys(scenes.SIZES, "size"),
    **dict.fromkeys(scenes.TEXTURES, "texture"),
}
_NUMBERS = {word: number for number, word in scenes.NUMBER_WORDS.items()}
_PLACE_WORD = "(?:top|bottom|left|right|center)"
_PLACE = re.compile(rf"\b(?:at|in|on) (?:(?:at|in|on|the) )*({_PLACE_WORD}(?: (?:the )?{_PLACE_WORD})*)\b(?! of)")
_PLACE_VALUE = re.compile(r"(?:top|bottom) (?:left|right)|top|bottom|left|right|center")
_RELATION = re.compile(r"\b(right of|below) it\b")
_BACKGROUND = re.compile(
    rf"\b(?:plain )?({'|'.join((*scenes.BACKGROUNDS, *scenes.COLOURS))}) background\b"
    rf"|\bon ({'|'.join(scenes.BACKGROUNDS)})\b"
)
_NUMBER = re.compile(rf"\b({'|'.join(_NUMBERS)}) shapes\b")


@dataclass
class ClaimedObject:
    """One object as a caption describes it, perhaps in contradictory words, perhaps without its shape.

    ``attributes`` holds each (attribute, value) once. ``relation`` is to the object that the caption named before.
    """

    attributes: list[tuple[str, str]] = field(default_factory=list)
    relation: str | None = None


@dataclass
class Claims:
    objects: list[ClaimedObject] = field(default_factory=list)
    background: str | None = None
    number: int | None = None


@dataclass(frozen=True)
class Counts:
    """Per kind: claims made, claims that are true, facts that exist, facts that were found."""

    made: Counter[str]
    true: Counter[str]
    exist: Counter[str]
    found: Counter[str]


def claims(text: str) -> Claims:
    """Reads the claims out of a caption. Made for the demo's sentences, and patient with broken ones."""
    lowered = text.lower()
    background, number = _BACKGROUND.search(lowered), _NUMBER.search(lowered)
    claimed = Claims(
        background=background.group(1) or background.group(2) if background else None,
        number=_NUMBERS[number.group(1)] if number else None,
    )
    for sentence in _BACKGROUND.sub(" ", lowered).split("."):
        claimed.objects += _objects(sentence)
    return claimed


def _objects(sentence: str) -> list[ClaimedObject]:
    """The objects of a sentence. A noun phrase ends with its shape, or, broken off, where the sentence ends.

    A relation is the first object's. A place is the next object's where the sentence opens with a place, as the demo's
    sentences do, and otherwise that of the object before.
    """
    relation = _RELATION.search(sentence)
    things = [ClaimedObject(relation=relation.group(1) if relation else None)]
    ended = places_lead = False
    for word, attribute in _words(_RELATION.sub(" ", sentence)):
        if attribute == "place" and not ended and len(things) == 1 and not things[0].attributes:
            places_lead = True
        # Two shapes in a row contradict each other about one object; anything else begins the next one.
        if ended and attribute != "shape" and not (attribute == "place" and not places_lead):
            things.append(ClaimedObject())
            ended = False
        if attribute is not None:
            late = attribute == "place" and not places_lead and not things[-1].attributes and len(things) > 1
            claims_of_one = things[-2 if late else -1].attributes
            if (attribute, word) not in claims_of_one:
                claims_of_one.append((attribute, word))
            ended = ended or attribute == "shape"
    return [thing for thing in things if thing.attributes or thing.relation]


def _words(sentence: str) -> Iterator[tuple[str, str | None]]:
    """Words in the singular, punctuation marks, and each place as one, with the attribute that they are a value of."""
    end = 0
    for run in [*_PLACE.finditer(sentence), None]:
        for word in re.findall(r"[a-z]+|[^a-z\s]", sentence[end : run.start() if run else len(sentence)]):
            word = word.removesuffix("s") if word.removesuffix("s") in _VALUES else word
            yield word, _VALUES.get(word)
        if run:  # a broken caption may stutter within a place ("at the top top left"), which is one place said once
            words = run.group(1).replace("the ", "").split()
            for place in _PLACE_VALUE.findall(" ".join(word for word, _ in itertools.groupby(words))):
                yield place, "place"
            end = run.end()


def score(text: str, scene: Scene) -> Counts:
    """Aligns the claimed objects with the true ones so that most attributes agree, then counts."""
    claimed = claims(text)
    partner = _align(claimed.objects, scene.objects)
    made, true, exist, found = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for number, thing in enumerate(claimed.objects):
        real = scene.objects[partner[number]] if number in partner else None
        for attribute, word in thing.attributes:
            made[attribute] += 1
            if real is not None and getattr(real, attribute) == word:
                true[attribute] += 1
                found[attribute] += 1
    for attribute in ATTRIBUTES:
        exist[attribute] = len(scene.objects)
    exist["relation"] = len(scene.relations())
    said: set[tuple[int, str, int]] = set()
    for number, thing in enumerate(claimed.objects):
        if thing.relation is None:
            continue
        made["relation"] += 1
        if number in partner and number - 1 in partner:
            later, earlier = partner[number], partner[number - 1]
            if _holds(scene.objects[later], thing.relation, scene.objects[earlier]):
                true["relation"] += 1
                said.add((later, thing.relation, earlier))
    found["relation"] = len(said & set(scene.relations()))
    others: dict[str, tuple[object, object]] = {
        "background": (claimed.background, scene.background),
        "number": (claimed.number, len(scene.objects)),
    }
    for kind, (value, truth) in others.items():
        exist[kind] = 1
        made[kind] = int(value is not None)
        true[kind] = found[kind] = int(value == truth)
    return Counts(made, true, exist, found)


def _holds(later: SceneObject, relation: str, earlier: SceneObject) -> bool:
    if relation == "below":
        return later.row > earlier.row
    return later.row == earlier.row and later.column > earlier.column


def _align(claimed: list[ClaimedObject], real: tuple[SceneObject, ...]) -> dict[int, int]:
    """Claimed object → true object, one to one, with the most attributes in agreement; none without any."""
    best: dict[int, tuple[int, dict[int, int]]] = {0: (0, {})}
    for number, thing in enumerate(claimed):
        extended = dict(best)
        for taken, (agreed, pairs) in best.items():
            for index, candidate in enumerate(real):
                same = sum(getattr(candidate, name) == value for name, value in thing.attributes)
                mask = taken | 1 << index
                if same and not taken & 1 << index and extended.get(mask, (-1, {}))[0] < agreed + same:
                    extended[mask] = (agreed + same, {**pairs, number: index})
        best = extended
    return max(best.values(), key=lambda entry: entry[0])[1]


def total(counts: Iterable[Counts]) -> dict[str, object]:
    """Precision and recall over many captions: the headline, and each kind with its denominators."""
    made, true, exist, found = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    num_captions = 0
    for one in counts:
        num_captions += 1
        made.update(one.made)
        true.update(one.true)
        exist.update(one.exist)
        found.update(one.found)
    kinds = {
        kind: {
            "precision": _share(true[kind], made[kind]), "claims": made[kind],
            "recall": _share(found[kind], exist[kind]), "facts": exist[kind],
        }
        for kind in (*HEADLINE, *OTHER)
    }  # fmt: skip
    sums = [sum(counter[kind] for kind in HEADLINE) for counter in (true, made, found, exist)]
    return {
        "num_captions": num_captions,
        "precision": _share(sums[0], sums[1]),
        "claims": sums[1],
        "recall": _share(sums[2], sums[3]),
        "facts": sums[3],
        "kinds": kinds,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
