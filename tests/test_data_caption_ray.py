"""Captioning on a Ray cluster of several nodes of this machine, one of which is lost in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import captionmaker
import pairsmaker
import pytest
from captionmaker import BuildEcho

from clips_data import ledger
from clips_data.config import RecaptionConfig
from clips_data.executor import Job
from clips_data.recaption import run as recaption

NUM_SHARDS, SHARD_ROWS = 12, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for workers, and two nodes with room for one each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # the workers import the captioner of the tests
        ray.init(address=cluster.address, log_to_driver=False, runtime_env=here)
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def content(folder: Path) -> dict[str, str]:
    return {path.name: ledger.digest_file(path) for path in sorted(folder.glob("*.parquet"))}


def test_a_handler_that_cannot_be_made_is_told_as_it_is(cluster: Any, tmp_path: Path) -> None:
    from clips_data.errors import UserError

    work, prompt = tmp_path / "w", tmp_path / "p.yaml"
    pairsmaker.write_pairs(work, num_shards=2)
    prompt.write_text("inputs: [image]\nuser: Describe.\n")
    undo = captionmaker.install(BuildEcho(broken=True))
    try:
        with pytest.raises(UserError, match="did not start: RuntimeError: no such device"):
            recaption.run(RecaptionConfig(prompt=str(prompt)), Job(work=work, quiet=True, executor="ray"))
    finally:
        undo()


def test_a_node_lost_in_the_middle_loses_nothing(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, prompt = tmp_path / "w", tmp_path / "p.yaml"
    pairsmaker.write_pairs(work, num_shards=NUM_SHARDS, shard_rows=SHARD_ROWS)
    prompt.write_text("inputs: [image]\nuser: Describe.\n")
    config = RecaptionConfig(prompt=str(prompt), batch_rows=4)
    undo = captionmaker.install(BuildEcho(max_batch_rows=4))
    try:
        alone = tmp_path / "alone" / "synthetic"
        recaption.run(config, Job(work=work, out=alone, quiet=True))
        undo()
        slow = BuildEcho(max_batch_rows=4, delay_s=0.2, asked=str(tmp_path / "asked"))
        undo = captionmaker.install(slow)
        lost = threading.Thread(target=lose_a_node, args=(cluster, work / "captions" / "synthetic"))
        lost.start()
        report = recaption.run(config, Job(work=work, quiet=True, executor="ray", processes=2))
        lost.join()
    finally:
        undo()
    assert report.counts == {"ok": NUM_SHARDS * (SHARD_ROWS - 1)}
    assert content(work / "captions" / "synthetic") == content(alone)
    assert "A worker of the Ray cluster was lost" in capsys.readouterr().err
    asked = len((tmp_path / "asked").read_text().splitlines())
    assert asked < 1.5 * report.counts["ok"], "what the lost node had journalled is not asked again"


def lose_a_node(cluster: Any, folder: Path) -> None:
    """Kills a node's processes as soon as its worker is in the middle of a shard."""
    cluster, nodes = cluster
    while sum(path.read_bytes().count(b"\n") > 4 for path in folder.glob("*.journal.jsonl")) < 2:
        time.sleep(0.05)
    cluster.remove_node(nodes[1], allow_graceful=False)
