"""What a user can choose about the use of trained models: evaluation, export, search, and teachers' features.

Every field becomes an option and a manifest key, with the description as its help. Frozen; unknown keys are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from clips_train.config import Line, StageConfig

Lines = Annotated[tuple[Line, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Several, or one by itself."""


DEMO = "demo-"
"""How benchmarks begin that ask for an attribute of the demo world's scenes."""


OWN_RESULTS = ("eval", "heldout", "facts")
"""What results of the held-out split are called, as files and in tables."""


class Benchmark(StageConfig):
    """One data set and what to do with it. On a command line and in short ``NAME=PATH``, or a mapping with more.

    A name that clips knows (``clips_train.evals.benchmarks.KNOWN``) brings its task, split, classes and prompts; any
    other name needs a ``task``.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the result; known ones need no task."
    )
    data: str = Field("shards", description="Folder or file of the data set; shards are those under --work.")
    task: Literal["retrieval", "zero_shot", "captioning", "compositionality"] | None = Field(
        None, description="What is scored; none takes what is known of the name."
    )
    format: Literal["karpathy", "webdataset", "shards", "folder", "json", "winoground", "sugarcrepe"] | None = Field(
        None, description="Layout of the files; none finds out."
    )
    split: str | None = Field(None, description="Split; none takes the benchmark's own, test where nothing is known.")
    annotations: str | None = Field(None, description="File of texts or labels, where it does not lie in the data.")
    texts: str | None = Field(
        None, description="Key of the texts, or caption column of shards; none takes the format's own."
    )
    captions_per_image: int | None = Field(
        None, gt=0, description="How many captions of an image count: the first ones; none takes the benchmark's own."
    )
    classes: str | None = Field(
        None,
        description="Class names: imagenet, imagenet-a or imagenet-r for open_clip's, or a file with one a line; "
        "none takes the data's own.",
    )
    templates: str | None = Field(
        None,
        description="Prompts: openai (open_clip's 80), simple (its 7), clip_paper (the paper's), photo (one), or a "
        "file with one a line, {c} for the class; none takes the benchmark's own.",
    )
    max_samples: int = Field(0, ge=0, description="Most images, in the order of the data set; 0 takes all.")


def _benchmark_from_text(value: Any) -> Any:
    """``NAME=PATH``, YAML of a mapping, or ``{NAME: PATH}``; of the demo world ``demo-QUESTION`` by itself."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"it is not YAML: {getattr(error, 'problem', None) or error}") from None
    if isinstance(value, str):
        name, separator, path = value.partition("=")
        if name.startswith(DEMO) and not separator:
            return {"name": name, "task": "zero_shot"}
        if not separator or not path:
            raise ValueError(f"{value!r} is not NAME=PATH")
        return {"name": name, "data": path}
    if isinstance(value, dict) and len(value) == 1 and "name" not in value:
        ((name, path),) = value.items()
        return {"name": name, "data": path}
    return value


Benchmarks = tuple[
    Annotated[Benchmark, BeforeValidator(_benchmark_from_text, json_schema_input_type=Benchmark | str)], ...
]


