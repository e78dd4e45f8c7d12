"""The search for words, against slow references that know no batches and no cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clips_data import draws
from clips_data.errors import UserError
from clips_train import search
from clips_train.decoding import Decoding
from clips_train.search import Written, drawn, punished, slot_by_slot, write

START, END = 0, 1


def logits_after(image: int, ids: Sequence[int], vocabulary: int = 6) -> Tensor:
    """The logits of a language model that is nothing but chance: a function of image and history."""
    number = draws.integer(1 << 62, 0, "logits", image, str(list(ids)))
    return 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(number))


class Recomputing:
    """A ``search.Writer`` without a cache, which tells how large its batches were."""

    def __init__(self, images: Sequence[int], vocabulary: int = 6) -> None:
        self.rows: list[tuple[int, list[int]]] = [(image, []) for image in images]
        self.vocabulary = vocabulary
        self.batches: list[int] = []

    def next(self, ids_B: Tensor) -> Tensor:
        self.batches.append(len(ids_B))
        self.rows = [(image, [*ids, token]) for (image, ids), token in zip(self.rows, ids_B.tolist(), strict=True)]
        return torch.stack([logits_after(image, ids, self.vocabulary) for image, ids in self.rows])

    def keep(self, rows_R: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows_R.tolist()]


def written(images: Sequence[int], max_tokens: int, vocabulary: int = 6, **decoding: object) -> list[Written]:
    settings = Decoding(**decoding)  # type: ignore[arg-type]
    return write(
        Recomputing(images, vocabulary),
        start_id=START,
        end_id=END,
        keys=[f"image {image}" for image in images],
        max_tokens=max_tokens,
        decoding=settings,
    )


def log_probability_of(image: int, ids: Sequence[int], ended: bool, vocabulary: int = 6) -> float:
    tokens = [*ids, *([END] if ended else [])]
    return sum(
        logits_after(image, [START, *ids[:place]], vocabulary).double().log_softmax(-1)[token].item()
        for place, token in enumerate(tokens)
    )


def normalised(one: Written, length_penalty: float) -> float:
    return one.log_probability / one.num_predicted**length_penalty


STRATEGIES = (
    {"strategy": "greedy"},
    {"strategy": "greedy", "repetition_penalty": 1.4},
    {"strategy": "top_p", "temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"strategy": "top_p", "temperature": 2.0, "top_p": 1.0, "top_k": 4, "min_p": 0.02, "repetition_penalty": 1.2},
    {"strategy": "beam", "beams": 3},
    {"strategy": "beam", "beams": 4, "length_penalty": 0.0, "repetition_penalty": 1.3},
)


@given(
    images=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    max_tokens=st.integers(1, 7),
    decoding=st.sampled_from(STRATEGIES),
)
@settings(max_examples=60)
def test_no_caption_depends_on_what_else_is_in_its_batch(
    images: list[int], max_tokens: int, decoding: dict[str, object]
) -> None:
    together = written(images, max_tokens, **decoding)
    assert together == [written([image], max_tokens, **decoding)[0] for image in images]
    for image, one in zip(images, together, strict=True):
        assert END not in one.ids and one.num_predicted <= max_tokens
        assert one.ended or len(one.ids) == max_tokens
        assert one.log_probability == pytest.approx(log_probability_of(image, one.ids, one.ended), abs=1e-4)


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    for image, one in enumerate(written(range(30), 8)):
        ids: list[int] = []
        while len(ids) < 8 and (token := int(logits_after(image, [START, *ids]).argmax())) != END:
            ids.append(token)
        assert one.ids == ids


def test_captions_that_have_ended_leave_the_batch() -> None:
    writer = Recomputing(range(32))
    found = write(writer, start_id=START, end_id=END, keys=["" for _ in range(32)], max_tokens=40, decoding=Decoding())
    lengths = [one.num_predicted for one in found]
    for step, size in enumerate(writer.batches):
        needed = sum(length > step for length in lengths)
        assert needed <= size <= max(needed / (1 - search.LEAVING_SHARE), 1), (step, size, needed)
    assert len(writer.batches) == max(lengths) < 40


# --- drawn ------------------------------------------------------------------------------------------------------------


def drawn_slowly(logits: Tensor, number: float, settings: Decoding) -> int:
    """One row, in plain numbers."""
    highest = max(logits.tolist())
    weights = {token: math.exp((logit - highest) / settings.temperature) for token, logit in enumerate(logits.tolist())}
    order = sorted(weights, key=lambda token: -weights[token])
    order = [token for token in order if weights[token] >= settings.min_p * weights[order[0]]]
    order = order[: settings.top_k or None]
    whole, kept, passed = sum(weights[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        passed += weights[token] / whole
        if passed >= settings.top_p:
            break
    wanted = number * sum(weights[token] for token in kept)
    for token in kept:
        wanted -= weights[token]
        if wanted < 0:
            return token
    return kept[-1]


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    likeliest=st.sampled_from([1, 4, 19, 1024]),
)
def test_drawing_follows_temperature_min_p_top_k_and_top_p(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float, likeliest: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = 3 * torch.randn(8, 20, generator=generator)
    uniform_B = torch.rand(8, generator=generator, dtype=torch.float64)
    settings = Decoding(strategy="top_p", temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    expected = [drawn_slowly(*row, settings) for row in zip(logits_BV, uniform_B.tolist(), strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LIKELIEST", likeliest)
        found = drawn(logits_BV, uniform_B, settings).tolist()
    if top_p < 1 or top_k or min_p:  # without a cut they are not put in order
        assert found == expected


def test_a_number_next_to_one_still_draws_a_token_that_is_left() -> None:
    logits_BV = torch.tensor([[1.0, 5.0, 4.9, -3.0]]).repeat(2, 1)
    almost_one = torch.tensor([1 - 2**-53, 1.0], dtype=torch.float64)
    assert drawn(logits_BV, almost_one, Decoding(strategy="top_p", top_k=2, top_p=1.0)).tolist() == [2, 2]


def test_draws_have_the_frequencies_that_the_model_gives() -> None:
    images = [7] * 4000
    found = write(
        Recomputing(images),
        start_id=START,
        end_id=END,
        keys=[str(place) for place in range(4000)],
        max_tokens=1,
        decoding=Decoding(strategy="top_p", top_p=1.0),
    )
    shares = logits_after(7, [START]).softmax(-1).tolist()
    for token, share in enumerate(shares):
        times = sum(one.ended if token == END else one.ids == [token] for one in found)
        assert abs(times / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_other_seeds_and_keys_draw_otherwise() -> None:
    def drawn_with(keys: Sequence[str], seed: int) -> list[list[int]]:
        decoding = Decoding(strategy="top_p", temperature=3.0, top_p=1.0, seed=seed)
        writer = Recomputing([5] * len(keys), vocabulary=200)
        found = write(writer, start_id=START, end_id=END, keys=keys, max_tokens=6, decoding=decoding)
        return [one.ids for one in found]

    found = drawn_with(["a", "b", "c", "d", "a", "b"], 0)
    assert found[:2] == found[4:]
    assert len({tuple(ids) for ids in found}) == 4
    assert drawn_with(["a", "b", "c", "d"], 1) != found[:4]


def test_the_penalty_touches_only_what_was_said() -> None:
    logits_BV = torch.tensor([[2.0, -1.0, 3.0], [2.0, -1.0, 3.0]])
    assert punished(logits_BV, [[0, 1], []], 2.0).tolist() == [[1.0, -2.0, 3.0], [2.0, -1.0, 3.0]]


# --- searched for -----------------------------------------------------------------------------------------------------


def searched_slowly(image: int, beams: int, length_penalty: float, max_tokens: int) -> float:
    """The normalised score that the search finds when no image stops before its length is reached."""
    running: list[tuple[float, list[int], bool]] = [(0.0, [], True)]
    ended: list[tuple[float, int]] = []
    for _ in range(max_tokens):
        grown = []
        for score, ids, greedy in running:
            told = logits_after(image, [START, *ids]).log_softmax(-1)
            likeliest = int(told.argmax())
            grown += [
                (score + told[token].item(), [*ids, token], greedy and token == likeliest) for token in range(len(told))
            ]
        grown.sort(key=lambda one: -one[0])
        width = beams - len(ended)
        kept = grown[:width]
        if not any(one[2] for one in kept):
            kept = [*kept[: width - 1], *(one for one in grown if one[2])] if any(one[2] for one in grown) else kept
        ended += [(score, len(ids)) for score, ids, _ in kept if ids[-1] == END]
        running = [one for one in kept if one[1][-1] != END]
        if not running:
            break
    ended += [(score, len(ids)) for score, ids, _ in running]
    return max(score / length**length_penalty for score, length in ended)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_beam_search_finds_what_a_slow_one_without_early_stop_finds(beams: int, length_penalty: float) -> None:
    found = written(range(25), 6, strategy="beam", beams=beams, length_penalty=length_penalty)
    for image, one in enumerate(found):
        expected = searched_slowly(image, beams, length_penalty, 6)
        assert normalised(one, length_penalty) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_with_room_for_all_captions_beam_search_finds_the_best_there_is(length_penalty: float) -> None:
    vocabulary, longest = 4, 4
    words = [token for token in range(vocabulary) if token != END]
    for image in range(6):
        every = [
            Written(list(ids), length < longest or ended, log_probability_of(image, ids, length < longest or ended, 4))
            for length in range(longest + 1)
            for ids in itertools.product(words, repeat=length)
            for ended in ([False] if length == longest else [True])
        ]
        best = max(every, key=lambda one: normalised(one, length_penalty))
        [found] = written(
            [image], longest, vocabulary, strategy="beam", beams=vocabulary**longest, length_penalty=length_penalty
        )
        assert (found.ids, found.ended) == (best.ids, best.ended)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_one_beam_is_greedy(penalty: float) -> None:
    beam = written(range(40), 9, strategy="beam", beams=1, repetition_penalty=penalty)
    assert beam == [
        Written(one.ids, one.ended, pytest.approx(one.log_probability, abs=1e-5))
        for one in written(range(40), 9, repetition_penalty=penalty)
    ]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beams_score_is_never_below_the_greedy_one(length_penalty: float) -> None:
    greedy = written(range(200), 7)
    higher = 0
    for beams in (2, 3):
        beam = written(range(200), 7, strategy="beam", beams=beams, length_penalty=length_penalty)
        for one, plain in zip(beam, greedy, strict=True):
            gained = normalised(one, length_penalty) - normalised(plain, length_penalty)
            assert gained >= -1e-5
            higher += gained > 1e-5
    assert higher > 100


def test_the_greedy_line_is_followed_although_others_look_better_for_a_while() -> None:
    class GardenPath(Recomputing):
        """After 2 (40 %) come ten tokens about alike, then a sure end; after 3 (30 %) come two alike, then anything."""

        def next(self, ids_B: Tensor) -> Tensor:
            super().next(ids_B)
            return torch.stack([self.share_after(ids).log() for _, ids in self.rows])

        def share_after(self, ids: list[int]) -> Tensor:
            share = torch.full((20,), 1e-9)
            if len(ids) == 1:
                share[[2, 3, 4]] = torch.tensor([0.4, 0.3, 0.3])
            elif len(ids) == 2:
                share[5:15] = 0.1 if ids[1] == 2 else 1e-9
                share[5:7] = torch.tensor([0.11, 0.1] if ids[1] == 2 else [0.51, 0.49])
            elif ids[1] == 2:
                share[END] = 1.0
            else:
                share += 0.05
            return share

    def of(**decoding: object) -> Written:
        settings = Decoding(**decoding)  # type: ignore[arg-type]
        writer = GardenPath([0])
        return write(writer, start_id=START, end_id=END, keys=[""], max_tokens=5, decoding=settings)[0]

    greedy, beam = of(), of(strategy="beam", beams=2, length_penalty=0.0)
    assert greedy.ids[0] == 2 and greedy.log_probability == pytest.approx(math.log(0.4 * 0.11), abs=0.05)
    assert beam == greedy


def test_the_search_stops_when_no_line_can_win_any_more() -> None:
    class Certain(Recomputing):
        """Ends at once, all but surely."""

        def next(self, ids_B: Tensor) -> Tensor:
            return super().next(ids_B).index_fill(1, torch.tensor([END]), 20.0)

    writer = Certain(range(3))
    found = write(
        writer, start_id=START, end_id=END, keys=["", "", ""], max_tokens=30,
        decoding=Decoding(strategy="beam", beams=4, length_penalty=0.0),
    )  # fmt: skip
    assert [(one.ids, one.ended) for one in found] == [([], True)] * 3
    assert writer.batches == [3]


# --- one for each slot ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots_per_pass", [1, 2, 3, 16])
def test_each_slot_gives_its_likeliest_token_until_the_end_token(
    slots_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SLOTS_PER_PASS", slots_per_pass)
    end = 2
    ids = [[5, 6, end, 7, 8, end], [end, 5, 5, 5, 5, 5], [3, 4, 5, 6, 7, 8], [4, 4, 4, 4, 4, end]]
    states_BQD = torch.nn.functional.one_hot(torch.tensor(ids), 9).float()  # likeliest under an identity head
    found = slot_by_slot(states_BQD, torch.eye(9), end)
    assert [one.ids for one in found] == [[5, 6], [], [3, 4, 5, 6, 7, 8], [4, 4, 4, 4, 4]]
    assert [one.ended for one in found] == [True, True, False, True]
    each = 1 - math.log(math.e + 8)
    assert [one.log_probability for one in found] == pytest.approx([3 * each, each, 6 * each, 6 * each], abs=1e-5)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "lucky"}, "'lucky' is not known. Choose greedy, top_p, beam"),
        ({"temperature": 0.0}, "temperature is 0; it should be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5; it should be at most 1"),
        ({"top_p": 0.0}, "top_p is 0; it should be above 0"),
        ({"beams": 0}, "beams is 0; it should be at least 1"),
        ({"max_tokens": -1}, "max_tokens is -1; it should be at least 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1"),
        ({"min_p": float("nan")}, "min_p is nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Decoding(**settings)  # type: ignore[arg-type]
