"""Zero-shot classification: an image belongs to the class whose prompts its features are nearest to.

The feature of a class is the mean of its prompts' unit features, made a unit vector again. An image is right at k when
fewer than k classes come before its own; of classes that tie, the lower number comes first, as in CLIP_benchmark.

Shape suffixes: N images, C classes, D classes of different prompts, E embedding, M and P prompts, Q images of a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from clips_data.errors import UserError
from clips_train.encoders import Encoder
from clips_train.evals import prompts
from clips_train.evals.embedding import embed_images, embed_texts
from clips_train.evals.grouped import mean_of_shares
from clips_train.evals.items import DataSet, Item
from clips_train.evals.outcome import Figure, Outcome
from clips_train.evals.prompts import Templates
from clips_train.use_config import Benchmark, EvalConfig

CONFUSIONS: Final = 20
MISSES: Final = 24
LISTED: Final = 20
IMAGES_PER_BLOCK: Final = 1024
LOGIT_SCALE: Final = 100.0
"""CLIP's, whatever the model's own: it changes no order, and with it logits are rounded as CLIP_benchmark's are."""
TOP: Final = 5


@dataclass(frozen=True)
class Answers:
    """What N images were taken for. ``label_N``, ``rank_N`` and ``predicted_N`` are int64."""

    label_N: Tensor
    rank_N: Tensor
    """How many classes come before the right one."""
    predicted_N: Tensor
    margin_N: Tensor
    """float32: cosine of the predicted class minus that of the right one."""
    tied_N: Tensor
    """bool: another class has exactly the right one's score."""


def score(encoder: Encoder, data: DataSet, config: EvalConfig, benchmark: Benchmark) -> Outcome:
    """Top-1, top-5 (from five classes on) and the mean of the classes' recalls, with details by class.

    Raises ``UserError`` where there are no classes or no labels, a label is none of the classes, or no image can be
    used.
    """
    names, named_by = _classes(data, benchmark)
    templates = _templates(data, benchmark)
    items = _labelled(data, names, benchmark)
    counts = Counter(data.about.get("left_out", {}))
    counts.update({"images": len(data.items), "images.without_label": len(data.items) - len(items)})
    class_DE, feature_of_class_C = classifier(encoder, names, templates, config)
    pictures = embed_images(encoder, [item.read for item in items], config)
    counts.update(pictures.counts)
    items = [items[number] for number in pictures.numbers]
    label_N = torch.tensor([item.label for item in items])
    answers = classify(pictures.image_NE, label_N, class_DE, feature_of_class_C)
    present_C = torch.bincount(label_N, minlength=len(names)) > 0
    counts["images.scored"] = len(items)
    counts["images.tied"] = int(answers.tied_N.sum())
    counts["classes"] = len(names)
    counts["classes.without_images"] = int((~present_C).sum())
    about = {
        "classes": named_by,
        "templates": templates.source,
        "num_templates": len(templates.texts),
        "first_prompt": templates.prompts(names[0])[0],
        "equal_names": len(names) - len(set(names)),
        "classes_without_images": [names[i] for i in torch.nonzero(~present_C).flatten()[:LISTED]],
        "ties": "of classes with equal scores the lower number comes first",
        "mean_per_class_recall": "over the classes that have images; the others compete all the same",
    }
    if len(names) < TOP:
        about["top5"] = f"left out: there are {len(names)} classes"
    return Outcome(figures(answers, len(names)), counts, about, _details(answers, names, items))


def figures(answers: Answers, num_classes: int) -> dict[str, Figure]:
    """Each beside what guessing would score; ``top5`` is left out below five classes."""
    right_N = answers.rank_N < 1
    found = {"top1": Figure.mean(right_N, chance=1 / num_classes)}
    if num_classes >= TOP:
        found["top5"] = Figure.mean(answers.rank_N < TOP, chance=TOP / num_classes)
    found["mean_per_class_recall"] = mean_of_shares(right_N, answers.label_N, chance=1 / num_classes)
    return found


def classifier(
    encoder: Encoder, names: Sequence[str], templates: Templates, config: EvalConfig
) -> tuple[Tensor, Tensor]:
    """Unit float32 [D, E], one for each class whose prompts differ, and int64 [C]: which of them each class has.

    Classes of one name, of which ImageNet has two pairs, thereby tie exactly.
    """
    prompts_C = [tuple(templates.prompts(name)) for name in names]
    number_of = {texts: number for number, texts in enumerate(dict.fromkeys(prompts_C))}
    text_ME = embed_texts(encoder, [text for texts in number_of for text in texts], config)
    mean_DE = torch.stack([text_PE.mean(dim=0) for text_PE in text_ME.split([len(texts) for texts in number_of])])
    return mean_DE / mean_DE.norm(dim=1, keepdim=True), torch.tensor([number_of[texts] for texts in prompts_C])


