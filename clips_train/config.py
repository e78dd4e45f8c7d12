"""What a user can choose about a model, its training, evaluation and export.

Every field becomes an option and a manifest key, with the description as its help. Frozen; unknown keys are refused.
"""

from __future__ import annotations

from typing import Literal, NewType

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Literal["tiny", "S/16", "B/16", "L/16", "L/14", "H/14"]
Line = NewType("Line", str)
"""A text that may hold commas. A list of them is given one at a time, by repeating the option."""


class StageConfig(BaseModel):
    """Base of the configs."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(StageConfig):
    """The towers and the captioner (METHOD §1)."""

    size: Size = Field("B/16", description="Size of the towers and the decoder.")
    image_px: int = Field(224, gt=0, description="Side of the square input image in pixels; a multiple of the patch.")
    context_length: int = Field(80, gt=3, description="Slots of a text, special tokens included.")
    target_length: int = Field(128, gt=3, description="Slots that the captioner predicts: its number of queries.")
    tokenizer: Literal["bpe", "bert"] = Field(
        "bpe", description="bpe is open_clip's own; bert is the paper's, from bert_vocab."
    )
    bert_vocab: str | None = Field(
        None, description="Path of the BERT vocabulary (one entry a line), for tokenizer=bert."
    )
    decoder: bool = Field(True, description="Whether there is a captioner beside the two towers.")
    pos_embed: Literal["sincos", "learned"] = Field(
        "sincos", description="Image positions: the fixed table of the paper's code, or learned."
    )

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> ModelConfig:
        patch_px = 14 if self.size.endswith("/14") else 16
        if self.image_px % patch_px:
            raise ValueError(f"image_px {self.image_px} is not a multiple of the {patch_px} px patch of {self.size}")
        if self.tokenizer == "bert" and not self.bert_vocab:
            raise ValueError("tokenizer bert needs bert_vocab, the path of a BERT vocabulary file")
        return self


class TrainConfig(ModelConfig):
    """``clips train``: shards become a CLIPS model. Its own choices, and those of the model it trains."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run under runs/.")
    samples: int = Field(
        12_800_000, gt=0, description="Samples to train on in total, epochs included; rounded up to whole steps."
    )
    batch: int = Field(
        256, gt=1, description="Samples per optimiser step; each is contrasted with all others of its step."
    )
    accumulation: int = Field(
        1,
        gt=0,
        description="Micro-batches that a step is computed in, to save memory; the gradient stays the whole batch's.",
    )
    seed: int = Field(0, ge=0, description="Seeds initial weights, sample order, augmentation and text views.")

    lr_base: float = Field(
        8e-6, gt=0, description="Learning rate per 256 samples of batch; the peak is lr_base * batch / 256."
    )
    lr: float | None = Field(None, gt=0, description="Peak learning rate; none derives it from lr_base and batch.")
    warmup_samples: int = Field(256_000, ge=0, description="Samples of linear warm-up, before the cosine decay to 0.")
    weight_decay: float = Field(
        0.2, ge=0, description="Decoupled weight decay of kernels (linear and convolution weights) only."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the second moment.")
    contrastive_weight: float = Field(1.0, ge=0, description="Weight of the contrastive loss in the total.")
    caption_weight: float = Field(
        2.0, ge=0, description="Weight of the captioning loss in the total; 0 needs decoder=false."
    )
    caption_negatives: int = Field(
        0,
        ge=0,
        description="Tokens drawn per step to stand for all that its captions do not use, in the captioning loss; "
        "0 takes the whole vocabulary, as the paper does.",
    )
    caption_every: int = Field(
        1, gt=0, description="One in this many samples of a step trains the captioner; 1, as in the paper, takes all."
    )
    clamp_logit_scale: bool = Field(
        False, description="Keep the logit scale at 100 or below, as open_clip does; the paper's code does not."
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Arithmetic of the forward and backward pass; parameters are fp32."
    )

    web_column: str = Field("web", description="Caption column of the web view, which also conditions the captioner.")
    synthetic_column: str = Field(
        "synthetic", description="Caption column of the short view and of the captioning target."
    )
    mix: tuple[Line, ...] = Field(
        (),
        description="Rules that draw the web view's text from all columns, anew each epoch, in place of web_column: "
        "weights (web=0.8,synthetic=0.2), perhaps after a condition (epoch>=10: …, score.web<0.25: …); the last whose "
        "condition holds counts. 'shards' stands for the rules and the seed of the shards' .txt. May be repeated.",
    )
    reduce: Literal["none", "truncate", "random", "block", "sub_caption", "one_piece", "sentences"] = Field(
        "one_piece", description="How the short view is cut from the synthetic caption."
    )
    tokens: int = Field(
        80, gt=3, description="Longest text view in tokens, special ones included; at most the model's context_length."
    )
    num_sentences: int = Field(1, gt=0, description="Number of sub-captions drawn by reduce=sentences.")
    augment: Literal["none", "crop", "full"] = Field(
        "full", description="Image augmentation: none, random crops, or crops and colour changes."
    )
    shuffle_captions: bool = Field(
        False, description="Control arm: give every image the captions of another one, drawn by the seed."
    )

    window_shards: int = Field(16, gt=0, description="Shards whose samples are shuffled together.")
    num_workers: int = Field(
        0, ge=0, description="Processes that load samples; 0 loads in threads of the training process."
    )
    cache_bytes: int = Field(
        1_000_000_000,
        ge=0,
        description="Bytes of memory for decoded pictures kept between epochs; only with num_workers=0.",
    )
    checkpoint_samples: int = Field(
        1_000_000, gt=0, description="Samples between checkpoints; the end of a run is always one."
    )
    log_steps: int = Field(10, gt=0, description="Steps between lines of metrics.jsonl.")
    device: str = Field("auto", description="Torch device, such as cpu or cuda; auto takes the GPU where there is one.")

    @model_validator(mode="after")
    def _objective_has_its_parts(self) -> TrainConfig:
        if self.caption_weight > 0 and not self.decoder:
            raise ValueError(
                f"caption_weight {self.caption_weight} needs a captioner; set decoder to true or the weight to 0"
            )
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} is not a multiple of accumulation {self.accumulation}")
        return self

    @property
    def model(self) -> ModelConfig:
        """The choices that describe the model alone."""
        return ModelConfig(**self.model_dump(include=set(ModelConfig.model_fields)))

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of warm-up."""
        return self.lr if self.lr is not None else self.lr_base * self.batch / 256


class EvalConfig(StageConfig):
    """``clips eval``: a checkpoint is scored on held-out samples."""

    split: str = Field("heldout", description="Split of the shards to score on.")
    batch: int = Field(64, gt=0, description="Images per forward pass.")
    max_samples: int = Field(0, ge=0, description="Largest number of samples, in the order of the shards; 0 takes all.")
    web_column: str = Field(
        "web",
        description="Caption column that conditions the captioner; searched for where a sample has no extra captions.",
    )
    synthetic_column: str = Field("synthetic", description="Caption column written beside the generated captions.")
    captions: bool = Field(True, description="Also write the captioner's own captions.")
    device: str = Field("auto", description="Torch device, such as cpu or cuda; auto takes the GPU where there is one.")


class ExportConfig(StageConfig):
    """``clips export``: a checkpoint becomes a folder that stock open_clip loads."""

    tolerance: float = Field(
        1e-4,
        gt=0,
        description="Largest absolute difference of any feature after loading it back; above it the export fails.",
    )
    batch: int = Field(8, gt=0, description="Images and texts compared, real ones besides random ones.")