class EvalConfig(StageConfig):
    """``clips eval``: models are scored on held-out samples and on benchmarks."""

    model: Lines = Field(
        (),
        description="Model instead of the run: run:NAME or the folder of a run, an open_clip name with its tag "
        "(NAME:TAG), hf-hub: or local-dir: path, or 'demo' for the packaged small CLIP. Repeated, one table compares "
        "them.",
    )
    pretrained: tuple[str, ...] = Field(
        (), description="Pretrained tags of the open_clip names that are given without one, in their order."
    )
    benchmark: Benchmarks = Field(
        (),
        description="Further data set to score on: NAME=PATH, such as coco=/data/coco, or {name: …, data: …, task: …}. "
        "Repeated for several. On the demo world demo-colour, demo-shape and others ask for attributes.",
        json_schema_extra={"repeated": True},
    )
    heldout: bool = Field(True, description="Score on the held-out split of the shards, where there are any.")
    compare: bool = Field(False, description="Print the published figures of the same benchmarks beside ours.")
    split: str = Field("heldout", description="Split of the shards to score on.")
    batch: int = Field(64, gt=0, description="Images per forward pass.")
    max_samples: int = Field(0, ge=0, description="Largest number of samples, in the order of the shards; 0 takes all.")
    resize: Literal["auto", "squash", "crop"] = Field(
        "auto",
        description="How a picture becomes square: squash both sides, or scale the shorter side and crop the middle; "
        "auto does what the model asks for.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Arithmetic of the towers (fp16 on a GPU).")
    web_column: str = Field(
        "web",
        description="Caption column that conditions the captioner; searched for where a sample has no extra captions.",
    )
    synthetic_column: str = Field("synthetic", description="Caption column written beside the generated captions.")
    captions: bool = Field(True, description="Also write the captioner's own captions.")
    queries: tuple[str, ...] = Field(
        ("captions",),
        min_length=1,
        description="Texts that images are searched by, each a set of scores of its own: captions stands for those "
        "that came with the list, else web_column; dense for the true descriptions of the demo world; others are "
        "caption columns, or further columns of the list.",
    )
    judge: str | None = Field(
        None,
        description="Model whose features CLIPScore takes, named as --model; none takes the model's own, which flatter "
        "its own captioner.",
    )
    bert_vocab: str | None = Field(
        None, description="BERT-base-uncased's vocab.txt, for released CLIPS models; none takes it from the hub."
    )
    seed: int = Field(0, ge=0, description="Seeds the resampling of intervals.")
    device: str = Field("auto", description="Torch device, such as cpu or cuda; auto takes the GPU where there is one.")

    @model_validator(mode="after")
    def _results_have_files_of_their_own(self) -> EvalConfig:
        names = [benchmark.name for benchmark in self.benchmark]
        if taken := next((name for name in names if name in OWN_RESULTS), None):
            raise ValueError(f"benchmark {taken} would overwrite a file of the held-out split; give it another name")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"benchmark {twice} is there twice; give each a name of its own, which names its result")
        return self


class ExportConfig(StageConfig):
    """``clips export``: a checkpoint becomes a folder that stock open_clip loads, and what other libraries load."""

    formats: tuple[Literal["open_clip", "timm", "transformers", "onnx"], ...] = Field(
        ("open_clip", "timm", "transformers"),
        description="What is written: open_clip, which always is; timm, its image tower; transformers, an exact "
        "architecture where there is one, and a LLaVA configuration; onnx, both towers as graphs (clips[onnx]).",
    )
    tolerance: float = Field(
        1e-4,
        gt=0,
        description="Largest absolute difference of any feature after loading it back; above it the export fails.",
    )
    batch: int = Field(8, gt=0, description="Images and texts compared, real ones besides random ones.")


class EmbedConfig(StageConfig):
    """``clips embed``: what teachers see in augmented images and in captions is stored, to be distilled from."""

    name: str = Field(
        "teacher", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the features, a folder of embeddings/."
    )
    model: Lines = Field(
        (Line("demo"),),
        min_length=1,
        description="Teacher: an open_clip name with its tag (NAME:TAG) or alone, hf-hub: or local-dir: path, run:NAME "
        "or the folder of a run, or 'demo' for the packaged small one. Repeated, the teachers are an ensemble.",
    )
    pretrained: tuple[str, ...] = Field(
        (), description="Pretrained tags of the open_clip names that are given without one, in their order."
    )
    columns: tuple[str, ...] = Field(("web", "synthetic"), description="Caption columns to store features of.")
    split: str = Field("train", description="Split of the shards.")
    num_augmentations: int = Field(10, gt=0, description="Augmentations of each image whose features are stored.")
    augment: Literal["none", "crop", "full"] = Field(
        "full", description="Image augmentation, which is also that of the training; none takes one of each image."
    )
    seed: int = Field(0, ge=0, description="Seeds the augmentations.")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Type that features are stored in, and arithmetic of the teachers (fp16 on a GPU only)."
    )
    batch: int = Field(64, gt=0, description="Augmented images, or captions, per forward pass.")
    num_workers: int = Field(
        0, ge=0, description="Processes that decode and augment; 0 does it in threads of the embedding process."
    )
    device: str = Field("auto", description="Torch device, such as cpu or cuda; auto takes the GPU where there is one.")

    @model_validator(mode="after")
    def _columns_and_augmentations_make_sense(self) -> EmbedConfig:
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns {','.join(self.columns) or 'none'} should name some caption columns, each once")
        if self.augment == "none" and self.num_augmentations != 1:
            raise ValueError("augment none makes one picture of an image; set num_augmentations to 1")
        return self


