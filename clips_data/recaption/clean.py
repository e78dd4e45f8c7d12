"""What is done to a model's answer before it is a caption: rules with names, each a function with one verdict.

Nothing is rewritten by guess. An answer is kept as it is or rejected with a code; only what the chat format left around
it and, where the prompt asks for it, an unfinished last sentence are cut off. ``raw`` keeps what the model said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from clips_data import languages, split

if TYPE_CHECKING:
    from clips_data.recaption.prompts import Cleaning

RULES: Final = {
    "turn_tokens": "cuts off a leading <think>…</think> and whatever follows an end-of-turn token written as text",
    "hit_token_cap": "flags an answer that ended because max_tokens was reached",
    "first_sentence": "keeps the first sentence only (clean.first_sentence)",
    "empty": "rejects an answer without any letter or digit",
    "refused": "rejects an answer that opens by declining, or by missing the image",
    "echo": "rejects an answer that repeats the instruction or speaks of the texts that it was given",
    "loop": "rejects an answer in which the model got stuck",
    "wrong_language": "rejects an answer that is plainly in another language than clean.language",
    "cut_to_sentence": "cuts an answer that hit the cap back to its last full sentence (clean.cut_to_sentence)",
    "opener": 'flags boilerplate openings: "The image shows", "This is a photo of"',
    "url": "flags web addresses",
    "email": "flags e-mail addresses",
    "phone": "flags telephone numbers",
}
"""The rules in the order in which they are applied. Codes and flags have the names of their rules."""


@dataclass(frozen=True)
class Judged:
    """``code`` is ``ok`` or why the answer is rejected; ``caption`` is on one line, and empty unless it is ``ok``."""

    code: str
    caption: str
    flags: list[str] = field(default_factory=list)


def finish(text: str, finish_reason: str, settings: Cleaning, instruction: str) -> Judged:
    """The caption that a model's answer ``text`` is, or the code of why it is none.

    ``instruction`` is the prompt's own words, without the texts that were filled in. With ``first_sentence`` only that
    sentence is judged, as nothing else is kept; otherwise the whole answer is, also what is cut off afterwards.
    """
    hit_cap = finish_reason == "length"
    flags = ["hit_token_cap"] if hit_cap else []
    caption = " ".join(without_turn_tokens(text).split())
    if settings.first_sentence:
        caption = first_sentence(caption)
    code = _code(caption, hit_cap, settings, instruction)
    if code != "ok":
        return Judged(code, "", flags)
    if settings.cut_to_sentence and hit_cap:
        whole = cut_to_sentence(caption)
        flags += ["cut_to_sentence"] if whole != caption else []
        caption = whole
    looks = {"opener": has_opener, "url": has_url, "email": has_email, "phone": has_phone}
    return Judged("ok", caption, flags + [flag for flag, looks_so in looks.items() if looks_so(caption)])


def _code(caption: str, hit_cap: bool, settings: Cleaning, instruction: str) -> str:
    if is_empty(caption):
        return "empty"
    if is_refusal(caption):
        return "refused"
    if is_echo(caption, instruction):
        return "echo"
    if is_loop(caption) or (hit_cap and ends_in_loop(caption)):
        return "loop"
    if settings.language and is_wrong_language(caption, settings.language):
        return "wrong_language"
    return "ok"


# --- what the chat format left ----------------------------------------------------------------------------------------

_THOUGHTS = re.compile(
    r"\A\s*(?:<s>|<bos>)?\s*(?:<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|(?:(?!<think).)*</think(?:ing)?>)?", re.DOTALL
)
_END_OF_TURN = re.compile(
    r"</s>|<eos>|<end_of_turn>|<turn\|>|<end_of_utterance>|<\|END_OF_TURN_TOKEN\|>|<｜end▁of▁sentence｜>|\[\|endofturn\|\]"
    r"|<\|(?:im_end|end|eot|eot_id|eom_id|end_of_text|endoftext|end_of_turn|return)\|>"
)


def without_turn_tokens(text: str) -> str:
    """The answer alone: models run by a template that is not quite theirs write its tokens as text and talk on.

    What follows an end of turn is a conversation that the model made up. Thoughts that were never closed leave nothing.
    """
    return _END_OF_TURN.split(_THOUGHTS.sub("", text, count=1), maxsplit=1)[0]


# --- rejected ---------------------------------------------------------------------------------------------------------

_SORRY = r"(?:i'?m|i am) (?:so |very |really |truly )?(?:sorry|afraid)|(?:so )?sorry|my apologies|i apologi[sz]e"
_CANNOT = r"(?:can ?not|can'?t|could ?no?'?t|am (?:not able|unable) to|'m (?:not able|unable) to|won't|will not)"
_DO = (
    r"(?:see (?:the|any|an|this|your)|view|assist|help (?:you|with)|provide|describe|identify|recogni[sz]e|process"
    r"|access|display|analy[sz]e|fulfil|comply|answer|generate|create a|write a|determine|do that|continue|open)\b"
)
_IMAGE = r"(?:image|picture|photo|photograph|file|attachment)\b"
_GIVEN = r"(?:provided|attached|uploaded|included|given|shared|available|found|loaded|displayed|opened)"
_REFUSALS = (
    rf"(?:{_SORRY})[,.;!–—-]* ?(?:but\b|i ?{_CANNOT}|i do(?: not|n't)|as an? |there (?:is|'s) no|no {_IMAGE}|we can)",
    rf"(?:{_SORRY})[.!]*$",
    rf"(?:unfortunately|regrettably),? (?:i ?{_CANNOT}|i do(?: not|n't)|(?:there (?:is|was) )?no {_IMAGE}|we can)",
    rf"(?:sorry, )?i ?{_CANNOT} {_DO}",
    rf"(?:i am |i'm )?(?:unable|not able) to {_DO}",
    rf"i do(?: not|n't) (?:have (?:the ability|access|enough information)|(?:have|see) (?:an?|any|the) {_IMAGE})",
    r"i(?: am|'m) (?:just |only )?an? (?:ai\b|(?:large )?language model|text[- ]based)",
    r"i(?: am|'m) not comfortable|it is(?: not|n't) (?:possible|appropriate)(?: for me)? to",
    r"as an? (?:ai(?:,| (?:language|model|assistant|system|i)\b)|(?:large )?language model|text[- ]based)",
    rf"(?:it (?:seems|appears|looks like)(?: that)? )?there (?:is|was) no {_IMAGE}.{{0,12}}\b(?:{_GIVEN}|to describe)",
    r"(?:it (?:seems|appears|looks like)(?: that)? )?you (?:did not|didn't|have not|haven't|forgot to) "
    r"(?:provide|upload|attach|share)",
    rf"no {_IMAGE} (?:was |is |has been )?{_GIVEN}",
    rf"(?:the|your|this) {_IMAGE} (?:is not|isn't|was not|wasn't|could not be|cannot be|can't be) {_GIVEN}",
    rf"(?:the|your|this) {_IMAGE} (?:failed to|did not|didn't) (?:load|open)",
    rf"(?:please|could you|can you)(?: please)? (?:provide|upload|share|attach|send)\b.{{0,20}}\b{_IMAGE}",
    rf"i(?: would|'d)? need (?:to see |you to |the |an ).{{0,20}}\b{_IMAGE}",
    rf"without (?:seeing )?(?:the|an) {_IMAGE},? i\b",
    # German, French, Spanish.
    r"(?:es )?tut mir (?:sehr )?leid,? (?:aber )?(?:ich|das|als)\b|leider kann ich\b|ich kann leider\b",
    r"(?:je suis )?(?:désolée?|navrée?),? (?:mais )?(?:je|il|en)\b",
    r"je ne (?:peux|suis) pas (?:en mesure|capable|voir|décrire|vous aider|t'aider|fournir|identifier)",
    r"lo siento,? (?:pero )?(?:no|como)\b|no puedo (?:ver|describir|ayudar|procesar|proporcionar|identificar)\b",
    # Portuguese, Italian, Russian.
    r"(?:desculpe|sinto muito|lamento),? (?:mas )?(?:não|eu|como)\b",
    r"não (?:posso|consigo) (?:ver|descrever|ajudar|processar|fornecer|identificar)\b",
    r"mi dispiace,? (?:ma )?(?:non|in quanto)\b|non posso (?:vedere|descrivere|aiutar|elaborare|fornire|identificare)",
    r"(?:извините|простите|к сожалению|прошу прощения),? (?:но )?я (?:не|как)\b",
    r"я не (?:могу|вижу) (?:помочь|описать|увидеть|видеть|изображени|просм)",
    # Chinese, Japanese.
    r"(?:很|非常|真的)?(?:抱歉|对不起|對不起)[，,。！]? ?(?:但是?)?(?:我|作为|作為|这|這|无法|無法)",
    r"我(?:无法|無法|不能)(?:查看|看到|描述|识别|識別|提供|处理|處理|协助|協助)",
    r"申し訳(?:ありません|ございません)|(?:すみません|ごめんなさい)[が、。]",
)
_REFUSAL = re.compile(rf"[\s*>#_-]*(?:{'|'.join(_REFUSALS)})", re.IGNORECASE)


def is_empty(caption: str) -> bool:
    return not any(character.isalnum() for character in caption)


def is_refusal(caption: str) -> bool:
    """Opens as models do that decline. Only the opening counts, and no quotation: "I'm sorry" may stand on a card.

    Feelings are no refusals: "Sorry-looking dog", "I'm sorry for your loss", "I can't believe it" are captions.
    """
    return bool(_REFUSAL.match(caption.replace("’", "'")))


_ECHO_WORDS = 8
_QUOTED = re.compile(r'"[^"]*"|“[^”]*”|«[^»]*»|「[^」]*」')
_LEAKS = re.compile(
    r"\bsentence [12]\b(?= ?[:,(]| (?:and|is|says|describes|mentions|provides)\b)|\balt[- ]text\b|\btriple quotes\b"
    r"|\b(?:web|raw|synthetic|provided|given) captions?\b|\bthe (?:provided|given) (?:text|description)\b"
    r"|\b(?:based on|according to) the (?:caption|text|description) (?:provided|given|above)\b"
    r"|\b(?:rewritten|merged|fused|rephrased) (?:caption|sentence|version)\b",
    re.IGNORECASE,
)


def is_echo(caption: str, instruction: str) -> bool:
    """Opens with the instruction, shares eight words in a row with it, or speaks of the texts that it was given.

    Eight, because captions do say "in the foreground and the background" as instructions do. What stands in quotation
    marks is text read from the picture and counts for nothing.
    """
    own = _QUOTED.sub(" ", caption)
    if _LEAKS.search(own):
        return True
    told, said = _words(instruction), _words(own)
    if len(told) >= 4 and said[: len(told)] == told:
        return True
    return bool(_runs(told, _ECHO_WORDS).keys() & _runs(said, _ECHO_WORDS).keys())


def is_loop(caption: str, *, words_in_phrase: int = 6, max_repeats: int = 3) -> bool:
    """Says the same six words more than three times, or spends 24 characters and more on one unit again and again."""
    phrases = _runs(_words(caption), words_in_phrase)
    if phrases and max(phrases.values()) > max_repeats:
        return True
    return any(len(match[0]) >= 24 for match in re.finditer(r"(.{1,40}?)\1{5,}", caption))


def ends_in_loop(caption: str) -> bool:
    """Ends in one phrase said three times over. The end may be anywhere in the phrase, as a token cap may fall."""
    return _tail_repeats(_words(caption), least=6) or _tail_repeats(list(caption.lower()), least=24)


def is_wrong_language(caption: str, expected: str) -> bool:
    """Both halves of the caption are told to be in one and the same other language: names and titles fool one half.

    Short captions are never told. Their bytes are counted, because 14 characters of Chinese say what 40 of English do.
    """
    if len(caption.encode()) < 40:
        return False
    middle = caption.find(" ", len(caption) // 2)
    middle = middle if 0 < middle < len(caption) * 3 // 4 else len(caption) // 2
    told = {languages.language(half) for half in (caption[:middle], caption[middle:])}
    return len(told) == 1 and not told & {expected, languages.UNCLEAR, languages.NO_LETTERS}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def _tail_repeats(pieces: list[str], *, least: int, longest_period: int = 40) -> bool:
    """Whether at least the last ``least`` pieces, and three periods, repeat what stands one period before them."""
    for period in range(1, min(longest_period, len(pieces) // 2) + 1):
        repeated = period
        while repeated < len(pieces) and pieces[-1 - repeated] == pieces[-1 - repeated + period]:
            repeated += 1
            if repeated >= max(3 * period, least):
                return True
    return False


# --- cut --------------------------------------------------------------------------------------------------------------

_FULL_STOP = re.compile(r"[.!?。！？｡…؟।](?:[\"'”’»)\]』」]*)$")


def first_sentence(caption: str) -> str:
    """By the sentence rule of ``split``; a caption without one is kept as it is."""
    spans = split.split_at_sentences(caption)
    return caption[slice(*spans[0])] if spans else caption


def cut_to_sentence(caption: str) -> str:
    """Without its last sentence, if that is unfinished. A caption of one unfinished sentence is kept as it is."""
    spans = split.split_at_sentences(caption)
    if len(spans) < 2 or _is_finished(caption, len(spans)):
        return caption
    return caption[: spans[-2][1]]


def _is_finished(caption: str, num_sentences: int) -> bool:
    """Ends in a full stop after which the sentence rule would begin anew: not so after "Dr." or the "3." of "3.5"."""
    if not _FULL_STOP.search(caption) or re.search(r"[0-9]\.$", caption):
        return False
    return len(split.split_at_sentences(f"{caption} Nobody knows.")) > num_sentences


# --- flagged ----------------------------------------------------------------------------------------------------------

_PICTURE = r"(?:image|picture|photo(?:graph)?|illustration|painting|drawing|scene|screenshot|graphic|artwork|shot|view)"
_OPENER = re.compile(
    rf"\W*(?:(?:in )?(?:the|this) (?:[\w-]+ )?{_PICTURE}\b"
    rf"|(?:(?:this|it|here) is )?an? (?:[\w-]+ ){{0,2}}{_PICTURE} (?:of|show(?:s|ing)|depict(?:s|ing)|featuring)\b"
    r"|here(?: is|['’]s) (?:the|an?) (?:[\w-]+ ){0,3}(?:caption|description)\b|(?:caption|description)\s?:"
    r"|(?:sure|certainly|of course|absolutely)[,!.]|(?:we|you) (?:can )?see\b)",
    re.IGNORECASE,
)
_URL = re.compile(
    r"https?://\w|\bwww\d?\.\w|\b[a-z0-9-]{2,63}\.(?:com|org|net|edu|gov|info|biz|shop|co\.[a-z]{2})\b(?!\.\w)",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){0,4}\.[a-z]{2,24}\b", re.IGNORECASE)
# Shapes that hardly anything but telephone numbers has, so that years, sizes, prices, ISBNs and dates are none.
_PHONE_SHAPES = (
    r"\+[1-9][0-9]{0,2}[ .-]?(?:\(0?[0-9]{1,4}\)[ .-]?)?[0-9]{1,4}(?:[ ./-]?[0-9]{2,4}){2,4}",  # +49 30 123456
    r"(?:\+?1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[0-9]{3}[ .-][0-9]{4}",  # (555) 123-4567
    r"0[0-9]{2,4}[ /-][0-9]{3,4}[ -]?[0-9]{3,5}",  # 0171 123 4567
    r"0[1-9](?:[ .][0-9]{2}){4}",  # 01 23 45 67 89
)
_PHONE = re.compile(
    rf"(?<![\w.,$€£¥#/+-])(?<![$€£¥#] )(?:{'|'.join(_PHONE_SHAPES)})(?![\w%]|[.,/x-][0-9])"
    r"|\b(?:tel|telephone|phone|fax|mobile|whatsapp|hotline|telefon|tél|teléfono|тел|电话|電話)\b"
    r"[ .:：#]{1,3}\(?\+?[0-9](?:[ ()./-]{0,2}[0-9]){5,14}\b",
    re.IGNORECASE,
)


def has_opener(caption: str) -> bool:
    """Opens with words about there being a picture. They say nothing, and a data set full of them teaches them."""
    return bool(_OPENER.match(caption))


def has_url(caption: str) -> bool:
    return bool(_URL.search(_EMAIL.sub(" ", caption)))


def has_email(caption: str) -> bool:
    return bool(_EMAIL.search(caption))


def has_phone(caption: str) -> bool:
    return bool(_PHONE.search(caption))
