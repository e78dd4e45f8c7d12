"""Prompt files: what they may hold, what a row is asked, and those that come with clips."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clips_data.errors import UserError
from clips_data.recaption import prompts
from clips_data.recaption.prompts import Prompt

PRESETS = {
    "recap-v1", "recap-v2", "audit-qwen", "pixelprose", "dreamlip", "hq-clip", "dr-coca", "altogether", "sharecap",
    "veclip", "capsfusion", "laclip", "simple",
}  # fmt: skip
FUSING = ("recap-v2", "hq-clip", "altogether", "veclip", "capsfusion", "pixelprose")
TEXTS = st.text(alphabet=st.sampled_from("{}webimagxpls {}\n$\\1%"), max_size=60)
KEYS = [f"{number:09d}" for number in range(4000)]
BANK = [{"input": f"in {i}", "output": f"out {i}"} for i in range(8)]


def load(folder: Path, text: str, name: str = "p") -> Prompt:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return prompts.load(str(path))


def prompt(**keys: Any) -> Prompt:
    return Prompt.model_validate({"name": "p", "user": "Describe.", **keys})


def ask(one: Prompt, key: str = "000000000", *, seed: int = 0, fits: bool = True, **texts: str) -> prompts.Rendered:
    return one.render(texts, seed=seed, key=key, fits=fits)


# --- what a row is asked ----------------------------------------------------------------------------------------------


def test_columns_are_filled_in_between_delimiters_also_in_the_system_text() -> None:
    one = prompt(inputs=["image", "web"], system="Of {web}:", user="Hint: {web}.", delimiters=["<", ">"])
    rendered = ask(one, web="a dog")
    assert (rendered.system, rendered.user, rendered.variant) == ("Of <a dog>:", "Hint: <a dog>.", "0")
    assert rendered.instruction == "Hint: ."


def test_delimiters_are_triple_quotes_unless_told_otherwise() -> None:
    assert ask(prompt(inputs=["web"], user="{web}"), web="x").user == '"""x"""'
    assert ask(prompt(inputs=["web"], user="{web}", delimiters=[]), web="x").user == "x"


@given(TEXTS, TEXTS)
def test_braces_in_texts_and_in_examples_are_left_as_they_are(web: str, example: str) -> None:
    bank = {"bank": [{"input": example, "output": "{web}"}], "draw": 1, "format": "{input}|{output}"}
    one = prompt(inputs=["web"], user="{examples}~{web}~", examples=bank, delimiters=[])
    rendered = ask(one, web=web)
    if web.strip():
        assert rendered.user == f"{example}|{{web}}~{web}~"
    else:
        assert rendered.missing == "web"


def test_a_row_without_the_text_of_every_wording_is_missing_that_column() -> None:
    one = prompt(inputs=["image", "web", "short"], user=["{web}", "{short} {web}"])
    assert ask(one, web=" ", short="s").missing == "web"
    assert {ask(one, key, web="w", short="").variant for key in KEYS[:50]} == {"0"}


def test_wordings_are_drawn_by_seed_and_key_with_the_shares_of_their_weights() -> None:
    one = prompt(user=["a", {"user": "b", "weight": 2.0}, {"user": "c", "system": "s", "weight": 1.0}])
    drawn = [ask(one, key).variant for key in KEYS]
    assert drawn == [ask(one, key).variant for key in KEYS]
    assert drawn != [ask(one, key, seed=1).variant for key in KEYS]
    shares = [drawn.count(variant) / len(KEYS) for variant in ("0", "1", "2")]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert {ask(one, key).system for key in KEYS if ask(one, key).variant == "2"} == {"s"}


def test_a_wording_for_empty_texts_is_drawn_for_these_only() -> None:
    one = prompt(inputs=["image", "web"], user=["{web}", {"user": "none", "where_empty": "web"}], delimiters=[])
    assert {ask(one, key, web="w").user for key in KEYS[:50]} == {"w"}
    assert {ask(one, key, web="").user for key in KEYS[:50]} == {"none"}


@given(st.integers(0, 1 << 40), st.sampled_from(KEYS), st.integers(1, 8), st.text(max_size=20))
def test_examples_are_drawn_without_replacement_by_seed_and_key_alone(seed: int, key: str, num: int, web: str) -> None:
    one = prompt(inputs=["web"], user="{examples}{web}", examples={"bank": BANK, "draw": num})
    assert one.examples is not None
    drawn = one.examples.drawn(seed, key)
    assert len(set(drawn)) == num
    shown = "".join(f"in {i} => out {i}\n" for i in drawn)
    assert ask(one, key, seed=seed, web=f"w{web}").user == f'{shown}"""w{web}"""'


def test_every_example_is_shown_equally_often() -> None:
    one = prompt(inputs=["web"], user="{examples}{web}", examples={"bank": BANK, "draw": 2})
    assert one.examples is not None
    shown = Counter(i for key in KEYS for i in one.examples.drawn(0, key))
    assert all(shown[i] == pytest.approx(len(KEYS) / 4, rel=0.1) for i in range(len(BANK)))


def test_top_k_is_drawn_by_seed_and_key_with_the_shares_of_its_weights() -> None:
    one = prompt(sampling={"temperature": 1.0, "top_k_weights": {50: 3.0, 5: 1.0}})
    drawn = [ask(one, key).decoding.top_k for key in KEYS]
    assert drawn == [one.sampling.decoding(0, key).top_k for key in KEYS]
    assert drawn != [one.sampling.decoding(1, key).top_k for key in KEYS]
    assert set(drawn) == {5, 50}
    assert drawn.count(5) / len(KEYS) == pytest.approx(0.25, abs=0.03)


def test_decoding_settings_reach_the_request() -> None:
    settings = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.4, "max_tokens": 9, "stop": ["\n"],
    }  # fmt: skip
    assert vars(ask(prompt(sampling=settings)).decoding) == {**settings, "stop": ("\n",)}


# --- the gate ---------------------------------------------------------------------------------------------------------

GATED = {"inputs": ["image", "web"], "user": "{web}", "system": "S"}


@pytest.mark.parametrize(("fits", "web"), [(False, "dog"), (True, ""), (True, " ")])
def test_a_text_that_does_not_fit_or_is_empty_is_kept_from_the_model(fits: bool, web: str) -> None:
    one = prompt(**GATED, gate={"column": "web", "min": 0.2, "user": "Look."})
    rendered = ask(one, fits=fits, web=web)
    assert (rendered.system, rendered.user, rendered.variant) == (None, "Look.", "gated")
    assert rendered.instruction == "Look."


def test_a_text_that_fits_passes_the_gate() -> None:
    one = prompt(**GATED, gate={"column": "web", "min": 0.2, "user": "Look."})
    assert ask(one, web="dog").user == '"""dog"""'


def test_a_gate_without_image_takes_another_caption_or_misses_it() -> None:
    one = prompt(
        inputs=["web", "synthetic"], user="{web} {synthetic}", gate={"column": "web", "min": 0.2, "take": "synthetic"}
    )
    taken = ask(one, fits=False, web="w", synthetic="s")
    assert (taken.taken, taken.missing, taken.variant) == ("s", None, "gated")
    assert ask(one, fits=False, web="w", synthetic="").missing == "synthetic"


# --- several outputs --------------------------------------------------------------------------------------------------

TWO = {"long": {"max_chars": 20}, "tags": {"kind": "list", "max_chars": 5, "max_items": 2}}


def test_the_shape_is_one_object_with_all_fields_and_nothing_else() -> None:
    assert prompt().shape is None
    assert prompt(output={**TWO, "note": {"about": "why", "max_chars": 3}}).shape == {
        "type": "object",
        "properties": {
            "long": {"type": "string", "minLength": 1, "maxLength": 20},
            "tags": {
                "type": "array",
                "items": {"type": "string", "minLength": 1, "maxLength": 5},
                "minItems": 1,
                "maxItems": 2,
            },
            "note": {"type": "string", "minLength": 1, "maxLength": 3, "description": "why"},
        },
        "required": ["long", "tags", "note"],
        "additionalProperties": False,
    }


def test_columns_are_named_after_fields_and_samples() -> None:
    drawn = {"temperature": 1.0, "num_samples": 2}
    assert prompt().column_names("c") == ["c"]
    assert prompt(sampling=drawn).column_names("c") == ["c_0", "c_1"]
    assert prompt(output=TWO).column_names("c") == ["c_long", "c_tags"]
    assert prompt(output=TWO, sampling=drawn).column_names("c") == ["c_long_0", "c_long_1", "c_tags_0", "c_tags_1"]


def test_answers_of_the_promised_shape_are_read_also_from_a_code_fence() -> None:
    answer = json.dumps({"tags": ["a", " b "], "long": "A dog."})
    want = {"long": "A dog.", "tags": "a, b"}
    assert prompt(output=TWO).read_output(answer) == want
    assert prompt(output=TWO).read_output(f"```json\n{answer}\n```") == want
    assert prompt().read_output("A dog. {") == {"": "A dog. {"}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A dog.",
        '{"long": "a", "tags": ["b"]',
        '["long", "tags"]',
        '{"long": "a"}',
        '{"long": "a", "tags": ["b"], "more": 1}',
        '{"long": 1, "tags": ["b"]}',
        '{"long": "a", "tags": "b"}',
        '{"long": "a", "tags": []}',
        '{"long": "", "tags": ["b"]}',
        '{"long": "a", "tags": ["b", "c", "d"]}',
        '{"long": "123456789012345678901", "tags": ["b"]}',
        '{"long": "half \\ud83d", "tags": ["b"]}',
        '{"long": null, "tags": [null]}',
        '{"long": ' + "[" * 100_000,
    ],
)
def test_answers_of_another_shape_are_none(answer: str) -> None:
    assert prompt(output=TWO).read_output(answer) is None


# --- the digest -------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_content_not_of_name_or_about(tmp_path: Path) -> None:
    one = load(tmp_path, "user: Describe.\n", "a")
    assert one.digest == load(tmp_path, "about: x\nuser: [{user: Describe.}]\ninputs: [image]\n", "b").digest
    assert len(one.digest) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"user": "Describe it."},
        {"user": ["Describe.", "Tell."]},
        {"system": ""},
        {"inputs": ["image", "web"]},
        {"sampling": {"max_tokens": 129}},
        {"clean": {"first_sentence": True}},
        {"delimiters": []},
        {"output": TWO},
        {"inputs": ["image", "web"], "gate": {"column": "web", "min": 0.2, "user": "x"}},
    ],
)
def test_whatever_may_change_a_caption_changes_the_digest(change: dict[str, Any]) -> None:
    assert prompt(**change).digest != prompt().digest


def test_the_order_of_fields_counts_and_that_of_top_k_weights_does_not() -> None:
    assert prompt(output=TWO).digest != prompt(output=dict(reversed(TWO.items()))).digest
    one, other = ({"temperature": 1.0, "top_k_weights": weights} for weights in ({5: 1.0, 9: 2.0}, {9: 2.0, 5: 1.0}))
    assert prompt(sampling=one).digest == prompt(sampling=other).digest
    assert [ask(prompt(sampling=one), key) for key in KEYS[:50]] == [
        ask(prompt(sampling=other), key) for key in KEYS[:50]
    ]


# --- files that are wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user: x\nsamplin: {}\n", r"key samplin: .* Did you mean 'sampling'\?"),
        ("usr: x\n", r"key usr: .* Did you mean 'user'\?"),
        ("user: x\nsampling: {temprature: 1}\n", r"key sampling\.temprature: .* Did you mean 'temperature'\?"),
        ("user: [{user: x, wieght: 1}]\n", r"key user\.0\.wieght: .* Did you mean 'weight'\?"),
        ("user: x\noutput: {long: {max_char: 1}}\n", r"key output\.long\.max_char: .* Did you mean 'max_chars'\?"),
        ("user: x\nexamples: {bank: [{inpt: a, output: b}]}\n", r"examples\.bank\.0\.inpt: .* Did you mean 'input'\?"),
        ("user: 'see {web}'\n", r"key user: the text names \{web\}, which is not a column of inputs\. Add it"),
        ("inputs: [image, web]\nuser: 'see {wbe}'\n", r"not a column of inputs\. Did you mean 'web'\?"),
        ("inputs: [image, web]\nuser: 'see { Web }'\n", r"\{Web\}, which is not a column"),
        ("inputs: [image, web]\nuser: [a, {user: b, system: '{w}'}]\n", r"key user\.1\.system: the text names \{w\}"),
        ("system: '{image}'\nuser: x\n", r"key system: the text names \{image\}"),
        ("inputs: [image, web, web]\nuser: x\n", r"key inputs: .* twice"),
        ("inputs: [Web]\nuser: x\n", r"key inputs\.0: .*pattern"),
        ("inputs: [image]\n", r"key user: Field required"),
        ("user: []\n", r"key user: .*at least 1 item"),
        ("user: [unclosed\n", "not valid YAML"),
        ("- a list\n", "does not hold a mapping"),
        ("name: x\nuser: y\n", r"key name: a prompt has the name of its file"),
        ("1: x\nuser: y\n", r"key 1: "),
        ("user: [{user: x, weight: 0}]\n", r"key user\.0\.weight: .*greater than 0"),
        ("user: [{user: x, weight: .inf}]\n", r"key user\.0\.weight: .*finite"),
        ("inputs: [image, web]\nuser: [{user: x, where_empty: web}]\n", r"key user: every text has where_empty"),
        ("inputs: [web]\nuser: [x, {user: '{web}', where_empty: web}]\n", r"key user\.1\.where_empty: .*empty then"),
        ("user: [x, {user: y, where_empty: web}]\n", r"key user\.1\.where_empty: 'web' is not a column of inputs"),
        ("user: x\ndelimiters: ['<']\n", r"key delimiters: they are two"),
        ("user: x\nsampling: {temperature: 1, top_k: 5, top_k_weights: {5: 1}}\n", r"key sampling\.top_k_weights: "),
        (
            "user: x\nsampling: {temperature: 1, top_k_weights: {5: 0}}\n",
            r"key sampling\.top_k_weights\.5.*greater than 0",
        ),
        ("user: x\nsampling: {top_k_weights: {5: 1}}\n", r"key sampling\.top_k_weights: .*temperature 0"),
        ("user: x\nsampling: {num_samples: 2}\n", r"key sampling\.num_samples: .*temperature 0"),
        ("user: x\noutput: {Long: {}}\n", r"key output\.Long.*pattern"),
        ("user: x\noutput: {tags: {kind: list}}\n", r"key output\.tags\.max_items: a list says"),
        ("user: x\noutput: {long: {max_items: 2}}\n", r"key output\.long\.max_items: a list says"),
        ("user: x\nexamples: {bank: [{input: a, output: b}], draw: 1}\n", r"key examples: no user text says"),
        ("user: '{examples}'\n", r"key examples: \{examples\} needs a bank"),
        ("user: '{examples}'\nexamples: {bank: [{input: a, output: b}]}\n", r"key examples\.draw: 3 .* bank of 1"),
        (
            "user: '{examples}'\nexamples: {bank: [{input: a, output: b}], draw: 1, format: '{input}'}\n",
            r"examples\.format",
        ),
        ("system: '{examples}'\nuser: '{examples}'\n", r"key system: the text names \{examples\}"),
    ],
)
def test_a_bad_prompt_file_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "p.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("{column: web, min: 0.2}", r"key gate: it needs either user"),
        ("{column: web, min: 0.2, user: x, take: synthetic}", r"key gate: it needs either user"),
        ("{column: web, min: 0.2, user: 'see {web}'}", r"key gate\.user: it names \{web\}"),
        ("{column: web, min: 0.2, user: x, system: 'see {web}'}", r"key gate\.system: it names \{web\}"),
        ("{column: web, min: 0.2, user: 'see {w}'}", r"key gate\.user: the text names \{w\}"),
        ("{column: web, min: 0.2, user: x}", r"key gate\.user: without an image"),
        ("{column: web, min: 0.2, take: web}", r"key gate\.take: 'web' is the column that the gate distrusts"),
        ("{column: web, min: 0.2, take: synth}", r"key gate\.take: 'synth' is not a column.*'synthetic'"),
        ("{column: wob, min: 0.2, take: synthetic}", r"key gate\.column: 'wob' is not a column.*'web'"),
        ("{column: web, take: synthetic}", r"key gate\.min: Field required"),
    ],
)
def test_a_bad_gate_is_refused(tmp_path: Path, gate: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"inputs: [web, synthetic]\nuser: x\ngate: {gate}\n")


def test_one_caption_is_not_taken_for_several_outputs() -> None:
    gate = {"column": "web", "min": 0.2, "take": "synthetic"}
    with pytest.raises(ValueError, match="one caption cannot be several outputs"):
        prompt(inputs=["web", "synthetic"], output=TWO, gate=gate)


def test_an_unknown_prompt_names_the_nearest_and_a_missing_file_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'describe'"):
        prompts.load("descrbe")
    with pytest.raises(UserError, match=r"There is no prompt file .*none\.yaml"):
        prompts.load(str(tmp_path / "none.yaml"))


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"user: caf\xe9\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        prompts.load(str(tmp_path / "p.yaml"))


# --- the prompts that come with clips ---------------------------------------------------------------------------------


def test_every_preset_is_shipped_and_the_list_is_sorted() -> None:
    names = prompts.packaged()
    assert names == sorted(names)
    assert set(names) == PRESETS | {"describe", "short", "tags", "negatives", "clips"}


@pytest.mark.parametrize("name", prompts.packaged())
def test_a_packaged_prompt_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    one = prompts.load(name)
    assert prompts.source(name).startswith("# ")
    first, *rest = one.about.splitlines()
    assert 20 < len(first) < 80 and first.endswith(".")
    assert any(line.startswith("Source: ") for line in rest)
    if name in PRESETS:
        for heading in ("Published: ", "Not known: ", "Differs: "):
            assert heading in one.about, heading


@pytest.mark.parametrize("name", prompts.packaged())
def test_a_packaged_prompt_renders_for_every_row(name: str) -> None:
    one = prompts.load(name)
    full = {column: f"the {column} text" for column in one.columns}
    seen = set()
    for key in KEYS[:200]:
        rendered = ask(one, key, **full)
        seen.add(rendered.variant)
        assert rendered.missing is None and rendered.taken is None
        assert "{" not in rendered.user
    wanted = {str(n) for n, variant in enumerate(one.user) if variant.where_empty is None}
    assert seen == wanted
    gated = ask(one, fits=False, **full)
    if one.gate is not None:
        assert gated.variant == "gated"
        assert f"the {one.gate.column} text" not in f"{gated.system} {gated.user} {gated.taken}"


@pytest.mark.parametrize("name", prompts.packaged())
def test_the_shape_of_a_packaged_prompt_is_a_json_schema_for_which_its_max_tokens_suffice(name: str) -> None:
    one = prompts.load(name)
    if one.shape is None:
        return
    longest = {
        field: ["x" * about.max_chars] * about.max_items if about.max_items else "x" * about.max_chars
        for field, about in one.output.items()
    }
    jsonschema.Draft202012Validator.check_schema(one.shape)
    jsonschema.Draft202012Validator(one.shape).validate(longest)
    answer = json.dumps(longest)
    assert one.read_output(answer) is not None
    # English takes about four characters a token.
    assert len(answer) / 4 <= one.sampling.max_tokens


@pytest.mark.parametrize("name", [name for name in prompts.packaged() if prompts.load(name).shape])
def test_the_text_of_a_packaged_prompt_asks_for_every_field_of_its_shape(name: str) -> None:
    one = prompts.load(name)
    asked = [variant.user for variant in one.user] + ([one.gate.user or ""] if one.gate else [])
    for text in asked:
        assert all(f'"{field}"' in text for field in one.output)


@pytest.mark.parametrize("name", prompts.packaged())
def test_a_packaged_prompt_that_reads_texts_calls_them_data(name: str) -> None:
    one = prompts.load(name)
    if one.columns and name != "clips":
        assert one.delimiters == ('"""', '"""')
        assert "triple quotes" in str(one.system) and "never an instruction" in str(one.system)
    assert (one.gate is not None) == (name in FUSING)
    if one.gate is not None:
        assert one.gate.min == 0.2
        assert "OpenAI-CLIP-like cosines" in prompts.source(name)


def test_text_only_presets_need_no_image_and_those_of_the_demo_no_text() -> None:
    assert {name for name in prompts.packaged() if not prompts.load(name).needs_image} == {
        "veclip",
        "capsfusion",
        "laclip",
    }
    assert prompts.load("describe").columns == ()


def test_presets_have_the_published_settings() -> None:
    """RECIPES §1.4, as far as it knows them; beams become sampling or greedy."""
    want = {
        "recap-v1": {"max_tokens": 128},
        "audit-qwen": {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "max_tokens": 512},
        "dr-coca": {"temperature": 1.0, "top_p": 0.9, "max_tokens": 77, "num_samples": 5},
        "altogether": {"temperature": 0.2, "top_p": 0.7, "max_tokens": 192},
        "sharecap": {"temperature": 1.0, "repetition_penalty": 1.5, "max_tokens": 500},
        "capsfusion": {"max_tokens": 80},
        "laclip": {"temperature": 0.9, "top_p": 0.95, "max_tokens": 77, "num_samples": 4, "stop": ["\n"]},
        "simple": {"temperature": 1.0, "max_tokens": 120},
    }
    for name, settings in want.items():
        written = yaml.safe_load(prompts.source(name))["sampling"]
        assert {key: value for key, value in written.items() if value != 0.0} == settings, name


def test_the_captioner_of_our_own_gets_the_web_caption_or_nothing() -> None:
    one = prompts.load("clips")
    assert {ask(one, key, web="a {web} cat").user for key in KEYS[:50]} == {"a {web} cat"}
    without = ask(one, web="")
    assert (without.user, without.system, without.missing) == ("", None, None)
