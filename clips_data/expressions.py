"""Expressions over the joined table, as users write them: polars SQL about one sample, such as ``pairs.width >= 200``.

What an expression says of a sample may depend on nothing else, or a filter's result would change with the sharding,
the day or the number of workers. So only functions of single values are let through; aggregates, windows, subqueries
(which can read files), and the clock are refused before polars sees them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from clips_data.errors import UserError, nearest

if TYPE_CHECKING:
    import polars as pl

MAX_CHARS: Final = 10_000
MAX_OPERATORS: Final = 250
"""Expressions beyond these are refused: with a thousand operators polars takes minutes, with some ten thousand its
stack overflows. A list after ``in`` counts as one."""

FUNCTIONS: Final = frozenset((
    "abs", "acos", "acosd", "asin", "asind", "atan", "atan2", "atan2d", "atand", "cbrt", "ceil", "ceiling", "cos",
    "cosd", "cot", "cotd", "degrees", "div", "exp", "floor", "ln", "log", "log10", "log1p", "log2", "mod", "pi", "pow",
    "power", "radians", "round", "sign", "sin", "sind", "sqrt", "tan", "tand", "trunc", "truncate",
    "bit_and", "bit_count", "bit_not", "bit_or", "bit_xor",
    "bit_length", "char_length", "character_length", "concat", "concat_ws", "ends_with", "initcap", "left", "length",
    "lower", "lpad", "ltrim", "normalize", "octet_length", "position", "regexp_like", "regexp_replace", "replace",
    "reverse", "right", "rpad", "rtrim", "split_part", "starts_with", "string_to_array", "strpos", "substr",
    "substring", "trim", "upper",
    "coalesce", "greatest", "if", "ifnull", "least", "nullif",
    "array_contains", "array_get", "array_length", "array_lower", "array_mean", "array_reverse", "array_sum",
    "array_to_string", "array_upper",
    "cast", "try_cast", "date", "date_part", "extract", "strftime", "strptime",
))  # fmt: skip
"""Functions of polars SQL that look at the values of one row."""
_BEFORE_BRACKETS: Final = frozenset((
    "all", "and", "any", "array", "as", "between", "by", "case", "else", "ilike", "in", "is", "like", "not", "or",
    "regexp", "rlike", "then", "when",
    "char", "decimal", "numeric", "float", "timestamp", "time", "varchar",
))  # fmt: skip
"""Words that may stand before a bracket without being functions."""
_REFUSED: Final = {
    "select": "holds a subquery",
    "exists": "holds a subquery",
    "over": "holds a window",
    **dict.fromkeys(
        ("current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"), "asks the clock"
    ),
}
_TOKEN: Final = re.compile(
    r"""(?P<string>'(?:[^']|'')*') | (?P<quoted>"(?:[^"]|"")*"|`[^`]*`) | (?P<comment>--|/\*) | (?P<dollar>\$)
    | (?P<number>\.?\d[\w.]*) | (?P<word>[^\W\d]\w*) | (?P<sign>\S)""",
    re.VERBOSE,
)
_SHOWN_CHARS: Final = 80
_SHOWN_FIELDS: Final = 30


@dataclass(frozen=True)
class Expression:
    """A checked expression. ``columns`` are those of the joined view that it reads, ``fields`` what it names in them.

    Made by ``compiled``; small, and compiled again in each process that uses it.
    """

    text: str
    option: str
    kind: Literal["condition", "number"]
    columns: tuple[str, ...]
    fields: tuple[str, ...]

    def values(self, view: pl.DataFrame) -> pl.Series:
        """One value a row of ``view``: Boolean for a condition, Float64 for a number; null where it says nothing.

        Raises ``UserError`` where a value cannot be worked with, such as a text that is cast to a number and is none.
        """
        import polars as pl

        kind = pl.Boolean if self.kind == "condition" else pl.Float64
        value = _attempt(self, lambda: view.select("key", _parse(self.text).cast(kind).alias("value")))
        return value["value"]


def compiled(text: str, view: pl.DataFrame, *, option: str, kind: Literal["condition", "number"]) -> Expression:
    """Checks ``text`` against the columns and rows of ``view``, which need not be many.

    ``option`` is what the text was given with, for messages. Raises ``UserError`` naming the expression and, where a
    field is unknown, the nearest one.
    """
    if len(text) > MAX_CHARS:
        raise UserError(f"{option} {_short(text)!r} has {len(text)} characters; {MAX_CHARS} are the most. Cut it up.")
    if not text.strip():
        raise UserError(f"{option} is empty. Write a condition such as 'pairs.width >= 200'.")
    _check_words(text, option)
    _check_size(text, option)
    draft = Expression(text, option, kind, (), ())
    roots = _attempt(draft, lambda: _parse(text).meta.root_names())
    chains = list(_chains(text))
    _check_names(draft, roots, chains, view)
    expression = Expression(text, option, kind, tuple(sorted(set(roots))), _fields(chains, view))
    found = _attempt(expression, lambda: view.select("key", _parse(text).alias("value")).schema["value"])
    if kind == "condition" and not _is_boolean(found):
        raise UserError(
            f"{option} {_short(text)!r} is {found}, not true or false. Compare it with something, as in "
            "'pairs.width >= 200'."
        )
    if kind == "number" and not (found.is_numeric() or _is_boolean(found)):
        raise UserError(f"{option} {_short(text)!r} is {found}, not a number. Name a score, such as 'score.web'.")
    expression.values(view)
    return expression


def field_names(view: pl.DataFrame) -> list[str]:
    """All that an expression can name, structs by their fields."""
    import polars as pl

    found = []
    for name, kind in view.schema.items():
        found += [f"{name}.{field.name}" for field in kind.fields] if isinstance(kind, pl.Struct) else [name]
    return found


def _is_boolean(kind: pl.DataType) -> bool:
    import polars as pl

    return kind == pl.Boolean


def _parse(text: str) -> pl.Expr:
    import polars as pl

    return pl.sql_expr(text).meta.undo_aliases()


_Found = TypeVar("_Found")


def _attempt(expression: Expression, call: Callable[[], _Found]) -> _Found:
    """What ``call`` returns; whatever polars has against the expression becomes a ``UserError``."""
    import polars as pl

    try:
        return call()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, TypeError, OverflowError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = " try_cast gives null where cast fails." if "conversion" in first else ""
        raise UserError(
            f"{expression.option} {_short(expression.text)!r} cannot be worked out: {_short(first.strip())}.{hint} "
            "It is polars SQL, with names such as pairs.width and score.web."
        ) from None


# --- reading the text -------------------------------------------------------------------------------------------------


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kind and text of each token; a quoted name is given without its quotes."""
    found = []
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup or "", match.group()
        if kind == "quoted":
            token = token[1:-1].replace(token[0] * 2, token[0])
        found.append((kind, token))
    return found


