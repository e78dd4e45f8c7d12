"""``index.json`` of a folder of training shards, and what else describes the whole of it.

A data set that grew has generations: the shards of pairs that were there when tars were first made, then those of each
later run that found new ones. ``generations.json`` names them before any tar of theirs is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data import dataset_card, ledger, schema
from clips_data.config import ShardConfig
from clips_data.errors import ResumeRefused, UserError

INDEX_FILE: Final = "index.json"
GENERATIONS_FILE: Final = "generations.json"
SIZES_FILE: Final = "sizes.json"
CARD_FILE: Final = "README.md"
SPLITS: Final = ("train", "heldout")


@dataclass
class Generation:
    """What a finished generation is made of: ``tars`` in the order of the index, and what did not become a sample."""

    tars: list[str]
    num_rows: int
    dropped: int
    removed: list[tuple[str, int]] = field(default_factory=list)
    """What each filter removed, in their order."""
    examples: list[tuple[str, list[str]]] = field(default_factory=list)
    """Keys of a few samples that it removed, for each filter that removed any."""


def read(folder: Path) -> dict[str, Any] | None:
    """The index, or ``None`` where there is none. Raises ``UserError`` for a damaged one."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}). Delete it and run `clips shard` again.") from None
    return index


def generations(folder: Path) -> list[list[str]]:
    """The shards of pairs that each generation of this folder is made from; ``[]`` where nothing was begun."""
    path = folder / GENERATIONS_FILE
    if not path.exists():
        return []
    try:
        named: list[list[str]] = json.loads(path.read_text())["generations"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Run `clips shard --overwrite`, or use another --out.") from None
    return named


def grown(folder: Path, units: Sequence[str]) -> list[list[str]]:
    """The generations with a further one for the shards of pairs that no earlier one has.

    Raises ``ResumeRefused`` where an earlier one was made from a shard that is not among ``units``.
    """
    before = generations(folder)
    used = {unit for generation in before for unit in generation}
    if gone := sorted(used - set(units)):
        raise ResumeRefused(
            f"{folder} was made from shards of pairs that are not among those given now ({', '.join(gone[:3])}; "
            f"{len(gone)} of {len(used)}). Use --overwrite to replace it, or --out with a new folder to keep both."
        )
    new = [unit for unit in units if unit not in used]
    return [*before, new] if new else before


def write_generations(folder: Path, named: Sequence[Sequence[str]]) -> None:
    content = {"schema_version": schema.SCHEMA_VERSION, "generations": [list(units) for units in named]}
    ledger.write_json(folder / GENERATIONS_FILE, content)


def remove(folder: Path) -> None:
    """Before tars that the index names are made otherwise."""
    for name in (INDEX_FILE, GENERATIONS_FILE):
        (folder / name).unlink(missing_ok=True)


def finished(folder: Path) -> list[Generation]:
    """The generations that the index says are finished."""
    return [Generation(**about) for about in (read(folder) or {}).get("generations", [])]


def write(folder: Path, config: ShardConfig, made: Sequence[Generation], about: Mapping[str, Any]) -> None:
    """Writes the index of these generations, and from it the sizes and the card. ``about`` is for the card."""
    index: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "splits": {name: {"num_samples": 0, "shards": []} for name in SPLITS},
        "columns": list(config.columns),
        "mix": {**_mix(config), "seed": config.seed},
        "generations": [asdict(generation) for generation in made],
        "about": dict(about),
    }
    for name in SPLITS:
        tars = [unit for generation in made for unit in generation.tars if unit.startswith(name)]
        index["splits"][name]["shards"] = [{"file": f"{unit}.tar"} for unit in tars]
    refresh(folder, index)


def refresh(folder: Path, index: dict[str, Any]) -> str:
    """Brings the index in line with the tars that it names, and writes it, the sizes and the card; the new digest."""
    digests, counts = [], Counter[str]()
    for split in (index["splits"][name] for name in SPLITS):
        for shard in split["shards"]:
            unit = shard["file"].removesuffix(".tar")
            sidecar = ledger.read_sidecar(folder, unit, check_files=False)
            assert sidecar is not None, folder / unit
            shard |= {"num_samples": sum(sidecar.counts.values()), **sidecar.files[shard["file"]]}
            digests.append(shard["sha256"])
            counts.update(sidecar.counts)
        split["num_samples"] = sum(shard["num_samples"] for shard in split["shards"])
    index["mix"]["counts"] = dict(counts)
    index["dropped"] = sum(generation["dropped"] for generation in index.get("generations", []))
    index["digest"] = ledger.digest_json(digests)
    ledger.write_json(folder / SIZES_FILE, dataset_card.sizes(index))
    ledger.write_bytes(folder / CARD_FILE, dataset_card.card(folder, index).encode())
    ledger.write_json(folder / INDEX_FILE, index)
    return str(index["digest"])


def _mix(config: ShardConfig) -> dict[str, Any]:
    from clips_data.mixing import Mix

    return Mix.of(config.web_ratio, config.columns, config.mix, config.replace_below).to_json()
