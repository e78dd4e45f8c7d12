"""One row on its way: texts and image become requests, answers become lines of the journal and rows of the columns."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import draws, duplicates, joined, ledger, schema
from clips_data.errors import UserError
from clips_data.recaption import clean, prompts, untrusted
from clips_data.recaption.engines import Answer, Request

if TYPE_CHECKING:
    import polars as pl

    from clips_data.recaption.prompts import Prompt

SEEDS: Final = 1 << 31


@dataclass(frozen=True)
class Row:
    """A pair as a prompt sees it. ``score`` is that of the prompt's gate, ``None`` where there is none."""

    key: str
    sha256: str
    image: bytes
    texts: Mapping[str, str]
    score: float | None = None
    is_duplicate: bool = False
    """Whether the image repeats an earlier one, which is captioned in its place."""


@dataclass(frozen=True)
class Item:
    """One caption to be made: sample ``sample`` of ``num_samples`` of a row.

    ``request`` is ``None`` where no engine is needed, and ``answer`` then says what became of it. ``digest`` is equal
    for requests that a model would answer alike: image, texts, decoding, seed where it matters, model and revision.
    """

    key: str
    sha256: str
    sample: int
    variant: str
    instruction: str
    flags: tuple[str, ...]
    digest: str
    seed: int
    request: Request | None
    answer: Answer | None = None


