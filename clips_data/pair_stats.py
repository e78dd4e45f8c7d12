"""What became of a URL list, and what the images and web captions that it gave are like. Reads tables, no images."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import draws, duplicates, languages, measure, schema

if TYPE_CHECKING:
    import polars as pl

TOP_HOSTS: Final = 20
HOSTS_OF_A_FAILURE: Final = 2
NOT_ASKED: Final = ("duplicate", "forgotten")
"""Codes of rows that nobody was asked for; they count neither as attempts nor as failures."""
LANGUAGE_CAPTIONS: Final = 2000
_LANGUAGE_SHARDS: Final = 20
_FIRST_YEAR: Final = 1995
_UNKNOWN: Final = "unknown"
_NO_HOST: Final = "(no host)"
_TEXTS: Final = (
    "url", "caption", "key", "status", "code", "sha256", "phash", "image_ext", "host", "retry_of",
)  # fmt: skip
_NUMBERS: Final = ("width", "height", "bytes", "orientation")


def gather(pairs: Path, units: Sequence[str], top: int = TOP_HOSTS) -> dict[str, Any]:
    """Everything about these shards of ``pairs``, ready for JSON.

    ``rows`` are all rows, ``attempted`` those whose URL was asked for, tries again included; ``urls`` are different
    URLs. In ``after_retries`` a later try stands for the row that it repeats. ``by_year`` goes by the year in the URL's
    path (``/2014/05/…``), ``unknown`` where there is none from 1995 to today. Sizes are those of the stored images,
    ``aspect_ratio`` is longer by shorter side. ``languages`` are of a sample drawn by key.
    """
    import polars as pl

    rows = _scan(pairs, units)
    asked, good = _asked(rows), rows.filter(pl.col("status") == schema.STATUS_SUCCESS)
    outcomes = _outcomes(measure.counts(pairs, rows, pl.col("code")))
    same = duplicates.count(pairs, units)
    texts = _captions(pairs, units, good)
    bands = {
        **measure.banded_share("success_share", outcomes["succeeded"], outcomes["attempted"]),
        **measure.banded_mean("web_caption_words_mean", texts["web_caption_words"]),
    }
    return {
        **outcomes,
        "shards": len(units),
        "urls": same["urls"] - same["duplicate_urls"],
        "after_retries": _after_retries(pairs, rows),
        "bands": bands,
        "hash_mismatches": {"of": outcomes["attempted"], "num": outcomes["failures"].get("hash_mismatch", 0)},
        "by_host": _by_host(pairs, asked, top),
        "by_year": _by_year(pairs, asked),
        **_images(pairs, good),
        "different_images": same["images"] - same["duplicate_images"],
        "duplicates": _duplicates(pairs, good, same),
        **texts,
    }


def failures_table(
    pairs: Path, units: Sequence[str], top: int = 5, hosts: int = HOSTS_OF_A_FAILURE
) -> list[dict[str, Any]]:
    """The ``top`` failure codes of these shards, most frequent first, each with the hosts that it came from most.

    ``code, rows, attempted`` and ``hosts`` with ``host, rows, attempted``; attempts of a code are those of all shards.
    """
    import polars as pl

    groups = _host_codes(pairs, _asked(_scan(pairs, units)))
    attempted = groups["len"].sum()
    of_host = dict(groups.group_by("host").agg(pl.col("len").sum()).iter_rows())
    failed = groups.filter(pl.col("code") != "ok")
    codes = failed.group_by("code").agg(pl.col("len").sum()).sort(["len", "code"], descending=[True, False])
    table = []
    for code, rows in codes.head(top).iter_rows():
        of_code = failed.filter(pl.col("code") == code).sort(["len", "host"], descending=[True, False]).head(hosts)
        places = [
            {"host": host, "rows": number, "attempted": of_host[host]}
            for host, number in of_code.select("host", "len").iter_rows()
        ]
        table.append({"code": code, "rows": rows, "attempted": attempted, "hosts": places})
    return table


def failure_lines(pairs: Path, units: Sequence[str], top: int = 5) -> list[str]:
    """``failures_table`` for people, at most ``3 * top + 2`` lines; none where nothing failed."""
    table = failures_table(pairs, units, len(schema.DOWNLOAD_CODES))
    if not table:
        return []
    attempted = table[0]["attempted"]
    failed = sum(row["rows"] for row in table)
    width = len(str(table[0]["rows"]))
    lines = [f"failures by code and host: {failed} of {attempted} URLs"]
    for row in table[:top]:
        lines.append(f"  {row['rows']:>{width}} {row['code']} ({100 * row['rows'] / attempted:.1f} %)")
        lines += [f"  {'':{width}}   {at['rows']} of {at['attempted']} at {at['host']}" for at in row["hosts"]]
    if rest := table[top:]:
        lines.append(f"  {sum(row['rows'] for row in rest)} with other codes: {', '.join(row['code'] for row in rest)}")
    return lines


# --- outcomes ---------------------------------------------------------------------------------------------------------


def _scan(pairs: Path, units: Sequence[str]) -> pl.LazyFrame:
    import polars as pl

    return measure.scan(pairs, units, dict.fromkeys(_TEXTS, pl.String) | dict.fromkeys(_NUMBERS, pl.Int64))


def _asked(rows: pl.LazyFrame) -> pl.LazyFrame:
    import polars as pl

    return rows.filter(~pl.col("code").is_in(NOT_ASKED))


def _outcomes(codes: dict[str, int]) -> dict[str, Any]:
    not_asked = {code: number for code, number in codes.items() if code in NOT_ASKED}
    found = {
        "rows": sum(codes.values()),
        "attempted": sum(codes.values()) - sum(not_asked.values()),
        "succeeded": codes.get("ok", 0),
        "failures": {code: number for code, number in codes.items() if code not in ("ok", *NOT_ASKED)},
    }
    return found | {"not_asked": not_asked} if not_asked else found


def _host_codes(pairs: Path, asked: pl.LazyFrame) -> pl.DataFrame:
    """``host``, ``code`` and their number of rows (``len``). A host stands in its column or else in the URL."""
    import polars as pl

    from_url = pl.col("url").str.extract(r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?(\[[^\]]*\]|[^/:?#]+)")
    known = pl.col("host").is_not_null() & (pl.col("host") != "")
    # Two branches, because reading hosts out of URLs is slow and new tables have them.
    unnamed = asked.filter(~known).with_columns(from_url.str.to_lowercase().fill_null(_NO_HOST).alias("host"))
    hosts = pl.concat([asked.filter(known), unnamed]).select("code", pl.col("host").str.replace_all(r"\p{C}", "�"))
    return measure.collect(pairs, hosts.group_by("host", "code").len())[0]


def _after_retries(pairs: Path, rows: pl.LazyFrame) -> dict[str, Any]:
    """Outcomes with one row a URL of a list: its latest try's. Tries again name the first one, and keys grow."""
    import polars as pl

    tries = rows.filter(pl.col("retry_of").is_not_null()).select("key", "code", pl.col("retry_of").alias("first"))
    latest = tries.group_by("first").agg(pl.col("code").sort_by("key").last().alias("later"))
    first = rows.filter(pl.col("retry_of").is_null()).select("key", "code")
    replaced = first.join(latest, left_on="key", right_on="first").group_by("code", "later").len()
    codes = Counter(measure.counts(pairs, first, pl.col("code")))
    retried = 0
    for code, later, number in measure.collect(pairs, replaced)[0].iter_rows():
        codes[code] -= number
        codes[later] += number
        retried += number
    found = _outcomes(measure.by_number(+codes))
    return {"retried": retried, **{name: found[name] for name in ("attempted", "succeeded", "failures")}}


