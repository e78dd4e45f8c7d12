"""``clips prompts``: the prompt files that there are, one of them, and what it makes of one sample."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from . import present
from .options import ConfigCommand, LazyCommand, common_options, load, option_for
from .stats import printable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from clips_data.config import RecaptionConfig
    from clips_data.executor import Job
    from clips_data.recaption.engines import Decoding
    from clips_data.recaption.prompts import Prompt, Sampling
    from clips_data.recaption.rows import Item, Recipe, Row

CONFIG: Final = "clips_data.config:RecaptionConfig"
OF_RENDER: Final = ("prompt", "column", "seed", "model", "scores", "gate_min", "work", "as_json", "debug")
"""What of `clips recaption`'s options decides about the text that a sample gets."""


class Prompts(click.Group):
    """A group whose help ends with an example, and which knows what a misspelt command was meant to be."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write("Example:\n  clips prompts show recap-v2\n")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            known = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(self.commands)}."
            raise click.UsageError(f"There is no command {args[0]!r}. {known}", ctx)
        return super().resolve_command(ctx, args)


def build(name: str, summary: str) -> click.Command:
    about = (
        "A prompt file says what a caption is made from, in which words a model is asked, how its answer is decoded "
        "and cleaned. Those that come with clips are named; your own are paths of .yaml files."
    )
    group = Prompts(name, help=f"{summary}\n\n{about}")
    for command in (_list(), _show(), _render()):
        group.add_command(command)
    return group


# --- list -------------------------------------------------------------------------------------------------------------


def _list() -> click.Command:
    return LazyCommand(
        "list",
        callback=list_prompts,
        parameters=lambda: common_options(("json", "debug")),
        example="clips prompts list",
        help="List the prompts that come with clips: inputs, outputs, decoding, and what each is.",
    )


def list_prompts(as_json: bool, debug: bool) -> None:
    from clips_data.recaption import prompts

    found = [prompts.load(name) for name in prompts.packaged()]
    if as_json:
        present.print_json([_about(prompt) for prompt in found])
        return
    rows = [
        {
            "name": prompt.name,
            "inputs": " ".join(prompt.inputs),
            "outputs": _outputs(prompt),
            "decoding": decoding_text(prompt.sampling),
            "about": _first_line(prompt),
        }
        for prompt in found
    ]
    print(present.table(rows, list(rows[0])))


def _about(prompt: Prompt) -> dict[str, Any]:
    return {
        "name": prompt.name,
        "digest": prompt.digest,
        "inputs": prompt.inputs,
        "outputs": list(prompt.output) or ["text"],
        "decoding": prompt.sampling.model_dump(),
        "gate": prompt.gate.model_dump() if prompt.gate else None,
        "about": _first_line(prompt),
    }


def _outputs(prompt: Prompt) -> str:
    outputs = " ".join(prompt.output) or "text"
    samples = prompt.sampling.num_samples
    return f"{outputs} ×{samples}" if samples > 1 else outputs


def _first_line(prompt: Prompt) -> str:
    return prompt.about.partition("\n")[0]


def decoding_text(sampling: Sampling | Decoding) -> str:
    """``T 0.9, top-p 0.95, 77 tokens``: what differs from plain sampling, in short."""
    said = [f"T {sampling.temperature:g}" if sampling.temperature else "greedy"]
    if weights := getattr(sampling, "top_k_weights", None):
        said.append("top-k one of " + "/".join(str(k) for k in sorted(weights)))
    plain = type(sampling)()
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if value != getattr(plain, name):
            said.append(f"{name.replace('_', '-')} {value:g}")
    said += [f"stop at {stop!r}" for stop in sampling.stop]
    return ", ".join([*said, f"{sampling.max_tokens} tokens"])


# --- show -------------------------------------------------------------------------------------------------------------


def _show() -> click.Command:
    def parameters() -> list[click.Parameter]:
        column = option_for("column", load(CONFIG).model_fields["column"])
        return [click.Argument(["name"], metavar="NAME"), column, *common_options(("json", "debug"))]

    return LazyCommand(
        "show",
        callback=show_prompt,
        parameters=parameters,
        example="clips prompts show dreamlip --column llava",
        help="Print one prompt file, its digest and the columns it would make.\n\n"
        "NAME is the name of a packaged prompt, or the path of a .yaml file. What is printed is again a prompt file.",
    )


def show_prompt(name: str, column: str | None, as_json: bool, debug: bool) -> None:
    from clips_data.recaption import prompts

    prompt = prompts.load(name)
    columns = prompt.column_names(column or load(CONFIG).model_fields["column"].default)
    if as_json:
        content = prompt.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
        present.print_json({"name": prompt.name, "digest": prompt.digest, "columns": columns, "prompt": content})
        return
    for line in prompts.source(name).rstrip().splitlines():
        print(printable(line.expandtabs()))
    print(f"\n# digest: {prompt.digest}\n# columns: {', '.join(columns)}")


# --- render -----------------------------------------------------------------------------------------------------------


class RenderCommand(ConfigCommand):
    """Those options of `clips recaption` that decide about a sample's text, and the sample's key."""

    def _parameters(self) -> list[click.Parameter]:
        kept = [parameter for parameter in super()._parameters() if parameter.name in OF_RENDER]
        return [click.Argument(["key"], metavar="KEY"), *kept]


def _render() -> click.Command:
    return RenderCommand(
        "render",
        config=CONFIG,
        call=render_prompt,
        common=("work", "json", "debug"),
        example="clips prompts render 000000003 --prompt recap-v2 --work quickstart",
        help="Print the exact text that one sample would get, and how its answer would be decoded.\n\n"
        "KEY is the key of a successful pair under --work. No model is asked; its tokenizer is read where it lies in a "
        "folder, so that the text can be shown in the model's chat template.",
    )


def render_prompt(config: BaseModel, job: Job, context: click.Context) -> None:
    from clips_data.recaption import choose, prompts, rows

    settings: RecaptionConfig = config  # type: ignore[assignment]
    prompt = prompts.load(settings.prompt)
    row = rows.find_row(job.work, prompt, context.params["key"], scores=settings.scores)
    tokenizer, why_not = _tokenizer(settings.model)
    recipe = rows.Recipe(
        prompt,
        column=settings.column,
        seed=settings.seed,
        model_digest=choose.model_digest(settings),
        special_tokens=_special_tokens(tokenizer),
        gate_min=settings.gate_min,
    )
    items = recipe.items(row)
    found = _rendered(prompt, row, items, recipe)
    if found["user"] is not None and tokenizer is not None:
        found["chat"], why_not = _chat_text(tokenizer, items[0])
    found["no_chat"] = why_not if found["user"] is not None else ""
    if context.params["as_json"]:
        present.print_json(found)
    else:
        for line in _lines(found):
            print(printable(line.expandtabs()))


def _rendered(prompt: Prompt, row: Row, items: list[Item], recipe: Recipe) -> dict[str, Any]:
    """What is asked about a row, and in ``examples`` the places in the bank, from 0, of those that are shown."""
    item = items[0]
    request = item.request
    examples = prompt.examples if request is not None and item.variant != "gated" else None
    return {
        "key": item.key,
        "prompt": prompt.name,
        "columns": recipe.columns,
        "variant": item.variant,
        "image": request is not None and request.image is not None,
        "gate_score": row.score,
        "flags": list(item.flags),
        "examples": examples.drawn(recipe.seed, item.key) if examples is not None else [],
        "decoding": vars(request.decoding) if request is not None else None,
        "seeds": [one.seed for one in items],
        "requests": [one.digest for one in items],
        "code": item.answer.code if item.answer is not None else None,
        "caption": item.answer.text if item.answer is not None else None,
        "system": request.system if request is not None else None,
        "user": request.user if request is not None else None,
        "chat": None,
    }


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """A head of facts, one a line, then each text under its own heading."""
    from clips_data.recaption.engines import Decoding

    head = {name: value for name, value in found.items() if name not in ("system", "user", "chat", "no_chat")}
    width = max(len(name) for name in head)
    for name, value in head.items():
        if isinstance(value, dict):
            value = decoding_text(Decoding(**value))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list):
            value = ", ".join(str(one) for one in value)
        if value not in (None, ""):
            yield f"{name:<{width}}  {value}"
    if found["user"] is None:
        yield from ("", "No model is asked about this row.")
    for name, heading in (("system", "system"), ("user", "user"), ("chat", "in the model's chat template")):
        if found[name] is not None:
            yield from ("", f"--- {heading}", *found[name].splitlines())
    if found["no_chat"]:
        yield from ("", f"Not shown in a chat template: {found['no_chat']}")


def _tokenizer(model: str) -> tuple[Any, str]:
    """The model's tokenizer where it lies in a folder, else ``None`` and why."""
    from pathlib import Path

    from clips_data.recaption import choose

    folder = Path(choose.model_path(model))
    if choose.is_clips_run(folder):
        return None, f"{model} is a captioner of ours, which gets the user text as its web caption."
    if not (folder / "tokenizer_config.json").is_file():
        return None, f"{model} is no folder with a tokenizer."
    try:
        import transformers

        # AutoTokenizer finds the same one for any folder, but imports torch on its way.
        is_fast = (folder / "tokenizer.json").is_file()
        kind = transformers.PreTrainedTokenizerFast if is_fast else transformers.AutoTokenizer
        return kind.from_pretrained(folder, local_files_only=True), ""
    except ImportError:
        return None, "transformers is not installed."
    except (OSError, ValueError) as error:
        return None, f"the tokenizer of {model} cannot be read: {error}"


def _special_tokens(tokenizer: Any) -> list[str]:
    from clips_data.recaption import template

    return template.special_tokens(tokenizer) if tokenizer is not None else []


def _chat_text(tokenizer: Any, item: Item) -> tuple[str | None, str]:
    """The request in the chat template of the model, control tokens and all; or ``None`` and why that cannot be."""
    from clips_data.errors import UserError
    from clips_data.recaption import template

    assert item.request is not None
    try:
        return template.prompt_text(tokenizer, item.request), ""
    except UserError as error:
        return None, str(error)
