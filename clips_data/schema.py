"""Names, folders and closed lists that all stages agree on. Standard library only."""

from __future__ import annotations

from typing import Any, Final

SCHEMA_VERSION: Final = 1
"""Version of every file that clips writes. Readers accept this version and name it when they meet another one."""

SHARD_DIGITS: Final = 5
KEY_DIGITS_IN_SHARD: Final = 4
"""A key is the shard number followed by the row in the shard, so a shard holds at most 10**4 rows."""

IMAGE_EXTENSIONS: Final = ("jpg", "png", "webp")
ADOPTED_EXTENSIONS: Final = ("jpeg",)
"""Further extensions that images have in tars of others."""

# Folders under --work, left to right. A stage reads only folders to its left.
PAIRS, CAPTIONS, SCORES, SHARDS, EMBEDDINGS, RUNS = "pairs", "captions", "scores", "shards", "embeddings", "runs"

COMPARE: Final = "compare"
"""What recipes said about the same images; no stage reads it."""

SEARCH: Final = "search"
"""Features of shards that queries are held against; no stage reads it."""

STATUS_SUCCESS: Final = "success"
STATUSES: Final = (STATUS_SUCCESS, "failed_to_download", "failed_to_resize")
"""img2dataset's own three values, kept so that its users' scripts read our tables."""

DOWNLOAD_CODES: Final = (
    "ok", "dns", "connect", "tls", "timeout", "http_3xx", "http_4xx", "http_5xx", "opt_out", "blocked_address",
    "bad_url", "too_large", "not_an_image", "too_many_pixels", "decode_failed", "hash_mismatch", "duplicate",
    "forgotten", "internal",
)  # fmt: skip
PAIR_COLUMNS: Final[dict[str, str]] = {
    "key": "string", "status": "string", "code": "string", "error_message": "string",
    "width": "int32", "height": "int32", "original_width": "int32", "original_height": "int32",
    "sha256": "string", "raw_sha256": "string", "image_ext": "string", "bytes": "int64", "orientation": "int32",
    "phash": "string", "host": "string", "final_url": "string", "attempts": "int32", "evidence": "string",
    "retry_of": "string", "duplicate_of": "string", "source_key": "string",
}  # fmt: skip
"""What a row of ``pairs/*.parquet`` has beside the columns of the list, with Arrow's names of the types.

``width`` and ``height`` are of the stored image, ``original_*`` of the downloaded one. ``orientation`` is the EXIF
value where stored bytes still need it (1 is upright). ``evidence`` is the header or robots.txt line that a refusal
rests on. ``retry_of`` is the key of the row that a later attempt repeats, ``duplicate_of`` that of the row whose URL
this one repeats, ``source_key`` the key that an adopted sample has in its own tar. All but the first three may be null.
"""
CAPTION_CODES: Final = (
    "ok", "refused", "empty", "loop", "echo", "wrong_language", "bad_shape", "no_input", "duplicate",
    "unreadable_image", "prompt_too_long", "engine_error", "engine_died",
)  # fmt: skip
"""What became of a caption. ``bad_shape`` is an answer without the promised JSON shape, ``no_input`` a prompt whose
text column is empty, ``duplicate`` an image that repeats an earlier one and was not captioned again."""
REJECTED_CAPTION_CODES: Final = tuple(code for code in CAPTION_CODES if code != "ok")
"""Rows with one of these codes have no usable caption; ``shard`` falls back to the web caption."""


def shard_name(number: int) -> str:
    """``7`` → ``"00007"``."""
    return f"{number:0{SHARD_DIGITS}d}"


def sample_key(shard: int, row: int) -> str:
    """Fixed-width digits, unique in a data set, never with a dot (webdataset cuts names at the first one)."""
    return f"{shard:0{SHARD_DIGITS}d}{row:0{KEY_DIGITS_IN_SHARD}d}"


def caption_metadata(**about: Any) -> dict[str, str]:
    """The file metadata of a caption table: who made these captions, and how. All values become JSON text."""
    import json

    required = {"model", "model_revision", "engine", "engine_version", "prompt", "prompt_digest", "sampling", "seed"}
    assert required == set(about), required ^ set(about)
    return {
        "clips_schema_version": str(SCHEMA_VERSION),
        **{key: json.dumps(about[key], sort_keys=True) for key in sorted(about)},
    }
