"""Facts in captions: the truthful description is perfect, one wrong word costs one, another scene's caption is poor."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data import draws
from clips_data.demo import facts, scenes
from clips_data.demo.scenes import Scene, SceneObject

WORLD = 5
WORDS: dict[str, tuple[str, ...]] = {
    word: values
    for values in (scenes.SHAPES, tuple(scenes.COLOURS), tuple(scenes.SIZES), scenes.TEXTURES)
    for word in values
}
SCENE = Scene(
    seed=0,
    index=0,
    objects=(
        SceneObject("circle", "red", "large", "plain", "top left"),
        SceneObject("star", "blue", "small", "dotted", "top right"),
        SceneObject("ring", "green", "large", "striped", "center"),
    ),
    background="white",
    width_px=300,
    height_px=300,
)
RING = "Below it, in the center, a large striped green ring."


def headline(text: str, scene: Scene) -> tuple[int, int, int, int]:
    """Claims made, claims true, facts that exist, facts found, over the six kinds of the headline."""
    counts = facts.score(text, scene)
    made, true, exist, found = (
        sum(counter[kind] for kind in facts.HEADLINE)
        for counter in (counts.made, counts.true, counts.exist, counts.found)
    )
    return made, true, exist, found


def other_than(value: str, values: tuple[str, ...], key: str) -> str:
    rest = [each for each in values if each != value]
    return rest[draws.integer(len(rest), 0, "test", 0, key)]


def test_the_description_of_each_of_two_thousand_scenes_is_true_and_complete() -> None:
    for index in range(2000):
        scene = scenes.make_scene(WORLD, index)
        counts = facts.score(scenes.describe(scene), scene)
        assert counts.made == counts.true == counts.exist == counts.found
        num = len(scene.objects)
        assert counts.exist == {
            **dict.fromkeys(facts.ATTRIBUTES, num),
            "relation": num - 1,
            "background": 1,
            "number": 1,
        }


@pytest.mark.parametrize("index", range(40))
def test_any_wrong_word_of_a_kind_costs_exactly_one_claim_and_one_fact(index: int) -> None:
    scene = scenes.make_scene(WORLD, index)
    text = scenes.describe(scene)
    all_of_them = len(scene.objects) * 6 - 1
    spans = [match.span() for match in re.finditer("[a-z]+", text) if match.group() in WORDS]
    assert len(spans) == 4 * len(scene.objects)
    for start, end in spans:
        word = text[start:end]
        wrong = text[:start] + other_than(word, WORDS[word], f"{index}/{start}") + text[end:]
        assert headline(wrong, scene) == (all_of_them, all_of_them - 1, all_of_them, all_of_them - 1), wrong


@pytest.mark.parametrize("index", range(40))
def test_a_wrong_place_or_relation_costs_exactly_one_claim_and_one_fact(index: int) -> None:
    scene = scenes.make_scene(WORLD, index)
    text = scenes.describe(scene)
    all_of_them = len(scene.objects) * 6 - 1
    expected = (all_of_them, all_of_them - 1, all_of_them, all_of_them - 1)
    for match in re.finditer("Right of|Below", text):
        wrong = text[: match.start()] + ("Below" if match.group() != "Below" else "Right of") + text[match.end() :]
        assert headline(wrong, scene) == expected, wrong
    for thing in scene.objects:
        phrase = scenes.PLACE_PHRASES[thing.place]
        other = scenes.PLACE_PHRASES[other_than(thing.place, scenes.PLACES, f"{index}/{thing.place}")]
        wrong = re.sub(rf"(?i)\b{phrase}, a", f"{other}, a", text, count=1)
        assert wrong != text
        assert headline(wrong, scene) == expected, wrong


def test_the_caption_of_another_scene_scores_low() -> None:
    total: dict[str, Any] = facts.total(
        facts.score(scenes.describe(scenes.make_scene(WORLD + 1, index)), scenes.make_scene(WORLD, index))
        for index in range(300)
    )
    assert total["precision"] < 0.45 and total["recall"] < 0.45
    assert total["kinds"]["shape"]["precision"] < 0.3 and total["kinds"]["colour"]["precision"] < 0.3


def test_a_missing_sentence_costs_recall_only() -> None:
    text = scenes.describe(SCENE).replace(RING, "")
    made, true, exist, found = headline(text, SCENE)
    assert (made, true, exist, found) == (11, 11, 17, 11)


def test_an_object_said_twice_is_true_once() -> None:
    made, true, _, found = headline(scenes.describe(SCENE) + " A large striped green ring.", SCENE)
    assert (made, true, found) == (17 + 4, 17, 17)


def test_a_relation_between_other_objects_than_neighbours_can_be_true_without_being_a_fact() -> None:
    counts = facts.score("A plain red circle. Below it, a striped green ring.", SCENE)
    assert counts.made["relation"] == counts.true["relation"] == 1
    assert counts.found["relation"] == 0


def test_a_relation_without_anything_to_relate_to_is_false() -> None:
    counts = facts.score("Below it, in the center, a large striped green ring.", SCENE)
    assert (counts.made["relation"], counts.true["relation"]) == (1, 0)


def test_a_relation_to_an_object_that_agrees_with_nothing_is_false() -> None:
    counts = facts.score("A pink heart. Below it, a striped green ring.", SCENE)
    assert (counts.made["relation"], counts.true["relation"]) == (1, 0)


def test_background_and_number_are_counted_beside_the_headline() -> None:
    text = scenes.describe(SCENE)
    wrong = text.replace("three shapes on a white", "five shapes on a black")
    assert headline(wrong, SCENE) == headline(text, SCENE) == (17, 17, 17, 17)
    counts = facts.score(wrong, SCENE)
    assert (counts.made["background"], counts.true["background"], counts.found["background"]) == (1, 0, 0)
    assert (counts.made["number"], counts.true["number"], counts.found["number"]) == (1, 0, 0)


def test_several_objects_in_a_sentence_are_several_claims() -> None:
    counts = facts.score("Blue star with green ring and a pink heart", SCENE)
    assert (counts.made["shape"], counts.true["shape"]) == (3, 2)
    assert (counts.made["colour"], counts.true["colour"]) == (3, 2)


def test_objects_are_aligned_for_the_best_total_not_greedily() -> None:
    objects = (
        SceneObject("circle", "red", "large", "plain", "left"),
        SceneObject("circle", "red", "small", "plain", "right"),
    )
    scene = Scene(0, 0, objects, "white", 300, 300)
    counts = facts.score("A red circle. A large red circle.", scene)
    assert counts.made["size"] == counts.true["size"] == 1


def test_totals_are_sums_over_captions_with_their_denominators() -> None:
    first = facts.score("A red circle.", SCENE)
    second = facts.score("A pink star.", SCENE)
    total: dict[str, Any] = facts.total([first, second])
    assert (total["num_captions"], total["claims"], total["facts"]) == (2, 4, 34)
    assert total["precision"] == 0.75 and total["recall"] == round(3 / 34, 4)
    assert total["kinds"]["colour"] == {"precision": 0.5, "claims": 2, "recall": round(1 / 6, 4), "facts": 6}
    assert total["kinds"]["size"]["precision"] is None and total["kinds"]["size"]["recall"] == 0


def test_no_captions_have_no_shares() -> None:
    total: dict[str, Any] = facts.total([])
    assert total["num_captions"] == 0 and total["precision"] is None and total["recall"] is None


@pytest.mark.parametrize("text", ["", ".", "untitled", "IMG_1234.JPG", "nice picture", "图片里有一个星形"])
def test_a_caption_without_claims_makes_none(text: str) -> None:
    assert headline(text, SCENE) == (0, 0, 17, 0)


SOUP = st.lists(
    st.sampled_from([*WORDS, "it", "Below", "right of", "at the top left", "on the", "left", "a", ",", ".", "shapes"])
    | st.text(max_size=4)
).map(" ".join)


@settings(max_examples=200)
@given(text=SOUP, index=st.integers(0, 200))
def test_word_soup_is_counted_within_bounds(text: str, index: int) -> None:
    counts = facts.score(text, scenes.make_scene(WORLD, index))
    for kind in (*facts.HEADLINE, *facts.OTHER):
        assert 0 <= counts.true[kind] <= counts.made[kind]
        assert 0 <= counts.found[kind] <= min(counts.true[kind], counts.exist[kind])


def claimed(text: str) -> list[tuple[set[str], str | None]]:
    return [({value for _, value in thing.attributes}, thing.relation) for thing in facts.claims(text).objects]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red blue circle.", [({"red", "blue", "circle"}, None)]),
        ("A red circle square.", [({"red", "circle", "square"}, None)]),
        ("A a large large red red circle.", [({"large", "red", "circle"}, None)]),
        ("Below it, on the left, a large plain red.", [({"left", "large", "plain", "red"}, "below")]),
        ("At the.", []),
        ("Right of it.", [(set(), "right of")]),
        ("At the top top left, a red circle.", [({"top left", "red", "circle"}, None)]),
        ("At the top at the bottom left, a ring.", [({"top", "bottom left", "ring"}, None)]),
        (
            "A red circle at the top left and a blue star on the right.",
            [({"red", "circle", "top left"}, None), ({"blue", "star", "right"}, None)],
        ),
        ("On the left, a ring, on the right, a star.", [({"left", "ring"}, None), ({"right", "star"}, None)]),
        ("A white rectangle.", [({"white", "rectangle"}, None)]),
        ("Two red circles on a plain white background.", [({"red", "circle"}, None)]),
        ("The rest of the picture is left empty.", []),
    ],
)  # fmt: skip
def test_a_broken_caption_is_held_to_every_claim_it_makes(
    text: str, expected: list[tuple[set[str], str | None]]
) -> None:
    assert claimed(text) == expected


def test_contradictory_words_cost_precision() -> None:
    text = scenes.describe(SCENE).replace("striped green ring", "striped dotted green blue ring")
    assert headline(text, SCENE) == (19, 17, 17, 17)


def test_a_phrase_without_its_shape_still_makes_its_claims() -> None:
    text = scenes.describe(SCENE).replace(RING, "Below it, in the center, a small plain pink.")
    assert headline(text, SCENE) == (11 + 5, 11 + 2, 17, 11 + 2)


def test_a_background_of_an_objects_colour_is_a_false_claim() -> None:
    counts = facts.score("A red circle on a pink background.", SCENE)
    assert (counts.made["background"], counts.true["background"], counts.made["colour"]) == (1, 0, 1)
