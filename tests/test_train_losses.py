"""The losses against loops over single pairs in float64, the golden numbers, and open_clip's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import goldens
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from clips_train.losses import (
    SOFTMAX_SLOTS_ON_CPU,
    alip_gates,
    caption_loss,
    clips_contrastive_loss,
    contrastive_loss,
    distillation_loss,
    sigmoid_loss,
    view_loss,
)

GOLDEN = ("losses_n8", "losses_n8_scale100")


def _features(golden: dict[str, Tensor]) -> list[Tensor]:
    names = ("image_features", "web_text_features", "synthetic_text_features", "logit_scale")
    return [golden[f"input.{name}"].clone().requires_grad_() for name in names]


@pytest.mark.parametrize("name", GOLDEN)
def test_contrastive_loss_and_its_gradients_are_the_references(name: str) -> None:
    golden = goldens.tensors(name)
    image, web, short, scale = _features(golden)
    loss = clips_contrastive_loss(image, web, short, scale)
    loss.sum().backward()
    goldens.assert_meets(name, loss, golden["output.contrastive_loss"])
    for tensor, what in zip((image, web, short, scale), ("image", "web_text", "synthetic_text"), strict=False):
        assert tensor.grad is not None
        goldens.assert_meets(name, tensor.grad, golden[f"grad.{what}_features"], what)
    assert scale.grad is not None
    goldens.assert_meets(name, scale.grad, golden["grad.logit_scale"], "scale")


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("chunk", [7, 4096])
def test_caption_loss_and_its_gradient_are_the_references(name: str, chunk: int) -> None:
    golden = goldens.tensors(name)
    logits = golden["input.caption_logits"].clone().requires_grad_()
    identity = torch.eye(logits.shape[-1])  # a head that makes states the logits
    loss = caption_loss(logits, identity, golden["input.labels"], golden["input.label_mask"], chunk=chunk)
    loss.backward()
    goldens.assert_meets(name, loss, golden["output.caption_loss"])
    assert logits.grad is not None
    goldens.assert_meets(name, logits.grad, golden["grad.caption_logits"])


def test_the_captions_of_one_kind_are_no_negatives_of_the_other() -> None:
    image, web, short, scale = (tensor.detach() for tensor in _features(goldens.tensors("losses_n8")))
    apart = (contrastive_loss(image, web, scale) + contrastive_loss(image, short, scale)) / 2
    torch.testing.assert_close(clips_contrastive_loss(image, web, short, scale), apart)
    torch.testing.assert_close(
        clips_contrastive_loss(image, web, short, scale), clips_contrastive_loss(image, short, web, scale)
    )


# --- views, against loops over single pairs -------------------------------------------------------------------------


@dataclass
class Texts:
    """Random unit features in float64, with a gradient each, and what else ``view_loss`` takes."""

    image_NE: Tensor
    text_NKE: Tensor
    negatives_NME: Tensor
    scale: Tensor
    there_NK: Tensor
    negatives_there_NM: Tensor
    gate_N: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.image_NE, self.text_NKE, self.negatives_NME, self.scale

    @property
    def options(self) -> dict[str, Any]:
        return {
            "there_NK": self.there_NK,
            "negatives_NME": self.negatives_NME,
            "negatives_there_NM": self.negatives_there_NM,
            "gate_N": self.gate_N,
        }

    def loss(self, **others: Any) -> Tensor:
        return view_loss(self.image_NE, self.text_NKE, self.scale, **self.options | others)


def _texts(num_samples: int, num_texts: int, num_negatives: int, *, seed: int = 0, scale: float = 14.3) -> Texts:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        raw = torch.randn(*shape, 6, dtype=torch.float64, generator=generator)
        return functional.normalize(raw, dim=-1).requires_grad_()

    there_NK = torch.rand(num_samples, num_texts, generator=generator) < 0.6
    there_NK[:, 0] |= ~there_NK.any(dim=1)
    return Texts(
        image_NE=unit(num_samples),
        text_NKE=unit(num_samples, num_texts),
        negatives_NME=unit(num_samples, num_negatives),
        scale=torch.tensor(scale, dtype=torch.float64, requires_grad=True),
        there_NK=there_NK,
        negatives_there_NM=torch.rand(num_samples, num_negatives, generator=generator) < 0.6,
        gate_N=torch.rand(num_samples, dtype=torch.float64, generator=generator),
    )


def _view_loss_pair_by_pair(texts: Texts, hardest: bool) -> Tensor:
    """The formula of the docstring, one exponential at a time."""
    image, text, negatives, scale = texts.leaves
    num_samples, num_texts = text.shape[:2]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(num_samples):
        own = [k for k in range(num_texts) if texts.there_NK[i, k]]
        against = [
            scale * image[i] @ text[j, k]
            for j in range(num_samples)
            for k in range(num_texts)
            if j != i and texts.there_NK[j, k]
        ]
        hard = [scale * image[i] @ negatives[i, m] for m in texts.negatives_there_NM[i].nonzero().flatten().tolist()]
        against += [max(hard, key=lambda logit: logit.item())] if hardest and hard else hard
        for k in own:
            right = scale * image[i] @ text[i, k]
            to_text = -torch.log(right.exp() / (right.exp() + sum(one.exp() for one in against)))
            all_images = sum((scale * image[j] @ text[i, k]).exp() for j in range(num_samples))
            to_image = -torch.log(right.exp() / all_images)
            total = total + texts.gate_N[i] * (to_text + to_image) / len(own)
    return total / (2 * num_samples)


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def _assert_same(ours: Tensor, wanted: Tensor, leaves: Sequence[Tensor]) -> None:
    """Value and every gradient."""
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    for mine, reference in zip(_gradients(ours, leaves), _gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 5),
    num_texts=st.integers(1, 4),
    num_negatives=st.integers(0, 3),
    hardest=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_views_loss_is_its_formula_pair_by_pair(
    num_samples: int, num_texts: int, num_negatives: int, hardest: bool, seed: int
) -> None:
    texts = _texts(num_samples, num_texts, num_negatives, seed=seed)
    _assert_same(texts.loss(hardest=hardest), _view_loss_pair_by_pair(texts, hardest), texts.leaves)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_view_of_one_text_is_open_clips_loss_and_half_of_the_golden_one(name: str) -> None:
    image, web, short, scale = _features(goldens.tensors(name))
    peer = open_clip.loss.ClipLoss()(image, web, scale)
    ours = view_loss(image, web.unsqueeze(1), scale)
    torch.testing.assert_close(ours, peer, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(_gradients(ours, [image, web, scale]), _gradients(peer, [image, web, scale]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    other = view_loss(image, short.unsqueeze(1), scale)
    goldens.assert_meets(name, (ours + other) / 2, goldens.tensors(name)["output.contrastive_loss"])


def _shares_cover_the_batch(num_samples: int) -> list[list[slice]]:
    return [
        [slice(None)],
        [slice(0, 1), slice(1, None)],
        [slice(row, row + 1) for row in range(num_samples)],
        [slice(0, 0), slice(0, 3), slice(3, num_samples)],
    ]


@pytest.mark.parametrize("hardest", [False, True])
def test_the_shares_of_rows_sum_to_a_views_loss_and_its_gradients(hardest: bool) -> None:
    texts = _texts(5, 3, 2)
    whole = texts.loss(hardest=hardest)
    for split in _shares_cover_the_batch(5):
        shares = torch.stack([texts.loss(hardest=hardest, rows=rows) for rows in split])
        _assert_same(shares.sum(), whole, texts.leaves)


def test_the_order_of_samples_changes_nothing() -> None:
    texts = _texts(6, 3, 2)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    options = {name: tensor[order] for name, tensor in texts.options.items()}
    shuffled = view_loss(texts.image_NE[order], texts.text_NKE[order], texts.scale, **options)
    _assert_same(shuffled, texts.loss(), texts.leaves)


def test_the_texts_of_one_image_are_no_negatives_of_each_other() -> None:
    """A second text that equals the image would ruin the first text's term, were it in its denominator."""
    texts = _texts(4, 1, 0)
    image, first, scale = texts.image_NE.detach(), texts.text_NKE.detach(), texts.scale.detach()
    perfect = image.unsqueeze(1)
    alone = view_loss(image[:1], first[:1], scale)
    assert alone.item() == 0  # one image: no negative at all
    both = view_loss(image[:1], torch.cat([first[:1], perfect[:1]], dim=1), scale)
    assert both.item() == 0

    # Two equal texts of each image: every other image's text counts twice, its own sibling not at all.
    twice = view_loss(image, first.repeat(1, 2, 1), scale)
    logits = scale * image @ first.squeeze(1).T
    own = logits.diagonal()
    others = logits.masked_fill(torch.eye(4, dtype=torch.bool), -math.inf)
    to_text = torch.log(own.exp() + 2 * others.exp().sum(1)) - own
    to_image = torch.log(own.exp() + others.exp().sum(0)) - own
    torch.testing.assert_close(twice, (to_text + to_image).mean() / 2)


