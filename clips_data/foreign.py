"""What one tar of somebody else's holds, as rows of ``pairs/``: img2dataset's with its table, or any webdataset tar.

Nothing is unpickled or extracted: images are checked by our decoder, captions and ``json`` members are read as text,
and what any other member holds is looked at by nobody.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import images, ledger, schema, tars
from clips_data.decoder import Decoder
from clips_data.errors import UserError
from clips_data.redact import host_of, redact, without_secrets

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SAMPLES: Final = 10**schema.KEY_DIGITS_IN_SHARD
IMAGES: Final = (*schema.IMAGE_EXTENSIONS, *schema.ADOPTED_EXTENSIONS)
# Columns of img2dataset's tables that ours have in a form of their own.
_THEIRS: Final = (
    "key", "status", "error_message", "width", "height", "original_width", "original_height", "sha256", "exif",
)  # fmt: skip
_CODES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), code)
    for pattern, code in (
        ("HTTP Error 3", "http_3xx"),
        ("HTTP Error 4", "http_4xx"),
        ("HTTP Error 5", "http_5xx"),
        ("unknown url type|control characters|nonnumeric port|no host given|ipv6 url|label too long", "bad_url"),
        ("timed? ?out", "timeout"),
        ("name or service not known|name resolution|getaddrinfo|nodename nor servname|no address assoc", "dns"),
        (r"\bssl|certificate", "tls"),
        ("X-Robots-Tag", "opt_out"),
        ("hash mismatch", "hash_mismatch"),
        ("image decoding error", "decode_failed"),
        ("image area too large", "too_many_pixels"),
        ("connection|refused|reset by|unreachable|no route|broken pipe|remote end|incompleteread", "connect"),
    )
)
"""img2dataset keeps the text of a Python exception and no kind of failure. The first pattern that is found counts."""


@dataclass(frozen=True)
class Foreign:
    """One of their tars, the name of its shard here, and the parquet file of its name where there is one."""

    unit: str
    tar: Path
    parquet: Path | None

    def inputs(self) -> dict[str, str]:
        """What tells, without reading the tar again, that it is still the one that was adopted."""
        found = {"tar": self.tar.name}
        for name, path in (("tar", self.tar), ("parquet", self.parquet)):
            if path is not None:
                about = path.stat()
                found |= {f"{name}_bytes": str(about.st_size), f"{name}_modified_ns": str(about.st_mtime_ns)}
        return found


@dataclass(frozen=True)
class Choices:
    """How their tars are to be read. ``ignore`` are extensions of members that may be there and are never read."""

    caption_ext: str
    caption_key: str | None
    max_pixels: int
    ignore: tuple[str, ...]

    @property
    def extensions(self) -> tuple[str, ...]:
        return (*tars.EXTENSIONS, *schema.ADOPTED_EXTENSIONS, self.caption_ext, *self.ignore)


@dataclass
class Content:
    """The rows of a tar. ``differences`` has for each kind the keys of the samples where tar and table disagree."""

    rows: list[dict[str, Any]]
    list_schema: pa.Schema
    differences: dict[str, list[str]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(row["code"] for row in self.rows))

    def differs(self, kind: str, key: str) -> None:
        self.differences.setdefault(kind, []).append(key)


def read(foreign: Foreign, choices: Choices) -> Content:
    """The rows of all samples, every image decoded once. Raises ``UserError`` for a tar or table that is not whole."""
    check(foreign, choices)
    listed = _img2dataset_table(foreign.parquet)
    content = Content([], _list_schema(listed))
    with Decoder(images.ImageSettings(max_pixels=choices.max_pixels)) as decoder:
        samples = tars.read_samples(foreign.tar, extensions=choices.extensions)
        found = {sample.key: _look(sample, choices, decoder, content) for sample in samples}
    if listed is not None:
        _check_count(foreign, listed.num_rows, content)
        for theirs in listed.to_pylist():
            content.rows.append(_listed_row(theirs, found.pop(theirs["key"], None), content))
        for key in found:
            content.differs("images without a row in img2dataset's table", key)
    elif foreign.parquet is not None:
        content.differs("parquet files that are not img2dataset's were not read", foreign.parquet.name)
    content.rows += [_plain_row(key, about) for key, about in found.items()]
    if len(content.rows) > MAX_SAMPLES:
        raise UserError(_too_many(foreign, len(content.rows)))
    for place, row in enumerate(content.rows):
        row["key"] = schema.sample_key(int(foreign.unit), place)
    return content


def check(foreign: Foreign, choices: Choices) -> int:
    """Walks the headers of a tar and returns its number of samples. Raises ``UserError`` as ``read`` does."""
    images_of = Counter[str]()
    keys = set()
    for member in tars.read_members(foreign.tar, extensions=choices.extensions):
        keys.add(member.key)
        images_of[member.key] += member.ext in IMAGES
        if images_of[member.key] > 1:
            raise UserError(
                f"{foreign.tar} is not a usable shard: at byte {member.offset - tars.BLOCK_BYTES} sample "
                f"{member.key!r} has a second image, and a pair has one. Repack the tar with one image a sample."
            )
    if len(keys) > MAX_SAMPLES:
        raise UserError(_too_many(foreign, len(keys)))
    return len(keys)


def code_of(message: str) -> str:
    """Our code for one of img2dataset's error messages."""
    return next((code for pattern, code in _CODES if pattern.search(message)), "internal")


