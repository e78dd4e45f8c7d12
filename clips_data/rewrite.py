"""Takes samples out of finished units, the one thing that changes them; only ``clips forget`` calls this.

Every function here writes what remains to ``*.part`` files and commits them under the same names, with the same config
and inputs. What remains depends on the keys alone, so that doing it twice, or again after a kill, ends in the same
bytes. Other samples' bytes are copied as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from clips_data import dataset_facts, embeddings, joined, ledger, schema, shard_index, tars
from clips_data.errors import UserError
from clips_data.mixing import Mix
from clips_data.verify import problem_with

if TYPE_CHECKING:
    import pyarrow as pa

FORGOTTEN: Final = "forgotten"
KEPT_COLUMNS: Final = ("key", "status", "code", "retry_of")
"""What is left of a forgotten row. Without ``retry_of``, ``--retry`` would take an earlier try for the latest."""
_COPY_BYTES: Final = 1 << 20
_RECORD_BYTES: Final = 20 * tars.BLOCK_BYTES


def pairs_unit(pairs: Path, unit: str, gone: Collection[str]) -> None:
    """Empties the rows with these keys and removes their images.

    A tar that is a link to somebody's own is replaced by a copy without them; theirs is not touched.
    """
    import pyarrow.parquet as pq

    table = read_parquet(pairs / f"{unit}.parquet")
    rows = table.to_pylist()
    forgotten = [row["key"] in gone or row["code"] == FORGOTTEN for row in rows]
    kept = {row.get("source_key") or row["key"] for row, away in zip(rows, forgotten, strict=True) if not away}
    tar, changed = pairs / f"{unit}.tar", []
    promised = _sidecar(pairs, unit).files[tar.name]
    strangers = any(member.key not in kept for member in tars.read_members(tar, extensions=None))
    if strangers or problem_with(tar, promised["bytes"], promised["sha256"]):  # a kill left the new tar, not its hash
        copy_tar(tar, kept.__contains__)
        changed.append(tar.name)
    pq.write_table(_emptied(table, forgotten), _fresh_part(pairs / f"{unit}.parquet"))
    codes = Counter(FORGOTTEN if away else row["code"] for row, away in zip(rows, forgotten, strict=True))
    recommit(pairs, unit, [*changed, f"{unit}.parquet"], codes)


def _emptied(table: pa.Table, forgotten: Sequence[bool]) -> pa.Table:
    import pyarrow as pa

    kept_rows = pa.array([None if away else row for row, away in enumerate(forgotten)], pa.int64())
    said = {"status": "failed_to_download", "code": FORGOTTEN}
    for place, about in enumerate(table.schema):
        if about.name in said:
            values = table[about.name].to_pylist()
            texts = [said[about.name] if away else text for text, away in zip(values, forgotten, strict=True)]
            table = table.set_column(place, about, pa.array(texts, about.type))
        elif about.name not in KEPT_COLUMNS:
            table = table.set_column(place, about.with_nullable(True), table[about.name].take(kept_rows))
    return table


def table_unit(folder: Path, unit: str, gone: Collection[str], count: Callable[[pa.Table], Mapping[str, int]]) -> None:
    """Removes the rows with these keys from a table of captions or scores."""
    import pyarrow.parquet as pq

    table = read_parquet(folder / f"{unit}.parquet")
    table = table.filter([key not in gone for key in table["key"].to_pylist()])
    pq.write_table(table, _fresh_part(folder / f"{unit}.parquet"))
    recommit(folder, unit, [f"{unit}.parquet"], count(table))


def count_captions(table: pa.Table) -> Mapping[str, int]:
    return Counter(table["code"].to_pylist())


def shard_unit(shards: Path, unit: str, gone: Collection[str]) -> None:
    """Removes the samples with these keys from a training tar, and from its offset index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tar, index = shards / f"{unit}.tar", shards / f"{unit}.index.parquet"
    copy_tar(tar, lambda key: key not in gone)
    table = read_parquet(index)
    table = table.filter([key not in gone for key in table["key"].to_pylist()])
    members = {(member.key, member.ext): member for member in tars.read_members(ledger.part(tar), extensions=None)}
    for kind in ("image", "txt", "json"):
        exts = table["image_ext"].to_pylist() if kind == "image" else [kind] * table.num_rows
        places = [members[key, ext].offset for key, ext in zip(table["key"].to_pylist(), exts, strict=True)]
        name = f"{kind}_offset"
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(places, pa.int64()))
    pq.write_table(table, _fresh_part(index))
    recommit(shards, unit, [tar.name, index.name], _outcomes(shards, unit, table))


def _outcomes(shards: Path, unit: str, table: pa.Table) -> Mapping[str, int]:
    """How the mix chose each text that remains, counted as ``clips shard`` counted it."""
    from clips_data.config import ShardConfig

    config = ShardConfig(**_sidecar(shards, unit).config)
    mix = Mix.of(config.web_ratio, config.columns, config.mix, config.replace_below)
    counts: Counter[str] = Counter()
    tar = ledger.part(shards / f"{unit}.tar")
    with tars.open_tar(tar) as file:
        for row in table.to_pylist():
            about = json.loads(tars.read_at(file, tar, row["json_offset"], row["json_bytes"]))
            choice = mix.choose(seed=config.seed, epoch=0, key=row["key"], texts=about, scores=about["scores"])
            counts[choice.outcome] += 1
    return counts


