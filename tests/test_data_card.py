"""The dataset card and ``sizes.json``: right figures, valid front matter, and nothing that others wrote comes alive."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pairsmaker
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from clips_data import dataset_card, dataset_facts, joined, ledger, shard_write
from clips_data.config import ShardConfig

COLUMNS = ("web", "synthetic")
HOSTILE = ("`| [x](http://evil.test) |", "<script>alert(1)</script>", "a\n# b", "``` ```", "\u202eabc", "www.evil.test",
           "![i](http://evil.test/i.png)", "", "`", "``", " ", "a|b", "\\`", "~~~", "---")  # fmt: skip


def folder(work: Path, *, num_shards: int = 3, **options: Any) -> tuple[Path, dict[str, Any]]:
    """Two tars and their index, as ``clips shard`` writes them."""

    def reject_some(number: int, row: pairsmaker.Row) -> None:
        if number % 4 == 0:
            pairsmaker.reject(row)

    pairsmaker.write_pairs(work, num_shards=num_shards)
    pairsmaker.write_captions(work, change=reject_some)
    config = ShardConfig(columns=COLUMNS, scores=(), **options)
    inputs = joined.open_inputs(work, COLUMNS)
    rows = pl.concat([inputs.table(unit).with_columns(unit=pl.lit(unit)) for unit in inputs.units])
    rows = rows.with_columns(
        pl.lit("{}").alias("extra"), pl.Series("flags.synthetic", [["opener"]] + [[]] * (len(rows) - 1))
    )
    out = work / "shards"
    out.mkdir()
    writing = shard_write.Writing(config, inputs.pairs, out, {})
    index: dict[str, Any] = {
        "columns": list(COLUMNS),
        "splits": {},
        "dropped": 0,
        "about": dataset_facts.gather(inputs, config),
    }
    counts: Counter[str] = Counter()
    for split, part in (("train", rows.head(10)), ("heldout", rows[10:])):
        unit = f"{split}-00000"
        counts.update(shard_write.write_tar(part, unit, writing))
        sidecar = ledger.read_sidecar(out, unit)
        assert sidecar is not None
        shards = [{"file": f"{unit}.tar", "num_samples": len(part), **sidecar.files[f"{unit}.tar"]}]
        index["splits"][split] = {"num_samples": len(part), "shards": shards}
    index["mix"] = {"rules": ["web=0.8,synthetic=0.2"], "columns": list(COLUMNS), "seed": 0, "counts": dict(counts)}
    return out, index


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return folder(tmp_path)


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def test_sizes_are_those_of_every_tar(made: tuple[Path, dict[str, Any]]) -> None:
    assert dataset_card.sizes(made[1]) == {"train-00000.tar": 10, "heldout-00000.tar": 5}


def test_the_front_matter_is_what_the_hub_reads(made: tuple[Path, dict[str, Any]]) -> None:
    card = dataset_card.card(*made)
    parsed = huggingface_hub.DatasetCard(card)
    assert isinstance(parsed.data, huggingface_hub.DatasetCardData) and parsed.text.lstrip().startswith(
        "# Dataset card"
    )
    found = front_matter(card)
    again = huggingface_hub.DatasetCardData(**found).to_dict()
    assert again == found and again["license"] == "unknown" and again["size_categories"] == ["n<1K"]
    (config,) = found["configs"]
    assert config["data_files"] == [
        {"split": "train", "path": "train-*.tar"},
        {"split": "heldout", "path": "heldout-*.tar"},
    ]
    assert [field["name"] for field in found["dataset_info"]["features"]] == ["jpg", "txt", "json"]


@pytest.mark.parametrize(
    ("licence", "told"),
    [("cc-by-4.0", {"license": "cc-by-4.0"}), ("mit", {"license": "mit"}),
     ("My Own: Terms", {"license": "other", "license_name": "My Own: Terms"})],
)  # fmt: skip
def test_licences_that_the_hub_does_not_know_are_named(tmp_path: Path, licence: str, told: dict[str, str]) -> None:
    found = front_matter(dataset_card.card(*folder(tmp_path, licence=licence)))
    assert {name: value for name, value in found.items() if name.startswith("license")} == told


@pytest.mark.parametrize(
    ("number", "band"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9_999_999, "1M<n<10M"), (10**7, "10M<n<100M"),
     (10**12 - 1, "100B<n<1T"), (10**12, "n>1T")],
)  # fmt: skip
def test_sizes_are_told_in_the_hubs_bands(number: int, band: str) -> None:
    assert dataset_card._size_category(number) == band


def test_the_card_says_what_is_there(made: tuple[Path, dict[str, Any]]) -> None:
    out, index = made
    table = pl.concat([pl.read_parquet(path) for path in sorted(out.glob("*.index.parquet"), reverse=True)])
    rejected = table.filter(pl.col("code.synthetic") == "refused").height
    outcomes = Counter(table["outcome"])
    card = dataset_card.card(out, index)
    assert 0 < rejected < 15 and outcomes.total() == 15
    for line in (
        f"| train | 10 | 1 | {(out / 'train-00000.tar').stat().st_size} |",
        "- `images.test`: 15 of 15 (100.0 %)",
        "  - model `demo`, model revision `0`, engine `vllm`, engine version `0`, prompt `describe`, "
        "prompt digest `0`, sampling `{}`, seed `0` (3 shards)",
        f"  - what became of them: `ok` {15 - rejected} of 15 ({100 - 100 * rejected / 15:.1f} %), "
        f"`refused` {rejected} of 15 ({100 * rejected / 15:.1f} %)",
        "| `web` | 15 of 15 (100.0 %) | 4 | 4 | 4 |",
        f"| `synthetic` | {15 - rejected} of 15 ({100 - 100 * rejected / 15:.1f} %) | 16 | 16 | 16 |",
        "- `synthetic`, `opener`: 1 of 15 (6.7 %)",
        *(f"| `{name}` | {number} of 15 ({100 * number / 15:.1f} %) |" for name, number in outcomes.items()),
        "- `web=0.8,synthetic=0.2`",
        "`unknown`, as stated by whoever made this data set. Images and web captions remain their owners'.",
    ):
        assert line in card.splitlines(), line


def test_what_filters_removed_is_summed_over_generations_in_their_order(made: tuple[Path, dict[str, Any]]) -> None:
    out, index = made
    where, balance = "where web.num_words >= 2 || x", "balance words.txt (cap 9)"
    index["generations"] = [
        {"num_rows": 12, "removed": [[where, 2], [f"{where} is null", 1], [balance, 1], [f"{balance}: no concept", 0]]},
        {"num_rows": 8, "removed": [[where, 2], [f"{where} is null", 0], [balance, 2], [f"{balance}: no concept", 0]]},
    ]  # fmt: skip
    index["dropped"] = 1
    lines = dataset_card.card(out, index).splitlines()
    start = lines.index("## What was left out")
    assert lines[start + 2 : start + 9] == [
        "Of 20 images; each filter counts what the ones before it left.",
        "",
        f"- `{where}`: 4 of 20 (20.0 %)",
        f"- `{where} is null`: 1 of 16 (6.2 %)",
        f"- `{balance}`: 3 of 15 (20.0 %)",
        "- without any caption: 1 of 12 (8.3 %)",
        "",
    ]


def test_a_licence_is_one_line_that_is_not_empty() -> None:
    assert ShardConfig(licence="My Own: Terms").licence == "My Own: Terms"
    for licence in ("", " ", "mit\n", "mit\nmalice: 1", "mit\rmit"):
        with pytest.raises(ValueError, match="licence"):
            ShardConfig(licence=licence)


def test_equal_folders_have_equal_cards_wherever_they_lie(tmp_path: Path) -> None:
    cards = []
    for name in ("here", "there/deeper"):
        out, index = folder(tmp_path / name)
        cards.append(dataset_card.card(out, index))
        again = json.loads(json.dumps(index, sort_keys=True))  # as it comes back from index.json
        assert dataset_card.card(out, again) == cards[-1]
    assert cards[0] == cards[1] and str(tmp_path) not in cards[0]


def test_of_a_models_path_only_the_last_part_is_told(tmp_path: Path) -> None:
    work = tmp_path / "w"
    folder(work)
    file = work / "captions" / "synthetic" / "00000.parquet"
    table = pq.read_table(file)
    models = ("/home/me/models/llava", "C:\\models\\llava", "~/llava", "./llava", "llava-hf/llava-1.5")
    for model, shown in zip(models, ["llava"] * 4 + ["llava-hf/llava-1.5"], strict=True):
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"model": json.dumps(model)}), file)
        about = dataset_facts.gather(
            joined.Inputs(work / "pairs", ("00000",), {"captions/synthetic": file.parent}), ShardConfig()
        )
        assert about["columns"]["synthetic"][0]["model"] == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_what_others_wrote_stays_text(made: tuple[Path, dict[str, Any]], text: str) -> None:
    out, index = made
    index["about"]["sources"]["top_hosts"] = [[text, 1]]
    index["about"]["columns"]["synthetic"][0]["model"] = text
    index["about"]["licence"] = text
    index["generations"] = [{"num_rows": 9, "removed": [[text, 1]]}]
    index["mix"]["counts"] = {text: 1}
    card = dataset_card.card(out, index)
    assert yaml.safe_load(card[4 : card.index("\n---\n")])["license"] in ("other", text)
    tokens = MarkdownIt("commonmark").enable("table").parse(card[card.index("\n---\n") + 5 :])
    inline = [child for token in tokens for child in token.children or []]
    assert not {"html_inline", "html_block", "link_open", "image"} & {token.type for token in [*tokens, *inline]}
    seen = "".join(char if char.isprintable() else "\ufffd" for char in text)
    spans = [token.content for token in inline if token.type == "code_inline"]
    assert spans.count(seen or " ") >= 3
    assert [token.content for token in tokens if token.type == "heading_open"] == [""] * card.count("\n## ") + [""]
    cells = [len([t for t in row if t.type == "td_open"]) for row in rows_of(tokens)]
    assert set(cells) == {2, 4, 5}


def rows_of(tokens: list[Any]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif rows and token.type == "td_open":
            rows[-1].append(token)
    return [row for row in rows if row]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.sampled_from([0.05, 0.5, 0.95]))
def test_ranks_are_those_of_numpy(values: list[int], share: float) -> None:
    assert dataset_facts.rank(Counter(values), share) == np.quantile(values, share, method="inverted_cdf")


def test_indexes_without_counts_leave_their_sections_out(made: tuple[Path, dict[str, Any]]) -> None:
    """As of shards that were made before there were such columns."""
    out, index = made
    for path in out.glob("*.index.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.select(table.schema.names[:9]), path)
    shutil.rmtree(out.parent / "pairs")
    index = {name: value for name, value in index.items() if name not in ("about", "dropped")}
    index["mix"] = {"web_ratio": 0.8, "seed": 0, "counts": {"web": 15}}
    card = dataset_card.card(out, index)
    assert "## Length" not in card and "## Flags" not in card and "| `web` | 15 of 15 (100.0 %) |" in card
