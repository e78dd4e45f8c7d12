"""``clips search``: texts and pictures find images, or captions, of training shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click

from . import present
from .options import ConfigCommand
from .stages import DEFAULT_RUN
from .stats import printable

if TYPE_CHECKING:
    from clips_train.search_run import Hit, Query, Search
    from clips_train.use_config import SearchConfig

CONFIG: Final = "clips_train.use_config:SearchConfig"
ABOUT: Final = (
    "FOLDER is a folder of training shards or a work folder (default: --work); each further word is a query, and - "
    "reads one a line from stdin. What the model sees in the split is stored once under search/, beside runs/; after "
    "that only the queries are embedded. Prints one line a result to stdout: rank, cosine similarity, key, caption, "
    "tabs between them, and before them the query where there are several. An image that cannot be read is counted."
)
STDIN: Final = "-"
MAX_IMAGE_BYTES: Final = 1 << 28
CAPTION_CHARS: Final = 300
"""Of a caption, in a line; --json has all of it."""
QUERY_CHARS: Final = 60
_UNSAFE_IN_JSON: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")


def build(name: str, summary: str) -> click.Command:
    return SearchCommand(
        name,
        config=CONFIG,
        call=search,
        common=("work", "debug", "quiet"),
        example='clips search quickstart/shards "a red circle above a blue square" --html found.html',
        help=f"{summary}\n\n{ABOUT}",
    )


class SearchCommand(ConfigCommand):
    def extra_options(self) -> list[click.Parameter]:
        return [
            click.Argument(["words"], nargs=-1, metavar="[FOLDER] QUERY..."),
            click.Option(
                ["--image"],
                multiple=True,
                metavar="FILE",
                help="Picture to search with; together with a text, for what is near to the mean of both.",
            ),
            click.Option(
                ["--html"],
                type=click.Path(path_type=Path, dir_okay=False),
                metavar="PAGE.html",
                help="Also write a page with the pictures: one file that loads nothing from elsewhere.",
            ),
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object a result, a line each."),
        ]


def search(config: Any, _: Any, context: click.Context) -> None:
    from clips_data.executor import stop_on_sigterm
    from clips_train.search_run import Search, default_model

    given = context.params
    folder, texts = _folder_and_texts(given["words"])
    queries = _queries(texts, given["image"])
    shards, home = _shards(folder or given["work"] or Path(), texts if folder is None else ())
    work = given["work"] or home
    settings = cast("SearchConfig", config)
    stop_on_sigterm()
    model = settings.model or default_model(work / "runs", DEFAULT_RUN)
    found = Search(settings, model=model, shards=shards, work=work, quiet=given["quiet"])
    notes = _notes(found)
    present.say("\n".join([_summary(found), *(f"  {note}" for note in notes)]), quiet=given["quiet"])
    answers = found.answers(queries, settings.top)
    if given["html"] is not None:
        _write_page(given["html"], found, queries, answers, notes)
        present.say(f"search: wrote {given['html']}", quiet=given["quiet"])
    _print(found, queries, answers, as_json=given["as_json"])


# --- what is asked ----------------------------------------------------------------------------------------------------


def _folder_and_texts(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A first word that names a folder is no query: it is there, or ends as a folder does."""
    if words and words[0] != STDIN and words[0].strip() and (words[0].endswith(os.sep) or Path(words[0]).is_dir()):
        return Path(words[0]), list(words[1:])
    return None, list(words)


def _queries(texts: Sequence[str], image_files: Sequence[str]) -> list[Query]:
    """Every text, or every text with every picture, or every picture."""
    from clips_data.errors import UsageError
    from clips_train.search_run import Query

    asked: list[str] = []
    for text in texts:
        if text != STDIN:
            if not text.strip():
                raise UsageError('A query is empty. Write what to search for, such as "a red circle".')
            asked.append(text)
            continue
        lines = [line.strip() for line in sys.stdin.buffer.read().decode("utf-8", "replace").splitlines()]
        if not any(lines):
            raise UsageError("There was no query on stdin. Write one a line.")
        asked += filter(None, lines)
    images = [(name, _read(Path(name))) for name in image_files]
    if not asked and not images:
        raise UsageError('What is to be searched for? Give a text, such as "a red circle", or a picture with --image.')
    if not images:
        return [Query(text) for text in asked]
    return [Query(text, data, _readable(name)) for text in asked or [""] for name, data in images]


def _readable(name: str) -> str:
    """Names of files may hold bytes that are no text."""
    return os.fsencode(name).decode("utf-8", "replace")


def _read(file: Path) -> bytes:
    from clips_data.errors import UserError

    try:
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise UserError(f"--image {file} has more than {MAX_IMAGE_BYTES} bytes. Name a smaller file.")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--image {file} cannot be read: {error.strerror}. Name an image file.") from None


