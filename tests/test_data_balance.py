"""Tests of clips_data/balance.py: which concepts are in a caption, and which captions balancing keeps."""

from __future__ import annotations

from pathlib import Path
from random import Random

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import balance, draws
from clips_data.balance import Balance, Concepts
from clips_data.errors import UserError

WORDS = ["dog", "cat", "New", "York", "U.S.", "a", ".", "dogs", "ice", "cream,"]


def view(captions: list[str], first: int = 0) -> pl.DataFrame:
    keys = [f"{first + row:09d}" for row in range(len(captions))]
    structs = [{"caption": text} for text in captions]
    return pl.DataFrame({"key": keys, "web": pl.Series(structs, dtype=pl.Struct({"caption": pl.String}))})


def concepts_of(captions: list[str], concepts: list[str]) -> list[set[str]]:
    table = Concepts.of(concepts)
    found: list[set[str]] = [set() for _ in captions]
    for row, number in zip(*table.found_in(pl.Series(captions, dtype=pl.String)), strict=True):
        found[row].add(table.texts[int(number)])
    return found


def write(path: Path, concepts: list[str]) -> Path:
    path.write_text("".join(f"{concept}\n" for concept in concepts))
    return path


def balanced(path: Path, views: list[pl.DataFrame], cap: int, seed: int = 0) -> Balance:
    return balance.find(path, "web", cap, seed, lambda look: [look(some) for some in views])


def kept(balance: Balance, views: list[pl.DataFrame]) -> list[str]:
    return [key for some in views for key in some.filter(balance.judge(some) == 0)["key"]]


def test_concepts_stand_between_spaces_and_punctuation_and_match_in_their_case() -> None:
    concepts = ["dog", "New York", "U.S.", "dogs", "hot dog stand", "hot dog"]
    captions = ["A dog, asleep", "hotdog", "In New\tYork!", "New  York", "The U.S. dogs", "Dog", "hot dog stands", ""]
    assert concepts_of(captions, concepts) == [
        {"dog"}, set(), {"New York"}, {"New York"}, {"U.S.", "dogs"}, set(), {"dog", "hot dog"}, set(),
    ]  # fmt: skip


texts = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)


@given(st.lists(texts, max_size=6), st.lists(texts.filter(str.strip), min_size=1, max_size=6, unique=True))
def test_what_is_found_is_what_polars_automaton_finds(captions: list[str], concepts: list[str]) -> None:
    def bounded(texts: list[str]) -> pl.Series:
        words = balance.spaced(pl.Series(texts, dtype=pl.String)).str.split(" ")
        return pl.select(
            " " + words.list.eval(pl.element().filter(pl.element() != "")).list.join(" ") + " "
        ).to_series()

    patterns = bounded(concepts)
    same = {pattern: concept for pattern, concept in reversed(list(zip(patterns, concepts, strict=True)))}
    expected = bounded(captions).str.extract_many(list(same), overlapping=True).to_list()
    assert concepts_of(captions, concepts) == [{same[pattern] for pattern in some} for some in expected]


def test_no_caption_and_no_match_are_nothing() -> None:
    assert concepts_of([], ["a"]) == []
    assert concepts_of(["", "b"], ["a"]) == [set(), set()]


def test_a_caption_that_two_concepts_draw_stays_once_and_counts_once_for_each(tmp_path: Path) -> None:
    views = [view(["dog and cat, dog", "dog", "bird"])]
    found = balanced(write(tmp_path / "w.txt", ["dog", "cat"]), views, cap=1)
    assert kept(found, views).count("000000000") == 1  # cat is rare and keeps it, whatever dog draws
    assert found.judge(views[0])[2] == 2
    assert dict(zip(found.thinned.tolist(), found.probabilities.tolist(), strict=True)) == {0: 0.5}


@given(
    st.lists(st.lists(st.sampled_from(["dog", "cat", "sun", "bird"]), max_size=4).map(" ".join), max_size=40),
    st.integers(1, 10),
    st.integers(0, 3),
    st.randoms(),
)
def test_a_sample_stays_if_one_of_its_concepts_draws_it_whatever_the_sharding(
    tmp_path_factory: pytest.TempPathFactory, captions: list[str], cap: int, seed: int, random: Random
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "words.txt", ["dog", "cat", "sun"])
    whole = view(captions)
    counts = {word: sum(word in text.split() for text in captions) for word in ("dog", "cat", "sun")}
    expected = [
        key
        for key, text in zip(whole["key"], captions, strict=True)
        if any(
            draws.uniform(seed, "balance", 0, f"{key} {word}") < cap / max(counts[word], cap)
            for word in counts
            if word in text.split()
        )
    ]
    order = list(range(len(captions)))
    random.shuffle(order)
    cut = len(order) // 3
    views = [whole[order[:cut]], whole[order[cut:]], whole.clear()]
    assert sorted(kept(balanced(path, views, cap, seed), views)) == expected


def test_a_frequent_concept_is_thinned_to_about_its_cap(tmp_path: Path) -> None:
    views = [view(["a dog"] * 3000 + ["a rare newt"] * 5), view(["one dog"] * 3000, first=5000)]
    stayed = kept(balanced(write(tmp_path / "w.txt", ["dog", "newt"]), views, cap=600), views)
    assert 520 < len(stayed) - 5 < 680  # 600, give or take three standard deviations
    assert {f"{row:09d}" for row in range(3000, 3005)} <= set(stayed)


def test_a_list_is_read_as_lines_without_blanks_and_doubles(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_bytes(b"\xef\xbb\xbf dog \r\n\r\ncat\ndog\n")
    assert balance.read(tmp_path / "w.txt").texts.to_list() == ["dog", "cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\n \n", "holds no concept"), (b"dog\n\xff\n", "not UTF-8 .byte 4")],
)
def test_a_list_that_cannot_be_used_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "w.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        balance.read(tmp_path / "w.txt")


def test_a_list_that_changes_after_counting_ends_the_stage(tmp_path: Path) -> None:
    views = [view(["a dog"])]
    found = balanced(write(tmp_path / "w.txt", ["dog"]), views, cap=1)
    write(tmp_path / "w.txt", ["cat"])
    with pytest.raises(UserError, match="was changed"):
        found.judge(views[0])


def test_examples_name_the_concepts(tmp_path: Path) -> None:
    views = [view(["a dog on a cat", "nothing"])]
    found = balanced(write(tmp_path / "w.txt", ["dog", "cat"]), views, cap=5)
    assert [sorted(row) for row in found.tell(views[0])["concepts"].to_list()] == [["cat", "dog"], []]