def index_of_shards(shards: Path, work: Path) -> str:
    """Brings ``index.json`` in line with its tars and with what they were made from, and returns the new digest."""
    from clips_data.config import ShardConfig

    index = shard_index.read(shards)
    assert index is not None, shards
    units = [unit for generation in shard_index.generations(shards) for unit in generation]
    if named := [shard["file"] for split in index["splits"].values() for shard in split["shards"]]:
        config = ShardConfig(**_sidecar(shards, named[0].removesuffix(".tar")).config)
        names = [f"{schema.CAPTIONS}/{column}" for column in config.columns if column != joined.WEB]
        names += [f"{schema.SCORES}/{name}" for name in config.scores]
        given = joined.Inputs(work / schema.PAIRS, tuple(units), {name: work / name for name in names})
        index["about"] = dataset_facts.gather(given, config)
    return shard_index.refresh(shards, index)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a caption journal, the header first; without a last one that a kill tore."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def journal(path: Path, gone: Collection[str], renamed: Mapping[str, str | None]) -> None:
    """Removes rows of a caption journal, and brings its header in line with the inputs as they are now."""
    if lines := read_journal(path):
        header = {**lines[0], "inputs": _renamed(lines[0]["inputs"], renamed)}
        kept = [header, *(row for row in lines[1:] if row["key"] not in gone)]
        ledger.write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())


def features_unit(folder: Path, unit: str, gone: Collection[str]) -> None:
    """Removes the rows with these keys from a teacher's stored features."""
    file = folder / (unit + embeddings.SUFFIX)
    part = _fresh_part(file)
    embeddings.write_without(file, gone, part)
    recommit(folder, unit, [file.name], embeddings.counts(part, _sidecar(folder, unit).counts))


def copy_tar(tar: Path, keep: Callable[[str], bool]) -> None:
    """Writes the part file of a tar: the members whose key ``keep`` lets through, headers and data byte for byte."""
    with tars.open_tar(tar) as old, _fresh_part(tar).open("wb") as new:
        start = 0
        for member in tars.read_members(tar, extensions=None):
            end = member.offset + member.size_bytes
            end += -end % tars.BLOCK_BYTES
            if keep(member.key):
                _copy(old, new, start, end)
            start = end  # an extended header belongs to the member that follows it
        new.write(bytes(2 * tars.BLOCK_BYTES))
        new.write(bytes(-new.tell() % _RECORD_BYTES))


def _copy(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    old.seek(start)
    while start < end:
        data = old.read(min(_COPY_BYTES, end - start))
        new.write(data)
        start += len(data)


def recommit(folder: Path, unit: str, changed: Sequence[str], counts: Mapping[str, int]) -> None:
    """Makes the part files of ``changed`` appear and promises them in the unit's sidecar; its other files stay."""
    sidecar = _sidecar(folder, unit)
    files = dict(sidecar.files)
    for name in changed:
        path = ledger.part(folder / name)
        ledger.fsync_file(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": ledger.digest_file(path)}
    for name in changed:
        ledger.part(folder / name).replace(folder / name)
        ledger.fsync_folder(folder)  # in this order also after a power cut: a table may tell what its tar held
    _write_sidecar(folder, sidecar, files=files, counts=dict(counts))


def rename_inputs(folder: Path, unit: str, renamed: Mapping[str, str | None]) -> None:
    """Replaces digests that the unit was made from by those that the same inputs have now; ``None`` drops one."""
    sidecar = _sidecar(folder, unit)
    if (inputs := _renamed(sidecar.inputs, renamed)) != sidecar.inputs:
        _write_sidecar(folder, sidecar, inputs=inputs)


def _renamed(inputs: Mapping[str, str], renamed: Mapping[str, str | None]) -> dict[str, str]:
    now = {name: renamed.get(digest, digest) for name, digest in inputs.items()}
    return {name: digest for name, digest in now.items() if digest is not None}


def _sidecar(folder: Path, unit: str) -> ledger.Sidecar:
    """A kill may have left files that are newer than it."""
    sidecar = ledger.read_sidecar(folder, unit, check_files=False)
    assert sidecar is not None, folder / unit
    return sidecar


def _write_sidecar(folder: Path, sidecar: ledger.Sidecar, **changes: Any) -> None:
    content = {"schema_version": schema.SCHEMA_VERSION, **sidecar.__dict__, **changes}
    ledger.write_json(ledger.sidecar_path(folder, sidecar.unit), content)


def _fresh_part(path: Path) -> Path:
    """A part file that is there may be a link, through which writing would reach somebody's own file."""
    part = ledger.part(path)
    part.unlink(missing_ok=True)
    return part


def read_parquet(path: Path, columns: Collection[str] | None = None) -> pa.Table:
    """One file, or those of ``columns`` that it has.

    As it is: ``pyarrow.parquet.read_table`` would take folder names like ``a=1`` for columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            return file.read([name for name in names if columns is None or name in columns])
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"Cannot read {path}: {str(error).splitlines()[0]}. Restore it; nothing of it is lost."
        ) from None
