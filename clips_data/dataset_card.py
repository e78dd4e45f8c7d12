"""What describes a folder of training shards to others: ``sizes.json`` for open_clip and the dataset card.

The card is ``README.md`` in the format of the Hugging Face Hub: front matter in YAML, then Markdown. It is a function
of index and tars, so it can be written anew when samples are taken out. Names, prompts and rules that others wrote
stand in code spans, where Markdown and HTML mean nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data import joined, measure
from clips_data.dataset_facts import MAKERS, SCORERS, Counted, rank

_SPLITS: Final = ("train", "heldout")
_TASKS: Final = ("zero-shot-image-classification", "image-to-text", "text-to-image")
_WORDS_RANKS: Final = (0.05, 0.5, 0.95)
_SIZES: Final = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
RARE: Final = (" is null", ": no concept")
"""Ends of filters' labels that are told only where something went under them."""
_HUB_NAME: Final = re.compile(r"[a-z0-9]+([.+-][a-z0-9]+)*")


def sizes(index: Mapping[str, Any]) -> dict[str, int]:
    """``sizes.json``: tar to its number of samples, from which open_clip's loader knows how long an epoch is."""
    return {shard["file"]: shard["num_samples"] for name in _SPLITS for shard in index["splits"][name]["shards"]}


# --- the card ---------------------------------------------------------------------------------------------------------


def card(folder: Path, index: Mapping[str, Any]) -> str:
    """The dataset card of the tars in ``folder`` that ``index`` (the content of ``index.json``) names."""
    about: Mapping[str, Any] = index.get("about", {})
    counted = Counted(folder, sizes(index))
    sections = [
        _front_matter(index, about, counted),
        _summary(index),
        _sources_section(about.get("sources")),
        _columns_section(index, about, counted),
        _lengths_section(index, counted),
        _flags_section(counted),
        _mix_section(index["mix"]),
        _removed_section(index),
        _scores_section(about.get("scores", {})),
        _licence_section(str(about.get("licence", "unknown"))),
        _loading_section(index),
    ]
    return "\n".join("\n".join(lines) + "\n" for lines in sections if lines)


def _front_matter(index: Mapping[str, Any], about: Mapping[str, Any], counted: Counted) -> list[str]:
    import yaml

    licence = str(about.get("licence", "unknown"))
    on_hub = _HUB_NAME.fullmatch(licence)
    filled = [name for name in _SPLITS if index["splits"][name]["shards"]]
    content = {
        "pretty_name": f"Image-text pairs with {len(index['columns'])} caption columns",
        "license": licence if on_hub else "other",
        **({} if on_hub else {"license_name": licence}),
        "size_categories": [_size_category(_num_samples(index))],
        "task_categories": list(_TASKS),
        "tags": ["webdataset", "image-captions", "clip", "clips"],
        "configs": [{"config_name": "default", "data_files": [{"split": n, "path": f"{n}-*.tar"} for n in filled]}],
        "dataset_info": {"config_name": "default", "features": _features(index, about, counted)},
    }
    return ["---", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip(), "---"]


def _features(index: Mapping[str, Any], about: Mapping[str, Any], counted: Counted) -> list[dict[str, Any]]:
    """The types of a sample's members, which `datasets` else guesses from five samples, and then fails on the sixth.

    ``extra`` is not among them: its content is the user's.
    """
    made = [name for name in index["columns"] if name != joined.WEB]
    said = [{"name": name, "dtype": "string"} for name in ("key", "sha256", *index["columns"])]
    pieces = [{"name": name, "list": {"list": "int64"}} for name in made]
    scores = [{"name": name, "dtype": "float64"} for name in about.get("score_fields", [])]
    codes = [{"name": name, "dtype": "string"} for name in made]
    provenance: list[dict[str, Any]] = [{"name": name, "dtype": "string"} for name in ("pairs", "url", "txt")]
    structs = {
        "sub_captions": pieces,
        "scores": scores,
        "provenance": [*provenance, *([{"name": "codes", "struct": codes}] if codes else [])],
    }
    about_sample = [*said, *({"name": name, "struct": fields} for name, fields in structs.items() if fields)]
    return [
        *({"name": ext, "dtype": "image"} for ext in sorted(counted.image_exts)),
        {"name": "txt", "dtype": "string"},
        {"name": "json", "struct": about_sample},
    ]


