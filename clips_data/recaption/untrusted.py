"""Makes a text from strangers safe to stand in a prompt: it may say what it likes, but it cannot act as the template.

Everything is looked for in a *folded* copy: NFKD without combining marks and format characters, in any letter case.
Some tokenizers normalise before they look for their special tokens, so that a full-width ``＜image＞`` can become a
token behind our back. Only the copy is folded: NFKC of the text itself would turn "5½" into "51⁄2".

What is kept on purpose: HTML tags that no model has for a token, "5 < 6", "[live]", joiners inside emoji and between
letters of scripts that need them, and "user: friendly": templates write their roles with a capital.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

MAX_INPUT_CHARS: Final = 1000
FLAGS: Final = {
    "input_special_token": "a special token of a model or chat template was taken out",
    "input_role_marker": "role markers of plain-text templates lost their hashes and colons, so that they open no turn",
    "input_control": "control, bidirectional or other invisible characters were taken out",
    "input_delimiter": "what the prompt puts around texts from outside was taken out",
    "input_cut": "the text was longer than the cap, or was built to become a token again and again, and was cut",
    "input_instruction": "the text reads like an instruction to a model; it is kept as it is",
}
"""The flags that ``neutralise`` gives, in this order, and what they mean."""

FAMILY_TOKENS: Final = (
    # The many of one shape: ChatML, GPT, Qwen, Phi, Zephyr, Llama 3, Granite, Command, Falcon, Molmo; Gemma 4; EXAONE.
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|startoftext|>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|eom_id|>", "<|python_tag|>", "<|image|>", "<|image_1|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<|object_ref_start|>", "<|box_start|>", "<|start_of_role|>", "<|START_OF_TURN_TOKEN|>",
    "<|channel|>", "<|message|>", "<|return|>", "<|turn>", "<turn|>", "[|Human|]", "[|endofturn|]",
    # DeepSeek and Kimi, with bars and brackets of their own.
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "◁think▷", "◁/think▷",
    # Llama 2 and Mistral.
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[IMG]", "[/IMG]", "[IMG_BREAK]", "[IMG_END]", "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]", "[ARGS]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    # Gemma, PaliGemma, T5, sentencepiece.
    "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<bos>", "<eos>",
    "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<sep>", "<cls>", "<extra_id_0>", "<unused0>", "<loc0000>", "<seg000>",
    # BERT, GLM, BLIP.
    "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[BOS]", "[EOS]", "[gMASK]", "[sMASK]", "[DEC]", "[ENC]", "<sop>",
    "<eop>", "[unused0]", "[UNUSED_TOKEN_145]",
    # Image places: LLaVA, InternVL, MiniCPM-V, Idefics, SmolVLM, XGen, Qwen-VL 1, Kosmos, Florence.
    "<image>", "</image>", "<img>", "</img>", "<IMG_CONTEXT>", "<im_start>", "<im_end>", "<im_patch>", "<video>",
    "</video>", "<audio>", "</audio>", "<image_id>", "</image_id>", "<slice>", "</slice>", "<global-img>",
    "<row_1_col_1>", "<fake_token_around_image>", "<end_of_utterance>", "<image placeholder>", "<ref>", "</ref>",
    "<box>", "</box>", "<quad>", "</quad>", "<point>", "</point>", "<poly>", "</poly>", "<grounding>", "<phrase>",
    "</phrase>", "<object>", "</object>", "<od>", "</od>", "<ocr>", "</ocr>", "<cap>", "</cap>", "<dcap>", "<ncap>",
    # Turns, thoughts and tools.
    "<eot>", "<eod>", "<eoh>", "<eoa>", "<|eot|>", "<system>", "</system>", "<user>", "</user>", "<assistant>",
    "</assistant>", "<human>", "</human>", "<think>", "</think>", "<thinking>", "</thinking>", "<thought>",
    "</thought>", "<reasoning>", "</reasoning>", "<answer>", "</answer>", "<tools>", "</tools>", "<tool_call>",
    "</tool_call>", "<tool_response>", "</tool_response>", "<function>", "</function>", "<function=name>",
    "<parameter=name>", "</parameter>", ">>QUESTION<<", ">>ANSWER<<", ">>INTRODUCTION<<", "|ENDOFTEXT|", "|SPEAKER|",
)  # fmt: skip
"""Special tokens of the common families. Always taken out, whatever the model's own list says."""

