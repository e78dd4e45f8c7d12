"""Trains the demo's captioner, a LLaVA (CLIP-style ViT, projector, Llama) of 2.4 M parameters, on scenes.

    python -m clips_data.demo.captioner --out weights/ [--start EARLIER]

Three phases. First the vision tower alone learns the truth of each place (which shape, colour, size, texture stands
there), because a captioner trained from scratch learns the form of the sentences long before their facts. Then the
language model learns to say words again: without that, fusing and rewriting did not begin within hundreds of steps. At
last tower, projector and language model learn the packaged prompts' answers together, with the first loss kept as a
weak second one. An earlier captioner to start from spares the first phase: its tower is kept. The result is in the
Hugging Face layout that vLLM serves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data.demo import scenes, tasks_tokens
from clips_data.demo.tasks_tokens import MAX_TOKENS, NUM_IMAGE_TOKENS, Asked
from clips_data.recaption import template

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlavaForConditionalGeneration

IMAGE_PX, PATCH_PX, WIDTH = 96, 16, 128
TRAIN_WORLD: Final = tasks_tokens.TRAIN_WORLD
PHASES: Final = ("tower", "copy", "caption")
PART: Final = 16  # rows that go through the model together
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


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=6, num_attention_heads=4,
        projection_dim=WIDTH, image_size=IMAGE_PX, patch_size=PATCH_PX, hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, tie_word_embeddings=True,
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
    # On a CPU the plain attention trains a third faster at these lengths than the fused one.
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )
    return model


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
    copy_steps: int,
    caption_steps: int,
    batch: int,
    peak_rate: float,
    seed: int,
    num_processes: int,
    start: Path | None = None,
    go_on: Path | None = None,
) -> None:
    import numpy as np
    import torch

    torch.manual_seed(seed)
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = tasks_tokens.build_tokenizer()
    model: Any = build_model(tokenizer)
    heads = PlaceHeads()
    if start is not None:
        take_over(model, tokenizer, start)
    images, labels = render_pool(num_scenes, num_processes)
    say(
        f"{num_scenes} scenes rendered in {time.monotonic() - started:.0f} s; vocabulary {len(tokenizer)}; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; device {device}"
    )
    model.to(device)
    heads.linear.to(device)
    special_tokens = template.special_tokens(tokenizer)
    for phase, num_steps in zip(PHASES, (tower_steps, copy_steps, caption_steps), strict=True):
        parameters = [p for p in (*model.parameters(), *heads.linear.parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        rng = np.random.default_rng([seed, PHASES.index(phase)])
        shown, first_step = Shown(), 0
        if go_on is not None:
            state = torch.load(go_on, weights_only=True)
            model.load_state_dict(state["model"])
            heads.linear.load_state_dict(state["heads"])
            if phase != state["phase"]:
                continue
            optimizer.load_state_dict(state["optimizer"])
            first_step = state["step"]
            go_on = None
        for step in range(num_steps):
            rows = rng.choice(num_scenes, batch, replace=False)
            if step < first_step:
                continue
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * min((step + 1) / 100, 1.0, (num_steps - step) / (0.3 * num_steps))
            if phase == "tower":
                pixels_BCHW, labels_BPH = pictures(images[rows], labels[rows], device)
                with torch.autocast(device, torch.bfloat16):
                    loss, accuracies = heads.loss(patches_of(model, pixels_BCHW), labels_BPH)
                loss.backward()
                shown.add("places", loss.item())
                for head, accuracy in zip(HEADS, accuracies, strict=True):
                    shown.add(head, accuracy)
            else:
                drawn_by = [f"{seed}/{step}/{row}" for row in rows]
                if phase == "copy":
                    asked = [tasks_tokens.copy(tokenizer, drawn) for drawn in drawn_by]
                else:
                    asked = [
                        tasks_tokens.ask(tokenizer, special_tokens, int(row), drawn)
                        for row, drawn in zip(rows, drawn_by, strict=True)
                    ]
                # Alike in length go together, which spares padding; the gradient is that of all.
                asked.sort(key=lambda one: one.num_tokens)
                total_weight = sum(one.weight for one in asked)
                for part in (asked[i : i + PART] for i in range(0, len(asked), PART)):
                    with torch.autocast(device, torch.bfloat16):
                        loss = part_loss(model, heads, part, images, labels, shown) / total_weight
                    loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 50 == 0:
                say(f"{phase} {step + 1}/{num_steps} {shown.means()} {time.monotonic() - started:.0f} s")
            if (step + 1) % 100 == 0 or step + 1 == num_steps:
                state = {"model": model.state_dict(), "heads": heads.linear.state_dict(), "phase": phase}
                out.mkdir(parents=True, exist_ok=True)
                torch.save({**state, "optimizer": optimizer.state_dict(), "step": step + 1}, out / "training.pt")
                save(model, tokenizer, out)


def take_over(model: Any, tokenizer: Any, folder: Path) -> None:
    """Starts from the captioner in ``folder``, whose vocabulary may be another: its tower, from then on as it is, and
    its language model. A new token begins as the mean of those that the earlier tokenizer makes of its text.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    earlier, known = AutoTokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")
    weights = {name: known[saved].float() for name in model.state_dict() if (saved := saved_name(name)) in known}
    table = weights.pop("model.language_model.embed_tokens.weight")
    known_ids = earlier.get_vocab()
    rows = []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        text = tokenizer.decode([number])
        pieces = [known_ids[token]] if token in known_ids else earlier.encode(text, add_special_tokens=False)
        rows.append(table[pieces].mean(0) if pieces else table.mean(0))
    new = {"model.language_model.embed_tokens.weight": torch.stack(rows)}
    model.load_state_dict({**weights, **new}, strict=False)
    model.model.vision_tower.requires_grad_(False)