def classify(image_NE: Tensor, label_N: Tensor, class_DE: Tensor, feature_of_class_C: Tensor) -> Answers:
    """Of unit features on the CPU; ``label_N`` are numbers of classes."""
    classes_C = torch.arange(len(feature_of_class_C))
    blocks = []
    for start in range(0, len(image_NE), IMAGES_PER_BLOCK):
        block = slice(start, start + IMAGES_PER_BLOCK)
        logits_QC = (LOGIT_SCALE * image_NE[block] @ class_DE.T)[:, feature_of_class_C]
        label_Q1 = label_N[block].unsqueeze(1)
        right_Q1 = logits_QC.gather(1, label_Q1)
        ties_QC = (logits_QC == right_Q1) & (classes_C != label_Q1)
        best_Q1 = logits_QC.amax(1, keepdim=True)
        # The first of the best, which argmax does not promise.
        predicted_Q = torch.where(logits_QC == best_Q1, classes_C, len(classes_C)).amin(1)
        rank_Q = (logits_QC > right_Q1).sum(1) + (ties_QC & (classes_C < label_Q1)).sum(1)
        margin_Q = (best_Q1 - right_Q1).squeeze(1) / LOGIT_SCALE
        blocks.append((rank_Q, predicted_Q, margin_Q, ties_QC.any(1)))
    rank_N, predicted_N, margin_N, tied_N = (torch.cat(column) for column in zip(*blocks, strict=True))
    return Answers(label_N, rank_N, predicted_N, margin_N, tied_N)


def _classes(data: DataSet, benchmark: Benchmark) -> tuple[Sequence[str], str]:
    """Names by label, and where they come from."""
    if benchmark.classes is not None:
        found = prompts.class_names(benchmark.classes)
        names, named_by = found.names, found.source
    else:
        names, named_by = tuple(data.classes), str(data.about.get("classes", "the data's own"))
    if len(names) < 2:
        raise UserError(
            f"{benchmark.name} has {len(names) or 'no'} class{'' if len(names) == 1 else 'es'} to tell apart. Set "
            "classes to a file with the name of each class in a line, in the order of the labels, or to imagenet."
        )
    return names, named_by


def _templates(data: DataSet, benchmark: Benchmark) -> Templates:
    if benchmark.templates is not None:
        return prompts.templates(benchmark.templates)
    if data.templates:
        return prompts.checked(data.templates, "the data's own")
    return prompts.templates(prompts.DEFAULT_TEMPLATES)


def _labelled(data: DataSet, names: Sequence[str], benchmark: Benchmark) -> list[Item]:
    items = [item for item in data.items if item.label is not None]
    if not items:
        raise UserError(
            f"None of the {len(data.items)} images of {benchmark.name} in {benchmark.data} has a class. Zero-shot "
            "classification wants folders of classes, a list of labels as annotations, or .cls members of a webdataset."
        )
    strange = [item for item in items if item.label is not None and not 0 <= item.label < len(names)]
    if strange:
        raise UserError(
            f"{len(strange)} of the {len(items)} labels of {benchmark.name} are none of its {len(names)} classes, such "
            f"as {strange[0].label} of {strange[0].key!r}. Labels count from 0; set classes to a list with them all."
        )
    return items


def _details(answers: Answers, names: Sequence[str], items: Sequence[Item]) -> dict[str, Any]:
    labels, predicted = answers.label_N.tolist(), answers.predicted_N.tolist()
    num_of = Counter(labels)
    right_of = Counter(label for label, rank in zip(labels, answers.rank_N.tolist(), strict=True) if rank < 1)
    confused = Counter((label, other) for label, other in zip(labels, predicted, strict=True) if label != other)
    missed = torch.nonzero(answers.rank_N >= 1).flatten()
    worst = missed[answers.margin_N[missed].argsort(descending=True, stable=True)][:MISSES].tolist()
    return {
        "per_class": [
            {"label": label, "name": names[label], "n": num_of[label], "recall": right_of[label] / num_of[label]}
            for label in sorted(num_of)
        ],
        "confused": [
            {"true": names[label], "predicted": names[other], "n": number, "of": num_of[label]}
            for (label, other), number in sorted(confused.items(), key=lambda entry: (-entry[1], entry[0]))[:CONFUSIONS]
        ],
        "misses": [
            {
                "key": items[number].key,
                "true": names[labels[number]],
                "predicted": names[predicted[number]],
                "rank": int(answers.rank_N[number]) + 1,
                "margin": round(float(answers.margin_N[number]), 4),
            }
            for number in worst
        ],
    }
