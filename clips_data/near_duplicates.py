"""Which captions of a column nearly repeat an earlier one, over all shards: equal words, or four fifths of their pairs.

Two captions are near duplicates when their words are equal, or when their sets of shingles have a Jaccard similarity of
at least 0.8; MinHash bands (``shingles``) say which ones are worth comparing, and each comparison is exact. Told is the
first such caption by key, so neither the cut into shards nor the order of work matters. The tables lie beside the
scores, in ``_near_duplicates/``, as those of duplicate images do beside the pairs.

Numbers of captions stand for their keys, in whose order they are. What is known of a caption lies in flat files that
are mapped, about 170 bytes and four for each shingle; in memory are the rows of one pass, told by their hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import joined, ledger, locks, shingles
from clips_data.errors import UserError
from clips_data.executor import Report

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

FOLDER: Final = "_near_duplicates"
UNIT: Final = "near_duplicates"
LEAST_JACCARD: Final = 0.8
COMPARED_WITH: Final = 8
"""First captions of a band's group with which the others are compared. Groups are larger where thousands of captions
are made from one template; a pair that is near is then still found in a band that the template does not decide."""
ROWS_AT_ONCE: Final = 1 << 22
SHINGLES_AT_ONCE: Final = 1 << 22
_KEY_BYTES: Final = 16
_NONE: Final = -1


def write(
    given: joined.Inputs, left_out: Mapping[str, pl.Series], columns: Sequence[str], out: Path, report: Report
) -> None:
    """Tells near duplicates in ``columns`` of all finished pairs once all of these are scored in ``out``.

    Nothing is done when that was told already. Captions of the keys in ``left_out`` are passed over. The report gets
    their numbers, or a note about the shards that are missing.
    """
    units = ledger.finished_units(given.pairs)
    missing = [unit for unit in units if ledger.read_sidecar(out, unit, check_files=False) is None]
    if missing:
        report.notes.append(
            f"Near-duplicate captions are told once all {len(units)} shards are scored; {len(missing)} are not yet."
        )
        return
    folder = out / FOLDER
    with ledger.readable_disk_errors(folder), locks.locked(folder):
        inputs = {unit: _input(out, unit) for unit in units}
        config = {"columns": list(columns), "least_jaccard": LEAST_JACCARD, "compared_with": COMPARED_WITH}
        known = ledger.read_sidecar(folder, UNIT)
        if known is None or known.inputs != inputs or known.config != config:
            with locks.scratch(folder, "work") as scratch:
                counts = _write_all(dataclasses.replace(given, units=tuple(units)), left_out, columns, folder, scratch)
            ledger.forget_unit(folder, UNIT)
            known = ledger.commit(
                folder, UNIT, [f"{unit}.parquet" for unit in units], inputs=inputs, config=config, counts=counts
            )
    report.facts.update({f"near_duplicates_{column}": known.counts[column] for column in columns})


def read(folder: Path, unit: str) -> pl.DataFrame | None:
    """``key`` of each row of a shard that was looked at, and for each column ``<column>_near_duplicate_of``.

    ``None`` where that was never told. Raises ``UserError`` where the shards of the scores in ``folder`` changed since.
    """
    known = ledger.read_sidecar(folder / FOLDER, UNIT, check_files=False)
    if known is None:
        return None
    if known.inputs.get(unit) != _input(folder, unit):
        raise UserError(
            f"The near duplicates in {folder / FOLDER} were told of other captions than shard {unit} has now. Run "
            f"`clips score --name {folder.name} --near-duplicates` again, or delete that folder."
        )
    return joined.read_table(folder / FOLDER / f"{unit}.parquet")


def forget(folder: Path) -> bool:
    """Removes what was told beside these scores, as it may name captions that are to go; whether there was any."""
    if ledger.read_sidecar(folder / FOLDER, UNIT, check_files=False) is None:
        return False
    ledger.remove_unit(folder / FOLDER, UNIT)
    return True


def _input(scores: Path, unit: str) -> str:
    sidecar = ledger.read_sidecar(scores, unit, check_files=False)
    return ledger.digest_json(dict(sidecar.inputs)) if sidecar is not None else "(absent)"


def _write_all(
    given: joined.Inputs, left_out: Mapping[str, pl.Series], columns: Sequence[str], folder: Path, scratch: Path
) -> dict[str, int]:

    texts = {column: Captions(scratch / column) for column in columns}
    for unit in given.units:
        table = _of_unit(given, left_out, unit)
        for column, captions in texts.items():
            captions.add(table["key"], table[f"text.{column}"])
    first_of = {column: captions.near_duplicates() for column, captions in texts.items()}
    start, counts = 0, dict.fromkeys(columns, 0)
    for unit in given.units:
        table = _of_unit(given, left_out, unit).select("key")
        for column, captions in texts.items():
            name = f"{column}_near_duplicate_of"
            table = table.with_columns(captions.keys_of(first_of[column][start : start + len(table)]).alias(name))
            counts[column] += len(table) - table[name].null_count()
        start += len(table)
        table.write_parquet(ledger.part(folder / f"{unit}.parquet"))
    return counts


def _of_unit(given: joined.Inputs, left_out: Mapping[str, pl.Series], unit: str) -> pl.DataFrame:
    table = given.table(unit, images=False).sort("key")
    return table.filter(~table["key"].is_in(left_out[unit].implode())) if unit in left_out else table


class Captions:
    """The captions of one column, added in the order of their keys, and kept in files under ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.num = folder, 0

    def add(self, keys: pl.Series, texts: pl.Series) -> None:
        import numpy as np

        spelt = np.array(keys.to_list(), dtype=f"S{_KEY_BYTES + 1}")
        assert not len(spelt) or max(map(len, spelt.tolist())) <= _KEY_BYTES, "keys are fixed-width digits"
        made = shingles.shingled(texts)
        self._append("keys", spelt.astype(f"S{_KEY_BYTES}"))
        self._append("texts", made.texts_N)
        self._append("lengths", made.lengths_N)
        self._append("flat", made.flat)
        for band, values in enumerate(made.bands_BN):
            self._append(f"band-{band}", values)
        self.num += len(spelt)

    def near_duplicates(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For each caption the number of the first that it nearly repeats, or -1. Mapped from a file."""
        import numpy as np

        first_of: np.ndarray[Any, np.dtype[np.int64]] = self._new("first_of", np.int64, _NONE)
        if not self.num:
            return first_of
        for numbers, place in self._groups("texts", None):
            again = place > 0
            first_of[numbers[again]] = numbers[np.arange(len(numbers)) - place][again]
        distinct = self._new("distinct", np.bool_, True)
        distinct[:] = first_of == _NONE
        flat, lengths = self._map("flat", np.uint32), self._map("lengths", np.int64)
        starts = self._new("starts", np.int64, 0)
        np.cumsum(lengths[:-1], out=starts[1:])
        for band in range(shingles.BANDS):
            for numbers, place in self._groups(f"band-{band}", distinct):
                for earlier in range(COMPARED_WITH):
                    later = np.flatnonzero(place > earlier)
                    _compare(numbers[later], numbers[later - place[later] + earlier], first_of, flat, starts, lengths)
        again = np.flatnonzero(~distinct)
        for some in np.array_split(again, len(again) // ROWS_AT_ONCE + 1):
            of_first = first_of[first_of[some]]
            first_of[some] = np.where(of_first == _NONE, first_of[some], of_first)
        return first_of

    def keys_of(self, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> pl.Series:
        """The keys of captions; null for -1."""
        import numpy as np
        import polars as pl

        keys = self._map("keys", np.dtype(f"S{_KEY_BYTES}"))
        spelt = [None if number == _NONE else keys[number].decode() for number in numbers.tolist()]
        return pl.Series(spelt, dtype=pl.String)

    def _groups(self, name: str, only: Any) -> Iterator[tuple[Any, Any]]:
        """Captions with equal values, as their numbers, group after group, and the place of each in its group.

        Single ones are left out. Every pass sees the values of one share of the hashes.
        """
        import numpy as np

        values = self._map(name, np.uint64)
        passes = -(-self.num // ROWS_AT_ONCE)
        for number in range(passes):
            wanted = []
            for first in range(0, self.num, ROWS_AT_ONCE):
                some = values[first : first + ROWS_AT_ONCE]
                mine = (some != 0) & (some % np.uint64(passes) == number)
                if only is not None:
                    mine &= only[first : first + ROWS_AT_ONCE]
                wanted.append(np.flatnonzero(mine) + first)
            numbers = np.concatenate(wanted)
            numbers = numbers[np.argsort(values[numbers], kind="stable")]
            told = values[numbers]
            begins = np.flatnonzero(np.concatenate([[True], told[1:] != told[:-1]])) if len(told) else told
            sizes = np.diff(np.append(begins, len(told)).astype(np.int64))
            place = np.arange(len(told)) - np.repeat(begins, sizes).astype(np.int64)
            several = np.repeat(sizes > 1, sizes)
            yield numbers[several], place[several]

    def _append(self, name: str, values: Any) -> None:
        with (self.folder / name).open("ab") as file:
            file.write(values.tobytes())

    def _map(self, name: str, kind: Any) -> Any:
        import numpy as np

        path = self.folder / name
        return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)

    def _new(self, name: str, kind: Any, value: Any) -> Any:
        """A file of one value for each caption, to be changed."""
        import numpy as np

        if not self.num:
            return np.zeros(0, kind)
        made = np.memmap(self.folder / name, kind, "w+", shape=(self.num,))
        made[:] = value
        return made


def _compare(later: Any, earlier: Any, first_of: Any, flat: Any, starts: Any, lengths: Any) -> None:
    """Notes in ``first_of`` the pairs that are near, where the earlier one is the first so far."""
    import numpy as np

    better = (first_of[later] == _NONE) | (earlier < first_of[later])
    shorter, longer = np.minimum(lengths[later], lengths[earlier]), np.maximum(lengths[later], lengths[earlier])
    possible = np.flatnonzero(better & (shorter >= LEAST_JACCARD * longer))
    if not len(possible):
        return
    pairs = np.stack([later[possible], earlier[possible]])
    parts = np.cumsum(lengths[pairs].sum(axis=0)) // SHINGLES_AT_ONCE
    for some in np.split(pairs, np.flatnonzero(np.diff(parts)) + 1, axis=1):
        near = shingles.jaccard(flat, starts[some], lengths[some]) >= LEAST_JACCARD
        first_of[some[0][near]] = some[1][near]
