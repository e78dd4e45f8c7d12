"""What a user can choose about a model, its training, evaluation and export.

Every field becomes an option and a manifest key, with the description as its help. Frozen; unknown keys are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NewType

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

SIZES = ("tiny", "S/16", "B/16", "L/16", "L/14", "H/14")
Line = NewType("Line", str)
"""A text that may hold commas. A list of them is given one at a time, by repeating the option."""

Source = str | dict[str, float] | tuple[str, ...]
"""Where a text comes from: a caption column; columns with weights, of which one is drawn anew each epoch; or rules,
of which the last whose condition holds counts (``clips_data.mixing``). ``shards`` stands for the shards' own rules."""

Reduce = Literal["none", "truncate", "random", "block", "sub_caption", "one_piece", "sentences", "first_piece"]


class StageConfig(BaseModel):
    """Base of the configs."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class View(StageConfig):
    """One text, or several, with which an image is contrasted: a source and a reduction (METHOD §4, RECIPES §1.5).

    A manifest may write the source alone. Saved without what has its default, so that later keys change no digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: Source = Field(alias="from", description="Caption column, weights of columns, or rules that draw one.")
    walk: bool = Field(
        False, description="Take the weighted columns in turn, one an epoch, from a start drawn per sample."
    )
    reduce: Reduce = Field("none", description="How the text is cut.")
    tokens: int | None = Field(
        None, gt=3, description="Longest text in tokens, special ones included; none takes the model's context_length."
    )
    length_of: str | None = Field(
        None, description="Column whose text's length in tokens is the most that this text may have (text shearing)."
    )
    count: int = Field(1, gt=0, description="Texts of one image, all of them positives; one_piece and sentences only.")
    pieces: int | str = Field(
        1, description="Sub-captions that reduce=sentences joins: a number, or LOW-HIGH to draw it for each text."
    )
    weight: float = Field(1.0, gt=0, description="Weight among the views; the contrastive loss is their weighted mean.")
    negatives: tuple[str, ...] = Field((), description="Columns whose texts are wrong for the image: hard negatives.")
    choose_negatives: Literal["all", "random", "first", "hardest"] = Field(
        "all", description="Which of the hard negatives count: hardest is the one most like the image just now."
    )
    gate: bool = Field(
        False, description="Weight each sample by how well image, this text and the other gated view's agree (ALIP)."
    )

    @model_validator(mode="after")
    def _count_has_what_to_draw(self) -> View:
        if self.count > 1 and self.reduce not in ("one_piece", "sentences"):
            raise ValueError(f"count {self.count} needs reduce one_piece or sentences, not {self.reduce}")
        if self.walk and not isinstance(self.source, dict):
            raise ValueError("walk needs columns with weights, such as from: {web: 1, synthetic: 1}")
        if isinstance(self.source, dict):
            below = next((name for name, weight in self.source.items() if not weight >= 0), None)
            if below is not None:
                raise ValueError(f"the weight {self.source[below]} of {below} is below 0; give 0, or leave it out")
            if not any(self.source.values()):
                raise ValueError("no weight is above 0, so that nothing can be drawn")
        self.pieces_range  # noqa: B018  (raises)
        return self

    @property
    def pieces_range(self) -> tuple[int, int]:
        """Fewest and most sub-captions in a text of reduce=sentences."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(self.pieces))
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 0 < low <= high:
            raise ValueError(f"pieces {self.pieces!r} is neither a number from 1 nor LOW-HIGH")
        return low, high

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: Callable[[View], dict[str, Any]]) -> dict[str, Any]:
        values = dump(self)
        source = values.pop("from") if "from" in values else values.pop("source")
        kept = {name: value for name, value in values.items() if getattr(self, name) != _default_of(View, name)}
        return {"from": source, **kept}


def _default_of(model: type[BaseModel], name: str) -> Any:
    return model.model_fields[name].default


def _from_alone(value: Any) -> Any:
    """A view written as its source alone. A mapping with a value that is no weight is meant as a view."""
    if isinstance(value, View) or (isinstance(value, dict) and ("from" in value or not _are_weights(value))):
        return value
    return {"from": value}


def _are_weights(value: dict[str, Any]) -> bool:
    return all(isinstance(weight, int | float) for weight in value.values())


Views = tuple[Annotated[View, BeforeValidator(_from_alone, json_schema_input_type=View | Source)], ...]


def _stage_lines(value: Any) -> Any:
    """Stages that a manifest wrote as mappings, as the lines of YAML that a command line has."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(json.dumps(stage, ensure_ascii=False) if isinstance(stage, dict) else stage for stage in value)


