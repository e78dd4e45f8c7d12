"""Words of captions as the published captioning metrics count them, with Java and without.

CIDEr, BLEU and ROUGE-L are published on the tokens of Stanford's ``PTBTokenizer`` (CoreNLP 3.4.1, lower-cased) less a
list of punctuation marks: that is what pycocoevalcap does, and it needs Java. ``RULES`` makes these tokens by rules of
ours, written from what Stanford's was seen to answer; ``STANFORD`` runs Stanford's.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from clips_data.errors import UserError

PUNCTUATION: Final = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""pycocoevalcap's list. Its brackets are upper-case and the tokens are not, so that brackets stay."""

_BLANK: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufe0e\ufe0f]+")
_NUMERAL: Final = re.compile(
    r"[⁺⁻₊₋]?[\xb2\xb3\xb9\u2070-\u2079]+|[\u2080-\u2089]+|[\xbc-\xbe\u2150-\u215f]|[\u2460-\u24ff]"
)
"""Raised, lowered, broken and circled numbers are words by themselves; Python counts them to a word."""
_ENTITIES: Final = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY: Final = re.compile("|".join(_ENTITIES), re.IGNORECASE)
_PLAIN: Final = str.maketrans(
    {"‘": "'", "’": "'", "‛": "'", "‹": "'", "›": "'", "“": '"', "”": '"', "«": '"', "»": '"', "\xad": None}
    | {"‒": "--", "–": "--", "—": "--", "―": "--", "…": "..."}
)
_SPELT: Final = str.maketrans(
    {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
    | {'"': "''", "£": "#", "€": "$", "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
)

_MARKS: Final = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u064b-\u065e\u0670\u06d6-\u06ed\u0900-\u0dff\u0e31-\u0e4e"
"""Signs on letters, which Python does not count to a word."""
_CHARACTER: Final = rf"(?:[^\W_]|[{_MARKS}])"
_LETTER: Final = rf"(?:[^\W\d_]|[{_MARKS}])"
_END: Final = rf"(?!{_CHARACTER})"
_HYPHEN: Final = "[-‐‑]"
_PART: Final = r"[A-Za-z0-9]++(?:-[A-Za-z]++)*+"
_VALUE: Final = r"""(?:'[^'<>]*+'|"[^"<>]*+"|[\w%#-]++)"""
_URL_REST: Final = r"""[^\s<>"|()]*[^\s<>"|().!?{},-]"""

# Their point is part of them: always, after a capital, and before a number.
_SHORT: Final = (
    "adj|adm|adv|ala?|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|cie|cmdr|co|col|"
    "colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|drs?|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|hon|inc|ind|"
    "insp|invt|jan|jos|jr|jul|jun|kans?|ky|lieut|lt|ltd|maj|mar|md|mfg|mich|minn|mlle|mme|mo|mont?|mrs?|ms|msgr|mt|mtg|"
    "natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|pres|profs?|pte|pty|pvt|rd|reps?|rev|rt|sens?|sept?|seq|sfc|sgt|spc|sq|"
    "sr|ste?|supt|sys|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wisc?|wm|wyo"
)
_SHORT_CAPITALISED: Final = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_SHORT_BEFORE_NUMBER: Final = "art|ca|figs?|nos?|op|pp|prop"

_KINDS: Final = (
    # By far the most tokens, found soonest.
    r"(?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b)[A-Za-z]++(?=[ ;]|,\ |$)",
    # What is written around text.
    rf"<[A-Za-z]\w*+(?:\s++[A-Za-z][\w:-]*+(?:={_VALUE})?+)*+\s*+/?>|</[A-Za-z]\w*+\s*+>|<[!?][A-Za-z-][^<>]*+>|&#\d++;",
    rf"(?i:https?)://[^\s<>\"|().]+[.:]{_URL_REST}",
    rf"(?i:www)\.[^\W_]++(?:\.[^\W_]++)++(?:/{_URL_REST})?",
    rf"[^\W_]++(?:\.[^\W_]++){{0,20}}?\.(?:com|net|org)(?:/{_URL_REST}|{_END})",
    r"(?:mailto:)?[A-Za-z0-9][\w.+%-]{0,100}@\w++(?:[.-]\w++)*+",
    rf"@[A-Za-z_]\w*+|#{_LETTER}++",
    rf"[<>]?[:;=]['o-]?(?:[()\\{{@|\[\]]|[DPdpO3]{_END})|\^_\^|>_<|-_-",
    r"\(\d{2,3}\)\ ?\d{3,4}[-\ ]?\d{4}",
    r"[A-Z]*\$|[cC](?:\+\+|\#)|[A-Z]++(?:&[A-Z]++)++",
    # Apostrophes that belong to a word, and places where a word is two.
    rf"'[nN]'|'(?:[eE][mM]|[cC]ause|[tT]il|[nN]){_END}|(?<!\w)'(?:[1-9]0s|\d\d){_END}",
    r"'[tT](?=(?:is|was)\b)|[yYjJ]'(?=[a-z])|(?:[oOlL]|[oO]l)'" + _END,
    r"(?i:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|lem(?=me\b)|gim(?=me\b))",
    rf"(?i:'(?:s|m|d|ll|re|ve)|n't){_END}",
    rf"{_CHARACTER}+?(?=[nN]'[tT]{_END})",
    rf"(?:[dDoOlLnN]|[cC](?='est)|[qQ]u|[nN]or)'{_LETTER}{_CHARACTER}*+|[cC]'mon\b|[eE]'er\b|rock(?='n')",
    rf"{_LETTER}+[aeiou]'[aeiou]{_LETTER}*+",
    # Words joined.
    rf"(?:{_LETTER}\.){{1,20}}+(?:-{_CHARACTER}++)++",
    rf"{_PART}(?:/{_PART}){{1,2}}",
    r"\d{1,4}[- ]\d{1,4}/\d{1,4}\b",
    rf"{_CHARACTER}++(?:[.,]{_CHARACTER}++){{0,20}}+(?:{_HYPHEN}{_CHARACTER}++)++",
    rf"{_CHARACTER}++(?:_{_CHARACTER}++)++(?:-{_CHARACTER}++)*+",
    # Points that belong to a word.
    rf"Ph\.D\.?|{_LETTER}(?:\.{_LETTER})++(?:\.|{_END})",
    rf"(?:(?i:{_SHORT})|{_SHORT_CAPITALISED})\.(?!{_LETTER})|(?i:{_SHORT_BEFORE_NUMBER})\.(?=\ ?\d)",
    rf"{_LETTER}\.(?!{_LETTER}|$)",
    # Words and numbers.
    rf"{_LETTER}{_CHARACTER}*+(?:[.!?]{_LETTER}{_CHARACTER}*+)*+",
    rf"[-+]?[.,:]?\d++(?:[.,:]\d++)++|\d++(?:\.[xX]{_END}|{_LETTER}{_CHARACTER}*+)|[-+]?[.,:]?\d++",
    # Marks.
    r"[!?]++|--+|_++|\*++|#++|@++|<<|>>|\.\.\.",
    r"[!-~\xa1-\u2023\u2026-\u2042\u2070-\u209f\u20a4\u20ac\u2100-\u2bff\u3001\u3002\u30fb\uff01-\uffe6]",
)
_TOKEN: Final = re.compile("|".join(_KINDS))


class Tokenizer(NamedTuple):
    """``tokens`` makes lower-cased words without punctuation of texts of any content; a blank text has none."""

    name: str
    """For results: figures of different tokenizers are not compared to the last digit."""
    tokens: Callable[[Sequence[str]], list[list[str]]]


def usual() -> Tokenizer:
    """Stanford's where there is a Java that runs, else ours."""
    return STANFORD if java() else RULES


@functools.cache
def java() -> str | None:
    """The path of a Java that runs: there are stubs that only say where to get one."""
    path = shutil.which("java")
    return path if path and subprocess.run([path, "-version"], capture_output=True).returncode == 0 else None


def jar(room: str, name: str) -> Path:
    """A file that comes with pycocoevalcap. Raises ``UserError`` where that is not installed."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "Captioning metrics need pycocoevalcap: install the extra `eval`, as in pip install clips[eval]."
        )
    return Path(package.submodule_search_locations[0]) / room / name


def _by_rules(texts: Sequence[str]) -> list[list[str]]:
    return [_kept(map(_spelt, _TOKEN.findall(_clean(text).translate(_PLAIN)))) for text in texts]


def _by_java(texts: Sequence[str]) -> list[list[str]]:
    """The program that pycocoevalcap runs, asked by its input instead of by a file beside it, and in UTF-8."""
    program = jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    main = "edu.stanford.nlp.process.PTBTokenizer"
    command = [str(java()), "-Dfile.encoding=UTF-8", "-cp", str(program), main, "-preserveLines", "-lowerCase"]
    lines = "".join(f"{_clean(text)}\n" for text in texts).encode(errors="replace")
    done = subprocess.run([*command, "-encoding", "UTF-8"], input=lines, capture_output=True)
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(
            f"{main} answered {len(found)} of {len(texts)} captions: {said}. Repair Java, or take it off PATH."
        )
    return [_kept(line.split(" ")) for line in found]


RULES: Final = Tokenizer("PTB by rules of clips, lower-cased, punctuation of pycocoevalcap removed", _by_rules)
STANFORD: Final = Tokenizer("PTBTokenizer of Stanford CoreNLP 3.4.1 (Java), as in pycocoevalcap", _by_java)


def _clean(text: str) -> str:
    """One line, without characters that no word has and that would end a line."""
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0].lower()], text)
    return _BLANK.sub(" ", _NUMERAL.sub(r" \g<0> ", text)).strip()


def _spelt(token: str) -> str:
    if token.startswith("--") and len(token) < 5:
        return "--"
    spelt = token.translate(_SPELT) if len(token) == 1 else token.replace("(", "-LRB-").replace(")", "-RRB-")
    return spelt.lower()


def _kept(tokens: Iterable[str]) -> list[str]:
    """Scorers split at blanks, and some tokens have some: an old phone number, a tag with attributes."""
    return [word for token in tokens if token not in PUNCTUATION for word in token.split()]
