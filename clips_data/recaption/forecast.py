"""What captioning will cost, before it is paid: a sample is captioned at the run's own pace, and the rest projected.

The sample's rows go through the engine again and again until it has worked at full load for a while, because the first
captions of a run come slower than the others, and a handful says nothing about the pace of a full batch.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import ledger
from clips_data.config import RecaptionConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_data.recaption import prompts, replica, rows
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, Request
from clips_data.recaption.rows import Item
from clips_data.recaption.run import prepare

LOADED_S: Final = 10.0
"""Seconds under full load that are measured."""
LONGEST_S: Final = 120.0
BLOCKS: Final = 10
T_OF_BLOCKS: Final = 2.26
"""Student's t for a 95 % interval of the mean of ten."""
LEAST_BURSTS: Final = 4
DRIFT: Final = 0.15
"""How far the pace of a later run lies from a short trial beside what the trial's own spread tells, as a share."""


@dataclass(frozen=True)
class Forecast:
    """A trial of ``num_rows`` rows, and what it says about the ``num_left`` captions that are still to be made.

    ``captions_per_s`` is of one replica: least, likeliest, most. ``startup_s`` and ``ramp_s`` (until the first answer)
    come once per replica.
    """

    engine: str
    device: str
    num_gpus: int
    num_rows: int
    codes: dict[str, int]
    num_left: int
    startup_s: float
    ramp_s: float
    captions_per_s: tuple[float, float, float]
    tokens_per_s: float
    tokens_mean: float
    tokens_p95: int
    cap: int
    num_hit_cap: int

    def seconds(self, num_replicas: int = 1) -> tuple[float, float, float]:
        """Wall time with so many replicas: least, likeliest, most."""
        slow, likely, fast = self.captions_per_s
        share = self.num_left / num_replicas
        if not self.num_left:
            return 0.0, 0.0, 0.0
        once = self.startup_s
        return (
            once * (1 - DRIFT) + share / fast,
            once + share / likely + self.ramp_s / 2,
            once * (1 + DRIFT) + share / slow + self.ramp_s,
        )

    def hours(self, num_replicas: int = 1) -> tuple[float, float, float]:
        """GPU-hours, or hours of replicas where there is no GPU."""
        least, likely, most = (seconds * num_replicas / 3600 for seconds in self.seconds(num_replicas))
        return least, likely, most

    def lines(self, num_replicas: int = 1, price: float | None = None) -> list[str]:
        """For people: counts with their denominators, the projection with its interval."""
        slow, likely, fast = self.captions_per_s
        asked = sum(self.codes.values())
        others = ", ".join(f"{number} {code}" for code, number in self.codes.items() if code != "ok")
        unit = "GPU-hours" if self.num_gpus else "replica-hours (no GPU here)"
        least, middle, most = self.seconds(num_replicas)
        found = [
            f"recaption: sample of {self.num_rows} rows with {self.engine} on {self.device}: "
            f"{self.codes.get('ok', 0)} of {asked} captions ok" + (f" ({others})" if others else ""),
            f"{likely:.1f} captions/s ({slow:.1f} to {fast:.1f}) and {self.tokens_per_s:.0f} tokens/s of one replica, "
            f"{self.tokens_mean:.0f} tokens a caption (95 % within {self.tokens_p95}), "
            f"{self.num_hit_cap} of {asked} hit the cap of {self.cap}",
            f"{self.num_left} captions to make take {_time(middle)} ({_time(least)} to {_time(most)}) on "
            f"{num_replicas} {'GPU' if self.num_gpus else 'replica'}{'s' if num_replicas > 1 else ''}, "
            f"{self.startup_s:.0f} s of it to start: " + _range(self.hours(num_replicas), "") + f" {unit}",
        ]
        if price is not None:
            cost = [price * hours for hours in self.hours(num_replicas)]
            found[-1] += f", {_range((cost[0], cost[1], cost[2]), '$')} at ${price:g} an hour"
        return found

    def as_dict(self, num_replicas: int = 1, price: float | None = None) -> dict[str, Any]:
        hours = self.hours(num_replicas)
        return {
            **self.__dict__,
            "num_replicas": num_replicas,
            "seconds": self.seconds(num_replicas),
            "hours": hours,
            "cost": [price * value for value in hours] if price is not None else None,
        }


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _range(values: tuple[float, float, float], sign: str) -> str:
    least, likely, most = (f"{sign}{value:.3g}" for value in values)
    return f"{likely} ({least} to {most})"


def measure(config: RecaptionConfig, job: Job, num_rows: int) -> Forecast:
    """Captions ``num_rows`` drawn rows as ``clips recaption`` would, writes nothing, and projects what is left to do.

    Raises ``UserError`` when an input is missing or the engine does not start.
    """
    prompt = prompts.load(config.prompt)
    work, units = prepare(config, prompt, job)
    num_left = sum(_left(work, unit) for unit in units)
    sample = rows.sample_rows(job.work, prompt, num_rows, seed=config.seed, scores=config.scores)
    if not sample:
        raise UserError(f"{work.pairs} has no successful pair to try. Look at its code column.")
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineProcess(work.build, log=Path(folder) / "engine.log", deadline_s=work.batch_deadline_s)
        engine.start()
        try:
            return _measure(work, engine, sample, num_left)
        finally:
            engine.close()