def _too_many(foreign: Foreign, num_samples: int) -> str:
    return (
        f"{foreign.tar} holds {num_samples} samples, and a shard has at most {MAX_SAMPLES}. "
        "Repack it into smaller tars."
    )


def _img2dataset_table(parquet: Path | None) -> pa.Table | None:
    """The table beside the tar, ``None`` where there is none or where it is somebody else's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if parquet is None:
        return None
    try:
        with pq.ParquetFile(parquet) as file:
            table = file.read()
            table.validate(full=True)  # texts may hold bytes that are none
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{parquet} cannot be read ({str(error).splitlines()[0]}), so img2dataset was stopped in this shard. "
            "Run img2dataset again, or remove the shard's files."
        ) from None
    if not {"key", "status", "error_message"} <= set(table.column_names):
        return None
    keys = table["key"].to_pylist()
    wrong = next((row for row, key in enumerate(keys) if not isinstance(key, str)), None)
    if wrong is not None:
        raise UserError(f"{parquet} row {wrong} has key {keys[wrong]!r}, which is no text. Make this shard again.")
    if len(set(keys)) < len(keys):
        twice = next(key for key, number in Counter(keys).items() if number > 1)
        raise UserError(f"{parquet} has key {twice!r} more than once. Make this shard again.")
    return table


def _list_schema(listed: pa.Table | None) -> pa.Schema:
    """The columns that their list had, with the names that they have here; ``url`` and ``caption`` are always there."""
    import pyarrow as pa

    fields = {} if listed is None else {_our_name(field.name): field for field in listed.schema}
    fields = {name: field.with_name(name) for name, field in fields.items() if field.name not in _THEIRS}
    return pa.schema(({name: pa.field(name, pa.string()) for name in ("url", "caption")} | fields).values())


def _our_name(name: str) -> str:
    """Columns of their list may not be taken for ours."""
    return f"source_{name}" if name in schema.PAIR_COLUMNS else name


def _check_count(foreign: Foreign, num_rows: int, content: Content) -> None:
    """img2dataset drops rows that it fails to write, and only its statistics still count them."""
    stats = foreign.tar.with_name(f"{foreign.tar.stem}_stats.json")
    if not stats.exists():
        return
    try:
        count = json.loads(stats.read_text())["count"]
    except (ValueError, KeyError, TypeError, RecursionError):
        content.differs("unreadable _stats.json", stats.name)
        return
    if count != num_rows:
        content.differs("tables with another number of rows than _stats.json", f"({count} URLs, {num_rows} rows)")


def _look(sample: tars.Sample, choices: Choices, decoder: Decoder, content: Content) -> dict[str, Any]:
    """What the members of a sample say: caption and URL, and the image's size and hash or why it is refused."""
    about = {**_said(sample, choices, content), "status": "failed_to_resize"}
    ext = next((ext for ext in IMAGES if ext in sample.members), None)
    if ext is None:
        return about | {"status": "failed_to_download", "code": "not_an_image", "error_message": "no image member"}
    data = sample.members[ext]
    try:
        image = decoder.check(data)
    except images.ImageRefused as error:
        return about | {"code": error.code, "error_message": error.detail}
    if image.data != data:
        detail = "only JPEG, PNG and WebP can be kept where they are"
        return about | {"code": "not_an_image", "error_message": detail}
    return about | {
        "status": schema.STATUS_SUCCESS,
        "code": "ok",
        "width": image.width_px,
        "height": image.height_px,
        "orientation": image.orientation,
        "sha256": ledger.digest_bytes(data),
        "bytes": len(data),
        "image_ext": image.extension,
    }


