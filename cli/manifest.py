"""A manifest: one YAML file that names a run and says what its stages are to do, with line numbers for its mistakes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .stages import STAGES

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel, ValidationError

TOP_KEYS: Final = ("name", "work", "stages")
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


@dataclass(frozen=True)
class Manifest:
    """What a manifest says, resolved: every stage in order with its whole config. ``work`` is as written."""

    name: str
    work: Path
    stages: Mapping[str, BaseModel]
    source: str

    def resolved(self) -> dict[str, Any]:
        """The manifest with every default written out, as it is saved beside the outputs."""
        stages = {name: self.saved(name) for name in self.stages}
        return {"name": self.name, "work": str(self.work), "stages": stages}

    def saved(self, stage: str) -> dict[str, Any]:
        """The stage's config as it may be written down: addresses in it without their secrets."""
        from clips_data.redact import redact

        values = self.stages[stage].model_dump(mode="json")
        return {
            name: redact(value) if isinstance(value, str) and "://" in value else value
            for name, value in values.items()
        }

    def run_of(self, stage: str) -> str:
        """The training run that ``stage`` works on: its own ``name``, else that of ``train``, else the manifest's."""
        if not STAGES[stage].of_run:
            return self.name
        own = getattr(self.stages[stage], "name", None)
        trained = getattr(self.stages.get("train"), "name", None)
        return str(own or trained or self.name)


def load_manifest(name: str, settings: Sequence[str] = (), work: Path | None = None) -> Manifest:
    """Reads the manifest at a path or of a packaged name; ``settings`` are ``stage.key=value`` overrides.

    Raises ``UserError`` naming file, line, key and the nearest right one.
    """
    source, text = find_manifest(name)
    return _Reader(source).manifest(text, settings, work)


# --- where it is ------------------------------------------------------------------------------------------------------


def find_manifest(name: str) -> tuple[str, str]:
    """The name under which messages quote a manifest, and its text."""
    from clips_data.errors import UserError, did_you_mean

    path = Path(name)
    if path.is_file():
        return name, path.read_text()
    packaged = packaged_manifests()
    if name in packaged:
        return f"{name}.yaml", packaged[name]
    kind = "no such file" if path.suffix in (".yaml", ".yml") or "/" in name else "no such file or packaged manifest"
    raise UserError(f"There is no manifest {name!r}: {kind}. {did_you_mean(path.stem, packaged)}")


def packaged_manifests() -> dict[str, str]:
    """Name -> text of the manifests that come with clips; those in ``recipes/`` are named ``recipes/NAME``."""
    root = packaged_file("")
    files = [*root.glob("*.yaml"), *root.glob("recipes/*.yaml")]
    return {file.relative_to(root).with_suffix("").as_posix(): file.read_text() for file in sorted(files)}


def packaged_file(name: str) -> Path:
    """Where the packaged file ``name`` of the manifests' folder is."""
    import importlib.resources

    try:
        return Path(str(importlib.resources.files("clips_manifests"))) / name
    except ModuleNotFoundError:  # a checkout that is not installed
        return Path(__file__).resolve().parent.parent / "manifests" / name


# --- what it says -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One value of the manifest and where it was written, as the start of a sentence about it."""

    value: Any
    place: str


