"""``clips trace``: one sample's way through the stages, for a person to read."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from . import present
from .options import LazyCommand, common_options
from .stats import printable

ABOUT: Final = (
    "KEY is in the key column of every table, and names the files in tars; an adopted sample is found by its own "
    "key, too. Failed downloads are traced as well. Each step is compared with what it was made from, and what was "
    "changed since is said, behind a `!`."
)
MAX_TEXT_CHARS: Final = 1500
_WIDEST: Final = 120
_INDENT: Final = "  "
_LONGEST_WORD: Final = 300
"""Words up to this length, such as hashes and URLs, are not broken, so that they can be copied."""
_IMAGE: Final = ("sha256", "raw_sha256", "orientation", "phash", "member", "offset")
_VERSIONED: Final = (
    ("model", "model_revision", "revision"),
    ("engine", "engine_version", "version"),
    ("prompt", "prompt_digest", "digest"),
)
_FILE_ONLY: Final = frozenset(("clips_schema_version",))
_SHOWN_ELSEWHERE: Final = frozenset((
    "key", "bytes", "width", "height", "original_width", "original_height", "image_ext", *_IMAGE, "retry_of",
    "duplicate_of",
))  # fmt: skip

Pairs = Sequence[tuple[str, Any]]


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=trace,
        parameters=lambda: [
            click.Argument(["key"], required=False, metavar="[KEY]"),
            click.Option(["--sha256"], metavar="HEX", help="The sample with this image, as stored or as served."),
            click.Option(["--url"], metavar="URL", help="The sample of this URL; signatures do not matter."),
            *common_options(("work", "json", "debug")),
        ],
        example="clips trace 000000007 --work quickstart",
        help=f"{summary}\n\n{ABOUT}",
    )


def trace(key: str | None, sha256: str | None, url: str | None, work: Path | None, as_json: bool, debug: bool) -> None:
    from clips_data.errors import UsageError

    if sum(given is not None for given in (key, sha256, url)) != 1:
        raise UsageError("Name one sample: by KEY, by --sha256 or by --url.")
    found = look_up(work or Path(), key, sha256, url)
    if as_json:
        present.print_json(found)
    else:
        for line in lines(found, min(_WIDEST, shutil.get_terminal_size().columns)):
            print(printable(line))


def look_up(work: Path, key: str | None, sha256: str | None, url: str | None) -> dict[str, Any]:
    """The lineage of one sample; ``also`` names further samples with the same hash, URL or key of their own."""
    from clips_data import trace_find
    from clips_data.trace import trace

    if key is not None:
        if (found := trace(work, key)) is not None:
            return {**found, "also": []}
        keys = trace_find.by_source_key(work, key)
        if not keys:
            raise trace_find.no_such_key(work, key)
    else:
        keys = trace_find.by_sha256(work, sha256) if sha256 is not None else trace_find.by_url(work, str(url))
    first = trace(work, keys[0])
    assert first is not None, keys
    return {**first, "also": keys[1:]}


# --- for people -------------------------------------------------------------------------------------------------------


def lines(found: Mapping[str, Any], width: int) -> Iterator[str]:
    """The lineage step by step, left to right, aligned and wrapped to ``width`` columns."""
    yield from _wrapped(f"{found['key']}  {_outcome(found)}", width, "")
    if found["also"]:
        yield from _wrapped(f"also: {', '.join(found['also'])}", width, _INDENT)
    for title, step, pairs in _sections(found):
        yield ""
        yield from _wrapped(f"{title}  {step['where']}" if step else title, width, "")
        names = max((len(name) for name, _ in pairs), default=0)
        if step and "absent" in step:
            yield from _wrapped(f"- {step['absent']}", width, _INDENT)
        for name, value in pairs:
            yield from _entry(name, value, names, width)
        for problem in step.get("problems", []):
            yield from _wrapped(f"! {problem}", width, _INDENT)
    yield ""
    number = len(found["problems"])
    yield (f"{number} lines with a ! say what does not fit." if number else "All that is here fits together.")


def _outcome(found: Mapping[str, Any]) -> str:
    row = found["list"].get("row")
    download = "not in pairs here" if row is None else "downloaded" if row["status"] == "success" else row["code"]
    held = {name: step for name, step in found["captions"].items() if "absent" not in step}
    good = sum(step["row"]["status"] == "success" for step in held.values())
    captions = f", {good} of {len(held)} caption columns ok" if held else ""
    places = [f", {step['split']} sample in {step['where']}" for step in found["shards"] if "absent" not in step]
    return download + captions + "".join(places)


def _sections(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Pairs]]:
    """Title, step and named values of each part."""
    yield "list row", found["list"], _listed(found)
    if found["image"] is not None:
        yield "image", found["image"], _image(found["image"], found["list"]["row"])
    for column, step in found["captions"].items():
        yield f"caption {column}", step, _caption(step)
    for name, step in found["scores"].items():
        yield f"scores {name}", step, _scores(step)
    for step in found["shards"]:
        yield "shards", step, _shards(step)
    if found["runs"] or found["shards"]:
        yield "runs", {}, _runs(found)


def _listed(found: Mapping[str, Any]) -> Pairs:
    step = found["list"]
    row = step.get("row", {})
    first = (
        "url",
        "final_url",
        "host",
        "status",
        "code",
        "error_message",
        "evidence",
        "attempts",
        "source_key",
        "caption",
    )
    names = [*first, *(name for name in row if name not in first and name not in _SHOWN_ELSEWHERE)]
    shown = [("web caption" if name == "caption" else name, row[name]) for name in names if row.get(name) is not None]
    related = [(about["relation"], f"{about['key']} {about.get('code', '')}".rstrip()) for about in found["related"]]
    return [*shown, *related, *_version(step)]


def _image(image: Mapping[str, Any], row: Mapping[str, Any]) -> Pairs:
    names = [name for name in _IMAGE if name in image]
    size = f"{row['width']} x {row['height']} px, {image.get('stored_bytes', row['bytes'])} bytes, {row['image_ext']}"
    before = [("as downloaded", f"{row['original_width']} x {row['original_height']} px")]
    known = before if row["original_width"] is not None else []  # who adopted an image did not see it downloaded
    return [("size", size), *known, *((name, image[name]) for name in names)]


def _caption(step: Mapping[str, Any]) -> Pairs:
    if "absent" in step:
        return []
    row, told = step["row"], ("key", "sha256", "caption", "raw", "engine")
    pairs = [("caption", row["caption"])]
    if " ".join((row.get("raw") or "").split()) != row["caption"]:
        pairs.append(("raw", row.get("raw")))
    pairs += [(name, value) for name, value in row.items() if name not in told and value not in (None, [])]
    return [*pairs, *_made_by(step, row.get("engine"))]


def _scores(step: Mapping[str, Any]) -> Pairs:
    if "absent" in step:
        return []
    nothing = "none, as the table has no label for it" if _is_labels(step) else "none, as the caption was empty"
    values = [(name, value) for name, value in step["row"].items() if name not in ("key", "sha256")]
    shown = [(name, nothing if value is None else _score(value)) for name, value in values]
    return [*shown, *_made_by(step)]


def _is_labels(step: Mapping[str, Any]) -> bool:
    return bool(step["made_by"].get("model") == "labels")


def _score(value: Any) -> str:
    """A number, a text, or the list of a caption's flags or of its sentences' similarities."""
    if isinstance(value, list):
        return ", ".join(map(_score, value)) or "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _made_by(step: Mapping[str, Any], engine: str | None = None) -> Pairs:
    """Who made a table's rows, each thing on a line with its version; ``engine`` is the row's own."""
    about = {name: value for name, value in step["made_by"].items() if value not in (None, {})}
    about.setdefault("engine", engine)
    if engine not in (None, about["engine"]):
        about["engine"] = f"{engine} (the column: {about['engine']})"
    pairs: list[tuple[str, Any]] = []
    for name, detail, word in _VERSIONED:
        thing, version = about.pop(name, None), about.pop(detail, None)
        if thing is not None:
            pairs.append((name, str(thing) if version is None else f"{thing}, {word} {version}"))
    for name, value in about.items():
        if name not in _FILE_ONLY:
            pairs.append(("seed of column" if name == "seed" else name, value))
    return [*pairs, *_version(step)]


def _shards(step: Mapping[str, Any]) -> Pairs:
    if "absent" in step:
        return []
    pairs: list[tuple[str, Any]] = [
        ("split", step["split"]),
        ("place", f"{step['tar']}, row {step['row']}"),
        (".txt", step["txt"]["text"]),
        (".txt is", f"the {step['txt']['column']} caption: {step['txt']['why']}"),
    ]
    for column, pieces in step["sub_captions"].items():
        pairs.append(("sub-captions", f"{len(pieces)} of {column}, by the rule {step['split_rule']}"))
        pairs += [("", f"{piece['start']}-{piece['end']}: {piece['text']}") for piece in pieces]
    pairs += [(f"score {name}", _score(value)) for name, value in step["scores"].items()]
    return [*pairs, *_version(step)]


def _runs(found: Mapping[str, Any]) -> Pairs:
    pairs: list[tuple[str, Any]] = []
    for run in found["runs"]:
        if run["shards"] is None:
            about = "its shards are not here any more: it may have seen this sample"
        elif run["split"] == "train":
            about = f"trained on {run['shards']}, with this sample"
        else:
            about = f"trained on {run['shards']}, where this sample is held out"
        pairs.append((run["run"], about))
        pairs += [("", path) for path in run["checkpoints"]]
    pairs += [("named in", path) for path in found["shown_in"]]
    return pairs or [("-", "none was trained on this sample's shards")]


def _version(step: Mapping[str, Any]) -> Pairs:
    return [("by clips", step["tool_version"])] if "tool_version" in step else []


def _entry(name: str, value: Any, names: int, width: int) -> Iterator[str]:
    """``  name   value``, the value wrapped beside its name."""
    text = str(value)
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {inner}" for key, inner in value.items() if inner not in (None, [], {}))
    elif isinstance(value, list | tuple):
        text = ", ".join(str(inner) for inner in value)
    if len(text) > MAX_TEXT_CHARS:
        text = f"{text[:MAX_TEXT_CHARS]} … {len(text) - MAX_TEXT_CHARS} more characters, see --json"
    head = f"{_INDENT}{name:<{names}}  "
    endless = any(len(word) > _LONGEST_WORD for word in text.split())
    wrapped = textwrap.wrap(text, max(20, width - len(head)), break_long_words=endless, break_on_hyphens=False)
    wrapped = wrapped or ["(empty)"]
    yield head + wrapped[0]
    yield from (" " * len(head) + line for line in wrapped[1:])


def _wrapped(text: str, width: int, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text, max(20, width), initial_indent=indent, subsequent_indent=indent + _INDENT, break_on_hyphens=False
    )
