"""Captioning: our captioner writes one caption for each image of a data set, greedily, and they are measured.

Shape suffixes: N images, M references of all images together, E embedding.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clips_data.errors import UserError
from clips_train import ahead, generate, transforms
from clips_train.encoders import Encoder
from clips_train.evals import caption_metrics, embedding
from clips_train.evals.items import DataSet, Item
from clips_train.evals.outcome import Figure, Outcome
from clips_train.generate import Caption, Trained
from clips_train.use_config import Benchmark, EvalConfig

WEB: Final = "web"
NUM_SHOWN: Final = 200
SHOWN_CHARS: Final = 1000
"""Of a text in the details."""


@dataclass(frozen=True)
class Written:
    """Captions of the images that could be used."""

    items: Sequence[Item]
    captions: Sequence[Caption]
    image_NE: Tensor
    """Unit features by the captioner's own towers, on the CPU."""
    bad: Counter[str]
    """The other images, by why they could not be used."""


def score(
    encoder: Encoder, data: DataSet, config: EvalConfig, benchmark: Benchmark, judge: Encoder | None = None
) -> Outcome:
    """CIDEr, BLEU-1 to -4, ROUGE-L, METEOR where there is Java, CLIPScore, distinct-n and length.

    The texts of an item are its references; a captioner that reads a text is given ``about["web"]``. CLIPScore is by
    ``judge``, else by the model's own towers. Raises ``UserError`` for a model without captioner, and where not one
    image can be used.
    """
    trained = captioner_of(encoder)
    written = write(encoder, trained, data.items, config)
    outcome = caption_metrics.measure(
        [caption.text for caption in written.captions], [item.texts for item in written.items]
    )
    outcome.figures |= _lengths(written.captions) | _clip_scores(judge or encoder, encoder, written, config)
    outcome.counts += Counter(data.about.get("left_out", {})) + written.bad
    outcome.counts["images.scored"] = len(written.items)
    outcome.about |= {
        "decoding": "greedy",
        "most_tokens": generate.most_tokens(trained),
        "condition": _condition(trained, written.items),
        "clip_score": {
            **{name: (judge or encoder).about[name] for name in ("model", "digest")},
            "own_towers": judge is None,
            "weight": caption_metrics.CLIP_SCORE_WEIGHT,
            "prompt": caption_metrics.CLIP_SCORE_PROMPT,
        },
    }
    outcome.details["captions"] = _shown(written)
    return outcome


def captioner_of(encoder: Encoder) -> Trained:
    """Raises ``UserError`` where the model has no captioner."""
    if encoder.trained is None or encoder.trained.model.decoder is None:
        raise UserError(
            f"--model {encoder.named.name} has no captioner, so the task captioning cannot be scored. Name a run that "
            "was trained with one (--model run:NAME; its --decoder is not none), or leave this benchmark out."
        )
    return encoder.trained


# --- from images to captions ------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    items: list[Item]
    pixels_NCHW: Tensor | None
    bad: Counter[str]


def write(encoder: Encoder, trained: Trained, items: Sequence[Item], config: EvalConfig) -> Written:
    """Raises ``UserError`` where not one image can be used."""
    kept: list[Item] = []
    captions: list[Caption] = []
    features, bad = [], Counter[str]()
    for batch in _batches(encoder, items, config):
        bad += batch.bad
        if batch.pixels_NCHW is not None:
            kept += batch.items
            captions += generate.captions(trained, batch.pixels_NCHW, [_web(item) for item in batch.items])
            features.append(encoder.image_features(batch.pixels_NCHW).cpu())
    if not kept:
        raise UserError(
            f"None of {len(items)} images can be captioned: {dict(bad) or 'there are none'}. Check the files of the "
            "data set, and that its folder is the right one."
        )
    return Written(kept, captions, torch.cat(features), bad)


def _batches(encoder: Encoder, items: Sequence[Item], config: EvalConfig) -> Iterator[_Batch]:
    """Decoded by threads, a few batches ahead."""
    squared = encoder.preprocessing.resized(config.resize).squarer()

    def load(start: int) -> _Batch:
        found, pixels, bad = [], [], Counter[str]()
        for item in items[start : start + config.batch]:
            try:
                pixels.append(squared(transforms.decode_whole(item.read())))
            except (OSError, transforms.BadImage) as error:
                bad[f"images.bad.{embedding.reason(error)}"] += 1
                continue
            found.append(item)
        return _Batch(found, torch.stack(pixels) if pixels else None, bad)

    batches = ahead.loaded(load, range(0, len(items), config.batch), 0)
    with (
        contextlib.closing(batches),
        tqdm(total=len(items), unit="image", desc="captions", disable=None, mininterval=1) as bar,
    ):
        for batch in batches:
            yield batch
            bar.update(len(batch.items) + batch.bad.total())


def _web(item: Item) -> str:
    return str(item.about.get(WEB) or "")


# --- from captions to figures -----------------------------------------------------------------------------------------


def _lengths(captions: Sequence[Caption]) -> dict[str, Figure]:
    cut = [float(caption.finish == "length") for caption in captions]
    return {
        "mean_tokens": Figure.mean(torch.tensor([float(caption.num_tokens) for caption in captions])),
        "cut_by_length": Figure.mean(torch.tensor(cut)),
    }


def _clip_scores(judge: Encoder, encoder: Encoder, written: Written, config: EvalConfig) -> dict[str, Figure]:
    image_NE = written.image_NE
    if judge is not encoder:
        image_NE = embedding.embed_images(judge, [item.read for item in written.items], config).image_NE
    prompt = caption_metrics.CLIP_SCORE_PROMPT
    references = [(n, text) for n, item in enumerate(written.items) for text in item.texts if text.strip()]
    texts = [*(caption.text for caption in written.captions), *(text for _, text in references)]
    text_ME = embedding.embed_texts(judge, [prompt + text for text in texts], config)
    image_of_reference_M = torch.tensor([n for n, _ in references], dtype=torch.long)
    count = len(written.items)
    return caption_metrics.clip_scores(image_NE, text_ME[:count], text_ME[count:], image_of_reference_M)


def _condition(trained: Trained, items: Sequence[Item]) -> str:
    """What the captioner was given beside the image."""
    if not trained.reads_text:
        return "the image alone"
    webs = [_web(item) for item in items]
    with_text = f"the image, and a web caption for {sum(bool(web.strip()) for web in webs)} of {len(webs)}"
    warning = generate.missing_text(trained, webs)
    return with_text if warning is None else f"{with_text}. {warning}"


def _shown(written: Written) -> list[dict[str, Any]]:
    pairs = list(zip(written.items, written.captions, strict=True))[:NUM_SHOWN]
    return [
        {"key": item.key, "caption": _cut(caption.text), "references": [_cut(text) for text in item.texts]}
        for item, caption in pairs
    ]


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