# The shapes that families number and extend at will. All repeats are bounded, so that no text is slow.
_SHAPES = (
    r"<\|[^<>]{1,64}?\|>", r"<\|[^<>\s]{1,64}>", r"<[^<>\s|]{1,64}\|>", r"\[\|[^\[\]]{1,64}?\|\]",
    r"</?[a-z0-9]{1,24}(?:[_-][a-z0-9]{1,24}){1,8}/?>", r"<(?!h[1-6]>)[a-z]{1,16}[0-9]{1,6}>",
    r"\[unused_?(?:token_?)?[0-9]{1,4}\]", r"<(?:function|parameter|tool)=[^<>]{1,64}>", r"◁[^◁▷]{1,32}▷",
)  # fmt: skip
# Inside longer words too, as tokenizers know no words; the short ones not, for the sake of DUBAI and ROBOT.
_ROLES = (
    "USER|User|ASSISTANT|Assistant|SYSTEM|System|HUMAN|Human|QUESTION|Question|ANSWER|Answer|INSTRUCTION|Instruction"
    "|RESPONSE|Response|(?<![A-Za-z])(?:AI|GPT|BOT|Bot)|CHATBOT|Chatbot"
)
_ROLE_MARKER = re.compile(rf"#{{3,}}|(?P<role>{_ROLES}) ?:")
# Not by category, which changes with the Unicode version that Python knows: emoji of next year must survive, and the
# same text must give the same bytes. White space is left to str.split; U+E0000.. are tags and variation selectors, of
# which the short ones stay where an emoji or a script may have them, one at a time: runs of them can carry hidden text.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u070f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ud800-\uf8ff\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U0010ffff]+"
    "|(?<![0-9#*\xa9-\U0001ffff])[\ufe00-\ufe0f]+|(?<=[\ufe00-\ufe0f])[\ufe00-\ufe0f]+"
)
_JOINERS = ("\u200c", "\u200d")
_QUOTES = {'"': ("“", "”"), "'": ("‘", "’"), "`": ("‘", "’")}
# A text is looked at up to this many times its cap: what is taken out may be longer than what is left.
_READ_AHEAD = 8
_MOST_ROUNDS = 16


def neutralise(
    text: str, special_tokens: Iterable[str], *, delimiters: Sequence[str] = (), max_chars: int = MAX_INPUT_CHARS
) -> tuple[str, list[str]]:
    """``text`` as it may stand in a prompt on one line, at most ``max_chars`` characters, and flags for what was done.

    Neither ``special_tokens`` (the model's) nor ``FAMILY_TOKENS`` nor ``delimiters`` are left in it, however they were
    written; a quotation mark at an end of the text, beside a delimiter of such marks, becomes a curly one. Applied to
    its own output it changes nothing. Instruction-like texts are flagged, and kept: they may be all that the picture
    says. A special token of nothing but white space cannot be taken out of a text and is passed over.
    """
    tokens = _token_pattern(tuple(special_tokens))
    fences = _delimiter_pattern(tuple(delimiters))
    marks = [mark.strip()[0] for mark in dict.fromkeys(delimiters) if len(set(mark.strip())) == 1]
    safe = text[: max_chars * _READ_AHEAD]
    flags = {"input_cut"} if len(safe) < len(text) else set()
    for _ in range(_MOST_ROUNDS):
        before = safe
        for flag, changed in (
            ("input_control", _without_invisible),
            ("input_special_token", lambda given: _without(given, tokens)),
            ("input_delimiter", lambda given: _without(given, fences)),
            ("input_role_marker", lambda given: _without(given, _ROLE_MARKER)),
        ):
            given, safe = safe, changed(safe)
            if safe != given:
                flags.add(flag)
        safe = " ".join(safe.split())
        if len(safe) > max_chars:
            safe = _shortened(safe, max_chars)
            flags.add("input_cut")
        safe = _with_curly_ends(safe, marks)
        if safe == before:
            break
    else:  # whoever nests tokens this deep has nothing to say about a picture
        safe = ""
        flags.add("input_cut")
    if _INSTRUCTION.search(_fold(safe)[0]):
        flags.add("input_instruction")
    return safe, [flag for flag in FLAGS if flag in flags]


# --- the folded copy --------------------------------------------------------------------------------------------------


def _fold(text: str) -> tuple[str, Sequence[int]]:
    """The folded copy, and for each of its characters the index of the one in ``text`` that it comes from."""
    if text.isascii():
        return text, range(len(text))
    folded = [_folded(character) for character in text]
    return "".join(folded), [i for i, piece in enumerate(folded) for _ in piece]


@functools.lru_cache(maxsize=1 << 14)
def _folded(character: str) -> str:
    pieces = unicodedata.normalize("NFKD", character)
    return "".join(piece for piece in pieces if unicodedata.category(piece) not in ("Mn", "Me", "Cf"))