def _said(sample: tars.Sample, choices: Choices, content: Content) -> dict[str, Any]:
    caption = sample.members.get(choices.caption_ext)
    text = None if caption is None else caption.decode(errors="replace")
    about = {}
    if "json" in sample.members:
        try:
            about = json.loads(sample.members["json"])
        except (ValueError, RecursionError):
            content.differs("unreadable json members", sample.key)
    values = about if isinstance(about, dict) else {}
    if choices.caption_key is not None:
        text = _text(values.get(choices.caption_key))
        if text is None:
            content.differs(f"samples without a text {choices.caption_key!r} in their json", sample.key)
    return {"caption": text, "url": _text(values.get("url"))}


def _text(value: Any) -> str | None:
    """A text; half a surrogate pair, which JSON can spell and no text can hold, becomes a replacement character."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else None


def _plain_row(key: str, about: Mapping[str, Any]) -> dict[str, Any]:
    url = about["url"]
    places = {"url": None if url is None else redact(url), "host": host_of(url) if url else None}
    return {**dict.fromkeys(schema.PAIR_COLUMNS), **about, **places, "source_key": key}


def _listed_row(theirs: Mapping[str, Any], found: Mapping[str, Any] | None, content: Content) -> dict[str, Any]:
    """A row of img2dataset's table with what its tar holds; where they disagree, the tar is right."""
    key, success = theirs["key"], theirs["status"] == schema.STATUS_SUCCESS
    listed = {_our_name(name): without_secrets(value) for name, value in theirs.items() if name not in _THEIRS}
    if found is None:
        if success:
            content.differs("rows that say success without a sample in the tar", key)
        found = _absent(theirs, success)
    elif not success:
        content.differs("samples whose row says that they failed", key)
    row = {**_plain_row(key, {"url": None, "caption": None, **found, **listed}), "source_key": key}
    if row["code"] == "ok":
        row |= {name: theirs.get(name) for name in ("original_width", "original_height")}
        row["raw_sha256"] = theirs.get("sha256")
    return row


def _absent(theirs: Mapping[str, Any], success: bool) -> dict[str, Any]:
    if success:
        return {"status": "failed_to_download", "code": "internal", "error_message": "the tar lacks this sample"}
    message = theirs["error_message"] or "no reason given"
    own = theirs.get("code")  # pairs that clips made
    code = own if own in schema.DOWNLOAD_CODES else code_of(message)
    if code == "bad_url":  # Python's message quotes the URL, in pieces
        message = "not a URL that can be fetched"
    status = theirs["status"] if theirs["status"] in schema.STATUSES else "failed_to_download"
    return {"status": status, "code": code, "error_message": _without_secrets(message)}


def _without_secrets(message: str) -> str:
    return re.sub(r"\w+://[^\s'\">]+", lambda url: redact(url[0]), message)
