"""Questions about a scene that have one answer out of few: what zero-shot classification asks of the demo world.

A scene that does not answer a question clearly is not asked it. The prompts use the words of the world's captions, so
that a model is asked about what it sees and not about words that it never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from clips_data.demo import scenes
from clips_data.demo.scenes import Scene

CENTER: Final = "center"


@dataclass(frozen=True)
class Question:
    """``answer`` is one of ``classes``, or ``None``; ``templates`` have ``{c}`` where it belongs."""

    asks: str
    classes: Sequence[str]
    templates: Sequence[str]
    answer: Callable[[Scene], str | None]


def _most(attribute: str) -> Callable[[Scene], str | None]:
    """The value of more objects than any other value."""

    def answer(scene: Scene) -> str | None:
        (first, number), *others = Counter(getattr(thing, attribute) for thing in scene.objects).most_common()
        return str(first) if number > (others[0][1] if others else 0) else None

    return answer


def _in_the_center(attribute: str) -> Callable[[Scene], str | None]:
    def answer(scene: Scene) -> str | None:
        return next((str(getattr(thing, attribute)) for thing in scene.objects if thing.place == CENTER), None)

    return answer


_WHERE: Final = f"{scenes.PLACE_PHRASES[CENTER]}, "
_OF_A_SHAPE: Final = tuple(f"a {{c}} {shape}" for shape in scenes.SHAPES)
_OF_A_COLOUR: Final = tuple(f"a {colour} {{c}}" for colour in scenes.COLOURS)

QUESTIONS: Final[Mapping[str, Question]] = {
    "background": Question(
        "colour of the background",
        tuple(scenes.BACKGROUNDS),
        ("on a {c} background", "A picture of shapes on a {c} background"),
        lambda scene: scene.background,
    ),
    "number": Question(
        "number of objects",
        tuple(scenes.NUMBER_WORDS.values()),
        ("This picture shows {c} shapes",),
        lambda scene: scenes.NUMBER_WORDS[len(scene.objects)],
    ),
    "colour": Question("colour of most objects", tuple(scenes.COLOURS), _OF_A_SHAPE, _most("colour")),
    "shape": Question("shape of most objects", scenes.SHAPES, _OF_A_COLOUR, _most("shape")),
    "size": Question("size of most objects", tuple(scenes.SIZES), _OF_A_SHAPE, _most("size")),
    "texture": Question("texture of most objects", scenes.TEXTURES, _OF_A_SHAPE, _most("texture")),
    "center-colour": Question(
        "colour of the object in the center",
        tuple(scenes.COLOURS),
        tuple(_WHERE + text for text in _OF_A_SHAPE),
        _in_the_center("colour"),
    ),
    "center-shape": Question(
        "shape of the object in the center",
        scenes.SHAPES,
        tuple(_WHERE + text for text in _OF_A_COLOUR),
        _in_the_center("shape"),
    ),
}