def _check_words(text: str, option: str) -> None:
    tokens = _tokens(text)
    where = f"{option} {_short(text)!r}"
    for place, (kind, token) in enumerate(tokens):
        after = tokens[place + 1] if place + 1 < len(tokens) else ("", "")
        if kind in ("comment", "dollar"):
            raise UserError(f"{where} holds {token!r}, which expressions are read without. Take it out.")
        if kind == "word" and (place == 0 or tokens[place - 1][1] != ".") and token.lower() in _REFUSED:
            raise UserError(
                f"{where} {_REFUSED[token.lower()]} ({token}). Expressions look at one sample at a time and at nothing "
                "else."
            )
        if kind in ("word", "quoted") and after == ("sign", "("):
            name = token.lower()
            if name not in FUNCTIONS and (kind == "quoted" or name not in _BEFORE_BRACKETS):
                near = nearest(name, FUNCTIONS)
                raise UserError(
                    f"{where} calls {token}(), which is no function of one sample's values"
                    + (f". Did you mean {near}()? " if near else ". ")
                    + "Aggregates over all samples are not to be had here; --keep-top keeps the highest of them."
                )


def _check_size(text: str, option: str) -> None:
    tokens = _tokens(text)
    words = sum(kind == "word" and token.lower() in _BEFORE_BRACKETS for kind, token in tokens)
    signs = sum(kind == "sign" and token not in ",.()" for kind, token in tokens)
    if words + signs > MAX_OPERATORS:
        raise UserError(
            f"{option} {_short(text)!r} has {words + signs} operators; {MAX_OPERATORS} are the most. Repeat {option} "
            "for each condition, or write 'in (…)' for many values."
        )


def _chains(text: str) -> Iterator[list[str]]:
    """The dotted names in ``text``, each as its parts."""
    chain: list[str] = []
    dotted = False
    for kind, token in [*_tokens(text), ("", "")]:
        if kind in ("word", "quoted") and (not chain or dotted):
            chain.append(token)
            dotted = False
        elif token == "." and kind == "sign" and chain:
            dotted = True
        else:
            if chain:
                yield chain
            chain = [token] if kind in ("word", "quoted") else []
            dotted = False


def _fields(chains: Sequence[Sequence[str]], view: pl.DataFrame) -> tuple[str, ...]:
    known = {*field_names(view), *view.columns}
    named = (".".join(chain[:2]) if ".".join(chain[:2]) in known else chain[0] for chain in chains)
    return tuple(dict.fromkeys(name for name in named if name in known))


def _check_names(draft: Expression, roots: Sequence[str], chains: Sequence[Sequence[str]], view: pl.DataFrame) -> None:
    import polars as pl

    for root in roots:
        if root not in view.columns:
            spelled = next((".".join(chain) for chain in chains if chain[0] == root), root)
            raise _unknown(draft, spelled, field_names(view))
    for head, *rest in chains:
        kind = view.schema.get(head)
        if head in roots and rest and isinstance(kind, pl.Struct) and rest[0] not in {f.name for f in kind.fields}:
            raise _unknown(draft, f"{head}.{rest[0]}", [name for name in field_names(view) if name.startswith(head)])


def _unknown(draft: Expression, spelled: str, known: Sequence[str]) -> UserError:
    lowered = {name.lower(): name for name in known}
    ends = [name for name in known if name.rpartition(".")[2].lower() == spelled.lower()]
    near = ends[0] if ends else nearest(spelled.lower(), lowered)
    hint = f"Did you mean {lowered.get(near, near)!r}? " if near else ""
    some = ", ".join(known[:_SHOWN_FIELDS]) + (", …" if len(known) > _SHOWN_FIELDS else "")
    return UserError(
        f"{draft.option} {_short(draft.text)!r} names {_short(spelled)!r}, which is not known. {hint}Known are: {some}."
    )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