class _Reader:
    """Reads one manifest. YAML is composed to nodes first, because only nodes know their lines."""

    def __init__(self, source: str) -> None:
        self.source = source

    def manifest(self, text: str, settings: Sequence[str], work: Path | None) -> Manifest:
        root = self._entries(self._compose(text), "the manifest", TOP_KEYS)
        stages = self._stages(root)
        overrides = _top_overrides(settings, stages)
        name = self._name(root, overrides)
        written = overrides.get("work", self._text(root, "work", default="."))
        configs = {stage: self._config(stage, entries, name) for stage, entries in stages.items()}
        return Manifest(name, Path(work if work is not None else written), configs, self.source)

    def _compose(self, text: str) -> yaml.Node:
        import yaml

        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self._fail(f"{self.source}, line {line}", f"this is not YAML: {error.problem}")
        except yaml.YAMLError as error:
            self._fail(self.source, f"this is not YAML: {error}")
        if node is None:
            self._fail(self.source, "the manifest is empty; it needs `name` and `stages`")
        return node

    def _entries(self, node: yaml.Node, what: str, known: Iterable[str] | None = None) -> dict[str, tuple[str, Any]]:
        """Key -> (place, value node) of a mapping node; refuses other nodes, unknown keys and repeated ones."""
        import yaml

        from clips_data.errors import did_you_mean

        if not isinstance(node, yaml.MappingNode):
            self._fail(self._place(node), f"{what} should be a mapping of keys to values")
        found: dict[str, tuple[str, Any]] = {}
        for key_node, value in node.value:
            key, place = str(key_node.value), self._place(key_node)
            if known is not None and key not in known:
                self._fail(place, f"{what} has no key {key!r}. {did_you_mean(key, known)}", end="")
            if key in found:
                self._fail(place, f"{key!r} is given a second time; it was first at {found[key][0]}")
            found[key] = (place, value)
        return found

    def _stages(self, root: dict[str, tuple[str, Any]]) -> dict[str, dict[str, Entry]]:
        from clips_data.errors import did_you_mean

        if "stages" not in root:
            self._fail(self.source, "the manifest has no `stages`")
        stages: dict[str, dict[str, Entry]] = {}
        for stage, (place, node) in self._entries(root["stages"][1], "stages").items():
            if stage not in STAGES:
                self._fail(place, f"there is no stage {stage!r}. {did_you_mean(stage, STAGES)}", end="")
            nothing = node.id == "scalar" and node.value in ("", "~", "null")
            given = {} if nothing else self._entries(node, stage)
            stages[stage] = {key: Entry(self._value(value), at) for key, (at, value) in given.items()}
        if not stages:
            self._fail(root["stages"][0], "`stages` names no stage")
        return stages

    def _config(self, stage: str, entries: dict[str, Entry], name: str) -> BaseModel:
        from pydantic import ValidationError

        from clips_data.errors import did_you_mean

        from .values import validated

        config = STAGES[stage].config_class
        for key, entry in entries.items():
            if key not in config.model_fields:
                near = did_you_mean(key, config.model_fields)
                self._fail(entry.place, f"{stage} has no key {key!r}. {near}", end="")
        values = {key: entry.value for key, entry in entries.items()}
        if STAGES[stage].of_run and "name" in config.model_fields:
            values.setdefault("name", name)
        try:
            return validated(config, values)
        except ValidationError as error:
            self._refuse(stage, entries, error)

    def _refuse(self, stage: str, entries: dict[str, Entry], error: ValidationError) -> NoReturn:
        from .values import what_is_right

        first = error.errors(include_url=False)[0]
        keys = [str(part) for part in first["loc"]]
        if first["type"] == "missing" or not keys or keys[0] not in entries:
            about = f"{stage}.{'.'.join(keys)} is missing" if first["type"] == "missing" else what_is_right(first)
            self._fail(self.source, f"{stage}: {about}" if first["type"] != "missing" else about)
        self._fail(entries[keys[0]].place, f"{stage}.{'.'.join(keys)} is {first['input']!r}; {what_is_right(first)}")

    def _name(self, root: dict[str, tuple[str, Any]], overrides: Mapping[str, str]) -> str:
        name = overrides.get("name") or self._text(root, "name", default="")
        if not re.match(NAME_PATTERN, name):
            place = root["name"][0] if "name" in root else self.source
            self._fail(place, f"name is {name!r}; a manifest needs a name of letters, digits, _ and -")
        return name

    def _text(self, root: dict[str, tuple[str, Any]], key: str, default: str) -> str:
        if key not in root:
            return default
        place, node = root[key]
        if node.id != "scalar":
            self._fail(place, f"{key} should be text")
        return self._with_environment(node)

    def _value(self, node: yaml.Node) -> Any:
        """A node as a plain value, with ``${NAME}`` read from the environment."""
        import yaml

        if isinstance(node, yaml.MappingNode):
            return {key: self._value(value) for key, (_, value) in self._entries(node, "this").items()}
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item) for item in node.value]
        assert isinstance(node, yaml.ScalarNode)
        text = self._with_environment(node)
        return text if node.style in ("'", '"', "|", ">") else plain_value(text)

    def _with_environment(self, node: yaml.Node) -> str:
        def read(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in os.environ:
                self._fail(self._place(node), f"the environment has no variable {name}. Set it: export {name}=…")
            return os.environ[name]

        return re.sub(r"\$\{(\w+)\}", read, str(node.value))

    def _place(self, node: yaml.Node) -> str:
        return f"{self.source}, line {node.start_mark.line + 1}"

    def _fail(self, place: str, problem: str, end: str = ".") -> NoReturn:
        from clips_data.errors import UserError

        raise UserError(f"{place}: {problem}{end}")


def plain_value(text: str) -> Any:
    """What YAML makes of an unquoted scalar: a number, a boolean, nothing, or the text itself."""
    import yaml

    loader: Any = yaml.SafeLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text), deep=True)
    finally:
        loader.dispose()


def _top_overrides(settings: Sequence[str], stages: dict[str, dict[str, Entry]]) -> dict[str, str]:
    """Puts ``stage.key=value`` settings into ``stages``; returns those of the manifest's own ``name`` and ``work``."""
    import yaml

    from clips_data.errors import UsageError, did_you_mean

    top: dict[str, str] = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        stage, dot, key = target.partition(".")
        if equals and target in ("name", "work"):
            top[target] = text
            continue
        if not (equals and dot and key):
            raise UsageError(f"--set {setting} is not of the form stage.key=value, for example train.samples=1000.")
        if stage not in stages:
            raise UsageError(f"--set {setting}: the manifest has no stage {stage!r}. {did_you_mean(stage, stages)}")
        try:
            value = yaml.safe_load(text) if text[:1] in "[{\"'" and text else plain_value(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {setting}: {text!r} is not a YAML value.") from None
        stages[stage][key] = Entry(value, f"--set {setting}")
    return top
