"""Both towers as ONNX graphs, for any batch size: pixels or ids in, unit features out.

Only torch's newer exporter (``dynamo=True``) can take these towers apart.

Shape suffixes: N images or texts, C channels, H and W pixels, L text slots.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clips_train.export_check import Loaded, Output
from clips_train.export_towers import Towers

IMAGE, TEXT, CONFIG = "image.onnx", "text.onnx", "config.json"
INLINE_BYTES = 1 << 30
"""Larger weights go into a file beside the graph, ``*.onnx.data``: a graph file cannot hold more than 2 GB."""
TRACED = 2  # inputs in the batch that is traced; of a single one torch would take the batch size for a constant


class _Image(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features_NE: Tensor = self.model.encode_image(pixels)[0]
        return features_NE


class _Text(_Image):
    def forward(self, ids: Tensor) -> Tensor:
        features_NE: Tensor = self.model.encode_text(ids)[0]
        return features_NE


def write(towers: Towers, folder: Path) -> None:
    folder.mkdir(parents=True)
    side = towers.image_px
    _write(_Image(towers.model), torch.zeros(TRACED, 3, side, side), "pixels", folder / IMAGE)
    _write(_Text(towers.model), torch.ones(TRACED, towers.context_length, dtype=torch.long), "ids", folder / TEXT)
    about = {
        "pixels": {**towers.preprocess, "size": side},
        "ids": {
            "tokenizer": towers.open_clip_config["model_cfg"]["text_cfg"].get("tokenizer_mode") or "clip",
            "context_length": towers.context_length,
            "vocab_size": towers.vocab_size,
        },
        "features": {"width": towers.embed_dim, "unit_length": True},
        "logit_scale": float(towers.model.logit_scale.detach().exp()),
        "logit_bias": None if towers.model.logit_bias is None else float(towers.model.logit_bias),
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def _write(module: nn.Module, example: Tensor, name: str, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of operators of torchvision that are not used here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about torch
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[name],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    weights_bytes = sum(weight.numel() * weight.element_size() for weight in module.state_dict().values())
    program.save(path, external_data=weights_bytes > INLINE_BYTES)


def load(folder: Path, towers: Towers) -> Loaded:
    return Loaded(
        outputs=(
            Output("image features", "pixels", _session(folder / IMAGE), lambda x: towers.model.encode_image(x)[0]),
            Output("text features", "ids", _session(folder / TEXT), lambda ids: towers.model.encode_text(ids)[0]),
        )
    )


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda inputs: torch.from_numpy(session.run(None, {given.name: inputs.numpy()})[0])