def test_texts_and_negatives_that_are_not_there_have_no_effect_whatever_they_hold() -> None:
    texts = _texts(5, 3, 3)
    texts.there_NK[:, 2] = False
    texts.negatives_there_NM[:, 2] = False
    without = view_loss(
        texts.image_NE,
        texts.text_NKE[:, :2],
        texts.scale,
        there_NK=texts.there_NK[:, :2],
        negatives_NME=texts.negatives_NME[:, :2],
        negatives_there_NM=texts.negatives_there_NM[:, :2],
        gate_N=texts.gate_N,
    )
    _assert_same(texts.loss(), without, texts.leaves)
    wanted = _gradients(texts.loss(), texts.leaves)
    with torch.no_grad():
        texts.text_NKE[~texts.there_NK] = math.nan
        texts.negatives_NME[~texts.negatives_there_NM] = math.inf
    for mine, clean in zip(_gradients(texts.loss(), texts.leaves), wanted, strict=True):
        torch.testing.assert_close(mine, clean)


def test_a_sample_without_any_text_adds_nothing_but_stays_a_wrong_image_for_the_others_texts() -> None:
    texts = _texts(3, 2, 0)
    texts.there_NK[:] = True
    texts.there_NK[1] = False
    loss = texts.loss(gate_N=None, negatives_NME=None, negatives_there_NM=None)
    image_grad, text_grad, _, scale_grad = _gradients(loss, texts.leaves)
    assert math.isfinite(loss.item()) and scale_grad.isfinite()
    assert not text_grad[1].any() and image_grad[1].any()


