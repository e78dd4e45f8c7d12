"""A small model as both we and our peers load it: an export for stock open_clip, which nobody trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runmaker

from clips_train import encoders, export_open_clip, generate
from clips_train.encoders import Encoder
from clips_train.export_towers import Towers
from clips_train.towers import open_clip_config


def write_export(folder: Path, *, seed: int = 0, **change: Any) -> Path:
    """A folder for ``local-dir:``."""
    run = runmaker.write_run(folder / "run", seed=seed, **change)
    trained = generate.load_trained(next((run / "checkpoints").glob("step-*")), "cpu")
    (folder / "export").mkdir()
    export_open_clip.write(Towers(trained.model, open_clip_config(trained.config, sigmoid=False)), folder / "export")
    return folder / "export"


def ours(folder: Path) -> Encoder:
    return encoders.load(encoders.find([f"local-dir:{folder}"], (), folder)[0], "cpu", "fp32")


def theirs(folder: Path) -> tuple[Any, Any, Any]:
    """open_clip's model, transform and tokenizer, which CLIP_benchmark takes."""
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")