class Recipe:
    """A prompt for one column, with a model: everything that a caption depends on beside its row."""

    def __init__(
        self,
        prompt: Prompt,
        *,
        column: str,
        seed: int,
        model_digest: str,
        special_tokens: Sequence[str] = (),
        gate_min: float | None = None,
    ) -> None:
        self.prompt, self.column, self.seed = prompt, column, seed
        self.model_digest, self.special_tokens = model_digest, tuple(special_tokens)
        self.gate_min = gate_min if gate_min is not None else prompt.gate.min if prompt.gate else None

    @property
    def columns(self) -> list[str]:
        """The columns that it makes, the first of which keeps the journal."""
        return self.prompt.column_names(self.column)

    def items(self, row: Row) -> list[Item]:
        """What is to be asked about a row: one item for each sample that the prompt wants."""
        safe, flags = {}, []
        for column in self.prompt.columns:
            text = row.texts.get(column, "")
            safe[column], found = untrusted.neutralise(text, self.special_tokens, delimiters=self.prompt.delimiters)
            flags += found
        fits = self.gate_min is None or (row.score is not None and row.score >= self.gate_min)
        return [self._item(row, safe, fits, flags, sample) for sample in range(self.prompt.sampling.num_samples)]

    def _item(self, row: Row, safe: Mapping[str, str], fits: bool, input_flags: Sequence[str], sample: int) -> Item:
        """Each sample has draws of its own: words, examples and tokens."""
        drawn_by = f"{row.key}/{sample}" if sample else row.key
        rendered = self.prompt.render(safe, seed=self.seed, key=drawn_by, fits=fits)
        flags = tuple(dict.fromkeys([*input_flags, *([prompts.GATED] if rendered.variant == prompts.GATED else [])]))
        purpose = f"caption/{self.column}" + (f"/{sample}" if sample else "")
        seed = draws.integer(SEEDS, self.seed, purpose, 0, row.key)
        image = row.image if self.prompt.needs_image else None
        request = Request(image, rendered.system, rendered.user, seed, rendered.decoding, self.prompt.shape)
        answer = None
        if row.is_duplicate:
            answer = Answer("duplicate")
        elif rendered.missing is not None:
            answer = Answer("no_input")
        elif rendered.taken is not None:
            assert self.prompt.gate is not None and self.prompt.gate.take is not None
            answer = Answer("ok", row.texts[self.prompt.gate.take], "stop")  # whole: no model reads it
        item = Item(
            row.key, row.sha256, sample, rendered.variant, rendered.instruction, flags, "", seed,
            None if answer else request, answer,
        )  # fmt: skip
        return replace(item, digest=self._digest(item, request))

    def _digest(self, item: Item, request: Request) -> str:
        greedy = request.decoding.temperature == 0
        return ledger.digest_json(
            {
                "image": item.sha256 if request.image is not None else None,
                "texts": [request.system, request.user],
                "decoding": {**request.decoding.__dict__, "stop": list(request.decoding.stop)},
                "shape": request.shape,
                "seed": None if greedy else item.seed,
                "model": self.model_digest,
            }
        )[:32]

    # --- answers ------------------------------------------------------------------------------------------------------

    def line(self, item: Item, answer: Answer, engine: str) -> dict[str, Any]:
        """What the journal keeps of an answer: what the model said, and all that its columns' rows are made from."""
        return {
            "key": item.key,
            "sha256": item.sha256,
            "sample": item.sample,
            "code": answer.code,
            "finish_reason": answer.finish_reason,
            "num_tokens": answer.num_tokens,
            "num_prompt_tokens": answer.num_prompt_tokens,
            # Servers may send half a surrogate pair, which no file can hold.
            "raw": answer.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            "flags": list(item.flags),
            "seed": item.seed,
            "variant": item.variant,
            "instruction": item.instruction,
            "request": item.digest,
            "engine": engine,
        }

    def column_rows(self, line: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The row of each column that a journal line fills, cleaned."""
        sampled = f"_{line['sample']}" if self.prompt.sampling.num_samples > 1 else ""
        texts = self.prompt.read_output(line["raw"]) if line["code"] == "ok" else None
        found = {}
        for field in self._fields():
            name = self.column + (f"_{field}" if field else "") + sampled
            if line["code"] != "ok":
                judged = clean.Judged(line["code"], "", [])
            elif line["variant"] == prompts.GATED and not line["engine"]:
                judged = clean.Judged("ok", line["raw"], [])  # another column's caption, taken as it is
            elif texts is None:
                judged = clean.Judged("bad_shape", "", [])
            else:
                judged = clean.finish(texts[field], line["finish_reason"], self.prompt.clean, line["instruction"])
            found[name] = _column_row(line, judged)
        return found

    def _fields(self) -> list[str]:
        return list(self.prompt.output) if self.prompt.output else [""]


def _column_row(line: Mapping[str, Any], judged: clean.Judged) -> dict[str, Any]:
    flags = [*line["flags"], *judged.flags]
    if line["finish_reason"] == "length" and "hit_token_cap" not in flags:
        flags.append("hit_token_cap")
    return {
        "key": line["key"],
        "sha256": line["sha256"],
        "caption": judged.caption if judged.code == "ok" else "",
        "status": schema.STATUS_SUCCESS if judged.code == "ok" else "failed",
        "code": judged.code,
        "finish_reason": line["finish_reason"],
        "num_tokens": line["num_tokens"],
        "flags": flags,
        "raw": line["raw"],
        "seed": line["seed"],
        "engine": line["engine"],
        "prompt_variant": line["variant"],
        "request": line["request"],
    }


# --- where rows come from ---------------------------------------------------------------------------------------------


def input_folders(prompt: Prompt, captions: Path, scores: Path) -> dict[str, Path]:
    """``captions/<column>`` and ``scores/<name>`` of what the prompt takes in, each with its folder."""
    folders = {f"{schema.CAPTIONS}/{name}": captions / name for name in prompt.columns if name != joined.WEB}
    if prompt.gate is not None:
        folders[f"{schema.SCORES}/{scores.name}"] = scores
    return folders


def open_inputs(work: Path, prompt: Prompt, scores: str, units: tuple[str, ...] | None = None) -> joined.Inputs:
    """The folders under ``work`` that the prompt reads. Raises ``UserError`` naming what is to be made first."""
    columns = tuple(dict.fromkeys(prompt.columns))
    return joined.open_inputs(work, columns, scores=scores if prompt.gate is not None else None, units=units)


def read_rows(
    inputs: joined.Inputs, unit: str, prompt: Prompt, table: pl.DataFrame, left_out: Collection[str] = ()
) -> Iterator[Row]:
    """The rows of ``table`` (made by ``inputs.table``) with their images, one in memory at a time.

    ``left_out`` has the keys of images that repeat an earlier one.
    """
    images: Iterable[bytes] = itertools.repeat(b"", len(table))
    if prompt.needs_image:
        images = joined.read_images(inputs.pairs, unit, table)
    column = f"score.{prompt.gate.column}" if prompt.gate is not None else None
    if column is not None and column not in table.columns:
        raise UserError(
            f"Prompt {prompt.name!r} has a gate on the score of column {column.removeprefix('score.')!r}, which these "
            f"scores lack. Run `clips score --columns {column.removeprefix('score.')}` first, or name other --scores."
        )
    for about, image in zip(table.iter_rows(named=True), images, strict=True):
        texts = {name: about[f"text.{name}"] for name in prompt.columns}
        yield Row(
            about["key"],
            about["sha256"],
            image,
            texts,
            about[column] if column is not None else None,
            about["key"] in left_out,
        )


def sample_rows(work: Path, prompt: Prompt, num_rows: int, *, seed: int = 0, scores: str = "clip") -> list[Row]:
    """Up to ``num_rows`` rows drawn by (seed, key) from all finished shards, in key order; all in memory.

    Images that repeat an earlier one are not drawn.
    """
    inputs = open_inputs(work, prompt, scores)
    left_out = duplicates.left_out(inputs.pairs, inputs.units)
    drawn: list[tuple[float, str, str]] = []
    for unit in inputs.units:
        keys = set(inputs.pair_rows(unit).filter(_succeeded())["key"]) - set(left_out.get(unit, ()))
        drawn += ((draws.uniform(seed, "sample_rows", 0, key), unit, key) for key in keys)
        drawn = sorted(drawn)[:num_rows]
    found: list[Row] = []
    for unit, keys_of in itertools.groupby(sorted((unit, key) for _, unit, key in drawn), lambda pair: pair[0]):
        found += _rows_of(inputs, unit, prompt, {key for _, key in keys_of})
    return sorted(found, key=lambda row: row.key)


def find_row(work: Path, prompt: Prompt, key: str, *, scores: str = "clip") -> Row:
    """The row of one sample. Raises ``UserError`` where no finished shard has it."""
    unit = key[: schema.SHARD_DIGITS]
    inputs = open_inputs(work, prompt, scores)
    found = _rows_of(inputs, unit, prompt, {key}) if unit in inputs.units else []
    if not found:
        raise UserError(
            f"No successful pair in {inputs.pairs} has the key {key!r}. Keys are in the key column of its parquet "
            f"files; `clips trace {key}` says what became of a row."
        )
    return found[0]


def _rows_of(inputs: joined.Inputs, unit: str, prompt: Prompt, keys: set[str]) -> list[Row]:
    table = inputs.table(unit)
    return list(read_rows(inputs, unit, prompt, table.filter([key in keys for key in table["key"]])))


def _succeeded() -> pl.Expr:
    import polars as pl

    return pl.col("status") == schema.STATUS_SUCCESS