_OLDER_DECODER = {False: "none", True: "queries"}


class ModelConfig(StageConfig):
    """The towers and the captioner (METHOD §1)."""

    size: str = Field(
        "B/16",
        description=f"Size of the towers and the decoder: {', '.join(SIZES)}; or the name of an open_clip model, "
        "such as ViT-B-32, for its own towers.",
    )
    image_px: int = Field(224, gt=0, description="Side of the square input image in pixels; a multiple of the patch.")
    context_length: int = Field(80, gt=3, description="Slots of a text, special tokens included.")
    target_length: int = Field(128, gt=3, description="Slots that the captioner predicts, end token included.")
    tokenizer: Literal["bpe", "bert"] = Field(
        "bpe", description="bpe is open_clip's own; bert is the paper's, from bert_vocab."
    )
    bert_vocab: str | None = Field(
        None, description="Path of the BERT vocabulary (one entry a line), for tokenizer=bert."
    )
    text_padding: Literal["reference", "trimmed"] = Field(
        "reference",
        description="reference attends to the padding of texts, as the paper's code does; trimmed masks it and cuts "
        "texts to the batch's longest: faster, but stock open_clip cannot load the model.",
    )
    decoder: Annotated[
        Literal["none", "queries", "teacher_forced"],
        BeforeValidator(lambda value: _OLDER_DECODER[value] if isinstance(value, bool) else value),
    ] = Field(
        "queries",
        description="Captioner beside the towers: queries is the paper's, which predicts all slots in one pass; "
        "teacher_forced is autoregressive.",
    )
    fusion: Literal["concat", "cross_attention"] = Field(
        "concat", description="How the captioner reads its condition: in one sequence with its slots, or by attention."
    )
    condition: Source | None = Field(
        "web", description="Text that the captioner reads beside the image; none takes the image alone."
    )
    pos_embed: Literal["sincos", "learned"] = Field(
        "sincos", description="Image positions: the fixed table of the paper's code, or learned."
    )

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> ModelConfig:
        if self.size in SIZES:
            patch_px = 14 if self.size.endswith("/14") else 16
            if self.image_px % patch_px:
                raise ValueError(
                    f"image_px {self.image_px} is not a multiple of the {patch_px} px patch of {self.size}"
                )
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
        256,
        gt=1,
        description="Samples per optimiser step, over all processes; each is contrasted with all others of its step.",
    )
    accumulation: int = Field(
        1,
        gt=0,
        description="Micro-batches that a step is computed in, to save memory; the gradient stays the whole batch's.",
    )
    seed: int = Field(0, ge=0, description="Seeds initial weights, sample order, augmentation and text views.")
    init: str | None = Field(
        None,
        description="Weights to start from: a run, checkpoint or export folder, a weights file, local-dir:, hf-hub: or "
        "MODEL:TAG of open_clip. Where positions differ in number they are interpolated or recomputed.",
    )
    stages: Annotated[
        tuple[Line, ...], BeforeValidator(_stage_lines, json_schema_input_type=tuple[Line | dict[str, Any], ...])
    ] = Field(
        (),
        description="Stages of training, each a YAML mapping of what differs in it, such as 'image_px: 224, samples: "
        "128000000, batch: 16384, lr_base: 4e-7'. Each starts from the weights of the one before. May be repeated.",
    )

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
    grad_clip: float = Field(0, ge=0, description="Largest norm of the whole gradient; 0 does not clip.")
    ema: float = Field(
        0, ge=0, lt=1, description="Decay per step of an exponential moving average of the weights; 0 keeps none."
    )

    views: Views = Field(
        (View(source="web"), View(source="synthetic", reduce="one_piece")),
        description="The texts that the image is contrasted with; see `clips train` in the README.",
    )
    condition_drop: float = Field(
        0, ge=0, le=1, description="Probability that the condition is the empty text, so that none works later too."
    )
    target: Source = Field("synthetic", description="Text that the captioner learns to write.")
    contrastive: Literal["softmax", "sigmoid"] = Field("softmax", description="Form of the contrastive loss.")
    contrastive_weight: float = Field(1.0, ge=0, description="Weight of the contrastive loss in the total.")
    caption_weight: float = Field(
        2.0, ge=0, description="Weight of the captioning loss in the total; 0 needs decoder=none."
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
    image_tokens_kept: float = Field(
        1.0, gt=0, le=1, description="Share of the image's tokens that the captioner sees, drawn anew each epoch."
    )
    stop_gradient: bool = Field(
        False, description="Whether the captioning loss stops at the captioner instead of training the towers too."
    )
    teacher: str | None = Field(
        None, description="Name of stored features under embeddings/, from `clips embed`, to distil from."
    )
    distillation_weight: float = Field(
        1.0, ge=0, description="Weight of the distillation loss in the total, where there is a teacher."
    )
    clamp_logit_scale: bool = Field(
        False, description="Keep the logit scale at 100 or below, as open_clip does; the paper's code does not."
    )
    local_loss: bool = Field(
        True, description="Each process computes its own rows of the loss; otherwise all compute all. Equal gradients."
    )

    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Arithmetic of the forward and backward pass; parameters are fp32."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="How several processes (torchrun) share the model: copies, or shards of it."
    )
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    gradient_checkpointing: bool = Field(
        False, description="Compute the blocks' activations again in the backward pass, to save memory."
    )
    augment: Literal["none", "crop", "full"] = Field(
        "full", description="Image augmentation: none, random crops, or crops and colour changes."
    )
    shuffle_captions: bool = Field(
        False, description="Control arm: give every image the captions of another one, drawn by the seed."
    )
    overfit: int = Field(
        0, ge=0, description="For debugging: train on this many samples only, unaugmented, over and over; 0 takes all."
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
    max_skipped_steps: int = Field(
        3, ge=0, description="Steps in a row whose loss or gradient is not finite, or a spike, that are left out."
    )
    spike_factor: float = Field(
        0, ge=0, description="A loss above this many times the recent mean is a spike, and its step left out; 0 is off."
    )
    checkpoint_samples: int = Field(
        1_000_000, gt=0, description="Samples between checkpoints; the end of a run is always one."
    )
    checkpoints_kept: int = Field(2, gt=0, description="Newest checkpoints that stay on disk.")
    eval_samples: int = Field(
        0, ge=0, description="Samples between retrieval scores on held-out samples during training; 0 takes none."
    )
    eval_images: int = Field(1000, gt=0, description="Most held-out images in such a score.")
    log_steps: int = Field(10, gt=0, description="Steps between lines of metrics.jsonl.")
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Where metrics also go, beside metrics.jsonl."
    )
    peak_tflops: float = Field(
        0, ge=0, description="The device's peak in TFLOP/s, for model FLOP/s utilisation; 0 knows common GPUs."
    )
    device: str = Field("auto", description="Torch device, such as cpu or cuda; auto takes the GPU where there is one.")

    @model_validator(mode="after")
    def _objective_has_its_parts(self) -> TrainConfig:
        if self.caption_weight > 0 and self.decoder == "none":
            raise ValueError(
                f"caption_weight {self.caption_weight} needs a captioner; set decoder to queries or the weight to 0"
            )
        if self.caption_weight == 0 and self.decoder != "none":
            raise ValueError("caption_weight 0 trains no captioner; set decoder to none")
        if not self.views and not (self.caption_weight > 0):
            raise ValueError("without views and without a captioner there is nothing to train")
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} is not a multiple of accumulation {self.accumulation}")
        if sum(view.gate for view in self.views) not in (0, 2):
            raise ValueError("gate compares two views, so that two of them must have it")
        for view in self.views:
            if view.tokens is not None and view.tokens > self.context_length:
                raise ValueError(f"a view's tokens {view.tokens} are more than context_length {self.context_length}")
            if self.contrastive == "sigmoid" and (view.count > 1 or view.negatives or view.gate):
                raise ValueError("contrastive sigmoid takes views without count, negatives and gate")
        return self

    @property
    def model(self) -> ModelConfig:
        """The choices that describe the model alone."""
        return ModelConfig(**self.model_dump(include=set(ModelConfig.model_fields)))

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of warm-up."""
        return self.lr if self.lr is not None else self.lr_base * self.batch / 256
