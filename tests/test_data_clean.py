"""The rules of cleaning, each with what it must hit and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import schema
from clips_data.recaption import clean
from clips_data.recaption.prompts import Cleaning

INSTRUCTION = "Describe the picture in detail."
LONG_INSTRUCTION = (
    "You are shown an image and the text beside it. Write one dense paragraph about what can be seen, from left to "
    "right, and use names from the text where the image bears them out."
)
DOG = "A small brown dog runs across a lawn with a red ball in its mouth."


def finish(text: str, reason: str = "stop", instruction: str = INSTRUCTION, **settings: Any) -> clean.Judged:
    return clean.finish(text, reason, Cleaning(**settings), instruction)


# --- the answer as a whole ---


def test_a_good_answer_is_kept_as_it_is_on_one_line() -> None:
    assert finish(f"  {DOG}\n\n It is\tsunny. ") == clean.Judged("ok", f"{DOG} It is sunny.", [])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (DOG, "ok"),
        (" \n ", "empty"),
        ("I'm sorry, but I cannot see the picture.", "refused"),
        ("Describe the picture in detail. Describe", "echo"),
        ("the dog and the cat " * 9, "loop"),
        ("Ein kleiner brauner Hund läuft über die Wiese und hat einen roten Ball im Maul.", "wrong_language"),
    ],
)
def test_every_code_keeps_no_caption_unless_it_is_ok(text: str, code: str) -> None:
    judged = finish(text, language="en")
    assert judged.code == code
    assert judged.code in schema.CAPTION_CODES
    assert judged.caption == (text if code == "ok" else "")


def test_rejected_answers_have_no_flags_but_that_of_the_cap() -> None:
    assert finish("I'm sorry, but I can't. Write to a@b.org", "length").flags == ["hit_token_cap"]


def test_flags_are_those_of_the_caption_that_is_kept() -> None:
    text = f"The image shows a shop. {DOG} Call +49 30 1234567, mail a@shop.example.org, see https://shop.org/x and"
    judged = finish(text, "length")
    assert judged.flags == ["hit_token_cap", "opener", "url", "email", "phone"]
    cut = finish(text, "length", cut_to_sentence=True)
    assert cut.caption == f"The image shows a shop. {DOG}"
    assert cut.flags == ["hit_token_cap", "cut_to_sentence", "opener"]


def test_the_rules_list_every_code_and_flag_in_the_order_of_their_application() -> None:
    codes = {"empty", "refused", "echo", "loop", "wrong_language"}
    flags = {"hit_token_cap", "cut_to_sentence", "opener", "url", "email", "phone"}
    assert codes | flags | {"turn_tokens", "first_sentence"} == set(clean.RULES)
    assert all(line and "\n" not in line for line in clean.RULES.values())
    assert codes < set(schema.CAPTION_CODES)


@given(st.text(max_size=300), st.sampled_from(["stop", "length"]), st.booleans(), st.booleans())
def test_any_text_is_judged_and_never_added_to(text: str, reason: str, cut: bool, first: bool) -> None:
    judged = finish(text, reason, cut_to_sentence=cut, first_sentence=first)
    assert (judged.code == "ok") == bool(judged.caption)
    assert judged.caption in " ".join(text.split())
    if judged.code == "ok":
        again = finish(judged.caption, cut_to_sentence=cut, first_sentence=first)
        assert (again.code, again.caption) == ("ok", judged.caption)


# --- turn_tokens ---


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A dog.</s>", "A dog."),
        ("A dog.<|im_end|>\n<|im_start|>user\nThanks", "A dog."),
        ("A dog.</s> USER: and now? ASSISTANT: a cat", "A dog."),
        ("A dog.<｜end▁of▁sentence｜>", "A dog."),
        ("<s> A dog.", "A dog."),
        ("<think>It has four\nlegs.</think>\n\nA dog.", "A dog."),
        ("It has four legs.\n</think>\nA dog.", "A dog."),
        ("<think>It has four legs and", ""),
        ("</s>", ""),
        ("A sign that reads <end>. A <b>dog</b>.", "A sign that reads <end>. A <b>dog</b>."),
        ("5 < 6 </ s>", "5 < 6 </ s>"),
    ],
)
def test_what_the_chat_format_left_is_cut_off(text: str, answer: str) -> None:
    assert clean.without_turn_tokens(text).strip() == answer
    assert finish(text).caption == answer


# --- empty ---


@pytest.mark.parametrize(("text", "empty"), [("", True), (" . ", True), ("!!!!!!", True), ("猫", False), ("7", False)])
def test_an_answer_without_letters_and_digits_is_empty(text: str, empty: bool) -> None:
    assert clean.is_empty(text) is empty


# --- refused ---


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I can’t assist with that request.",
        "I am very sorry, but the image is not clear.",
        "Sorry, I cannot identify people in photos.",
        "Sorry.",
        "I'm afraid I can't describe this image.",
        "I apologize, but I am unable to view images.",
        "My apologies, but I cannot process the picture.",
        "Unfortunately, I cannot see any image.",
        "Unfortunately, there is no image here.",
        "I cannot provide a description of this person.",
        "I can't see the image you are referring to.",
        "I'm unable to view the picture.",
        "Unable to process the image.",
        "I don't have the ability to see images.",
        "I do not see any image in our conversation.",
        "As an AI language model, I cannot see.",
        "As an AI, I",
        "As a large language model I do not have eyes.",
        "I'm just an AI and cannot",
        "There is no image attached to your message.",
        "It seems that there is no image provided.",
        "It looks like you forgot to attach an image.",
        "You haven't uploaded a picture.",
        "No image was provided.",
        "The image could not be loaded.",
        "Please provide the image you would like described.",
        "Could you please upload the photo again?",
        "I need to see the image first.",
        "It is not appropriate for me to describe this.",
        "**I'm sorry, but no.**",
        "Es tut mir leid, aber ich kann das Bild nicht sehen.",
        "Leider kann ich das Bild nicht öffnen.",
        "Désolé, je ne peux pas vous aider.",
        "Lo siento, pero no puedo ver la imagen.",
        "Desculpe, mas não posso ajudar.",
        "Mi dispiace, ma non posso aiutarti.",
        "К сожалению, я не могу увидеть изображение.",
        "抱歉，我无法查看图片。",
        "申し訳ありませんが、画像を見ることができません。",
    ],
)
def test_refusals_are_told_by_their_opening(text: str) -> None:
    assert clean.is_refusal(text)
    assert finish(text).code == "refused"


@pytest.mark.parametrize(
    "text",
    [
        "Sorry-looking dog on a bench.",
        "Sorry sign on a shop door.",
        "\"I'm sorry, but I can't\" reads a speech bubble above a cartoon cat.",
        "I'm sorry for your loss, a card with white lilies.",
        "I can't believe it's not butter, a tub on a shelf.",
        "I can't help falling in love with you, vinyl cover.",
        "I cannot wait for summer poster with palm trees.",
        "I am not a robot checkbox on a web form.",
        "A man says: I'm sorry, but I cannot see.",
        "As an airplane lands, passengers wait.",
        "As an artist paints, a child looks on.",
        "As an AI-generated artwork, it shows a castle.",
        "Unfortunately Yours book cover.",
        "No smoking sign on a wall.",
        "No image can do justice to this sunset over the bay.",
        "There is no car in the street, only a dog.",
        "The image is not sharp; a dog runs through mist.",
        "The photo is not centered.",
        "Please wash your hands, a sign beside a sink.",
        "You have mail icon.",
        "Unable to fly, a penguin waddles over ice.",
        "Without the umbrella, a woman stands in the rain.",
        "It is not a bird but a plane.",
        "Could you be loved, Bob Marley record sleeve.",
    ],
)
def test_captions_that_only_sound_like_refusals_are_kept(text: str) -> None:
    assert not clean.is_refusal(text)
    assert finish(text).code == "ok"


# --- echo ---


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("Describe the picture in detail", INSTRUCTION),
        ("DESCRIBE the picture, in detail: a dog", INSTRUCTION),
        ("A dog. I write one dense paragraph about what can be seen here.", LONG_INSTRUCTION),
        ("请 详细 描述 图片。一只猫", "请 详细 描述 图片"),
        ("Sentence 1: A dog on a lawn.", INSTRUCTION),
        ("A dog. Sentence 2 describes a ball.", INSTRUCTION),
        ("The alt-text says that it is a Labrador.", INSTRUCTION),
        ("According to the web caption, this is Rex.", INSTRUCTION),
        ("A dog, as in the provided text.", INSTRUCTION),
        ("Rewritten caption: a dog.", INSTRUCTION),
    ],
)
def test_echoes_of_the_prompt_are_told(text: str, instruction: str) -> None:
    assert clean.is_echo(text, instruction)
    assert finish(text, instruction=instruction).code == "echo"


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        (DOG, INSTRUCTION),
        (DOG, ""),
        ("The picture in detail shows a dog.", INSTRUCTION),
        ("A photo of a dog", "A photo of"),
        ("A dense paragraph about what can be read stands on the sign.", LONG_INSTRUCTION),
        ('A worksheet that reads "Sentence 1: the cat" and "alt-text".', INSTRUCTION),
        ("A sentence 1 metre long is painted on the wall.", INSTRUCTION),
        ("A page with captions and text on the web.", INSTRUCTION),
    ],
)
def test_captions_that_share_words_with_the_prompt_are_no_echoes(text: str, instruction: str) -> None:
    assert not clean.is_echo(text, instruction)


# --- loop ---


@pytest.mark.parametrize(
    "text",
    [
        "a b c d e f " * 5,
        "the dog the dog the dog the dog the dog the dog",
        "There is a tree on the left. " * 5,
        "A dog. " + "na" * 20,
        "A dog. 一只猫" + "在沙发上" * 7,
        "The sign reads " + "0" * 40,
    ],
)
def test_answers_that_are_stuck_are_loops(text: str) -> None:
    assert clean.is_loop(text.strip())


@pytest.mark.parametrize(
    "text",
    [
        DOG,
        "A red circle, a red circle, a red circle and a blue square.",
        "There is a tree on the left. There is a tree on the right. There is a tree behind.",
        "It costs 1,000,000,000,000 dollars, says the sign: ha ha ha!",
        "A very very very long wall ......",
        "一个红色的圆，一个蓝色的圆，一个绿色的圆。",
    ],
)
def test_enumerations_are_no_loops(text: str) -> None:
    assert not clean.is_loop(text)
    assert not clean.ends_in_loop(text)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (f"{DOG} It is next to a tree, a tree, a tree, a", True),
        (f"{DOG} A tree{' and a bench and a tree' * 3} and a ben", True),
        ("一只狗，还有一棵很高的大树，还有一棵很高的大树，还有一棵很高的大树，还有", True),
        (f"{DOG} It is next to a tree, a bench, and a", False),
        (f"{DOG} very very", False),
    ],
)
def test_a_loop_at_the_end_counts_where_the_cap_was_hit(text: str, loops: bool) -> None:
    assert clean.ends_in_loop(text) is loops
    assert finish(text, "length").code == ("loop" if loops else "ok")
    assert finish(text, "stop").code == "ok"


# --- wrong_language ---


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Un petit chien brun court sur la pelouse avec une balle rouge dans la gueule.", "en"),
        ("Маленькая собака бежит по лужайке с красным мячом.", "en"),
        ("一只棕色的小狗叼着红球跑过草坪，旁边有一棵树。", "en"),
        (DOG, "de"),
        (DOG, "zh"),
    ],
)
def test_another_language_is_rejected_where_one_is_asked_for(text: str, language: str) -> None:
    assert finish(text, language=language).code == "wrong_language"
    assert finish(text).code == "ok"


@pytest.mark.parametrize(
    "text",
    [
        DOG,
        "Un chien",
        "Nike Air Max 90",
        "A man in Rio de Janeiro",
        "A plate of spaghetti alla carbonara with parmigiano reggiano",
        "Château de Chenonceau",
        "ラーメン",
        "Das Boot ist voll, La vie est belle et le monde",
        "A restaurant sign that reads Bienvenue à la maison du chocolat in gold letters.",
        "1234567890 1234567890 1234567890 1234567890 1234567890",
        "A neon sign with the words 東京 and 大阪 glows above a narrow street at night.",
    ],
)
def test_names_titles_and_short_captions_are_not_told_to_be_foreign(text: str) -> None:
    assert finish(text, language="en").code == "ok"


# --- hit_token_cap, cut_to_sentence, first_sentence ---


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog runs. It has a red", "A dog runs."),
        ("A dog runs. It has a ball. The tree is 3.", "A dog runs. It has a ball."),
        ("A dog runs. It belongs to Dr.", "A dog runs."),
        ('A dog runs. A sign says "No. 5 is', "A dog runs."),
        ("A dog runs! Is it a", "A dog runs!"),
        ("一只狗在跑。它有一个红色的", "一只狗在跑。"),
        ("A dog runs. It has a ball.", "A dog runs. It has a ball."),
        ('A dog runs. A sign says "Stop."', 'A dog runs. A sign says "Stop."'),
        ("A dog that runs over a", "A dog that runs over a"),
        ("A ball of 3.5 m", "A ball of 3.5 m"),
    ],
)
def test_an_answer_that_hit_the_cap_is_cut_to_its_last_full_sentence(text: str, kept: str) -> None:
    judged = finish(text, "length", cut_to_sentence=True)
    assert judged.caption == kept
    assert judged.flags == ["hit_token_cap"] + ["cut_to_sentence"] * (kept != text)


def test_only_what_hit_the_cap_is_cut_and_only_where_the_prompt_asks_for_it() -> None:
    text = "A dog runs. It has a red"
    assert finish(text, "stop", cut_to_sentence=True) == clean.Judged("ok", text, [])
    assert finish(text, "length") == clean.Judged("ok", text, ["hit_token_cap"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog runs. It has a ball.", "A dog runs."),
        ("Dr. Smith holds 3.5 m of rope. He smiles.", "Dr. Smith holds 3.5 m of rope."),
        ("A dog without a full stop", "A dog without a full stop"),
        ("A dog runs. I'm sorry, sentence 1 " + "na" * 50, "A dog runs."),
    ],
)
def test_the_first_sentence_alone_is_kept_and_judged(text: str, kept: str) -> None:
    assert finish(text, first_sentence=True) == clean.Judged("ok", kept, [])


# --- flags ---


@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("The image shows a dog.", True),
        ("In this picture, a dog runs.", True),
        ("The provided image depicts a dog.", True),
        ("This is a photo of a dog.", True),
        ("This is a black-and-white photograph showing a dog.", True),
        ("A close-up photo of a dog.", True),
        ("An illustration depicting a dog.", True),
        ("Here is a detailed description of the image: a dog.", True),
        ("Sure, a dog.", True),
        ("Caption: a dog.", True),
        ("We see a dog.", True),
        (DOG, False),
        ("The dog looks at an image.", False),
        ("The imagery of the poem.", False),
        ("A photographer takes a photo of a dog.", False),
        ("A picture frame on a wall.", False),
        ("This is a dog.", False),
        ("Surely a dog.", False),
    ],
)
def test_boilerplate_openers_are_flagged(text: str, opens: bool) -> None:
    assert clean.has_opener(text) is opens
    assert ("opener" in finish(text).flags) is opens
    assert finish(text).caption == text


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("See https://example.org/a?b=1.", True),
        ("The sign reads WWW.EXAMPLE.DE", True),
        ("From shop.example.com today", True),
        ("Sold at amazon.co.uk", True),
        ("Write to jane@example.com", False),
        ("The end.It is late. No. 5, e.g. this", False),
        ("A node.js book and a .net logo", False),
        ("10.5 com 3", False),
    ],
)
def test_web_addresses_are_flagged(text: str, url: bool) -> None:
    assert clean.has_url(text) is url


@pytest.mark.parametrize(
    ("text", "email"),
    [
        ("jane.doe+x@mail.example.org", True),
        ("(A@B.CO)", True),
        ("@janedoe", False),
        ("5 @ 3.50", False),
        ("a@b", False),
    ],
)
def test_email_addresses_are_flagged(text: str, email: bool) -> None:
    assert clean.has_email(text) is email


@pytest.mark.parametrize(
    "text",
    [
        "+1 555 123 4567", "+49 30 1234567", "+44 (0)20 7946 0958", "+86-138-1234-5678", "(555) 123-4567",
        "555-123-4567", "555.123.4567", "1-800-555-0199", "0171 123 4567", "030/1234567", "01 23 45 67 89",
        "Tel. 12 34 56 78", "phone: 5551234", "WhatsApp: +5511987654321", "电话：12345678",
    ],
)  # fmt: skip
def test_telephone_numbers_are_flagged(text: str) -> None:
    assert clean.has_phone(text)
    assert clean.has_phone(f"Call {text}, please.")


@pytest.mark.parametrize(
    "text",
    [
        "1999-2005", "in 1984 and 2001 and 2020", "1920x1080", "10 x 20 x 30 cm", "$1,299.99", "€ 555 123 4567",
        "1,000,000 people", "2020-05-12 10:30:00", "12/05/2020", "01.02.2020", "ISBN 978-3-16-148410-0",
        "ISBN 0-306-40615-2", "48.8584, 2.2945", "3.14159265", "Model 123-456-789", "012345678905", "iPhone 12 2020",
        "phone 5", "the years 2010 2011 2012 2013", "0.5 0.25 0.125", "+5 degrees", "192.168.100.200", "#555-123-4567",
        "no. 123 456 789", "1 234 567 890", "5/8 11/16 13/16", "+100 200 points", "LEGO 75192-1",
    ],
)  # fmt: skip
def test_years_sizes_prices_and_other_numbers_are_no_telephone_numbers(text: str) -> None:
    assert not clean.has_phone(text)
    assert not clean.has_phone(f"A label with {text} on it.")
