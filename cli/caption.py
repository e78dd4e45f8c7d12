"""``clips caption``: the captioner of a trained run describes image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from . import present
from .options import LazyCommand, common_options
from .stages import DEFAULT_RUN

IMAGES_PER_PASS: Final = 16


def build(name: str, summary: str) -> click.Command:
    about = "Prints one line per image to stdout: its path, a tab, the caption. With --json, one object."
    return LazyCommand(
        name,
        callback=caption,
        parameters=lambda: [
            click.Argument(["images"], nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path)),
            click.Option(
                ["--name"],
                default=DEFAULT_RUN,
                metavar="TEXT",
                help=f"Name of the training run, a folder under runs/.  [default: {DEFAULT_RUN}]",
            ),
            click.Option(
                ["--web"],
                default="",
                metavar="TEXT",
                help="Web caption that the captioner is given beside each image.  [default: none]",
            ),
            click.Option(
                ["--device"],
                default="auto",
                metavar="TEXT",
                help="Torch device; auto takes the GPU where there is one.  [default: auto]",
            ),
            *common_options(("work", "json", "debug", "quiet")),
        ],
        example="clips caption photo.jpg --name first --work quickstart",
        help=f"{summary}\n\n{about}",
    )


def caption(images: tuple[Path, ...], name: str, web: str, device: str, as_json: bool, **given: Any) -> None:
    from clips_data.executor import stop_on_sigterm

    _check_files(images)
    stop_on_sigterm()
    run = (given["work"] or Path()) / "runs" / name
    present.say(f"caption: {len(images)} images with {run}", quiet=given["quiet"])
    texts = caption_files(images, run=run, web=web, device=device)
    if as_json:
        present.print_json(dict(zip(map(str, images), texts, strict=True)))
    else:
        for image, text in zip(images, texts, strict=True):
            print(f"{image}\t{' '.join(text.split())}")


def _check_files(images: Sequence[Path]) -> None:
    from clips_data.errors import UserError

    for image in images:
        if not image.is_file():
            raise UserError(f"{image} is not a file. Name image files.")


def caption_files(images: Sequence[Path], *, run: Path, web: str, device: str) -> list[str]:
    """One caption per image file, each made from the image and ``web``. Raises ``UserError`` for one it cannot read."""
    import torch

    from clips_data.errors import UserError
    from clips_train import generate, transforms

    trained = generate.load_trained(run, device)
    side_px = trained.config.image_px
    texts: list[str] = []
    for start in range(0, len(images), IMAGES_PER_PASS):
        pixels = []
        for image in images[start : start + IMAGES_PER_PASS]:
            try:
                pixels.append(transforms.squash(transforms.decode(image.read_bytes(), side_px), side_px))
            except transforms.BadImage as error:
                raise UserError(f"{image} cannot be read as an image: {error.reason}. Leave it out.") from None
        texts += generate.caption_images(trained, torch.stack(pixels), [web] * len(pixels))
    return texts