def _left(work: replica.Work, unit: str) -> int:
    """Captions of a shard that are neither committed nor in its journal."""
    finished = all(ledger.read_sidecar(folder, unit, check_files=False) for folder in work.folders.values())
    if finished:
        return 0
    sidecar = ledger.read_sidecar(work.pairs, unit)
    assert sidecar is not None
    journal = work.journal(unit)
    done = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
    images = sidecar.counts.get("ok", 0) - len(work.left_out.get(unit, ()))
    return max(0, images * work.prompt.sampling.num_samples - done)


def _measure(work: replica.Work, engine: EngineProcess, sample: list[rows.Row], num_left: int) -> Forecast:
    recipe = work.recipe(engine.about["special_tokens"])
    items = [item for row in sample for item in recipe.items(row)]
    asked = [item for item in items if item.request is not None]
    answers: dict[tuple[str, int], Answer] = {
        (item.key, item.sample): item.answer for item in items if item.answer is not None
    }
    landed: list[tuple[float, int]] = []
    begun = time.monotonic()

    def again() -> Iterator[tuple[Item, Request]]:
        """The sample over and over; once only where the engine would know an image again from its earlier samples."""
        for item in itertools.cycle(asked) if work.prompt.sampling.num_samples == 1 else asked:
            assert item.request is not None
            yield item, item.request

    loaded_from = 0.0
    for item, answer in engine.stream(again() if asked else ()):
        now = time.monotonic()
        landed.append((now, answer.num_tokens))
        answers.setdefault((item.key, item.sample), answer)
        if not loaded_from and len(landed) >= engine.about["capacity"] // 2:
            loaded_from = now
        complete = len(answers) == len(items)
        enough = complete and loaded_from and now - loaded_from > LOADED_S
        if now - begun > LONGEST_S or (enough and len(_ends_of_bursts(landed, loaded_from)) >= LEAST_BURSTS):
            break
    share_asked = len(asked) / len(items)
    return _project(work, engine, recipe, items, answers, landed, begun, loaded_from, round(num_left * share_asked))


def _project(
    work: replica.Work,
    engine: EngineProcess,
    recipe: rows.Recipe,
    items: list[Item],
    answers: dict[tuple[str, int], Answer],
    landed: list[tuple[float, int]],
    begun: float,
    loaded_from: float,
    num_left: int,
) -> Forecast:
    said = [(item, answers[item.key, item.sample]) for item in items if (item.key, item.sample) in answers]
    lines = [recipe.line(item, answer, work.engine) for item, answer in said]
    codes = Counter(row["code"] for line in lines for row in recipe.column_rows(line).values())
    tokens = sorted(answer.num_tokens for item, answer in said if item.request is not None) or [0]
    rate, spread = _rate(landed, loaded_from or begun)
    mean = statistics.mean(tokens)
    lengths = 2 * statistics.stdev(tokens) / math.sqrt(len(tokens)) / mean if len(tokens) > 1 and mean else 0.0
    width = min(0.8, math.hypot(spread, lengths, DRIFT))
    about = engine.about
    return Forecast(
        engine=f"{work.engine} {about['engine_version']}",
        device=about["device"],
        num_gpus=about.get("num_gpus", 0),
        num_rows=len({item.key for item, _ in said}),
        codes=dict(codes.most_common()),
        num_left=num_left,
        startup_s=engine.startup_s,
        ramp_s=landed[0][0] - begun if landed else 0.0,
        captions_per_s=(rate * (1 - width), rate, rate * (1 + width)),
        tokens_per_s=rate * mean,
        tokens_mean=mean,
        tokens_p95=tokens[min(len(tokens) - 1, int(0.95 * len(tokens)))],
        cap=work.prompt.sampling.max_tokens,
        num_hit_cap=sum(answer.finish_reason == "length" for _, answer in said),
    )


def _ends_of_bursts(landed: list[tuple[float, int]], since: float) -> list[int]:
    """Places of the answers after which none came for longer than usual, as at the end of an engine's batch.

    What lies between two of them was begun and ended within the time between them.
    """
    first = next((place for place, (moment, _) in enumerate(landed) if moment >= since), len(landed))
    gaps = [(place, landed[place + 1][0] - landed[place][0]) for place in range(first, len(landed) - 1)]
    usual = statistics.mean(gap for _, gap in gaps) if gaps else 0.0
    return [place for place, gap in gaps if gap >= usual]


def _rate(landed: list[tuple[float, int]], since: float) -> tuple[float, float]:
    """Answers per second, and the half-width of its 95 % interval as a share.

    Counted from the end of one burst to that of another. The width comes from the spread among ten blocks of time or,
    where there are few bursts, among these; too few to tell are half a width.
    """
    ends = _ends_of_bursts(landed, since)
    if len(ends) < 2:
        seconds = landed[-1][0] - since if landed else 0.0
        return (len(landed) / seconds if seconds > 0 else float(len(landed))), 0.5
    moments = [moment for moment, _ in landed[ends[0] : ends[-1] + 1]]
    rate = (len(moments) - 1) / (moments[-1] - moments[0])
    if len(ends) > 2 * BLOCKS:
        edges = [moments[0] + (moments[-1] - moments[0]) * number / BLOCKS for number in range(BLOCKS + 1)]
        rates = [float(sum(low < moment <= high for moment in moments)) for low, high in itertools.pairwise(edges)]
    else:
        rates = [(last - first) / (landed[last][0] - landed[first][0]) for first, last in itertools.pairwise(ends)]
    if len(rates) < LEAST_BURSTS - 1:
        return rate, 0.5
    return rate, T_OF_BLOCKS * statistics.stdev(rates) / math.sqrt(len(rates)) / statistics.mean(rates)
