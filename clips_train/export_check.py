"""An export is what its own library makes of it: loaded by that library and compared with the model it was made from.

Vectors are compared at unit length, so that one tolerance means the same for features and for hidden states.

Shape suffixes: N images or texts, C channels, H and W pixels, L text slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clips_data.errors import UserError
from clips_train import transforms
from clips_train.export_towers import Towers

RANDOM_SEED = 0
SHOWN_CHARACTERS = 60

Differences = dict[str, dict[str, float]]
"""Output → ``random`` or ``real`` → the largest absolute difference of any component."""


@dataclass(frozen=True)
class Output:
    """One output of a loaded export, and the same one of ours; both map pixels or ids to vectors of any length."""

    name: str
    reads: Literal["pixels", "ids"]
    theirs: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loaded:
    """An export, loaded by its own library."""

    outputs: Sequence[Output]
    pixels: Callable[[Image.Image], Tensor] | None = None
    """Its own preprocessing, float32 [C, H, W]; ``None`` where the format has none."""
    ids: Callable[[list[str]], Tensor] | None = None
    """Its own tokenizer, int64 [N, L]."""


@dataclass(frozen=True)
class Inputs:
    """What exports are compared on."""

    pictures: Sequence[Image.Image]
    pixels_NCHW: Tensor
    """Of the pictures, as ours."""
    texts: Sequence[str]
    ids_NL: Tensor
    random_NCHW: Tensor
    random_ids_NL: Tensor


def inputs_of(
    towers: Towers, pictures: Sequence[Image.Image], texts: Sequence[str], ids_NL: Tensor, num_random: int
) -> Inputs:
    """``ids_NL`` are those of ``texts``, from the tokenizer that the model was trained with."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    side, most = towers.image_px, towers.vocab_size
    return Inputs(
        pictures=pictures,
        pixels_NCHW=transforms.normalise(torch.stack([transforms.squash(picture, side) for picture in pictures])),
        texts=texts,
        ids_NL=ids_NL,
        random_NCHW=torch.randn(num_random, 3, side, side, generator=generator),
        random_ids_NL=torch.randint(1, most, (num_random, towers.context_length), generator=generator),
    )


@torch.inference_mode()
def compare(name: str, loaded: Loaded, inputs: Inputs) -> Differences:
    """Raises ``UserError`` where its tokenizer gives other ids than ours; how large a difference may be is for the
    caller to say."""
    pixels_NCHW, ids_NL = inputs.pixels_NCHW, inputs.ids_NL
    if loaded.ids is not None:
        _check_ids(name, inputs, loaded.ids(list(inputs.texts)))
    found: Differences = {}
    for output in loaded.outputs:
        if output.reads == "ids":
            pairs = {"random": (inputs.random_ids_NL, inputs.random_ids_NL), "real": (ids_NL, ids_NL)}
        else:
            theirs_NCHW = pixels_NCHW
            if loaded.pixels is not None:
                theirs_NCHW = torch.stack([loaded.pixels(picture) for picture in inputs.pictures])
            pairs = {"random": (inputs.random_NCHW, inputs.random_NCHW), "real": (theirs_NCHW, pixels_NCHW)}
        found[output.name] = {
            kind: _largest(output.theirs(theirs), output.ours(ours)) for kind, (theirs, ours) in pairs.items()
        }
    return found


def _largest(theirs: Tensor, ours: Tensor) -> float:
    assert theirs.shape == ours.shape, f"{tuple(theirs.shape)} is not {tuple(ours.shape)}"
    difference = functional.normalize(theirs.float(), dim=-1) - functional.normalize(ours.float(), dim=-1)
    return float(difference.abs().max())


def _check_ids(name: str, inputs: Inputs, theirs_NL: Tensor) -> None:
    for text, ours_L, theirs_L in zip(inputs.texts, inputs.ids_NL, theirs_NL, strict=True):
        if not torch.equal(ours_L, theirs_L):
            raise UserError(
                f"The export was not made: {name} gives other token ids than training did for "
                f"{text[:SHOWN_CHARACTERS]!r}. Use the version of {name} that this version of clips asks for."
            )


def worst(differences: Differences) -> float:
    """Not a number where any is none."""
    values = [value for kinds in differences.values() for value in kinds.values()]
    return max(values) if all(value == value for value in values) else float("nan")


def rows(differences: Mapping[str, Differences]) -> list[tuple[str, str, float, float]]:
    """Format, output, and the differences on random and on real input: the table of all formats."""
    return [
        (name, output, kinds["random"], kinds["real"])
        for name, outputs in differences.items()
        for output, kinds in outputs.items()
    ]