def _by_host(pairs: Path, asked: pl.LazyFrame, top: int) -> dict[str, Any]:
    import polars as pl

    groups = _host_codes(pairs, asked)
    totals = _totals(groups, "host").sort(["attempted", "host"], descending=[True, False])
    worst = groups.filter(pl.col("code") != "ok").sort(["len", "code"], descending=[True, False])
    worst = worst.group_by("host", maintain_order=True).first()
    shown = totals.head(top).join(worst, on="host", how="left", maintain_order="left")
    names = {"code": "main_failure", "len": "main_failure_rows"}
    return {"hosts": len(totals), "top": shown.rename(names).to_dicts()}


def _by_year(pairs: Path, asked: pl.LazyFrame) -> list[dict[str, Any]]:
    import polars as pl

    years = "|".join(str(year) for year in range(_FIRST_YEAR, datetime.date.today().year + 1))
    # A part of the path that is a year, or begins with a year and a month; the first one counts.
    pattern = rf"^[^/?#]*//[^/?#]*(?:/[^/?#]*)*?/({years})(?:/|-\d\d?[-/])"
    year = pl.col("url").str.extract(pattern).fill_null(_UNKNOWN)
    (groups,) = measure.collect(pairs, asked.group_by(year.alias("year"), "code").len())
    return _totals(groups, "year").sort("year").to_dicts()


