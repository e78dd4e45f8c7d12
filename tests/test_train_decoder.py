from __future__ import annotations

import goldens
import pytest
import torch
from torch import Tensor

from clips_train.decoder import CaptionDecoder, prefix_lm_mask
from clips_train.losses import caption_loss

NUM_PATCHES, NUM_TEXT, NUM_QUERIES = 5, 4, 6


def _golden() -> tuple[CaptionDecoder, dict[str, Tensor]]:
    golden = goldens.tensors("decoder_w48")
    decoder = CaptionDecoder(
        width=48, layers=2, heads=3, num_queries=24, vocab_size=1200, image_width=64, text_width=48
    )
    decoder.load_state_dict(goldens.decoder_state(goldens.under(golden, "param."), layers=2))
    return decoder, golden


def test_logits_loss_and_gradients_are_the_references() -> None:
    decoder, golden = _golden()
    image = golden["input.image_tokens"].clone().requires_grad_()
    text = golden["input.text_tokens"].clone().requires_grad_()
    states = decoder(image, text)
    loss = caption_loss(states, decoder.head.weight, golden["input.labels"], golden["input.label_mask"], chunk=10)
    loss.backward()
    found = {
        "intermediate.projected_image_tokens": decoder.image_projection(image),
        "intermediate.projected_text_tokens": decoder.text_projection(text),
        "output.logits": decoder.head(states),
        "output.caption_loss": loss,
        "grad.image_tokens": image.grad,
        "grad.text_tokens": text.grad,
        "grad.learnable_tokens": decoder.queries.grad,
    }
    for name, ours in found.items():
        assert ours is not None
        goldens.assert_meets("decoder_w48", ours, golden[name], name)
    assert decoder.head.weight.grad is not None
    goldens.assert_meets("decoder_w48", decoder.head.weight.grad.T, golden["grad.head.kernel"], "head")


def test_without_gradients_the_outputs_are_the_same() -> None:
    """torch takes another path through its attention then."""
    decoder, golden = _golden()
    with torch.no_grad():
        states = decoder.eval()(golden["input.image_tokens"], golden["input.text_tokens"])
    goldens.assert_meets("decoder_w48", decoder.head(states), golden["output.logits"])


def test_the_mask_is_the_references() -> None:
    assert torch.equal(prefix_lm_mask(16 + 79, 24), goldens.tensors("decoder_w48")["mask.attention"])


def test_mask_lets_the_condition_see_itself_and_a_query_nothing_later() -> None:
    allowed = prefix_lm_mask(3, 2)
    assert allowed.int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


@pytest.fixture
def decoder() -> CaptionDecoder:
    generator = torch.Generator().manual_seed(11)
    made = CaptionDecoder(
        width=16, layers=3, heads=2, num_queries=NUM_QUERIES, vocab_size=20, image_width=12, text_width=8
    )
    for parameter in made.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return made


def _condition() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    return (
        torch.randn(2, NUM_PATCHES, 12, generator=generator),
        torch.randn(2, NUM_TEXT, 8, generator=generator),
    )


@pytest.mark.parametrize("changed", range(NUM_QUERIES))
def test_a_query_reaches_itself_and_later_ones_only(decoder: CaptionDecoder, changed: int) -> None:
    with torch.no_grad():
        before = decoder(*_condition())
        decoder.queries[changed, 0] += 1  # a norm would undo a shift of all of them
        moved = (decoder(*_condition()) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert moved.tolist() == [position >= changed for position in range(NUM_QUERIES)]


def test_every_query_sees_every_token_of_both_conditions(decoder: CaptionDecoder) -> None:
    image, text = _condition()
    image.requires_grad_(), text.requires_grad_()
    decoder(image, text)[:, 0].square().sum().backward()
    assert image.grad is not None and text.grad is not None
    assert (image.grad.abs().amax(dim=-1) > 0).all()
    assert (text.grad.abs().amax(dim=-1) > 0).all()


def test_the_order_of_the_condition_does_not_matter(decoder: CaptionDecoder) -> None:
    image, text = _condition()
    with torch.no_grad():
        torch.testing.assert_close(decoder(image.flip(1), text.flip(1)), decoder(image, text))


def test_samples_of_a_batch_do_not_mix(decoder: CaptionDecoder) -> None:
    image, text = _condition()
    with torch.no_grad():
        torch.testing.assert_close(decoder(image, text)[1:], decoder(image[1:], text[1:]))


def test_bf16_stays_close_and_has_gradients(decoder: CaptionDecoder) -> None:
    exact = decoder(*_condition())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(*_condition())
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)
    rounded.float().square().mean().backward()
    for name, parameter in decoder.named_parameters():
        if name != "head.weight":
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
