from __future__ import annotations

import goldens
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from clips_train.losses import caption_loss, clips_contrastive_loss, contrastive_loss

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
