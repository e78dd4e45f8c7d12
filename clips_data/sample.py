"""Tries a few URLs of a list before all of it: does DNS answer, what succeeds, how long will it take?

Most downloads with a low success rate fail at DNS, and that shows in a hundred rows. Nothing is stored.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clips_data import addresses, draws, fetch, images, sources
from clips_data.batches import file_rows, list_rows
from clips_data.config import DownloadConfig
from clips_data.decoder import Decoder
from clips_data.redact import host_of


@dataclass(frozen=True)
class Sample:
    """What became of ``num_rows`` rows of a list of ``list_rows``, asked by one process with the config's threads."""

    num_rows: int
    list_rows: int
    hosts: int
    hosts_resolved: int
    dns_ms_median: float
    counts: dict[str, int]
    urls_per_s: float
    image_bytes_mean: int
    """Mean stored bytes of those that succeeded."""

    @property
    def estimated_s(self) -> float:
        """Seconds for the whole list with one process."""
        return self.list_rows / self.urls_per_s

    @property
    def estimated_bytes(self) -> int:
        """Stored image bytes of the whole list."""
        return round(self.image_bytes_mean * self.counts.get("ok", 0) / max(1, self.num_rows) * self.list_rows)

    def lines(self) -> list[str]:
        """For people: counts with their denominators, and what a low DNS rate asks for."""
        others = ", ".join(f"{code} {number}" for code, number in self.counts.items() if code != "ok")
        good = f"{self.counts.get('ok', 0)} of {self.num_rows} succeeded" + (f" ({others})" if others else "")
        found = [
            f"sample of {self.num_rows} of {self.list_rows} URLs: {good}",
            f"DNS: {self.hosts_resolved} of {self.hosts} hosts resolved, median {self.dns_ms_median:.1f} ms",
            f"at {self.urls_per_s:.1f} URLs/s of one process the list takes {_duration(self.estimated_s)} and "
            f"{self.estimated_bytes / 1e6:,.1f} MB",
        ]
        if self.hosts_resolved < 0.9 * self.hosts:
            found.append(
                "Many hosts do not resolve: name resolvers of your own with --dns-servers, or lower --threads."
            )
        return found


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.1f} s"
    )


def measure(config: DownloadConfig, num_rows: int) -> Sample:
    """Fetches ``num_rows`` rows, drawn by their number in the list, as ``clips download`` would, and keeps nothing."""
    from clips_data.download import policy

    with tempfile.TemporaryDirectory() as folder:
        url_list = sources.locate(config, Path(folder))
        total = sum(file_rows(url_list))
        numbers = {draws.integer(total, 0, "plan_sample", 0, str(turn)) for turn in range(num_rows)} if total else set()
        urls = list_rows(url_list, sorted(numbers))
        with policy(config, Path(folder), 1) as rules:
            times_ms, resolved = _resolve({host_of(url) for url in urls} - {"", *rules.fixed_hosts}, rules)
            with Decoder(images.ImageSettings.of(config)) as decoder:
                started = time.monotonic()
                with ThreadPoolExecutor(config.threads) as threads:
                    results = list(threads.map(lambda url: fetch.fetch(url, rules), urls))
                outcomes = [_outcome(result, decoder) for result in results]
                seconds = time.monotonic() - started
    sizes = [num_bytes for code, num_bytes in outcomes if code == "ok"]
    return Sample(
        num_rows=len(urls),
        list_rows=total,
        hosts=len(times_ms),
        hosts_resolved=resolved,
        dns_ms_median=statistics.median(times_ms) if times_ms else 0.0,
        counts=dict(Counter(code for code, _ in outcomes).most_common()),
        urls_per_s=len(urls) / seconds,
        image_bytes_mean=round(statistics.mean(sizes)) if sizes else 0,
    )


def _outcome(result: fetch.Fetched, decoder: Decoder) -> tuple[str, int]:
    if result.code != "ok":
        return result.code, 0
    try:
        return "ok", len(decoder.check(result.body).data)
    except images.ImageRefused as refused:
        return refused.code, 0


def _resolve(hosts: set[str], rules: fetch.FetchPolicy) -> tuple[list[float], int]:
    """Milliseconds that each host's question took, and how many were answered."""

    def ask(host: str) -> tuple[float, bool]:
        started = time.monotonic()
        try:
            name = addresses.canonical_host(host)
            addresses.allowed_addresses(name, rules.allow_network, rules.dns_servers, started + rules.timeout_s)
            answered = True
        except addresses.Refused as refused:
            answered = refused.code != "dns"
        return (time.monotonic() - started) * 1000, answered

    with ThreadPoolExecutor(16) as threads:
        asked = list(threads.map(ask, sorted(hosts)))
    return [took for took, _ in asked], sum(answered for _, answered in asked)
