"""Values of a manifest with the places that they come from, and those that ``--set`` puts over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SETTABLE: Final = ("name", "work", "results")
"""The manifest's own keys that ``--set`` knows, beside those of its stages."""


@dataclass(frozen=True)
class Entry:
    """One value of the manifest and where it was written, as the start of a sentence about it."""

    value: Any
    place: str
    node: Any = None
    """The YAML node that the value came from, if any: it knows the lines of what is inside."""


Stages = dict[str, dict[str, Entry]]


def laid_over(below: Stages, above: Stages) -> Stages:
    """The stages of both, the values of ``above`` winning.

    They stand in the order of ``below``; what only ``above`` has stands behind the stage that it follows there.
    """
    order = list(below)
    place = 0
    for stage in above:
        if stage in below:
            place = order.index(stage) + 1
        else:
            order.insert(place, stage)
            place += 1
    return {stage: below.get(stage, {}) | above.get(stage, {}) for stage in order}


def plain_value(text: str) -> Any:
    """What YAML makes of an unquoted scalar: a number, a boolean, nothing, or the text itself."""
    import yaml

    loader: Any = yaml.SafeLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text), deep=True)
    finally:
        loader.dispose()


@dataclass(frozen=True)
class Overrides:
    """What ``--set`` gave: values of the manifest's own keys, and of its stages, in every arm."""

    top: Mapping[str, str]
    stages: Stages

    @classmethod
    def parse(cls, settings: Sequence[str], known: Iterable[str]) -> Overrides:
        import yaml

        from clips_data.errors import UsageError, did_you_mean

        top: dict[str, str] = {}
        stages: Stages = {}
        for setting in settings:
            target, equals, text = setting.partition("=")
            stage, dot, key = target.partition(".")
            kinds = {name.partition(" ")[0] for name in known}
            if equals and target in SETTABLE:
                top[target] = text
                continue
            if not (equals and dot and key):
                raise UsageError(f"--set {setting} is not of the form stage.key=value, such as train.samples=1000.")
            if stage not in known and stage not in kinds:
                raise UsageError(f"--set {setting}: the manifest has no stage {stage!r}. {did_you_mean(stage, known)}")
            try:
                value = yaml.safe_load(text) if text[:1] in "[{\"'" and text else plain_value(text)
            except yaml.YAMLError:
                raise UsageError(f"--set {setting}: {text!r} is not a YAML value.") from None
            stages.setdefault(stage, {})[key] = Entry(value, f"--set {setting}")
        return cls(top, stages)

    def after(self, scale: Stages) -> Overrides:
        """With the values of ``scale`` below them."""
        return Overrides(
            self.top, {stage: scale.get(stage, {}) | self.stages.get(stage, {}) for stage in {**scale, **self.stages}}
        )

    def over(self, stages: Stages) -> Stages:
        """``recaption`` is meant for every stage of that name; one with a label for that one alone."""
        return {
            stage: entries | self.stages.get(stage.partition(" ")[0], {}) | self.stages.get(stage, {})
            for stage, entries in stages.items()
        }