class Shown:
    """Means of what training shows since it last did."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, total: float, weight: float = 1.0) -> None:
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += total
        sums[1] += weight

    def means(self) -> str:
        text = " ".join(f"{name} {total / weight:.3f}" for name, (total, weight) in sorted(self._sums.items()))
        self._sums.clear()
        return text


def pictures(images: Any, labels: Any, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in -1…1 [B, 3, H, W] and the places' labels."""
    import torch

    pixels_BCHW = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
    return pixels_BCHW, torch.from_numpy(labels).to(device)


def patches_of(model: Any, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    patches: torch.Tensor = model.model.vision_tower(pixels_BCHW).last_hidden_state[:, 1:]
    return patches  # without a gradient where the tower was taken over


def part_loss(model: Any, heads: PlaceHeads, part: list[Asked], images: Any, labels: Any, shown: Shown) -> torch.Tensor:
    """Next-token loss of the answers by their weights, and a tenth of the places' loss for rows with a picture."""
    import torch

    device = model.device
    longest = max(one.num_tokens for one in part)
    ids_BL = torch.zeros((len(part), longest), dtype=torch.long)
    labels_BL = torch.full((len(part), longest), -100)
    for row, one in enumerate(part):
        ids_BL[row, : one.num_tokens] = torch.tensor(one.prompt + one.answer)
        labels_BL[row, len(one.prompt) : one.num_tokens] = torch.tensor(one.answer)
    ids_BL, labels_BL = ids_BL.to(device), labels_BL.to(device)
    embeds_BLD = model.get_input_embeddings()(ids_BL)
    seen = [one.picture for one in part if one.picture is not None]
    place_loss = embeds_BLD.new_zeros(())
    if seen:
        pixels_BCHW, labels_BPH = pictures(images[seen], labels[seen], str(device))
        patches = patches_of(model, pixels_BCHW)
        if patches.requires_grad:  # a tower that was taken over has learned its places
            place_loss, _ = heads.loss(patches, labels_BPH)
            shown.add("places", place_loss.item() * len(seen), len(seen))
        projected = model.model.multi_modal_projector(patches).to(embeds_BLD.dtype)
        embeds_BLD = embeds_BLD.masked_scatter((ids_BL == model.config.image_token_index)[..., None], projected)
    hidden = model.model.language_model(inputs_embeds=embeds_BLD, use_cache=False).last_hidden_state[:, :-1]
    counted = labels_BL[:, 1:] != -100
    logits = model.lm_head(hidden[counted]).float()
    losses = torch.nn.functional.cross_entropy(logits, labels_BL[:, 1:][counted], reduction="none")
    total: torch.Tensor = 0.1 * place_loss * sum(one.weight for one in part if one.picture is not None)
    for one, loss in zip(part, losses.split([len(one.answer) for one in part]), strict=True):
        total = total + one.weight * loss.mean()
        shown.add(one.task, loss.detach().sum().item(), len(loss))
    return total


def saved_name(name: str) -> str:
    """How published LLaVA checkpoints call the weight ``name``."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes config, bf16 weights, tokenizer and processor in the layout of published LLaVA checkpoints."""
    import torch
    from safetensors.torch import save_file

    weights = {}
    for name, tensor in model.state_dict().items():
        # The head is tied to the token embedding.
        if name != "lm_head.weight" and not name.endswith("position_ids"):
            weights[saved_name(name)] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.update(architectures=["LlavaForConditionalGeneration"], torch_dtype="bfloat16")
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
    tokenizer.save_pretrained(out)
    vocabulary = out / "tokenizer.json"  # written with an indent, which would take a third of what may still be shipped
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text()), ensure_ascii=False, separators=(",", ":")))
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
    parser.add_argument("--copy-steps", type=int, default=300)
    parser.add_argument("--caption-steps", type=int, default=1_800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peak-rate", type=float, default=1.5e-3, help="learning rate between warm-up and decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=2, help="processes that render scenes")
    parser.add_argument("--start", type=Path, help="folder of an earlier captioner whose tower and layers to take over")
    parser.add_argument("--go-on", type=Path, help="a training.pt of the same run to go on from")
    options = vars(parser.parse_args())
    train(**options)


if __name__ == "__main__":
    main()
