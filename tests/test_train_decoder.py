from __future__ import annotations

from itertools import product

import goldens
import pytest
import torch
from torch import Tensor

from clips_train.blocks import Block, PrefixBlock, added
from clips_train.decoder import CaptionDecoder, Fusion, Mode, prefix_lm_mask
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


KINDS = list(product(("queries", "teacher_forced"), ("concat", "cross_attention"), ("image", "both", "masked")))
MASK = torch.tensor([[True, True, False, True], [True, False, False, True]])


def _made(mode: Mode, fusion: Fusion, condition: str, *, layers: int = 4) -> CaptionDecoder:
    generator = torch.Generator().manual_seed(13)
    made = CaptionDecoder(
        width=16,
        layers=layers,
        heads=2,
        num_queries=NUM_QUERIES,
        vocab_size=20,
        image_width=12,
        text_width=None if condition == "image" else 8,
        mode=mode,
        fusion=fusion,
    )
    for parameter in made.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return made.eval()


def _inputs(condition: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Patch tokens, text states, tokens and mask, as ``CaptionDecoder`` takes them."""
    image, text = _condition()
    ids = torch.randint(20, (2, NUM_QUERIES), generator=torch.Generator().manual_seed(14))
    return image, None if condition == "image" else text, ids, MASK if condition == "masked" else None


def _moved(decoder: CaptionDecoder, before: Tensor, *inputs: Tensor | None) -> Tensor:
    """bool [B, Q]: which outputs differ."""
    return (decoder(*inputs) - before).abs().amax(dim=2) > 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "fusion", "condition"), KINDS)
@torch.no_grad()
def test_every_slot_reads_all_of_the_condition_and_no_later_slot(mode: Mode, fusion: Fusion, condition: str) -> None:
    decoder = _made(mode, fusion, condition)
    image, text, ids, mask = _inputs(condition)
    before = decoder(image, text, ids, mask)
    for patch in range(NUM_PATCHES):
        other = image.clone()
        other[:, patch, 0] += 3
        assert _moved(decoder, before, other, text, ids, mask).all()
    for token in range(NUM_TEXT if text is not None else 0):
        assert text is not None
        other = text.clone()
        other[:, token, 0] += 3
        read = torch.ones(2) > 0 if mask is None else mask[:, token]
        moved = _moved(decoder, before, image, other, ids, mask)
        assert torch.equal(moved, read[:, None].expand(-1, NUM_QUERIES))
    for slot in range(NUM_QUERIES):
        wanted = torch.arange(NUM_QUERIES).expand(2, -1) >= slot
        if mode == "teacher_forced":
            other = ids.clone()
            other[:, slot] = (other[:, slot] + 1) % 20
            assert torch.equal(_moved(decoder, before, image, text, other, mask), wanted)
        else:
            decoder.queries[slot, 0] += 1
            assert torch.equal(_moved(decoder, before, image, text, ids, mask), wanted)
            decoder.queries[slot, 0] -= 1


@torch.no_grad()
def test_a_prefix_block_has_the_references_mask_at_every_row_and_column() -> None:
    torch.manual_seed(0)
    block, at, size = PrefixBlock(16, 2), NUM_PATCHES, NUM_PATCHES + NUM_QUERIES
    allowed = prefix_lm_mask(at, NUM_QUERIES)
    slot_mask = added(allowed[at:], torch.float32)
    states = torch.randn(1, size, 16)
    before = block(states, at, None, slot_mask)
    for column in range(size):
        other = states.clone()
        other[:, column, 0] += 2
        moved = (block(other, at, None, slot_mask) - before).abs().amax(dim=(0, 2)) > 1e-6
        assert torch.equal(moved, allowed[:, column])
    whole = Block(16, 2)
    whole.load_state_dict(block.state_dict())
    torch.testing.assert_close(before, whole(states, attn_mask=allowed))
    torch.testing.assert_close(block(states, at, None, slot_mask, True), before[:, at:])


@pytest.mark.parametrize(("mode", "fusion", "condition"), KINDS)
@torch.no_grad()
def test_fewer_slots_are_the_first_of_all_slots(mode: Mode, fusion: Fusion, condition: str) -> None:
    decoder = _made(mode, fusion, condition)
    image, text, ids, mask = _inputs(condition)
    torch.testing.assert_close(decoder(image, text, ids[:, :3], mask), decoder(image, text, ids, mask)[:, :3])


@pytest.mark.parametrize(("fusion", "condition"), [kind[1:] for kind in KINDS if kind[0] == "teacher_forced"])
@pytest.mark.parametrize("layers", [1, 3, 4])
@torch.no_grad()
def test_slot_by_slot_the_cache_gives_what_the_parallel_pass_gives(fusion: Fusion, condition: str, layers: int) -> None:
    decoder = _made("teacher_forced", fusion, condition, layers=layers)
    image, text, ids, mask = _inputs(condition)
    whole = decoder(image, text, ids, mask)
    cache = decoder.prefill(image, text, mask)
    for slot in range(NUM_QUERIES):
        torch.testing.assert_close(decoder.next(ids[:, slot], cache), whole[:, slot], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fusion", "condition"), [kind[1:] for kind in KINDS if kind[0] == "teacher_forced"])
@torch.no_grad()
def test_a_cache_follows_its_rows_when_they_repeat_change_places_or_leave(fusion: Fusion, condition: str) -> None:
    """As a beam search does it: each step's rows are tried against the parallel pass on the tokens they hold."""
    decoder = _made("teacher_forced", fusion, condition)
    image, text, _, mask = _inputs(condition)
    cache = decoder.prefill(image, text, mask).repeat(3)
    sample, tokens = torch.arange(2).repeat_interleave(3), torch.zeros(6, 0, dtype=torch.long)
    generator = torch.Generator().manual_seed(3)
    for rows in ([2, 0, 0, 4, 4, 5], [5, 0, 3, 1], [1, 1, 2, 0], [3], [0, 0]):
        ids = torch.randint(20, (len(tokens),), generator=generator)
        tokens = torch.cat([tokens, ids[:, None]], dim=1)
        state = decoder.next(ids, cache)
        of_rows = [None if whole is None else whole[sample] for whole in (image, text, mask)]
        assert of_rows[0] is not None
        whole = decoder(of_rows[0], of_rows[1], tokens, of_rows[2])
        torch.testing.assert_close(state, whole[:, -1], rtol=1e-5, atol=1e-5)
        index = torch.tensor(rows)
        cache, sample, tokens = cache.reorder(index), sample[index], tokens[index]


@torch.no_grad()
def test_more_slots_than_positions_are_refused() -> None:
    decoder = _made("teacher_forced", "concat", "image")
    cache = decoder.prefill(_condition()[0])
    for _ in range(NUM_QUERIES):
        decoder.next(torch.tensor([1, 2]), cache)
    with pytest.raises(AssertionError, match="at most 6 slots"):
        decoder.next(torch.tensor([1, 2]), cache)


@pytest.mark.parametrize(
    ("layers", "crossing"), [(1, [False, True]), (3, [False, True, False]), (4, [False, True] * 2)]
)
def test_half_of_the_blocks_cross_where_the_condition_is_attended_to(layers: int, crossing: list[bool]) -> None:
    blocks = _made("queries", "cross_attention", "both", layers=layers).transformer.resblocks
    assert [hasattr(block, "ln_1_kv") for block in blocks] == crossing


@pytest.mark.parametrize(("mode", "fusion", "condition"), KINDS)
def test_gradient_checkpointing_changes_no_gradient(mode: Mode, fusion: Fusion, condition: str) -> None:
    decoder = _made(mode, fusion, condition, layers=2)

    def gradients() -> dict[str, Tensor | None]:
        decoder.zero_grad()
        decoder.head(decoder(*_inputs(condition))).square().sum().backward()
        return {name: parameter.grad for name, parameter in decoder.named_parameters()}

    plain = gradients()
    decoder.gradient_checkpointing = True
    for name, found in gradients().items():
        wanted = plain[name]
        assert found is not None and wanted is not None, name  # every parameter is used, as DDP wants it
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("mode", "fusion"), [("teacher_forced", "concat"), ("queries", "cross_attention")])
def test_the_decoder_compiles_to_one_graph(mode: Mode, fusion: Fusion) -> None:
    decoder, inputs = _made(mode, fusion, "masked", layers=2), _inputs("masked")
    torch.compiler.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*inputs), decoder(*inputs))


@pytest.mark.parametrize(("mode", "fusion", "condition"), KINDS)
@torch.no_grad()
def test_bf16_stays_close_in_all_kinds(mode: Mode, fusion: Fusion, condition: str) -> None:
    decoder = _made(mode, fusion, condition, layers=2)
    image, text, ids, mask = _inputs(condition)
    exact = decoder(image, text, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(image, text, ids, mask)
        torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.15)
        if mode == "teacher_forced":
            cache = decoder.prefill(image, text, mask)
            stepwise = torch.stack([decoder.next(ids[:, slot], cache) for slot in range(NUM_QUERIES)], dim=1)
            torch.testing.assert_close(stepwise.float(), exact, rtol=0.1, atol=0.15)


def test_bf16_stays_close_and_has_gradients(decoder: CaptionDecoder) -> None:
    exact = decoder(*_condition())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(*_condition())
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)
    rounded.float().square().mean().backward()
    for name, parameter in decoder.named_parameters():
        if name != "head.weight":
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