def _shards(folder: Path, texts: Sequence[str]) -> tuple[Path, Path]:
    """The folder of the shards, and the work folder that it belongs to. The first text may be a mistyped one."""
    from clips_data.errors import UserError
    from clips_data.schema import SHARDS

    if (folder / "index.json").is_file():
        return folder, folder.resolve().parent if folder.name in ("", "..") else folder.parent
    if (folder / SHARDS / "index.json").is_file():
        return folder / SHARDS, folder
    asked = f" {texts[0][:QUERY_CHARS]!r} is no folder, so it is a query." if len(texts) > 1 else ""
    raise UserError(
        f"{folder} holds no finished shards, and neither does {folder / SHARDS}.{asked} Name a folder that `clips "
        "shard` wrote, or its work folder with --work."
    )


# --- what is said -----------------------------------------------------------------------------------------------------


def _summary(found: Search) -> str:
    about = found.about
    return (
        f"search: {about['num_searched']} {about['searched']} of split {about['split']} in {about['shards']}, with "
        f"{about['model']}, {_WAYS[found.way]}"
    )


_WAYS: Final = {"exact": "all compared", "ivf": "through an index (some may be missed; --index exact compares all)"}


def _notes(found: Search) -> list[str]:
    total = sum(found.counts.values())
    missing = [f"{number} of {total} {reason}" for reason, number in found.counts.most_common() if reason != "ok"]
    left_out = [f"not searched: {', '.join(missing)}"] if missing else []
    return [*left_out, *found.store.notes]


def _print(found: Search, queries: Sequence[Query], answers: Sequence[Sequence[Hit]], *, as_json: bool) -> None:
    columns = _columns(found)
    several = len(queries) > 1
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for number, (query, hits) in enumerate(zip(queries, answers, strict=True)):
        if width is not None and several and not as_json:
            print(("\n" if number else "") + _plain(_name(query), width))
        for hit in hits:
            if as_json:
                print(_json_line(query, hit, columns))
            elif width is not None:
                print(_plain(f"{hit.rank:>4}  {hit.score:.4f}  {hit.key}  {_caption(hit, columns)}", width))
            else:
                cells = [str(hit.rank), f"{hit.score:.4f}", hit.key, _caption(hit, columns)]
                print("\t".join(_plain(cell, CAPTION_CHARS) for cell in ([_name(query)] if several else []) + cells))


def _columns(found: Search) -> list[str]:
    """In the order in which they are shown: the searched one first, the web's last."""
    columns = sorted(found.split.columns, key=lambda column: column == "web")
    searched = found.config.text
    return columns if searched is None else [searched, *(column for column in columns if column != searched)]


def _caption(hit: Hit, columns: Sequence[str]) -> str:
    return next(iter(hit.captions(columns).values()), "")


def _name(query: Query) -> str:
    text = query.text if len(query.text) <= QUERY_CHARS else query.text[:QUERY_CHARS] + "…"
    return " + ".join(filter(None, (text, query.image_name)))


def _plain(text: str, most_chars: int) -> str:
    """One line that steers no terminal, cut where it is too long."""
    line = text if len(text) <= most_chars else text[: most_chars - 1] + "…"
    return printable(re.sub(r"\s", " ", line))


def _json_line(query: Query, hit: Hit, columns: Sequence[str]) -> str:
    """All of it; what could steer a terminal is written as an escape of JSON, so nothing is lost."""
    about = {
        "query": query.text,
        "image": query.image_name or None,
        "rank": hit.rank,
        "score": round(hit.score, 6),
        "key": hit.key,
        "file": hit.file,
        "sha256": hit.about.get("sha256"),
        "url": _url(hit),
        "captions": hit.captions(columns),
    }
    line = json.dumps(about, ensure_ascii=False)
    return "".join(_escaped(one) if unicodedata.category(one) in _UNSAFE_IN_JSON else one for one in line)


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if character.isascii() else json.dumps(character)[1:-1]


def _url(hit: Hit) -> str | None:
    from clips_data.redact import redact

    provenance = hit.about.get("provenance")
    url = provenance.get("url") if isinstance(provenance, dict) else None
    return redact(url) if isinstance(url, str) else None


def _write_page(
    path: Path, found: Search, queries: Sequence[Query], answers: Sequence[Sequence[Hit]], notes: Sequence[str]
) -> None:
    from clips_data import ledger, search_page

    columns = _columns(found)

    def shown(hits: Sequence[Hit]) -> Iterator[search_page.Found]:
        for hit in hits:
            facts = [hit.file, *filter(None, [_url(hit)])]
            yield search_page.Found(hit.rank, hit.score, hit.key, found.image(hit), hit.captions(columns), facts)

    asked = [
        search_page.Asked(query.text, query.image, Path(query.image_name).name, list(shown(hits)))
        for query, hits in zip(queries, answers, strict=True)
    ]
    ledger.write_bytes(path, search_page.render(asked, found.about, notes).encode())
