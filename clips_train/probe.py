"""``clips probe``: a run's image tower, frozen, becomes the eyes of a small LLaVA, which shows what the tower sees.

Projector and language model are trained from scratch on the captions of the training shards, then they describe the
held-out images. Towers are compared by what the same language model, begun alike and fed alike, makes of them.

The folder holds the language model as transformers loads it (``config.json``, ``model.safetensors``,
``tokenizer.json``), the projector beside it, and ``probe.json``, ``captions.jsonl`` and ``metrics.jsonl``.

Shape suffixes: B samples, P patches, V width of the tower, L slots of the caption.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from clips_data import draws, ledger
from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train import checkpoint, generate, probe_data, probe_model, shards
from clips_train.evals.heldout import Derived, open_split
from clips_train.optim import build_optimizer, clip_gradient, learning_rate
from clips_train.probe_data import Pictures, Sample
from clips_train.probe_model import Captioner, FrozenTower
from clips_train.use_config import ProbeConfig

FOLDER, UNIT = "probe", "probe"
SCORES, CAPTIONS, METRICS = "probe.json", "captions.jsonl", "metrics.jsonl"
MODEL, MODEL_CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
PROJECTOR = "projector.safetensors"
FILES: Final = (SCORES, CAPTIONS, METRICS, MODEL, MODEL_CONFIG, TOKENIZER, PROJECTOR)
NOT_IN_DIGEST: Final = frozenset({"device", "cache_bytes", "log_steps"})
BETA1, BETA2 = 0.9, 0.98
PACKAGES: Final = ("torch", "transformers", "tokenizers", "open_clip_torch")


@dataclass(frozen=True)
class Part:
    """One split, ready to be trained or scored on."""

    samples: Sequence[Sample]
    ids: Sequence[Sequence[int]]
    """Of the captions, end token included."""
    pictures: Pictures


def probe(
    config: ProbeConfig,
    *,
    run: Path,
    shards: Path,
    overwrite: bool = False,
    quiet: bool = False,
    derived: Derived | None = None,
) -> dict[str, Any]:
    """Writes ``probe/`` under ``run`` and returns the scores as plain figures.

    Skips what was probed before from the same checkpoint, data and config; ``ResumeRefused`` when it was from others.
    ``derived`` makes texts that the shards do not carry.
    """
    newest = checkpoint.find(run)
    train, scored = open_split(shards, "train"), open_split(shards, config.split)
    out = run / FOLDER
    inputs = {"shards": train.digest, "checkpoint": ledger.digest_file(newest / checkpoint.WEIGHTS)}
    settings = config.model_dump(mode="json", exclude=set(NOT_IN_DIGEST))
    if ledger.is_done(out, UNIT, inputs=inputs, config=settings, overwrite=overwrite, has_out=False):
        return {**figures(json.loads((out / SCORES).read_text())), "skipped": True}
    trial = Trial(config, newest, train, scored, derived or {}, quiet=quiet)
    metrics = trial.train()
    rows, result = trial.score()
    result = {"checkpoint": newest.name, **result, "settings": settings}
    with ledger.readable_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        trial.save(out)
        for name, lines in ((CAPTIONS, rows), (METRICS, metrics)):
            text = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)
            ledger.part(out / name).write_text(text, encoding="utf-8")
        ledger.part(out / SCORES).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        ledger.commit(out, UNIT, list(FILES), inputs=inputs, config=settings, counts=trial.counts)
    return figures(result)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of ``probe.json`` without its nesting."""
    return {**result["scores"], "train_s": result["train_s"]}