def test_a_hard_negative_raises_its_own_images_loss_alone() -> None:
    texts = _texts(4, 2, 1)
    near = functional.normalize(texts.image_NE.detach()[2] + 0.1, dim=0)
    negatives_there = torch.tensor([[False], [False], [True], [False]])
    options = {"negatives_NME": near.expand(4, 1, 6), "negatives_there_NM": negatives_there}
    for row in range(4):
        rows = slice(row, row + 1)
        plain = texts.loss(rows=rows, negatives_NME=None, negatives_there_NM=None)
        beside = texts.loss(rows=rows, **options)
        assert (beside > plain) if row == 2 else torch.equal(beside, plain)


def test_of_the_hardest_only_the_most_similar_negative_counts() -> None:
    texts = _texts(4, 2, 3)
    texts.negatives_there_NM[:] = True
    similarity_NM = torch.einsum("ne,nme->nm", texts.image_NE, texts.negatives_NME)
    best_N11 = similarity_NM.argmax(dim=1)[:, None, None].expand(-1, 1, 6)
    one = texts.loss(negatives_NME=texts.negatives_NME.gather(1, best_N11), negatives_there_NM=None)
    _assert_same(texts.loss(hardest=True), one, texts.leaves)
    (grad,) = _gradients(texts.loss(hardest=True), [texts.negatives_NME])
    assert (grad.abs().sum(dim=2) > 0).sum(dim=1).tolist() == [1] * 4
    assert texts.loss().item() > one.item()


