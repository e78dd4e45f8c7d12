"""The arithmetic of a training step, counted from the sizes of the model and the lengths that it was given.

Only matrix products are counted, two operations for each multiplication and addition: linear maps, the patch
convolution, attention. A step is three times its forward pass, the gradient of inputs and of weights costing one each;
so a frozen part counts too high by a third. The products between the features of images and texts are left out: at
the paper's sizes they are less than a hundredth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clips_train.parts import Part, Targets

PEAK_BF16_TFLOPS = {
    "A10G": 70.0, "A100": 312.0, "A30": 165.0, "A40": 149.7, "A6000": 154.8, "B200": 2250.0, "GH200": 989.0,
    "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "L4": 121.0, "L40S": 362.0, "L40": 181.0,
    "RTX 3090": 71.0, "RTX 4090": 165.2, "RTX 5090": 209.5, "V100": 125.0,
}  # fmt: skip
"""Dense bf16 (V100: fp16) with fp32 accumulation, without sparsity, by a part of the name that CUDA gives a device.

What NVIDIA states for these products, not what they were seen to reach; ``TrainConfig.peak_tflops`` overrides it.
"""


def peak_tflops(device: torch.device) -> float:
    """Of the device in bf16; 0 where it is not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def peak_of(name: str) -> float:
    """By the longest known part of a device's name, so that an L40S is no L4."""
    found = [known for known in PEAK_BF16_TFLOPS if known in name]
    return PEAK_BF16_TFLOPS[max(found, key=len)] if found else 0.0


@dataclass(frozen=True)
class Stack:
    """A transformer of plain blocks: each token costs the same linear maps, and each pair of tokens some attention."""

    width: int
    layers: int
    linear: int
    """Weights that multiply each token, of all blocks."""

    @classmethod
    def of(cls, blocks: Any) -> Stack:
        weights = [p for block in blocks for p in block.parameters() if p.ndim >= 2]
        return cls(blocks[0].ln_1.weight.shape[0], len(blocks), sum(p.numel() for p in weights))

    def flops(self, rows: int, slots: int) -> float:
        return rows * (2 * self.linear * slots + 4 * self.layers * self.width * slots * slots)


@dataclass(frozen=True)
class StepShape:
    """What is needed of a model to count by."""

    image: Stack
    patch_px: int
    patch_weights: int
    image_head: int
    text: Stack
    text_head: int
    decoder: DecoderShape | None

    @classmethod
    def of(cls, trainee: Any) -> StepShape:
        """Of a ``step.Trainee``, before it is wrapped."""
        towers, decoder = trainee.model.towers, trainee.model.decoder
        visual = towers.visual
        return cls(
            image=Stack.of(visual.transformer.resblocks),
            patch_px=visual.conv1.kernel_size[0],
            patch_weights=visual.conv1.weight.numel(),
            image_head=visual.proj.numel(),
            text=Stack.of(towers.transformer.resblocks),
            text_head=_numel(towers.text_projection),
            decoder=None if decoder is None else DecoderShape.of(decoder),
        )

    def num_patches(self, part: Part) -> int:
        return (part.image_NCHW.shape[-2] // self.patch_px) * (part.image_NCHW.shape[-1] // self.patch_px)

    def tokens(self, part: Part) -> int:
        """Image patches, text slots and target slots, padding included."""
        captioned = 0 if part.captioned is None else part.captioned.labels_SQ.numel()
        return len(part.image_NCHW) * self.num_patches(part) + part.text_RL.numel() + captioned

    def flops(self, part: Part, targets: Targets, share: float) -> float:
        """Of the part, forward and backward. ``share`` is how much of the slots that count in a step is the part's."""
        num_images, num_patches = len(part.image_NCHW), self.num_patches(part)
        num_texts, num_slots = part.text_RL.shape
        patches = 2.0 * num_images * self.patch_weights * num_patches
        forward = patches + num_images * 2 * self.image_head
        forward += self.image.flops(num_images, num_patches + 1)
        forward += self.text.flops(num_texts, num_slots) + num_texts * 2 * self.text_head
        if self.decoder is not None and part.captioned is not None:
            captioned = part.captioned
            if captioned.kept_SP is not None:
                num_patches = captioned.kept_SP.shape[1]
            read = 0 if captioned.condition_rows_S is None else num_slots - 1
            rows, slots = captioned.labels_SQ.shape
            forward += self.decoder.flops(rows, slots, num_patches, read)
            tokens = self.decoder.vocab if targets.candidates_U is None else len(targets.candidates_U)
            forward += 2 * self.decoder.width * tokens * targets.num_counted * share
        return 3.0 * forward - patches  # of pixels no gradient is taken


@dataclass(frozen=True)
class DecoderShape:
    """A captioner, of either fusion."""

    width: int
    layers: int
    concat: bool
    image_weights: int
    text_weights: int
    block_weights: tuple[int, ...]
    vocab: int

    @classmethod
    def of(cls, decoder: Any) -> DecoderShape:
        blocks = decoder.transformer.resblocks
        return cls(
            width=decoder.head.in_features,
            layers=len(blocks),
            concat=decoder.fusion == "concat",
            image_weights=_numel(decoder.image_projection),
            text_weights=_numel(decoder.text_projection),
            block_weights=tuple(sum(p.numel() for p in block.parameters() if p.ndim >= 2) for block in blocks),
            vocab=decoder.head.out_features,
        )

    def flops(self, rows: int, slots: int, num_patches: int, num_read: int) -> float:
        """Forward without the head, of ``rows`` captions that read patches and text states; see ``CaptionDecoder``."""
        condition, width = num_patches + num_read, self.width
        total = 2 * (self.image_weights * num_patches + self.text_weights * num_read)
        for number, weights in enumerate(self.block_weights):
            keys_values = 2 * width * width
            if self.concat and number < self.layers - 1:
                total += 2 * weights * (condition + slots)
                total += 4 * width * (condition * condition + slots * (condition + slots))
            elif self.concat:  # of the condition the last block takes keys and values only
                total += 2 * (weights * slots + keys_values * condition) + 4 * width * slots * (condition + slots)
            elif number % 2 == 1:
                total += 2 * ((weights - keys_values) * slots + keys_values * condition) + 4 * width * slots * condition
            else:
                total += 2 * weights * slots + 4 * width * slots * slots
        return float(rows * total)


def _numel(module: Any) -> int:
    """Weights of a matrix, a layer, or nothing."""
    if module is None:
        return 0
    weights: Any = module.weight if isinstance(module, nn.Module) else module
    return int(weights.numel())