def _without(text: str, pattern: re.Pattern[str] | None) -> str:
    """``text`` with a space in place of what matches in its folded copy; a match's last group stays, if it has one."""
    if pattern is None:
        return text
    folded, origin = _fold(text)
    pieces, done = [], 0
    for match in pattern.finditer(folded):
        pieces.append(text[done : max(done, origin[match.start()])])
        if match.lastgroup:
            start, end = match.span(match.lastgroup)
            pieces.append(text[origin[start] : origin[end - 1] + 1])
        pieces.append(" ")
        done = origin[match.end() - 1] + 1
    return "".join(pieces) + text[done:] if done else text


# --- one step each ----------------------------------------------------------------------------------------------------


def _without_invisible(text: str) -> str:
    """Closes the gap that they leave, so that a word split by a soft hyphen is whole again."""

    def kept(match: re.Match[str]) -> str:
        around = text[max(0, match.start() - 1) : match.start()] + text[match.end() : match.end() + 1]
        joins = len(around) == 2 and not any(c.isascii() or c.isspace() for c in around)
        return match[0] if joins and match[0] in _JOINERS else ""

    return _INVISIBLE.sub(kept, text)


@functools.lru_cache(maxsize=16)
def _token_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Longest first. Tokens that hold one of the families' shapes are left out: a long alternation is slow."""
    shapes = re.compile("|".join(_SHAPES), re.IGNORECASE)
    folded = {" ".join(_fold(token)[0].split()) for token in (*FAMILY_TOKENS, *special_tokens)}
    literal = sorted((token for token in folded if token and not shapes.search(token)), key=lambda t: (-len(t), t))
    return re.compile("|".join((*_SHAPES, *map(re.escape, literal))), re.IGNORECASE)


@functools.lru_cache(maxsize=16)
def _delimiter_pattern(delimiters: tuple[str, ...]) -> re.Pattern[str] | None:
    """One mark repeated is also found in a longer run of that mark."""
    folded = {" ".join(_fold(delimiter)[0].split()) for delimiter in delimiters} - {""}
    literal = sorted(folded, key=lambda d: (-len(d), d))
    return re.compile("|".join(f"(?:{re.escape(d)})+" for d in literal), re.IGNORECASE) if literal else None