class Trial:
    """One frozen tower, and the projector and language model that are trained to describe what it sees."""

    def __init__(
        self,
        config: ProbeConfig,
        newest: Path,
        train: shards.Split,
        scored: shards.Split,
        derived: Derived,
        *,
        quiet: bool,
    ) -> None:
        trained = generate.load_trained(newest, config.device)
        self.config, self.quiet = config, quiet
        self.tower = FrozenTower(trained, config.layer)
        self.seed = trained_seed(newest) if config.seed is None else config.seed
        self.counts: Counter[str] = Counter()
        self.train_s = 0.0
        samples = probe_data.samples_with(train, config.column, derived, config.max_samples, self.counts)
        self.counts["trained"] = len(samples)
        texts = [sample.caption for sample in samples]
        self.tokenizer = probe_model.build_tokenizer(texts, config.vocab_size)
        self.captioner = Captioner(
            tower_width=self.tower.width,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            vocab_size=self.tokenizer.get_vocab_size(),
            num_slots=1 + self.tower.num_patches + config.max_tokens,
            seed=self.seed,
        ).to_device(self.tower.device)
        image_px = trained.config.image_px
        self.seen = self._part(train, samples, image_px)
        kept_out = probe_data.samples_with(scored, config.column, derived, config.max_scored, self.counts)
        self.scored = self._part(scored, kept_out, image_px)

    def _part(self, split: shards.Split, samples: Sequence[Sample], image_px: int) -> Part:
        ids = probe_model.caption_ids(self.tokenizer, [sample.caption for sample in samples], self.config.max_tokens)
        return Part(samples, ids, Pictures(split, samples, self.tower, image_px, self.config.cache_bytes))

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self) -> list[dict[str, Any]]:
        """Trains projector and language model, and returns the lines of ``metrics.jsonl``.

        Raises ``UserError`` where the loss is no longer finite, or where no image can be read.
        """
        config = self.config
        optimizer = build_optimizer(self.captioner, weight_decay=config.weight_decay, beta1=BETA1, beta2=BETA2)
        parameters = list(self.captioner.parameters())
        num_steps = -(-config.samples // config.batch)
        warmup_steps = config.warmup_samples // config.batch
        numbers, metrics, recent = self._order(), list[dict[str, Any]](), list[float]()
        self.captioner.train()
        began = time.monotonic()
        for step in tqdm(range(num_steps), unit="step", desc="probe", disable=self.quiet or None, mininterval=1):
            rate = learning_rate(step, num_steps=num_steps, warmup_steps=warmup_steps, peak=config.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            readable, tokens_BPV = self._readable(numbers)
            ids_BL = probe_model.batch_of([self.seen.ids[number] for number in readable]).to(tokens_BPV.device)
            with self._arithmetic():
                loss, _ = self.captioner.loss(tokens_BPV, ids_BL)
            mean = loss / (ids_BL != probe_model.PAD_ID).sum()
            if not bool(torch.isfinite(mean)):
                raise UserError(f"The probe's loss is {mean.item()} at step {step}. Probe again with a smaller --lr.")
            optimizer.zero_grad()
            mean.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
            clip_gradient(parameters, norm, config.grad_clip)
            optimizer.step()
            recent.append(mean.item())
            if (step + 1) % config.log_steps == 0 or step + 1 == num_steps:
                line = {"step": step + 1, "loss": sum(recent) / len(recent), "learning_rate": rate}
                metrics.append({**line, "seconds": round(time.monotonic() - began, 2)})
                recent.clear()
        self.train_s = time.monotonic() - began
        return metrics

    def _order(self) -> Iterator[int]:
        """Numbers of training samples without end: each epoch all of them, in an order drawn for it."""
        epoch = 0
        while True:
            yield from draws.permutation(len(self.seen.samples), self.seed, "probe.order", epoch)
            epoch += 1

    def _readable(self, numbers: Iterator[int]) -> tuple[list[int], torch.Tensor]:
        """The next batch, without the images of it that cannot be read."""
        while len(self.seen.pictures.bad) < len(self.seen.samples):
            readable, tokens_BPV = self.seen.pictures.tokens(
                [next(numbers) for _ in range(min(self.config.batch, len(self.seen.samples)))]
            )
            if readable:
                return readable, tokens_BPV
        bad = dict(Counter(self.seen.pictures.bad.values()))
        raise UserError(f"No image of the training split can be read: {bad}. Make the shards again.")

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.tower.device.type, torch.bfloat16)

    # --- scoring ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The lines of ``captions.jsonl`` and what ``probe.json`` says.

        Losses are nats per token, end tokens included: by the image, and by the image of another sample.
        """
        self.captioner.eval()
        numbers, batch = range(len(self.scored.samples)), self.config.batch
        rows: list[dict[str, Any]] = []
        losses, of_others, right, num_tokens = 0.0, 0.0, 0, 0
        other_1PV: torch.Tensor | None = None
        with tqdm(total=len(numbers), unit="image", desc="caption", disable=self.quiet or None, mininterval=1) as bar:
            for first in range(0, len(numbers), batch):
                readable, tokens_BPV = self.scored.pictures.tokens(numbers[first : first + batch])
                bar.update(len(numbers[first : first + batch]))
                if not readable:
                    continue
                ids_BL = probe_model.batch_of([self.scored.ids[number] for number in readable]).to(tokens_BPV.device)
                others_BPV = torch.cat([tokens_BPV[-1:] if other_1PV is None else other_1PV, tokens_BPV[:-1]])
                other_1PV = tokens_BPV[-1:]
                with self._arithmetic():
                    loss, num_right = self.captioner.loss(tokens_BPV, ids_BL)
                    of_other, _ = self.captioner.loss(others_BPV, ids_BL)
                    written = self.captioner.write(tokens_BPV, self.config.max_tokens)
                losses, of_others = losses + loss.item(), of_others + of_other.item()
                right, num_tokens = right + int(num_right), num_tokens + int((ids_BL != probe_model.PAD_ID).sum())
                rows += [self._row(number, ids) for number, ids in zip(readable, written, strict=True)]
        if not rows:
            bad = dict(Counter(self.scored.pictures.bad.values()))
            raise UserError(f"No image of split {self.config.split} can be read: {bad}. Make the shards again.")
        self._count(len(rows))
        scores = {
            "num_images": len(rows),
            "token_loss": losses / num_tokens,
            "token_loss_of_another_image": of_others / num_tokens,
            "token_accuracy": right / num_tokens,
        }
        return rows, self._about(scores)

    def _row(self, number: int, ids: Sequence[int]) -> dict[str, Any]:
        sample = self.scored.samples[number]
        caption = self.tokenizer.decode(list(ids)).strip()
        return {"key": sample.key, "reference": sample.caption, "caption": caption, "extra": sample.extra}

    def _count(self, num_scored: int) -> None:
        self.counts["scored"] = num_scored
        self.counts["trained"] -= len(self.seen.pictures.bad)
        for part in (self.seen, self.scored):
            self.counts.update(f"bad.{reason}" for reason in part.pictures.bad.values())

    def _about(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "scores": dict(scores),
            "counts": dict(self.counts),
            "train_s": round(self.train_s, 1),
            "seed": self.seed,
            "num_patches": self.tower.num_patches,
            "num_parameters": self.captioner.num_parameters,
            "vocab_size": self.tokenizer.get_vocab_size(),
            "environment": {
                "python": platform.python_version(),
                "device": self.tower.device.type,
                "versions": {name: metadata.version(name) for name in PACKAGES},
            },
        }

    def save(self, out: Path) -> None:
        """The files of what was trained, not committed yet."""
        model = self.captioner.language_model
        tied = {"lm_head.weight"}
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(weights, ledger.part(out / MODEL), metadata={"format": "pt"})
        config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
        ledger.part(out / MODEL_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
        ledger.part(out / TOKENIZER).write_text(self.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        projector = self.captioner.projector.state_dict()
        save_file({name: tensor.cpu().contiguous() for name, tensor in projector.items()}, ledger.part(out / PROJECTOR))


def trained_seed(newest: Path) -> int:
    """The seed of the run that wrote a checkpoint."""
    seed: int = checkpoint.read_about(newest)["config"]["seed"]
    return seed