def _totals(groups: pl.DataFrame, name: str) -> pl.DataFrame:
    import polars as pl

    ok = pl.col("len").filter(pl.col("code") == "ok").sum()
    totals = groups.group_by(name).agg(pl.col("len").sum().alias("attempted"), ok.alias("succeeded"))
    percent = (100 * pl.col("succeeded") / pl.col("attempted")).round(1)
    return totals.with_columns(percent.alias("succeeded_percent"))


# --- images and captions ----------------------------------------------------------------------------------------------


def _images(pairs: Path, good: pl.LazyFrame) -> dict[str, Any]:
    import polars as pl

    width, height = pl.col("width"), pl.col("height")
    shorter, longer = pl.min_horizontal("width", "height"), pl.max_horizontal("width", "height")
    sizes = {
        "bytes_per_image": pl.col("bytes"),
        "megapixels": width * height / 1e6,
        "shorter_side_px": shorter,
        "aspect_ratio": pl.when(shorter > 0).then(longer / shorter),
    }
    (total,) = measure.collect(pairs, good.select(pl.col("bytes").sum()))
    return {
        "image_bytes": int(total.item() or 0),
        **measure.spreads(pairs, good, sizes),
        "formats": measure.counts(pairs, good, pl.col("image_ext")),
        "orientations": measure.counts(pairs, good, pl.col("orientation"), null="not_recorded"),
    }


def _duplicates(pairs: Path, good: pl.LazyFrame, same: dict[str, int]) -> dict[str, Any]:
    with_phash, different_phash = measure.num_different(pairs, good, "phash")
    by_phash = {"images_with_phash": with_phash, "duplicate_images_by_phash": with_phash - different_phash}
    return same | (by_phash if with_phash else {})


def _captions(pairs: Path, units: Sequence[str], good: pl.LazyFrame) -> dict[str, Any]:
    import polars as pl

    captioned = good.select("key", pl.col("caption").str.strip_chars()).filter(pl.col("caption") != "")
    measures = {
        "web_caption_words": pl.col("caption").str.count_matches(r"\S+"),
        "web_caption_characters": pl.col("caption").str.len_chars(),
    }
    sample = _sampled_captions(pairs, units)
    about = {"sampled": len(sample), "by_language": languages.count(sample)} if sample else {}
    return {**measure.spreads(pairs, captioned, measures), "languages": about}


def _sampled_captions(pairs: Path, units: Sequence[str]) -> list[str]:
    """Captions of successful rows: from the shards with the lowest draws, those of the rows with the lowest draws."""
    import polars as pl

    chosen = sorted(units, key=lambda unit: draws.uniform(0, "language_shards", 0, unit))[:_LANGUAGE_SHARDS]
    sample: list[str] = []
    for unit in sorted(chosen):
        table = measure.scan(pairs, [unit], dict.fromkeys(("key", "caption", "status"), pl.String))
        filled = (pl.col("status") == schema.STATUS_SUCCESS) & (pl.col("caption").str.strip_chars() != "")
        (rows,) = measure.collect(pairs, table.filter(filled).select("key", "caption"))
        drawn = sorted(rows.iter_rows(), key=lambda row: draws.uniform(0, "language_rows", 0, row[0]))
        sample += [caption for _, caption in drawn[: LANGUAGE_CAPTIONS // len(chosen)]]
    return sample