def test_a_gate_weights_both_directions_of_its_sample() -> None:
    texts = _texts(4, 2, 1)
    ones = texts.loss(gate_N=torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(ones, texts.loss(gate_N=None))
    shares = torch.stack([texts.loss(gate_N=None, rows=slice(row, row + 1)) for row in range(4)])
    torch.testing.assert_close(texts.loss(), (shares * texts.gate_N).sum())


def test_views_at_a_scale_of_hundred_stay_finite_in_single_precision() -> None:
    texts = _texts(8, 3, 2, scale=100)
    single = [leaf.detach().float().requires_grad_() for leaf in texts.leaves]
    image, text, negatives, scale = single
    loss = view_loss(image, text, scale, **texts.options | {"negatives_NME": negatives, "gate_N": None})
    torch.testing.assert_close(loss.double(), texts.loss(gate_N=None), rtol=1e-5, atol=1e-5)
    assert all(grad.isfinite().all() for grad in _gradients(loss, single))


# --- sigmoid, distillation, gates -----------------------------------------------------------------------------------


def test_the_sigmoid_loss_is_siglips_pair_by_pair_and_open_clips() -> None:
    texts = _texts(5, 1, 0)
    image, text, _, scale = texts.leaves
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            logit = scale * image[i] @ text[j, 0] + bias
            wanted = wanted + torch.log(1 + (-logit if i == j else logit).exp()) / 5
    ours = sigmoid_loss(image, text[:, 0], scale, bias)
    leaves = [image, text, scale, bias]
    _assert_same(ours, wanted, leaves)
    _assert_same(ours, open_clip.loss.SigLipLoss()(image, text[:, 0], scale, bias), leaves)


def test_the_shares_of_rows_sum_to_the_sigmoid_loss_and_its_gradients() -> None:
    texts = _texts(5, 1, 0)
    image, text, _, scale = texts.leaves
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    whole = sigmoid_loss(image, text[:, 0], scale, bias)
    for split in _shares_cover_the_batch(5):
        shares = torch.stack([sigmoid_loss(image, text[:, 0], scale, bias, rows=rows) for rows in split])
        _assert_same(shares.sum(), whole, [image, text, scale, bias])


def _teacher(num_samples: int) -> tuple[Tensor, Tensor]:
    """Features of another width than the student's."""
    generator = torch.Generator().manual_seed(7)
    raw = torch.randn(2, num_samples, 9, dtype=torch.float64, generator=generator)
    image, text = functional.normalize(raw, dim=-1)
    return image, text


def test_the_distillation_loss_is_the_divergence_from_the_teacher_pair_by_pair() -> None:
    texts = _texts(5, 1, 0)
    image, text, _, scale = texts.leaves
    teacher_image, teacher_text = _teacher(5)
    wanted = torch.zeros((), dtype=torch.float64)
    for student, teacher in (
        (scale * image @ text[:, 0].T, 50 * teacher_image @ teacher_text.T),
        (scale * text[:, 0] @ image.T, 50 * teacher_text @ teacher_image.T),
    ):
        for i in range(5):
            p, q = teacher[i].exp() / teacher[i].exp().sum(), student[i].exp() / student[i].exp().sum()
            wanted = wanted + sum(p[j] * torch.log(p[j] / q[j]) for j in range(5)) / 10
    teacher_image.requires_grad_()
    ours = distillation_loss(image, text[:, 0], scale, teacher_image, teacher_text, 50.0)
    _assert_same(ours, wanted, [image, text, scale])
    assert not _gradients(ours, [teacher_image])[0].any()


def test_the_distillation_loss_has_open_clips_gradient_and_lacks_only_the_teachers_entropy() -> None:
    texts = _texts(5, 1, 0)
    image, text, _, scale = texts.leaves
    teacher_image, teacher_text = _teacher(5)
    ours = distillation_loss(image, text[:, 0], scale, teacher_image, teacher_text, 50.0)
    _, peer = open_clip.loss.DistillClipLoss()(image, text[:, 0], scale, teacher_image, teacher_text, 50.0)
    logits = 50 * teacher_image @ teacher_text.T
    entropy = sum(torch.distributions.Categorical(logits=way).entropy().mean() / 2 for way in (logits, logits.T))
    torch.testing.assert_close(ours + entropy, peer)
    leaves = [image, text, scale]
    for mine, theirs in zip(_gradients(ours, leaves), _gradients(peer, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn_from_it() -> None:
    texts = _texts(5, 1, 0)
    image, text, _, scale = texts.leaves
    loss = distillation_loss(image, text[:, 0], scale, image, text[:, 0], scale.item())
    assert abs(loss.item()) < 1e-12
    assert all(grad.abs().max() < 1e-9 for grad in _gradients(loss, [image, text, scale]))


def test_the_shares_of_rows_sum_to_the_distillation_loss_and_its_gradients() -> None:
    texts = _texts(5, 1, 0)
    image, text, _, scale = texts.leaves
    given_all = (image, text[:, 0], scale, *_teacher(5), 50.0)
    whole = distillation_loss(*given_all)
    for split in _shares_cover_the_batch(5):
        shares = torch.stack([distillation_loss(*given_all, rows=rows) for rows in split])
        _assert_same(shares.sum(), whole, [image, text, scale])


def test_gates_weigh_what_agrees_less_than_the_mean_so_far() -> None:
    texts = _texts(6, 2, 0)
    image, a, b = texts.image_NE, texts.text_NKE[:, 0], texts.text_NKE[:, 1]
    means = torch.tensor([0.1, 0.0, -0.2], dtype=torch.float64)
    gate_a, gate_b, new_means = alip_gates(image, a, b, means, decay=0.9)
    pairs = ((a, b), (image, a), (image, b))
    for number, (one, other) in enumerate(pairs):
        batch_mean = sum((one[i] @ other[i]).item() for i in range(6)) / 6
        assert new_means[number].item() == pytest.approx(0.9 * means[number].item() + 0.1 * batch_mean)
    for i in range(6):
        gates = [
            min(1.0, math.exp((one[i] @ other[i]).item() - new_means[number].item()) ** 2)
            for number, (one, other) in enumerate(pairs)
        ]
        assert gate_a[i].item() == pytest.approx(gates[0] * gates[1])
        assert gate_b[i].item() == pytest.approx(gates[0] * gates[2])
    assert not any(found.requires_grad for found in (gate_a, gate_b, new_means))


def test_gates_never_pass_one_and_are_one_where_all_agree_as_always() -> None:
    image = functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    gate_a, gate_b, means = alip_gates(image, image, image, torch.ones(3))
    torch.testing.assert_close(means, torch.ones(3))
    assert torch.allclose(gate_a, torch.ones(4)) and torch.allclose(gate_b, torch.ones(4))
    far_above = alip_gates(image, image, image, torch.zeros(3))
    assert far_above[0].max() <= 1 and far_above[1].max() <= 1


@pytest.mark.parametrize(
    "compute",
    [
        lambda image, text, scale: view_loss(image, text.unsqueeze(1), scale),
        lambda image, text, scale: sigmoid_loss(image, text, scale, -10 * torch.ones(())),
        lambda image, text, scale: distillation_loss(image, text, scale, text, image, 100.0),
        lambda image, text, scale: alip_gates(image, text, text, torch.ones(3))[0].sum(),
    ],
    ids=["view", "sigmoid", "distillation", "gates"],
)
def test_autocast_and_features_of_half_width_change_no_arithmetic(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    image, text, _, scale = (tensor.detach() for tensor in _features(goldens.tensors("losses_n8_scale100")))
    image, text = image.bfloat16(), text.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = compute(image, text, scale.squeeze())
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, compute(image.float(), text.float(), scale.squeeze()), rtol=0, atol=0)


# --- captions -------------------------------------------------------------------------------------------------------


def _states(num_slots: int = 11, width: int = 16, vocab: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(4, num_slots, width, generator=generator)
    head = torch.randn(vocab, width, generator=generator)
    labels = torch.randint(0, vocab, (4, num_slots), generator=generator)
    mask = torch.rand(4, num_slots, generator=generator) < 0.6
    return states, head, labels, mask


@pytest.mark.parametrize("chunk", [1, 5, 26, 1000])
def test_chunks_change_neither_the_loss_nor_its_gradients(chunk: int) -> None:
    states, head, labels, mask = _states()
    whole_states, whole_head = states.clone().requires_grad_(), head.clone().requires_grad_()
    logits = whole_states[mask] @ whole_head.T
    whole = functional.cross_entropy(logits, labels[mask])
    (3 * whole).backward()
    states.requires_grad_(), head.requires_grad_()
    loss = caption_loss(states, head, labels, mask, chunk=chunk)
    (3 * loss).backward()
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(states.grad, whole_states.grad)
    torch.testing.assert_close(head.grad, whole_head.grad)


def _many(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """More slots than are in one softmax, and not a multiple of them."""
    states, head, labels, _ = _states(num_slots=SOFTMAX_SLOTS_ON_CPU)
    states, head = states.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return states, head, labels, torch.arange(SOFTMAX_SLOTS_ON_CPU).expand(4, -1) % 9 > 0


def _plain_loss(states: Tensor, head: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return functional.cross_entropy((states[mask] @ head.T).float(), labels[mask])


@pytest.mark.parametrize("chunk", [SOFTMAX_SLOTS_ON_CPU // 2, SOFTMAX_SLOTS_ON_CPU + 3, 150, None])
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_parts_of_a_chunk_change_neither_the_loss_nor_its_gradients(chunk: int | None, magnitude: float) -> None:
    states, head, labels, mask = _many()
    ours = caption_loss(magnitude * states, head, labels, mask, chunk=chunk)
    whole = _plain_loss(magnitude * states, head, labels, mask)
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-6)
    for mine, reference in zip(_gradients(ours, [states, head]), _gradients(whole, [states, head]), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6 * magnitude)


def test_in_double_precision_the_captioning_loss_is_its_formula_slot_by_slot() -> None:
    states, head, labels, mask = _many(torch.float64)
    wanted = torch.zeros((), dtype=torch.float64)
    for b, q in mask.nonzero().tolist():
        logits = head @ states[b, q]
        wanted = wanted + torch.log(logits.exp().sum()) - logits[labels[b, q]]
    _assert_same(caption_loss(states, head, labels, mask, chunk=100), wanted / mask.sum(), [states, head])


def test_under_bf16_chunks_change_the_gradient_by_less_than_bf16_itself_does() -> None:
    states, head, labels, mask = _many()
    leaves = [states, head]
    exact = _gradients(_plain_loss(states, head, labels, mask), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        plain = _plain_loss(states, head, labels, mask)
        ours = caption_loss(states, head, labels, mask, chunk=100)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)  # equal logits, both summed in fp32
    for mine, reference, wanted in zip(_gradients(ours, leaves), _gradients(plain, leaves), exact, strict=True):
        error, of_bf16 = (mine - wanted).norm(), (reference - wanted).norm()
        assert error < 1.5 * of_bf16 < 0.05 * wanted.norm()


def test_a_loss_can_be_differentiated_twice_from_one_graph() -> None:
    states, head, labels, mask = _many()
    loss = caption_loss(states, head, labels, mask)
    once, again = _gradients(loss, [states, head]), _gradients(2 * loss, [states, head])
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(2 * first, second)


@pytest.mark.parametrize("frozen", ["states", "head"])
def test_a_frozen_head_or_frozen_states_leave_the_others_gradient_as_it_is(frozen: str) -> None:
    states, head, labels, mask = _many()
    of_states, of_head = _gradients(caption_loss(states, head, labels, mask), [states, head])
    both = {"states": of_states, "head": of_head}
    (states if frozen == "states" else head).requires_grad_(False)
    caption_loss(states, head, labels, mask).backward()
    found = {"states": states.grad, "head": head.grad}
    assert found.pop(frozen) is None
    for name, grad in found.items():
        torch.testing.assert_close(grad, both[name])


def test_a_label_with_the_padding_id_counts_where_the_mask_says_so() -> None:
    states, head, labels, _ = _states()
    mask = torch.ones_like(labels, dtype=torch.bool)
    zeros = torch.zeros_like(labels)
    wanted = functional.cross_entropy((states @ head.T).flatten(0, 1), zeros.flatten())
    torch.testing.assert_close(caption_loss(states, head, zeros, mask), wanted)


def test_a_batch_of_only_padding_gives_zero_and_zero_gradients() -> None:
    states, head, labels, mask = _states()
    states.requires_grad_(), head.requires_grad_()
    loss = caption_loss(states, head, labels, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert states.grad is not None and head.grad is not None
    assert not states.grad.any()
    assert not head.grad.any()


def test_slots_that_do_not_count_may_hold_anything() -> None:
    states, head, labels, mask = _states()
    clean = caption_loss(states, head, labels, mask)
    states[~mask], labels[~mask] = float("nan"), -1
    torch.testing.assert_close(caption_loss(states, head, labels, mask), clean)


def test_micro_batches_divided_by_the_slots_of_the_whole_batch_sum_to_its_loss() -> None:
    states, head, labels, mask = _states()
    total = sum(
        caption_loss(states[rows], head, labels[rows], mask[rows], num_counted=int(mask.sum()))
        for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(total, caption_loss(states, head, labels, mask))


def test_without_gradients_only_the_loss_is_computed() -> None:
    states, head, labels, mask = _states()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = caption_loss(states, head.requires_grad_(), labels, mask)
    assert not loss.requires_grad
    assert counter.get_total_flops() == 2 * int(mask.sum()) * head.numel()  # one product with the head
    torch.testing.assert_close(loss, caption_loss(states, head, labels, mask).detach())


def test_under_bf16_the_losses_stay_fp32_and_close() -> None:
    states, head, labels, mask = _states()
    exact = caption_loss(states, head, labels, mask)
    states.requires_grad_(), head.requires_grad_()
    image, web, short, scale = (tensor.detach() for tensor in _features(goldens.tensors("losses_n8")))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = caption_loss(states, head, labels, mask, chunk=6)
        contrast = clips_contrastive_loss(image, web, short, scale)
    rounded.backward()
    assert rounded.dtype == contrast.dtype == torch.float32
    assert rounded.item() != exact.item()  # the product with the head did run in bf16
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(contrast, clips_contrastive_loss(image, web, short, scale))
    assert head.grad is not None and head.grad.dtype == torch.float32
