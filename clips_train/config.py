"""What a user can choose about a model, its training, evaluation and export.

Every field becomes an option and a manifest key, with the description as its help. Frozen; unknown keys are refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Literal["tiny", "S/16", "B/16", "L/16", "L/14", "H/14"]


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
