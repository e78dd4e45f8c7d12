"""Procedural scenes that know their own truth, and the captions people, web pages and annotators would give them.

A scene is a pure function of ``(seed, index)``: three to six objects, each with a shape, colour, size, texture and a
place on a 3 x 3 grid, on a plain background. Because the truth is known, hallucination and recall of any caption can be
counted instead of guessed (see ``facts.py``).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = {
    "red": (214, 32, 36),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 150, 60),
    "cyan": (50, 205, 215),
    "blue": (35, 70, 205),
    "purple": (125, 45, 165),
    "pink": (245, 130, 185),
}
SIZES = {"small": 0.64, "large": 0.96}  # diameter as a share of the shorter cell side
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = {"white": (246, 246, 246), "gray": (150, 150, 150), "black": (28, 28, 30), "beige": (226, 208, 172)}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
PLACE_PHRASES = {
    place: {"center": "in the center", "left": "on the left", "right": "on the right"}.get(place, f"at the {place}")
    for place in PLACES
}
NUMBER_WORDS = {3: "three", 4: "four", 5: "five", 6: "six"}


@dataclass(frozen=True)
class SceneObject:
    shape: str
    colour: str
    size: str
    texture: str
    place: str

    @property
    def row(self) -> int:
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Scene:
    """One scene: its objects in reading order, its background and its size on the page."""

    seed: int
    index: int
    objects: tuple[SceneObject, ...]
    background: str
    width_px: int
    height_px: int

    def relations(self) -> list[tuple[int, str, int]]:
        """``(later, "right of" | "below", earlier)`` for each object and its predecessor in reading order."""
        return [(i, relation_between(self.objects[i - 1], self.objects[i]), i - 1) for i in range(1, len(self.objects))]


def relation_between(earlier: SceneObject, later: SceneObject) -> str:
    """How ``later`` stands to ``earlier``, for two objects in reading order."""
    return "right of" if earlier.row == later.row else "below"


def make_scene(seed: int, index: int) -> Scene:
    """The scene number ``index`` of world ``seed``."""
    rng = random.Random(f"scene/{seed}/{index}")
    cells = sorted(rng.sample(range(9), rng.randint(3, 6)))
    objects = tuple(
        SceneObject(
            shape=rng.choice(SHAPES),
            colour=rng.choice(list(COLOURS)),
            size=rng.choice(list(SIZES)),
            texture=rng.choice(TEXTURES),
            place=PLACES[cell],
        )
        for cell in cells
    )
    width_px, height_px = rng.choice(((320, 240), (300, 300), (360, 300), (280, 336), (400, 300), (320, 320)))
    return Scene(seed, index, objects, rng.choice(list(BACKGROUNDS)), width_px, height_px)


# --- the picture ------------------------------------------------------------------------------------------------------

_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {  # corners in the unit square, y downwards
    "square": ((0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)),
    "triangle": ((0.5, 0.04), (0.98, 0.92), (0.02, 0.92)),
    "diamond": ((0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)),
    "cross": (
        (0.34, 0.02), (0.66, 0.02), (0.66, 0.34), (0.98, 0.34), (0.98, 0.66), (0.66, 0.66),
        (0.66, 0.98), (0.34, 0.98), (0.34, 0.66), (0.02, 0.66), (0.02, 0.34), (0.34, 0.34),
    ),
    "star": (
        (0.5, 0.0), (0.62, 0.35), (0.98, 0.35), (0.69, 0.57), (0.79, 0.93), (0.5, 0.71),
        (0.21, 0.93), (0.31, 0.57), (0.02, 0.35), (0.38, 0.35),
    ),
    "heart": (
        (0.5, 0.98), (0.06, 0.48), (0.02, 0.3), (0.1, 0.12), (0.27, 0.05), (0.42, 0.1),
        (0.5, 0.24), (0.58, 0.1), (0.73, 0.05), (0.9, 0.12), (0.98, 0.3), (0.94, 0.48),
    ),
}  # fmt: skip


def draw_scene(scene: Scene) -> Image.Image:
    """The RGB picture of ``scene`` at its web size, with slight jitter of colour, position and tilt."""
    from PIL import Image

    rng = random.Random(f"pixels/{scene.seed}/{scene.index}")
    picture = Image.new("RGB", (scene.width_px, scene.height_px), _jitter(rng, BACKGROUNDS[scene.background], 8))
    cell_width, cell_height = scene.width_px / 3, scene.height_px / 3
    for thing in scene.objects:
        diameter = round(min(cell_width, cell_height) * SIZES[thing.size] * rng.uniform(0.95, 1.0))
        slack_x, slack_y = (cell_width - diameter) / 2, (cell_height - diameter) / 2
        x = cell_width * thing.column + slack_x * (1 + rng.uniform(-0.4, 0.4))
        y = cell_height * thing.row + slack_y * (1 + rng.uniform(-0.4, 0.4))
        mask = _shape_mask(thing.shape, diameter).rotate(rng.uniform(-8, 8))
        colour = _jitter(rng, COLOURS[thing.colour], 14)
        picture.paste(colour, (round(x), round(y)), mask)
        if thing.texture != "plain":  # drawn inside a rim of plain colour, so that the outline stays legible
            inner = round(diameter * 0.86)
            rim = (diameter - inner) / 2
            tile = _texture_tile(thing.texture, colour, inner, min(cell_width, cell_height))
            picture.paste(tile, (round(x + rim), round(y + rim)), mask.resize((inner, inner)))
    return picture


def _jitter(rng: random.Random, colour: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def _shape_mask(shape: str, diameter: int) -> Image.Image:
    from PIL import Image, ImageDraw

    mask = Image.new("L", (diameter, diameter), 0)
    draw = ImageDraw.Draw(mask)
    end = diameter - 1
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, end, end), fill=255)
        if shape == "ring":
            hole = round(diameter * 0.27)
            draw.ellipse((hole, hole, end - hole, end - hole), fill=0)
    else:
        draw.polygon([(x * end, y * end) for x, y in _POLYGONS[shape]], fill=255)
    return mask


def _texture_tile(texture: str, colour: tuple[int, int, int], diameter: int, cell: float) -> Image.Image:
    """Stripes are dark and horizontal, dots are white, both with a period of a fifth of the cell."""
    from PIL import Image, ImageDraw

    tile = Image.new("RGB", (diameter, diameter), colour)
    draw = ImageDraw.Draw(tile)
    period = cell / 5
    steps = int(diameter / period) + 2
    if texture == "striped":
        dark = (colour[0] // 3, colour[1] // 3, colour[2] // 3)
        for i in range(steps):
            draw.rectangle((0, i * period, diameter, i * period + period * 0.45), fill=dark)
    elif texture == "dotted":
        radius = period * 0.3
        for i in range(steps):
            for j in range(steps):
                x, y = (i + 0.5) * period, (j + 0.5) * period
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))
    return tile


# --- the words --------------------------------------------------------------------------------------------------------


def describe(scene: Scene) -> str:
    """The dense truthful description, 45 to 80 words: every fact of the scene, in reading order."""
    sentences = [f"This picture shows {NUMBER_WORDS[len(scene.objects)]} shapes on a {scene.background} background."]
    for i, thing in enumerate(scene.objects):
        where = PLACE_PHRASES[thing.place]
        what = f"a {thing.size} {thing.texture} {thing.colour} {thing.shape}"
        if i == 0:
            sentences.append(f"{where.capitalize()}, {what}.")
        else:
            relation = relation_between(scene.objects[i - 1], thing)
            sentences.append(f"{relation.capitalize()} it, {where}, {what}.")
    if len(scene.objects) == 3:
        sentences.append("The rest of the picture is left empty.")
    return " ".join(sentences)


def web_caption(scene: Scene) -> str:
    """What a web page says about the picture: short, often vague, sometimes wrong or in another language."""
    rng = random.Random(f"web/{scene.seed}/{scene.index}")
    first, second = (f"{thing.colour} {thing.shape}" for thing in rng.sample(scene.objects, 2))
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(
            (f"{first} and {second}", f"{first} with {second} on {scene.background}", f"a {first} near a {second}")
        )
    if kind < 0.67:
        return f"{first.title()} Wall Art | Free Shipping | Buy {second.title()} Prints Online - Best Price!!"
    if kind < 0.75:
        return rng.choice(
            ("untitled", f"IMG_{rng.randint(1000, 9999)}.JPG", "nice picture", "image may contain: art", "thumbnail")
        )
    if kind < 0.83:  # the caption of another page
        other = make_scene(scene.seed + 1, scene.index).objects
        return f"{other[0].colour} {other[0].shape} and {other[1].colour} {other[1].shape}"
    if kind < 0.91:
        thing = rng.choice(scene.objects)
        language = rng.choice(list(_FOREIGN))
        return _FOREIGN[language].format(shape=_FOREIGN_SHAPES[language][SHAPES.index(thing.shape)])
    return f"<b>{first}</b>&nbsp;&amp; {second} <a href='/shop?id={rng.randint(10, 99)}'>more</a>"


_FOREIGN = {
    "fr": "un {shape} dans une image géométrique",
    "de": "ein Bild mit {shape} auf farbigem Grund",
    "es": "una imagen con {shape}",
    "zh": "图片里有一个{shape}",
}
_FOREIGN_SHAPES = {
    "fr": ("cercle", "carré", "triangle", "étoile", "croix", "anneau", "losange", "cœur"),
    "de": ("Kreis", "Quadrat", "Dreieck", "Stern", "Kreuz", "Ring", "Raute", "Herz"),
    "es": ("círculo", "cuadrado", "triángulo", "estrella", "cruz", "anillo", "rombo", "corazón"),
    "zh": ("圆形", "正方形", "三角形", "星形", "十字", "圆环", "菱形", "心形"),
}


def five_captions(scene: Scene) -> list[str]:
    """Five short captions as five annotators would write them, for retrieval: each names two or three objects."""
    rng = random.Random(f"five/{scene.seed}/{scene.index}")
    captions = []
    for _ in range(5):
        chosen = sorted(rng.sample(range(len(scene.objects)), rng.choice((2, 3))))
        names = []
        for i in chosen:
            thing = scene.objects[i]
            words = [
                thing.size if rng.random() < 0.3 else "",
                thing.texture if rng.random() < 0.3 else "",
                thing.colour,
                thing.shape,
            ]
            names.append("a " + " ".join(word for word in words if word))
        text = ", ".join(names[:-1]) + " and " + names[-1]
        if rng.random() < 0.4:
            text += f" on a {scene.background} background"
        captions.append(rng.choice(("{}", "There is {}", "A picture of {}")).format(text))
    return captions
