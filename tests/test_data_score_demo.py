"""The demo's small CLIP tells right from wrong web captions of scenes that it has never seen."""

from __future__ import annotations

import io
import json
from collections import Counter

from clips_data import score
from clips_data.config import ScoreConfig
from clips_data.demo import scenes
from clips_data.demo.scorer import SCORER_WORLD, kind_of_web_caption, roc_auc


def test_web_captions_are_told_to_be_right_wrong_or_vague() -> None:
    kinds = Counter(
        kind_of_web_caption(scene, scenes.web_caption(scene))
        for scene in (scenes.make_scene(3, index) for index in range(2000))
    )
    assert abs(kinds["wrong"] / 2000 - 0.08) < 0.02 and abs(kinds["vague"] / 2000 - 0.08) < 0.02


def test_ties_count_half() -> None:
    assert roc_auc([1, 2], [0, 1]) == 0.875 and roc_auc([0], [1]) == 0 and roc_auc([1, 1], [1]) == 0.5


def test_the_packaged_scorer_separates_right_from_wrong_web_captions() -> None:
    """Every scene's own caption, unless it is vague, and that of another page; smaller than the measured set."""
    unseen = [scenes.make_scene(SCORER_WORLD, index) for index in range(240)]
    own = [scenes.web_caption(scene) for scene in unseen]
    told = [scene for scene, text in zip(unseen, own, strict=True) if kind_of_web_caption(scene, text) == "right"]
    images = []
    for scene in told:
        file = io.BytesIO()
        scenes.draw_scene(scene).save(file, "JPEG")
        images.append(file.getvalue())
    others = [scenes.make_scene(scene.seed + 1, scene.index).objects for scene in told]
    wrong = [f"{a.colour} {a.shape} and {b.colour} {b.shape}" for a, b, *_ in others]
    scorer = score.load_scorer(score.resolve_model(ScoreConfig()), None, name="demo")
    image_NE = scorer.image_features(images, [""] * len(images))
    right_cosines = scorer.similarities(image_NE, [scenes.web_caption(scene) for scene in told])
    wrong_cosines = scorer.similarities(image_NE, wrong)
    auc = roc_auc([value or 0 for value in right_cosines], [value or 0 for value in wrong_cosines])
    assert auc >= 0.9, auc
    measured = json.loads((score.DEMO_MODEL / "measured.json").read_text())
    assert measured["web_right_wrong_auc"] >= 0.9