def _num_samples(index: Mapping[str, Any]) -> int:
    return sum(int(index["splits"][name]["num_samples"]) for name in _SPLITS)


def _size_category(num_samples: int) -> str:
    """The Hub's own bands: powers of ten from a thousand on."""
    band = sum(num_samples >= 1000 * 10**power for power in range(len(_SIZES)))
    if band == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if band == len(_SIZES) else f"{_SIZES[band - 1]}<n<{_SIZES[band]}"


def _summary(index: Mapping[str, Any]) -> list[str]:
    columns = ", ".join(_code(name) for name in index["columns"])
    return [
        "# Dataset card",
        "",
        f"{_num_samples(index)} images with captions in the columns {columns}, in webdataset tars. A sample is an",
        "image, `KEY.txt` (one caption, see below) and `KEY.json`: each caption under its column's name, sub-captions",
        "as character spans into them, `scores`, `extra` (further columns of the list) and `provenance`. Beside each",
        "tar is an offset index (`*.index.parquet`); `index.json` has the tars' sha256. Train and held-out samples are",
        "split by image sha256, so that copies of an image do not part.",
        "",
        "| split | samples | tars | bytes |",
        "|---|---:|---:|---:|",
        *[
            f"| {name} | {about['num_samples']} | {len(about['shards'])} | {sum(s['bytes'] for s in about['shards'])} |"
            for name, about in ((name, index["splits"][name]) for name in _SPLITS)
        ],
    ]


def _sources_section(sources: Mapping[str, Any] | None) -> list[str]:
    if not sources:
        return []
    images = sources["images"]
    told = f"Before filters there were {images} images. Different hosts: {sources['hosts']}. Most came from:"
    lines = ["## Sources", "", told, ""]
    lines += [f"- {_code(host)}: {_share(number, images)}" for host, number in sources["top_hosts"]]
    if sources["from"]:
        lines += ["", "They were taken over from, or listed as:", ""]
        lines += [f"- {_code(name)} ({number} shards)" for name, number in sources["from"].items()]
    return lines


def _columns_section(index: Mapping[str, Any], about: Mapping[str, Any], counted: Counted) -> list[str]:
    lines = ["## Caption columns", ""]
    made: Mapping[str, Any] = about.get("columns", {})
    for column in index["columns"]:
        if column == joined.WEB:
            lines.append(f"- {_code(column)}: the caption that the image had on the web.")
            continue
        lines.append(f"- {_code(column)}, made by")
        lines += [f"  - {_maker(maker)}" for maker in made.get(column, [])] or ["  - nobody who is recorded"]
        if codes := counted.codes.get(column):
            shares = (f"{_code(code)} {_share(n, codes.total())}" for code, n in measure.by_number(codes).items())
            lines.append(f"  - what became of them: {', '.join(shares)}")
    if "split" in about:
        lines += ["", f"Sub-captions are cut by the rule {_code(about['split'])}; the web caption has none."]
    return lines


def _maker(maker: Mapping[str, Any]) -> str:
    known = {name: value for name, value in maker.items() if name != "shards" and value is not None}
    order = [name for name in (*MAKERS, *SCORERS) if name in known]
    told = [f"{name.replace('_', ' ')} {_code(_text(known[name]))}" for name in dict.fromkeys(order)]
    return f"{', '.join(told) or 'not recorded'} ({maker['shards']} shards)"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _lengths_section(index: Mapping[str, Any], counted: Counted) -> list[str]:
    rows = []
    for column in index["columns"]:
        words = Counter({value: number for value, number in counted.words.get(column, {}).items() if value})
        if words:
            ranks = " | ".join(str(rank(words, share)) for share in _WORDS_RANKS)
            rows.append(f"| {_cell(column)} | {_share(words.total(), counted.words[column].total())} | {ranks} |")
    if not rows:
        return []
    head = ["| column | with a caption | 5th percentile | median | 95th percentile |", "|---|---:|---:|---:|---:|"]
    return ["## Length of captions, in words", "", *head, *rows]


def _flags_section(counted: Counted) -> list[str]:
    lines = []
    for column, flags in counted.flags.items():
        of = counted.words[column].total()
        lines += [
            f"- {_code(column)}, {_code(flag)}: {_share(number, of)}"
            for flag, number in measure.by_number(flags).items()
        ]
    return ["## Flags of captions", "", *lines] if lines else []