def _shortened(text: str, max_chars: int) -> str:
    """Cut between words, unless that would cost half of it, as in scripts without spaces."""
    end = text.rfind(" ", max_chars // 2, max_chars + 1)
    return text[: end if end > 0 else max_chars].rstrip()


def _with_curly_ends(text: str, marks: Iterable[str]) -> str:
    """A mark at an end would make a delimiter of such marks longer. Marks without a curly form are stripped."""
    for mark in marks:
        inner = text.strip(mark)
        opening, closing = _QUOTES.get(mark, ("", "")) if inner else ("", "")
        text = (opening if text.startswith(mark) else "") + inner + (closing if text.endswith(mark) else "")
    return text


# --- what reads like an instruction to a model ------------------------------------------------------------------------

_INSTRUCTIONS = (
    # English. A road sign says "you are now entering", a song "forget the rules".
    r"\b(?:ignore|disregard|forget|override|bypass|do not follow|don'?t follow)\b.{0,40}"
    r"\b(?:previous|prior|above|preceding|earlier|other|all|any|your|system)\b.{0,24}"
    r"\b(?:instructions?|prompts?|directions?|rules|guidelines|commands?)\b",
    r"\b(?:ignore|disregard)\b.{0,20}\b(?:everything|anything|all)\b.{0,12}\b(?:above|before|said|told)\b",
    r"\byou are now\b(?! (?:entering|leaving|crossing|here|in|at|on|under|inside|free|ready)\b)",
    r"\byou are (?:an? )?(?:ai|(?:helpful )?assistant|language model|chatbot)\b", r"\bfrom now on,? you\b",
    r"\bas an ai\b", r"\bact as an? (?:ai|assistant|model)\b", r"\bjailbreak\b", r"\bnew instructions?:",
    r"\b(?:respond|reply|answer)\W{1,3}(?:only|just|exclusively|solely|strictly)\b",
    r"\b(?:respond|reply) (?:with|in)\b", r"\bonly (?:respond|reply|answer|output)\b",
    r"\bsystem[ -]?(?:prompt|instructions?)\b", r"\bend of (?:prompt|instructions)\b",
    r"\b(?:output|print|say|write|return|repeat) (?:only |just )?(?:the following|exactly|verbatim)\b",
    r"\b(?:reveal|show|print|repeat|leak) (?:me )?(?:your|the) (?:\w+ )?(?:prompt|instructions)\b",
    r"\b(?:describe|caption|label) (?:this|the) (?:image|picture|photo) (?:as|with)\b",
    r"\b(?:do not|don'?t) (?:describe|caption|mention) (?:this|the) (?:image|picture|photo)\b",
    # German, French.
    r"\b(?:ignorier\w*|vergiss|vergesst|missachte\w*)\b.{0,30}\b(?:vorherige|vorige|bisherige|obige|alle)\w*\b.{0,20}"
    r"\b(?:anweisung|instruktion|vorgabe|befehl|regel)\w*", r"\bab (?:jetzt|sofort) bist du\b", r"\bals ki[ -]",
    r"\bdu bist (?:jetzt|nun) ein\w* (?:ki|assistent|chatbot|sprachmodell)",
    r"\bantworte (?:nur|ausschließlich) (?:mit|auf)\b",
    r"\b(?:ignor(?:e|ez|er)|oubli(?:e|ez|er)|ne tiens pas compte)\b.{0,30}\b(?:instruction|consigne|directive)s\b",
    r"\b(?:tu es|vous êtes) (?:maintenant|désormais) une? (?:ia|assistant|modèle)",
    r"\ben tant qu['’](?:ia\b|intelligence artificielle)",
    r"\brépond(?:s|ez) (?:uniquement|seulement) (?:par|avec|en)\b",
    # Spanish, Portuguese, Italian, Dutch.
    r"\b(?:ignor[ae]|olvid[ae]|haz caso omiso)\b.{0,30}\b(?:instrucciones|indicaciones|órdenes)\b",
    r"\ba partir de ahora,? eres\b", r"\bresponde (?:solo|solamente|únicamente) (?:con|en)\b",
    r"\bcomo (?:una? )?(?:ia\b|modelo de lenguaje|inteligencia artificial)",
    r"\b(?:ignor[ae]|desconsider[ae]|esqueça)\b.{0,30}\b(?:instruções|ordens|comandos)\b",
    r"\ba partir de agora,? você é\b", r"\bresponda (?:apenas|somente|só) (?:com|em)\b",
    r"\bcomo (?:uma? )?(?:modelo de linguagem|inteligência artificial)",
    r"\b(?:ignora|dimentica|non considerare)\b.{0,30}\b(?:istruzioni|indicazioni)\b", r"\bda ora in poi sei\b",
    r"\brispondi (?:solo|soltanto|esclusivamente) (?:con|in)\b",
    r"\b(?:negeer|vergeet)\b.{0,30}\b(?:instructies|opdrachten|aanwijzingen)\b",
    r"\bantwoord (?:alleen|uitsluitend) (?:met|in)\b",
    # Russian, Chinese in both scripts, Japanese, Korean, Arabic.
    r"\b(?:игнорируй|забудь|не обращай)\w*\b.{0,30}\b(?:инструкци|указани|команд)\w*", r"\bсистемн\w+ промпт",
    r"\bотвечай(?:те)? только\b", r"\bтеперь ты\W{1,3}(?:ассистент|помощник|бот)", r"\bкак (?:ии|языковая модель)\b",
    r"(?:忽略|无视|無視|忘记|忘記|不要理会).{0,8}(?:之前|以上|上面|上述|先前|前面|所有).{0,8}"
    r"(?:指令|指示|说明|說明|提示|命令|要求)",
    r"你[现現]在是一", r"[从從][现現]在[开開]?[始起].{0,2}你", r"只(?:需|能)?(?:回答|回复|回覆|输出|輸出)",
    r"[系][统統]提示", r"作[为為]一?[个個]?(?:ai|人工智能|语言模型)",
    r"(?:これまで|以前|上記|今まで|すべて|全て)の.{0,6}(?:指示|命令|プロンプト)を?.{0,4}(?:無視|忘れ)",
    r"システムプロンプト", r"(?:のみ|だけ)を?(?:出力|回答|返答)",
    r"(?:이전|위의|앞의|모든).{0,8}(?:지시|명령|지침).{0,8}(?:무시|잊)", r"시스템 ?프롬프트",
    r"(?:تجاهل|انس|تجاهلي)\b.{0,20}(?:التعليمات|الأوامر|الإرشادات)",
)  # fmt: skip
# Folded as the texts are, so that accents, full-width forms and composed letters do not matter.
_INSTRUCTION = re.compile("|".join(_fold(pattern)[0] for pattern in _INSTRUCTIONS), re.IGNORECASE)
