"""Trains the demo's captioner, a LLaVA (CLIP-style ViT, projector, Llama) of 2.3 M parameters, on scenes.

    python -m clips_data.demo.captioner --out weights/

Two phases. First the vision tower alone learns the truth of each place (which shape, colour, size, texture stands
there), because a captioner trained from scratch learns the form of the sentences long before their facts. Then tower,
projector and language model learn the descriptions together, with the first loss kept as a weak second one. The result
is saved in the Hugging Face layout that vLLM serves.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_data.demo import scenes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

IMAGE_PX, PATCH_PX, WIDTH = 96, 16, 128
NUM_IMAGE_TOKENS = (IMAGE_PX // PATCH_PX) ** 2
TRAIN_WORLD = 7001  # scenes of the demo's own data sets come from other seeds
INSTRUCTION = "Describe the picture in detail."
PROMPT = "USER: <image>\n{instruction} ASSISTANT:"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }} "
    "{% elif message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% else %} ASSISTANT: {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
HEADS = {
    "shape": scenes.SHAPES,
    "colour": tuple(scenes.COLOURS),
    "size": tuple(scenes.SIZES),
    "texture": scenes.TEXTURES,
}


# --- data -------------------------------------------------------------------------------------------------------------


def _render(index: int) -> tuple[bytes, list[list[int]]]:
    """One training scene: its ``IMAGE_PX`` square as RGB bytes and, per place, the class of each head (-1: empty)."""
    from PIL import Image

    scene = scenes.make_scene(TRAIN_WORLD, index)
    small = scenes.draw_scene(scene).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    labels = [[-1] * len(HEADS) for _ in scenes.PLACES]
    for thing in scene.objects:
        labels[scenes.PLACES.index(thing.place)] = [
            values.index(getattr(thing, head)) for head, values in HEADS.items()
        ]
    return small.tobytes(), labels


def render_pool(num_scenes: int, num_processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, H, W, 3] and labels int64 [N, 9 places, 4 heads], however many processes."""
    import numpy as np

    images = np.empty((num_scenes, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    labels = np.empty((num_scenes, len(scenes.PLACES), len(HEADS)), np.int64)
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        for i, (pixels, label) in enumerate(pool.imap(_render, range(num_scenes), chunksize=256)):
            images[i] = np.frombuffer(pixels, np.uint8).reshape(images[i].shape)
            labels[i] = label
    return images, labels


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 1,024 entries, learned from the demo's texts: it can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    worlds = [scenes.make_scene(TRAIN_WORLD, i) for i in range(4000)]
    texts = [scenes.describe(s) for s in worlds] + [scenes.web_caption(s) for s in worlds]
    texts += [PROMPT.format(instruction=INSTRUCTION)] * 200
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=6, num_attention_heads=4,
        projection_dim=WIDTH, image_size=IMAGE_PX, patch_size=PATCH_PX, hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


class PlaceHeads:
    """Reads each place's attributes off the four patches that cover it. Used in training only, not saved."""

    def __init__(self) -> None:
        import torch

        sizes = [len(values) for values in HEADS.values()]
        # The first head has one class more: nothing stands here.
        self.sizes = [sizes[0] + 1, *sizes[1:]]
        patches_per_place = NUM_IMAGE_TOKENS // len(scenes.PLACES)
        self.linear = torch.nn.Linear(WIDTH * patches_per_place, sum(self.sizes))

    def loss(self, patches_BND: torch.Tensor, labels_BPH: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        """Cross-entropy summed over heads, and the accuracy of each head on places that hold an object."""
        import torch

        side = IMAGE_PX // PATCH_PX
        per_place = side // 3
        grid = patches_BND.unflatten(1, (3, per_place, 3, per_place))
        places = grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        total, accuracies = patches_BND.new_zeros(()), []
        for head, logits in enumerate(self.linear(places).float().split(self.sizes, dim=-1)):
            target = labels_BPH[..., head]
            seen = target >= 0
            if head == 0:
                target = torch.where(seen, target, self.sizes[0] - 1)
                total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            else:
                total = total + torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), target.flatten(), ignore_index=-1
                )
            accuracies.append((logits.argmax(-1) == target)[seen].float().mean().item())
        return total, accuracies


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    out: Path,
    num_scenes: int,
    tower_steps: int,
    caption_steps: int,
    batch: int,
    seed: int,
    num_processes: int,
    init: Path | None = None,
) -> None:
    import numpy as np
    import torch

    torch.manual_seed(seed)
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer()
    images, labels = render_pool(num_scenes, num_processes)
    say(
        f"{num_scenes} scenes rendered in {time.monotonic() - started:.0f} s; "
        f"vocabulary {len(tokenizer)}; device {device}"
    )
    model: Any = build_model(tokenizer)
    model.to(device)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    heads = PlaceHeads()
    heads.linear.to(device)
    parameters = [*model.parameters(), *heads.linear.parameters()]
    texts = caption_ids(tokenizer, num_scenes)
    if init:
        state = torch.load(init, weights_only=True)
        model.load_state_dict(state["model"])
        heads.linear.load_state_dict(state["heads"])
    for phase, num_steps, peak in (("tower", tower_steps, 1.5e-3), ("caption", caption_steps, 1.5e-3)):
        optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        rng = np.random.default_rng([seed, phase == "caption"])
        recent: list[tuple[float, ...]] = []
        for step in range(num_steps):
            lr = peak * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = rng.choice(num_scenes, batch, replace=False)
            pixels_BCHW = torch.from_numpy(images[rows]).to(device).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
            labels_BPH = torch.from_numpy(labels[rows]).to(device)
            with torch.autocast(device, torch.bfloat16):
                if phase == "tower":
                    patches = model.model.vision_tower(pixels_BCHW).last_hidden_state[:, 1:]
                    loss, accuracies = heads.loss(patches, labels_BPH)
                    shown = (loss.item(), *accuracies)
                else:
                    loss, shown = caption_loss(model, heads, pixels_BCHW, labels_BPH, [texts[i] for i in rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(shown)
            if (step + 1) % 100 == 0:
                means = " ".join(f"{sum(column) / len(column):.3f}" for column in zip(*recent, strict=True))
                say(f"{phase} {step + 1}/{num_steps} {means} {time.monotonic() - started:.0f} s")
                recent.clear()
            if (step + 1) % 2000 == 0 or step + 1 == num_steps:
                out.mkdir(parents=True, exist_ok=True)
                torch.save({"model": model.state_dict(), "heads": heads.linear.state_dict()}, out / "training.pt")
                save(model, tokenizer, out)


def caption_ids(tokenizer: Any, num_scenes: int) -> list[tuple[list[int], list[int]]]:
    """Per scene the ids of the prompt (with its image tokens) and of the answer."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    prompt: list[int] = []
    for token in tokenizer(PROMPT.format(instruction=INSTRUCTION))["input_ids"]:
        prompt += [image] * NUM_IMAGE_TOKENS if token == image else [token]
    answers = [" " + scenes.describe(scenes.make_scene(TRAIN_WORLD, i)) for i in range(num_scenes)]
    return [
        (prompt, [*ids, tokenizer.eos_token_id]) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]
    ]


def caption_loss(
    model: Any, heads: PlaceHeads, pixels_BCHW: Any, labels_BPH: Any, texts: list[tuple[list[int], list[int]]]
) -> Any:
    """Next-token loss on the answers plus a tenth of the places' loss; shown are both and the share of right tokens."""
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros((len(texts), longest), dtype=torch.long)
    labels = torch.full((len(texts), longest), -100)
    for row, (prompt, answer) in enumerate(texts):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    ids, labels = ids.to(pixels_BCHW.device), labels.to(pixels_BCHW.device)
    patches = model.model.vision_tower(pixels_BCHW).last_hidden_state[:, 1:]
    projected = model.model.multi_modal_projector(patches)
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_index)[..., None], projected.to(embeds.dtype))
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    counted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[counted]).float()
    target = labels[:, 1:][counted]
    text_loss = torch.nn.functional.cross_entropy(logits, target)
    place_loss, _ = heads.loss(patches, labels_BPH)
    right = (logits.argmax(-1) == target).float().mean()
    return text_loss + 0.1 * place_loss, (text_loss.item(), place_loss.item(), right.item())


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes config, bf16 weights, tokenizer and processor in the layout of published LLaVA checkpoints."""
    import torch
    from safetensors.torch import save_file

    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the token embedding
            continue
        name = name.removeprefix("model.")
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        if not name.endswith("position_ids"):
            weights[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.update(architectures=["LlavaForConditionalGeneration"], torch_dtype="bfloat16")
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
    tokenizer.save_pretrained(out)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_PX, "width": IMAGE_PX},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH_PX,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    (out / "processor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, config, tokenizer and processor")
    parser.add_argument("--num-scenes", type=int, default=60_000, help="different training scenes")
    parser.add_argument("--tower-steps", type=int, default=700)
    parser.add_argument("--caption-steps", type=int, default=1_800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=2, help="processes that render scenes")
    parser.add_argument("--init", type=Path, help="a training.pt to start from")
    options = vars(parser.parse_args())
    train(**options)


if __name__ == "__main__":
    main()
