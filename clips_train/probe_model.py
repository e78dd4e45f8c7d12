"""A LLaVA: the patch tokens of a frozen image tower pass through a two-layer projector into a causal language model.

What the language model reads is LLaVA-1.5's first stage: start token, image tokens, caption, end token. Its loss is on
the caption and the end token.

Shape suffixes: B samples, C channels, H and W pixels, P patches, V width of the tower, D width of the language model,
L slots of the caption, S slots of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from clips_data.errors import UserError
from clips_train import transforms
from clips_train.generate import Trained

PAD, START, END = "<pad>", "<s>", "</s>"
PAD_ID, START_ID, END_ID = 0, 1, 2
NOT_COUNTED: Final = -100
"""The label of a slot that no loss is taken of."""
_MLP_RATIO, _MLP_MULTIPLE = 8 / 3, 32


class FrozenTower:
    """The image tower of a checkpoint, asked for the patch tokens that one of its layers leaves."""

    def __init__(self, trained: Trained, layer: int) -> None:
        """``layer`` counts as transformers' ``vision_feature_layer`` does: 0 is what enters the first block, -1 what
        leaves the last one, before the final norm.

        Raises ``UserError`` for a layer that the tower does not have.
        """
        self._trained = trained
        self._visual = trained.model.towers.visual
        num_layers = len(self._visual.transformer.resblocks)
        if not -num_layers - 1 <= layer <= num_layers:
            raise UserError(
                f"--layer {layer}: the image tower of {trained.folder} has {num_layers} layers. Name one of "
                f"{-num_layers - 1} to {num_layers}, such as -1 for the last, or -2 for the one that LLaVA takes."
            )
        self._num_blocks = layer if layer >= 0 else num_layers + 1 + layer
        self.width: int = self._visual.class_embedding.shape[0]
        self.num_patches: int = self._visual.positional_embedding.shape[0] - 1
        self.device = trained.device

    @torch.no_grad()
    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """float32 [B, P, V] of uint8 pixels at the tower's size, without the class token."""
        states_BSV = self._visual._embeds(transforms.normalise(pixels_BCHW.to(self.device)))
        for block in self._visual.transformer.resblocks[: self._num_blocks]:
            states_BSV = block(states_BSV)
        tokens_BPV: Tensor = states_BSV[:, 1:].float()
        return tokens_BPV


class Captioner(nn.Module):
    """Projector and language model (``transformers.LlamaForCausalLM``), both trained from scratch.

    Equal seeds and sizes give equal weights, whatever torch's global generator holds.
    """

    def __init__(
        self, *, tower_width: int, width: int, layers: int, heads: int, vocab_size: int, num_slots: int, seed: int
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        between = -(-round(width * _MLP_RATIO) // _MLP_MULTIPLE) * _MLP_MULTIPLE
        config = LlamaConfig(
            hidden_size=width, intermediate_size=between, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=vocab_size, max_position_embeddings=num_slots,
            tie_word_embeddings=True, pad_token_id=PAD_ID, bos_token_id=START_ID, eos_token_id=END_ID,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Sequential(nn.Linear(tower_width, width), nn.GELU(), nn.Linear(width, width))
            self.language_model: Any = LlamaForCausalLM(config)

    def to_device(self, device: torch.device) -> Captioner:
        # On a CPU two matrix products are twice as fast in bf16 as torch's fused attention, which GPUs are to use.
        self.language_model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
        return self.to(device)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def loss(self, tokens_BPV: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Summed over samples and slots: cross-entropy in nats, float32, and how many tokens are predicted rightly.

        ``ids_BL`` are captions as ``batch_of`` makes them.
        """
        embeds_BSD = torch.cat([self._read(tokens_BPV), self._embed(ids_BL[:, :-1])], dim=1)
        states_BSD = self.language_model.model(inputs_embeds=embeds_BSD, use_cache=False).last_hidden_state
        labels_BL = ids_BL.masked_fill(ids_BL == PAD_ID, NOT_COUNTED)
        counted_BL = labels_BL != NOT_COUNTED
        logits = self.language_model.lm_head(states_BSD[:, -ids_BL.shape[1] :][counted_BL]).float()
        target = labels_BL[counted_BL]
        return nn.functional.cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).sum()

    @torch.inference_mode()
    def write(self, tokens_BPV: Tensor, max_tokens: int) -> list[list[int]]:
        """The captions' ids, greedily, without end tokens."""
        embeds_BSD = self._read(tokens_BPV)
        written_BL = self.language_model.generate(
            inputs_embeds=embeds_BSD,
            attention_mask=torch.ones(embeds_BSD.shape[:2], dtype=torch.long, device=embeds_BSD.device),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        return [[number for number in ids if number not in (PAD_ID, START_ID, END_ID)] for ids in written_BL.tolist()]

    def _read(self, tokens_BPV: Tensor) -> Tensor:
        """Start token and image, [B, 1 + P, D]."""
        start_B1 = torch.full((len(tokens_BPV), 1), START_ID, device=tokens_BPV.device)
        projected_BPD = self.projector(tokens_BPV)
        return torch.cat([self._embed(start_B1).to(projected_BPD.dtype), projected_BPD], dim=1)

    def _embed(self, ids_BL: Tensor) -> Tensor:
        embeds_BLD: Tensor = self.language_model.get_input_embeddings()(ids_BL)
        return embeds_BLD


def batch_of(captions: Sequence[Sequence[int]]) -> Tensor:
    """[B, L]: captions' ids, which end with the end token, padded to the longest."""
    ids_BL = torch.full((len(captions), max(map(len, captions))), PAD_ID)
    for row, ids in enumerate(captions):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
    return ids_BL


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE (``tokenizers.Tokenizer``) of at most ``vocab_size`` entries, learned from ``texts``.

    It can spell any text; no text can spell its start and end tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def caption_ids(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """With the end token, which a caption that is cut at ``max_tokens`` keeps."""
    return [[*encoding.ids[: max_tokens - 1], END_ID] for encoding in tokenizer.encode_batch(list(texts))]