def _mix_section(mix: Mapping[str, Any]) -> list[str]:
    rules = mix.get("rules") or [f"{joined.WEB}={mix['web_ratio']}"]
    counts: Mapping[str, int] = mix.get("counts", {})
    total = sum(counts.values())
    return [
        "## Which caption `KEY.txt` holds",
        "",
        f"Drawn for each key with seed {mix['seed']}; of these rules the last whose condition holds counts:",
        "",
        *[f"- {_code(rule)}" for rule in rules],
        "",
        "What came of it:",
        "",
        "| column | samples |",
        "|---|---:|",
        *[f"| {_cell(outcome)} | {_share(number, total)} |" for outcome, number in measure.by_number(counts).items()],
    ]


def _removed_section(index: Mapping[str, Any]) -> list[str]:
    """What did not become a sample: summed over generations, in the order of the filters."""
    generations: Sequence[Mapping[str, Any]] = index.get("generations", [])
    removed: dict[str, int] = {}
    for generation in generations:
        for name, number in _pairs(generation.get("removed", {})):
            removed[name] = removed.get(name, 0) + number
    dropped = index.get("dropped", 0)
    if not removed and not dropped:
        return []
    left = sum(generation["num_rows"] for generation in generations) or _num_samples(index) + dropped
    lines = ["## What was left out", "", f"Of {left} images; each filter counts what the ones before it left.", ""]
    for name, number in removed.items():
        if number or not name.endswith(RARE):
            lines.append(f"- {_code(name)}: {_share(number, left)}")
        left -= number
    return [*lines, f"- without any caption: {_share(dropped, left)}"] if dropped else lines


def _pairs(removed: Mapping[str, int] | Sequence[Sequence[Any]]) -> Iterator[tuple[str, int]]:
    """A list of pairs keeps the order of the filters, which sorted JSON loses."""
    for name, number in sorted(removed.items()) if isinstance(removed, Mapping) else removed:
        yield str(name), int(number)


def _scores_section(scores: Mapping[str, Any]) -> list[str]:
    if not scores:
        return []
    lines = ["## Scores", ""]
    for name, makers in scores.items():
        lines += [f"- {_code(name)}: {_maker(maker)}" for maker in makers]
    return lines


def _licence_section(licence: str) -> list[str]:
    return [
        "## Licence",
        "",
        f"{_code(licence)}, as stated by whoever made this data set. Images and web captions remain their owners'.",
    ]


def _loading_section(index: Mapping[str, Any]) -> list[str]:
    split = next((name for name in _SPLITS if index["splits"][name]["shards"]), _SPLITS[0])
    files = [shard["file"] for shard in index["splits"][split]["shards"]] or [f"{split}-00000.tar"]
    first, last = (file.removeprefix(f"{split}-").removesuffix(".tar") for file in (files[0], files[-1]))
    tars = f"{split}-{{{first}..{last}}}.tar" if len(files) > 1 else files[0]
    return [
        "## How to load",
        "",
        "```python",
        "import webdataset",
        "",
        f'samples = webdataset.WebDataset("{tars}", shardshuffle=False)',
        'samples = samples.decode("pil").to_tuple("jpg;png;webp", "txt", "json")',
        "```",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'samples = load_dataset("FOLDER", split="{split}")  # all of the JSON but `extra`',
        "```",
        "",
        "open_clip reads `sizes.json` and needs no `--train-num-samples`:",
        "",
        "```bash",
        f"python -m open_clip_train.main --model ViT-B-32 --dataset-type webdataset --train-data '{tars}'",
        "```",
    ]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else f"{part} of {whole}"


def _code(text: str) -> str:
    """A code span that holds ``text`` whatever it is, in one line and without characters that cannot be seen."""
    seen = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text) or " "
    longest = max((len(run) for run in re.findall("`+", seen)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if seen.startswith("`") or seen.endswith("`") else ""
    return f"{fence}{pad}{seen}{pad}{fence}"


def _cell(text: str) -> str:
    """``_code`` for a table, where a bar would begin the next cell."""
    return _code(text.replace("|", "\N{BROKEN BAR}"))
