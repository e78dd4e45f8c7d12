"""The instructions of the demo's captioner: what is taught is true, as asked, and comes through whole."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data.demo import facts, scenes, tasks, tasks_measure, tasks_texts
from clips_data.demo.tasks import Given, Task
from clips_data.recaption import prompts
from clips_data.recaption.choose import DEMO_MODEL
from clips_data.recaption.engines import Answer, Request
from clips_data.recaption.rows import Recipe

WORLD = [scenes.make_scene(5, i) for i in range(60)]
DESCRIPTIONS = [scenes.describe(scene) for scene in WORLD]
by_prompt = pytest.mark.parametrize("task", tasks.TASKS, ids=lambda task: task.prompt)


class Taught:
    """An engine that has learned everything by heart: it gives the taught answers of one task."""

    def __init__(self, task: Task, spoil: Any = lambda text: text) -> None:
        self.about: dict[str, Any] = {"special_tokens": ["</s>", "<image>", "ASSISTANT:", "USER:"]}
        self._task, self._spoil = task, spoil

    def answer(self, requests: list[Request]) -> list[Answer]:
        recipe = Recipe(tasks.prompt_of(self._task), column="demo", seed=0, model_digest="")
        found = []
        for scene, text, _ in zip(WORLD, DESCRIPTIONS, requests, strict=True):
            web = scenes.web_caption(scene)
            key = f"{scene.index:09}"
            variant = recipe.prompt.render({"web": web, "synthetic": text}, seed=0, key=key).variant
            answer = self._task.answer(Given(scene, web, text, variant, Random(key)))
            found.append(Answer("ok", self._spoil(tasks.written(answer)), "stop", 9, 9))
        return found


def measured(task: Task, spoil: Any = lambda text: text) -> dict[str, dict[str, Any]]:
    engine: Any = Taught(task, spoil)
    answered = tasks_measure.ask(engine, task, WORLD, DESCRIPTIONS)
    fields = dict.fromkeys(one.field for one in answered)
    return {field: tasks_measure.measure(task, [one for one in answered if one.field == field]) for field in fields}


# --- the bank ---------------------------------------------------------------------------------------------------------


def test_every_packaged_prompt_with_words_is_taught() -> None:
    assert {task.prompt for task in tasks.TASKS} == set(prompts.packaged()) - {"clips"}
    assert sum(task.share for task in tasks.TASKS) == pytest.approx(1)


@by_prompt
def test_taught_answers_come_through_recaption_whole_true_and_complete(task: Task) -> None:
    for field, figures in measured(task).items():
        assert figures["rejected"] == 0 and figures["as_taught"] == figures["num_captions"] == len(WORLD)
        assert figures["recall"] == 1 and figures["asked"] > 0
        if field in tasks_measure.NEGATIVES:
            assert figures["false"] == len(WORLD)
        else:
            assert figures["precision"] == 1


@pytest.mark.parametrize("prompt", ["tags", "hq-clip", "negatives", "dreamlip"])
def test_json_answers_are_as_the_grammar_forces_them(prompt: str) -> None:
    drawn = tasks.example(tasks.task_of(prompt), WORLD[0], Random(0))
    assert drawn.answer == json.dumps(json.loads(drawn.answer), separators=(",", ":"))
    assert drawn.request.shape is not None and list(json.loads(drawn.answer)) == drawn.request.shape["required"]


@by_prompt
def test_an_example_is_a_function_of_its_draws_and_asks_in_the_prompts_own_words(task: Task) -> None:
    first, again = (tasks.example(task, WORLD[1], Random(7)) for _ in range(2))
    assert first == again
    assert (first.request.image is None) == (not tasks.prompt_of(task).needs_image)
    assert first.request.decoding.max_tokens == tasks.prompt_of(task).sampling.max_tokens


def test_gated_rows_are_taught_without_the_web_text() -> None:
    task = tasks.task_of("recap-v2")
    drawn = [tasks.example(task, scene, Random(i)) for i, scene in enumerate(WORLD)]
    gated = [one for one in drawn if one.request.system is None]
    assert 0.1 < len(gated) / len(drawn) < 0.4
    assert not any(", the" in one.answer or "wall art" in one.answer for one in gated)
    assert any(", the" in one.answer for one in drawn)


def test_the_packaged_captioner_was_measured_on_the_prompts_as_they_are() -> None:
    """Whoever changes a prompt trains and measures the captioner again: it knows no other words."""
    measured = json.loads((DEMO_MODEL / "measured.json").read_text())
    assert measured["prompt_digests"] == {task.prompt: tasks.prompt_of(task).digest for task in tasks.TASKS}


# --- the texts --------------------------------------------------------------------------------------------------------

some_scenes = st.builds(scenes.make_scene, st.integers(0, 50), st.integers(0, 500))


@settings(max_examples=150)
@given(some_scenes)
def test_descriptions_with_a_web_text_say_all_facts_and_nothing_else(scene: scenes.Scene) -> None:
    text = tasks_texts.describe(scene, scenes.web_caption(scene))
    counts = facts.score(text, scene)
    assert counts.made == counts.true == counts.exist == counts.found


@pytest.mark.parametrize("web", ["", "untitled", "IMG_1234.JPG", "pink ring and cyan cross", "图片里有一个心形"])
def test_a_web_text_about_something_else_changes_nothing(web: str) -> None:
    things = tuple(scenes.SceneObject("star", "red", "large", "plain", place) for place in scenes.PLACES[:3])
    scene = scenes.Scene(0, 0, things, "white", 300, 300)
    assert tasks_texts.describe(scene, web) == scenes.describe(scene)


def test_what_a_web_text_names_rightly_is_taken_up() -> None:
    scene = scenes.make_scene(5, 3)
    thing = scene.objects[1]
    advert = f"{thing.colour.title()} {thing.shape.title()} Wall Art | Free Shipping | Buy Brown Oval Prints Online"
    text = tasks_texts.describe(scene, advert)
    assert text.startswith("This wall art shows")
    assert text.count(", the ") == 1
    assert f"the {thing.size} {thing.texture} {thing.colour} {thing.shape}" in text
    assert "Shipping" not in text and "oval" not in text


@settings(max_examples=150)
@given(some_scenes, st.integers(0, 3))
def test_fused_captions_are_true_and_name_first_what_the_web_text_names(scene: scenes.Scene, kind: int) -> None:
    web = scenes.web_caption(scene)
    dense, short = (scenes.describe(scene), tasks_texts.describe(scene, web)), tasks_texts.short(scene)
    synthetic = [*dense, short, scenes.five_captions(scene)[0]][kind]
    fused = tasks_texts.fuse(web, synthetic)
    counts, said = facts.score(fused, scene), facts.claims(fused)
    assert counts.made == counts.true
    assert not any(word in fused for word in ("Shipping", "Buy", "Price", "<", "&", "|", "IMG", "titled"))
    assert ("all art" in fused) == ("Wall Art" in web)
    if kind < 2 and (named := tasks_texts.named(tasks_texts.read_web(web), tasks_texts.truth(scene))):
        assert dict(said.objects[0].attributes)["place"] == scene.objects[named[0]].place


@settings(max_examples=150)
@given(some_scenes, st.integers(0, 99))
def test_rewrites_say_what_the_web_text_says_in_other_words(scene: scenes.Scene, draw: int) -> None:
    web = scenes.web_caption(scene)
    rewritten = tasks_texts.rewrite(web, Random(draw))
    told, said = tasks_texts.read_web(web), facts.claims(rewritten)
    assert sorted(sorted(dict(thing.attributes).values()) for thing in said.objects) == sorted(
        sorted(thing.values()) for thing in told.things
    )
    assert said.background == told.background
    assert rewritten.lower() != web.lower() and not any(mark in rewritten for mark in "<|&")


@settings(max_examples=150)
@given(some_scenes, st.integers(0, 2))
def test_negatives_are_false_of_their_scene_by_one_claim_or_two(scene: scenes.Scene, kind: int) -> None:
    synthetic = [scenes.describe(scene), tasks_texts.short(scene), scenes.five_captions(scene)[0]][kind]
    for name, text in tasks_texts.negatives(synthetic, scene).items():
        counts = facts.score(text, scene)
        assert 1 <= sum(counts.made.values()) - sum(counts.true.values()) <= 2, name
    wrong = facts.score(tasks_texts.describe(tasks_texts.wrong_scene(scene)), scene)
    assert sum(wrong.made.values()) - sum(wrong.true.values()) == 1


# --- the figures ------------------------------------------------------------------------------------------------------


def test_a_wrong_word_costs_precision_and_recall_and_a_rejected_answer_recall() -> None:
    figures = measured(tasks.task_of("veclip"), lambda text: text.replace("large", "small"))[""]
    assert figures["precision"] < 1 and figures["recall"] < 1 and figures["as_taught"] < len(WORLD)
    figures = measured(tasks.task_of("describe"), lambda text: "")[""]
    assert figures["rejected"] == len(WORLD) and figures["precision"] is None and figures["recall"] == 0


def test_a_negative_that_is_true_is_no_negative() -> None:
    scene_of = {scenes.describe(scene): scene for scene in WORLD}
    assert len(scene_of) == len(WORLD)
    task = tasks.task_of("hq-clip")
    true = measured(task, lambda text: json.dumps({**json.loads(text), "long_negative": json.loads(text)["long"]}))
    assert true["long_negative"]["false"] == 0


def test_leads_of_the_web_text_that_are_false_are_counted() -> None:
    figures = measured(tasks.task_of("recap-v2"), lambda text: text.replace(", a ", ", the "))[""]
    assert figures["taken_up"] == figures["named"] > 0 and figures["taken_up_unnamed"] > 0


def test_agreement_pairs_objects_for_the_best_total() -> None:
    def shared(one: str, other: str) -> int:
        return tasks_measure.agreement(facts.claims(one), facts.claims(other))

    assert shared("A red circle and a large red circle.", "A large red circle and a red circle.") == 5
    assert shared("A red circle on a white background.", "A blue circle on a white background.") == 2
    assert shared("A red circle.", "A blue star.") == 0
    assert shared("", "A blue star.") == 0
