from __future__ import annotations

from clips_data.demo import scenes

WORLD = [scenes.make_scene(5, i) for i in range(1000)]


def test_a_scene_is_a_function_of_world_and_index() -> None:
    again = scenes.make_scene(5, 17)
    assert again == WORLD[17] != WORLD[18]
    assert scenes.draw_scene(again).tobytes() == scenes.draw_scene(WORLD[17]).tobytes()


def test_descriptions_have_45_to_80_words_and_tell_1000_scenes_apart() -> None:
    descriptions = [scenes.describe(scene) for scene in WORLD]
    lengths = [len(text.split()) for text in descriptions]
    assert min(lengths) >= 45
    assert max(lengths) <= 80
    assert len(set(descriptions)) == len(WORLD)


def test_objects_stand_in_reading_order_each_in_its_own_place() -> None:
    for scene in WORLD:
        places = [scenes.PLACES.index(thing.place) for thing in scene.objects]
        assert places == sorted(set(places))
        assert 3 <= len(places) <= 6
        assert len(scene.relations()) == len(places) - 1


def test_the_picture_shows_the_colour_of_each_object_in_its_place() -> None:
    for scene in WORLD[:100]:
        picture = scenes.draw_scene(scene)
        assert picture.size == (scene.width_px, scene.height_px)
        for thing in scene.objects:
            if thing.texture == "plain" and thing.shape != "ring":
                x = int(scene.width_px * (thing.column + 0.5) / 3)
                y = int(scene.height_px * (thing.row + 0.5) / 3)
                pixel = picture.getpixel((x, y))
                assert isinstance(pixel, tuple)
                wanted = scenes.COLOURS[thing.colour]
                assert all(abs(a - b) <= 20 for a, b in zip(pixel, wanted, strict=True)), (scene, thing, pixel)


def test_web_captions_are_short_and_noisy() -> None:
    captions = [scenes.web_caption(scene) for scene in WORLD]
    mean_words = sum(len(text.split()) for text in captions) / len(captions)
    assert 3 < mean_words < 10
    assert any("<b>" in text for text in captions)
    assert any(not text.isascii() for text in captions)
    informative = sum(
        any(thing.shape in text.lower() for thing in scene.objects) for scene, text in zip(WORLD, captions, strict=True)
    )
    assert 0.6 < informative / len(captions) < 0.95


def test_five_captions_name_true_objects_only() -> None:
    for scene in WORLD[:200]:
        captions = scenes.five_captions(scene)
        assert len(captions) == 5
        true = {f"{thing.colour} {thing.shape}" for thing in scene.objects}
        for caption in captions:
            assert sum(name in caption for name in true) >= 1