class SearchConfig(StageConfig):
    """``clips search``: texts and pictures find images, or captions, of shards."""

    model: str | None = Field(
        None,
        description="Model to search with: run:NAME or the folder of a run, an open_clip name with its tag (NAME:TAG), "
        "hf-hub: or local-dir: path, or 'demo' for the packaged small CLIP; none takes the run named default, else the "
        "newest.",
    )
    pretrained: str | None = Field(None, description="Pretrained tag of an open_clip name that is given without one.")
    split: str = Field("train", description="Split of the shards to search.")
    text: str | None = Field(None, description="Search the captions of this column; none searches the images.")
    top: int = Field(12, gt=0, description="Results of a query.")
    index: Literal["auto", "exact", "ivf"] = Field(
        "auto",
        description="exact compares with everything; ivf looks into the nearest sixteenth of an index on disk and may "
        "miss some; auto is exact up to a million features.",
    )
    resize: Literal["auto", "squash", "crop"] = Field(
        "auto",
        description="How a picture becomes square: squash both sides, or scale the shorter side and crop the middle; "
        "auto does what the model asks for.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Arithmetic of the model (fp16 on a GPU only); features are stored in fp16."
    )
    batch: int = Field(64, gt=0, description="Images or captions per forward pass.")
    num_workers: int = Field(
        0, ge=0, description="Processes that decode images; 0 does it in threads of the searching process."
    )
    bert_vocab: str | None = Field(
        None, description="BERT-base-uncased's vocab.txt, for released CLIPS models; none takes it from the hub."
    )
    device: str = Field("auto", description="Torch device, such as cpu or cuda; auto takes the GPU where there is one.")


class ProbeConfig(StageConfig):
    """``clips probe``: how good a run's frozen image tower is as the eyes of a multimodal language model."""

    layer: int = Field(
        -2,
        description="Layer of the image tower whose patch tokens are read: -1 is the last one, -2 the one before it, "
        "as LLaVA takes, 0 what enters the first one.",
    )
    column: str = Field(
        "synthetic",
        description="Text that the language model learns to write: a caption column, captions for the first of those "
        "that came with the list, or dense for the true descriptions of the demo world.",
    )
    split: str = Field("heldout", description="Split of the shards to score on.")
    samples: int = Field(25_600, gt=0, description="Samples to train on in total, epochs included.")
    batch: int = Field(64, gt=0, description="Samples per optimiser step.")
    lr: float = Field(3e-3, gt=0, description="Peak learning rate of projector and language model.")
    warmup_samples: int = Field(3_200, ge=0, description="Samples of linear warm-up, before the cosine decay to 0.")
    weight_decay: float = Field(0.05, ge=0, description="Decoupled weight decay of kernels.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the whole gradient.")
    width: int = Field(128, gt=0, description="Width of the language model; a multiple of twice its heads.")
    layers: int = Field(2, gt=0, description="Layers of the language model.")
    heads: int = Field(4, gt=0, description="Attention heads of the language model.")
    vocab_size: int = Field(
        4096, gt=259, description="Most entries of the vocabulary, which is learned from the captions trained on."
    )
    max_tokens: int = Field(128, gt=1, description="Longest caption in tokens, end token included; others are cut.")
    max_samples: int = Field(0, ge=0, description="Most samples to train on, in the order of the shards; 0 takes all.")
    max_scored: int = Field(0, ge=0, description="Most samples to score on, in the order of the shards; 0 takes all.")
    seed: int | None = Field(
        None, ge=0, description="Seeds initial weights and sample order; none takes the seed of the run."
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Arithmetic of the language model; the tower's and the parameters are fp32."
    )
    cache_bytes: int = Field(
        2_000_000_000, ge=0, description="Bytes of memory for patch tokens; those of further images are computed anew."
    )
    log_steps: int = Field(10, gt=0, description="Steps between lines of metrics.jsonl.")
    device: str = Field("auto", description="Torch device, such as cpu or cuda; auto takes the GPU where there is one.")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> ProbeConfig:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of twice the heads, {2 * self.heads}")
        return self
