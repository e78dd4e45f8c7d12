"""The trial before captioning: what it tells, and that the projection follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import captionmaker
import pairsmaker
import pytest
from captionmaker import BuildEcho

from clips_data import ledger
from clips_data.config import RecaptionConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_data.recaption import forecast
from clips_data.recaption import run as recaption
from clips_data.recaption.forecast import Forecast

SHARDS, ROWS, GOOD = 3, 6, 15
TRIED: dict[str, Any] = {
    "engine": "vllm 1", "device": "NVIDIA", "num_gpus": 1, "num_rows": 64, "codes": {"ok": 60, "loop": 4},
    "num_left": 36_000, "startup_s": 60.0, "ramp_s": 4.0, "captions_per_s": (8.0, 10.0, 12.0), "tokens_per_s": 500.0,
    "tokens_mean": 50.0, "tokens_p95": 80, "cap": 128, "num_hit_cap": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(forecast, "LOADED_S", 0.5)
    undo = captionmaker.install(BuildEcho(max_batch_rows=4, delay_s=0.01))
    yield
    undo()


def work_with_prompt(folder: Path, text: str = "user: Describe.\n") -> RecaptionConfig:
    pairsmaker.write_pairs(folder, num_shards=SHARDS, shard_rows=ROWS)
    (folder / "p.yaml").write_text(text)
    return RecaptionConfig(prompt=str(folder / "p.yaml"))


def test_a_trial_writes_nothing_and_counts_what_is_left(tmp_path: Path) -> None:
    config = work_with_prompt(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = forecast.measure(config, Job(work=tmp_path), 8)
    assert sorted(tmp_path.rglob("*")) == before
    assert (said.num_rows, said.codes, said.num_left, said.num_hit_cap) == (8, {"ok": 8}, GOOD, 0)
    assert said.captions_per_s[0] < said.captions_per_s[1] < said.captions_per_s[2]


def test_what_is_finished_or_journalled_is_not_projected_again(tmp_path: Path) -> None:
    config = work_with_prompt(tmp_path)
    recaption.run(config, Job(work=tmp_path, quiet=True, limit=7))
    assert forecast.measure(config, Job(work=tmp_path), 4).num_left == GOOD - 7
    recaption.run(config, Job(work=tmp_path, quiet=True))
    said = forecast.measure(config, Job(work=tmp_path), 4)
    assert (said.num_left, said.seconds()) == (0, (0.0, 0.0, 0.0))


def test_samples_of_a_row_are_captions_of_their_own(tmp_path: Path) -> None:
    config = work_with_prompt(tmp_path, "user: Describe.\nsampling: {temperature: 1.0, num_samples: 3}\n")
    said = forecast.measure(config, Job(work=tmp_path), 5)
    assert (said.num_rows, said.codes, said.num_left) == (5, {"ok": 15}, 3 * GOOD)


def test_a_trial_of_rows_that_no_model_is_asked_about_ends(tmp_path: Path) -> None:
    config = work_with_prompt(tmp_path, "inputs: [image, web]\nuser: 'Alt-text {web}'\n")
    for path in (tmp_path / "pairs").glob("*"):
        path.unlink()
    pairsmaker.write_pairs(tmp_path, num_shards=1, change=lambda number, row: row.update(caption=""))
    assert forecast.measure(config, Job(work=tmp_path), 5).codes == {"no_input": 5}


def test_without_pairs_the_trial_says_what_to_run(tmp_path: Path) -> None:
    config = work_with_prompt(tmp_path)
    for path in (tmp_path / "pairs").glob("*" + ledger.SIDECAR):
        path.unlink()
    with pytest.raises(UserError, match="download"):
        forecast.measure(config, Job(work=tmp_path), 5)


def test_the_projection_is_of_rows_rate_start_and_replicas() -> None:
    said = Forecast(**TRIED)
    least, likely, most = said.seconds()
    assert likely == 60 + 3600 + 2
    assert least == pytest.approx(60 * (1 - forecast.DRIFT) + 3000) and most == pytest.approx(
        60 * (1 + forecast.DRIFT) + 4500 + 4
    )
    assert said.seconds(8)[1] == 60 + 450 + 2
    assert said.hours(8)[1] == pytest.approx(8 * 512 / 3600)


def test_people_are_told_counts_with_their_denominators_and_money_with_an_interval() -> None:
    lines = Forecast(**TRIED).lines(8, price=2.5)
    assert "60 of 64 captions ok (4 loop)" in lines[0]
    assert "2 of 64 hit the cap of 128" in lines[1]
    assert "36000 captions to make" in lines[2] and "on 8 GPUs" in lines[2]
    assert "GPU-hours" in lines[2] and "$2.84 ($" in lines[2] and "at $2.5 an hour" in lines[2]


def test_without_a_gpu_hours_are_not_called_gpu_hours() -> None:
    assert "replica-hours (no GPU here)" in Forecast(**{**TRIED, "num_gpus": 0}).lines()[2]


def test_the_spread_among_blocks_widens_the_interval() -> None:
    steady = [(number * 0.1 + 0.01 * (number % 3), 1) for number in range(1000)]
    uneven = [(number // 100 * 10 + number % 100 * (0.01 if number // 100 % 2 else 0.1), 1) for number in range(1000)]
    assert forecast._rate(steady, 0.0)[0] == pytest.approx(10, rel=0.01)
    assert forecast._rate(steady, 0.0)[1] < 0.02 < forecast._rate(uneven, 0.0)[1]


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_answers_that_come_in_batches_are_counted_with_the_time_of_their_batch(batch: int) -> None:
    """Eight answers every six seconds are eight in six, also where the trial ends at the first of a batch."""
    landed = [(6.0 * (number // batch + 1) + 0.001 * (number % batch), 1) for number in range(5 * batch + 1)]
    rate, width = forecast._rate(landed, 0.0)
    assert rate == pytest.approx(batch / 6, rel=0.01)
    assert width < 0.05


def test_rows_that_no_model_sees_are_not_projected(tmp_path: Path) -> None:
    pairsmaker.write_pairs(
        tmp_path, num_shards=4, change=lambda n, row: row.update(caption="" if n % 2 else row["caption"])
    )
    (tmp_path / "p.yaml").write_text("inputs: [image, web]\nuser: 'Alt-text {web}'\n")
    said = forecast.measure(RecaptionConfig(prompt=str(tmp_path / "p.yaml")), Job(work=tmp_path), 20)
    assert said.num_left == said.codes["ok"] == 12
