"""``clips caption``: the captioner of a trained run describes image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from . import present
from .options import LazyCommand, common_options, load
from .stages import DEFAULT_RUN

ENTRY: Final = "clips_train.generate:caption_files"


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
            *common_options(("work", "json", "debug", "quiet")),
        ],
        example="clips caption photo.jpg --name first --work quickstart",
        help=f"{summary}\n\n{about}",
    )


def caption(images: tuple[Path, ...], name: str, web: str, as_json: bool, **given: Any) -> None:
    from clips_data.errors import UserError
    from clips_data.executor import stop_on_sigterm

    for image in images:
        if not image.is_file():
            raise UserError(f"{image} is not a file. Name image files.")
    stop_on_sigterm()
    run = (given["work"] or Path()) / "runs" / name
    present.say(f"caption: {len(images)} images with {run}", quiet=given["quiet"])
    captions: list[str] = load(ENTRY)(images, run=run, web=web)
    if as_json:
        present.print_json({str(image): text for image, text in zip(images, captions, strict=True)})
    else:
        for image, text in zip(images, captions, strict=True):
            print(f"{image}\t{' '.join(text.split())}")
