"""Reads a manifest's YAML, and tells its mistakes with their lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .manifest import NAME_PATTERN, Arm, Manifest, find_manifest
from .manifest_values import Entry, Overrides, Stages, laid_over, plain_value
from .stages import STAGES, stage_named

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel, ValidationError

TOP_KEYS: Final = ("name", "work", "include", "without", "recipe", "stages", "scales", "arms", "seeds", "results")
REPEATED: Final = ("recaption", "score", "embed")
"""Stages that a manifest may hold several times, each with a label of its own: they write folders of their own."""
ARM_KEYS: Final = ("expected", "core")
COMPARED: Final = ("train", "eval")
"""What an experiment cannot be without: something that differs, and figures to compare."""


Root = dict[str, tuple[str, Any]]
"""Key -> place and value node."""


class Reader:
    """Reads one manifest. YAML is composed to nodes first, because only nodes know their lines.

    ``folder`` is the manifest's own, from which ``results`` is named.
    """

    def __init__(self, source: str, folder: Path, including: Sequence[str] = ()) -> None:
        self.source, self.folder = source, folder
        self.including = [*including, source]
        """This manifest and those that include it, from the outermost."""

    def manifest(
        self, text: str, settings: Sequence[str], work: Path | None, scale: tuple[str, Stages] | None = None
    ) -> Manifest:
        """``scale`` is a name and values for the stages; own `scales` go over it, ``settings`` over all."""
        root = self._entries(self._compose(text), "the manifest", TOP_KEYS)
        stages = self._stages(root)
        overrides = Overrides.parse(settings, stages)
        if scale is not None:
            name, values = scale
            overrides = overrides.after(laid_over(values, self._own_scale(root, name)))
        name = self._name(root, overrides.top)
        written = overrides.top.get("work", self._text(root, "work", default="."))
        where = Path(work if work is not None else written)
        if "arms" in root:
            return self._experiment(root, stages, overrides, name, where)
        for key in ("seeds", "results"):
            if key in root or key in overrides.top:
                place = root[key][0] if key in root else f"--set {key}={overrides.top[key]}"
                self._fail(place, f"{key} is for manifests that have `arms`")
        configs = self._configs(overrides.over(stages), name, self.source)
        return Manifest(name, where, configs, self.source, recipe=self.recipe(root))

    def scale(self, text: str) -> Stages:
        """The values of a scale, which is no manifest by itself: it has `stages` alone."""
        return self._stages(self._entries(self._compose(text), "the scale", ("stages",)))

    def _own_scale(self, root: Root, name: str) -> Stages:
        """What the manifest, and those that it includes, change for a scale."""
        below: Stages = {}
        if "include" in root:
            reader, inner = self._opened(root)
            below = reader._own_scale(inner, name)
        if "scales" not in root:
            return below
        scales = self._entries(root["scales"][1], "scales")
        return laid_over(below, self._written(scales[name][1], f"the scale {name}") if name in scales else {})

    def recipe(self, root: Root) -> Mapping[str, Any]:
        """What the manifest says of itself as a recipe; empty where it says nothing."""
        if "recipe" not in root:
            return {}
        place, node = root["recipe"]
        found = self._value(node)
        if not isinstance(found, dict):
            self._fail(place, "recipe should be a mapping of keys to texts")
        return found

    # --- arms ---------------------------------------------------------------------------------------------------------

    def _experiment(self, root: Root, stages: Stages, overrides: Overrides, name: str, work: Path) -> Manifest:
        place, node = root["arms"]
        for stage in COMPARED:
            if stage not in stages:
                self._fail(place, f"arms are compared by what train and eval say, and `stages` has no {stage}")
        seeds = self._seeds(root)
        shared = {stage: entries for stage, entries in stages.items() if not stage_named(stage).of_run}
        configs = self._configs(overrides.over(shared), name, self.source)
        written = self._entries(node, "arms")
        if not written:
            self._fail(place, "`arms` names no arm")
        arms = []
        for arm, (at, values) in written.items():
            if not re.match(NAME_PATTERN, arm) or arm == "core":
                self._fail(at, f"an arm is named {arm!r}; it needs a name of letters, digits, _ and -, and not core")
            expected, core, changed = self._arm(arm, values, stages)
            own = {stage: entries | changed.get(stage, {}) for stage, entries in stages.items() if stage not in shared}
            runs = {}
            for seed in seeds:
                run = f"{name}-{arm}-s{seed}"
                merged = self._of_seed(overrides.over(own), seed)
                runs[seed] = Manifest(run, work, configs | self._configs(merged, run, f"{at}, arm {arm}"), self.source)
            arms.append(Arm(arm, expected, core, runs))
        return Manifest(name, work, configs, self.source, arms, self._results(root, overrides.top, name, work))

    def _arm(self, arm: str, node: yaml.Node, stages: Stages) -> tuple[str, bool, Stages]:
        """What is expected of an arm, whether it belongs to the core, and the values that it changes."""
        from clips_data.errors import did_you_mean

        may_change = [stage for stage in stages if stage_named(stage).of_run]
        expected, core, changed = "", False, Stages()
        for key, (place, value) in ({} if _is_nothing(node) else self._entries(node, f"arm {arm}")).items():
            if key == "expected":
                expected = self._text({key: (place, value)}, key, default="")
            elif key == "core":
                core = self._value(value)
                if not isinstance(core, bool):
                    self._fail(place, f"arm {arm}: core is {core!r}; it should be true or false")
            elif key in may_change:
                given = {} if _is_nothing(value) else self._entries(value, f"{key} of arm {arm}")
                changed[key] = {name: Entry(self._value(node), at, node) for name, (at, node) in given.items()}
            elif key in stages:
                self._fail(
                    place,
                    f"arm {arm} cannot change {key}, which is done once for all arms. "
                    f"What may differ: {', '.join(may_change)}",
                )
            else:
                near = did_you_mean(key, [*ARM_KEYS, *may_change])
                self._fail(place, f"arm {arm} has no key {key!r}. {near}", end="")
        return expected, core, changed

    def _of_seed(self, stages: Stages, seed: int) -> Stages:
        """``stages`` with the training seed. The names of runs and their seeds are the experiment's to give."""
        for stage, entries in stages.items():
            for key, giver in (("name", "the experiment, the arm and the seed"), ("seed", "`seeds`")):
                if key in entries and key in stage_named(stage).config_class.model_fields:
                    self._fail(entries[key].place, f"{stage}.{key} comes from {giver}, where there are `arms`")
        return stages | {"train": stages["train"] | {"seed": Entry(seed, self.source)}}

    def _seeds(self, root: Root) -> list[int]:
        if "seeds" not in root:
            return [0]
        place, node = root["seeds"]
        seeds = self._value(node)
        numbers = seeds if isinstance(seeds, list) else []
        whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in numbers)
        if not numbers or not whole or len(set(numbers)) < len(numbers):
            self._fail(place, f"seeds is {seeds!r}; it should be a list of different whole numbers, such as [0, 1, 2]")
        return numbers

    def _results(self, root: Root, top: Mapping[str, str], name: str, work: Path) -> Path:
        """From the current folder where it was set, else from the manifest's."""
        if "results" in top:
            path, place = Path(top["results"]), f"--set results={top['results']}"
        elif "results" in root:
            path, place = self.folder / self._text(root, "results", default=""), root["results"][0]
        else:
            return work / "results" / f"{name}.json"
        if path.suffix != ".json":
            self._fail(place, f"results is {str(path)!r}; it should be the name of a .json file")
        return path

    # --- stages -------------------------------------------------------------------------------------------------------

    def _stages(self, root: Root) -> Stages:
        included = self._included(root)
        if "stages" not in root and not included:
            self._fail(self.source, "the manifest has no `stages`")
        stages = self._written(root["stages"][1], "stages") if "stages" in root else {}
        if not stages and not included:
            self._fail(root["stages"][0], "`stages` names no stage")
        return laid_over(included, stages)

    def _written(self, node: yaml.Node, what: str) -> Stages:
        """A mapping of stages to their values."""
        from clips_data.errors import did_you_mean

        stages: Stages = {}
        for key, (place, inner) in self._entries(node, what).items():
            stage, _, label = key.partition(" ")
            if stage not in STAGES:
                self._fail(place, f"there is no stage {stage!r}. {did_you_mean(stage, STAGES)}", end="")
            if label and (stage not in REPEATED or not re.match(NAME_PATTERN, label)):
                self._fail(place, f"{key!r} has a label, which only {', '.join(REPEATED)} may have, and of one word")
            given = {} if _is_nothing(inner) else self._entries(inner, key)
            stages[key] = {name: Entry(self._value(value), at, value) for name, (at, value) in given.items()}
        return stages

    def _included(self, root: Root) -> Stages:
        """The stages of the manifest that this one includes, less those that it is to be without."""
        if "include" not in root:
            if "without" in root:
                self._fail(root["without"][0], "without names stages of an included manifest; there is no `include`")
            return {}
        from clips_data.errors import did_you_mean

        reader, inner = self._opened(root)
        stages = reader._stages(inner)
        if "without" in root:
            at, node = root["without"]
            names = self._value(node)
            for stage in names if isinstance(names, list) else [names]:
                if stage not in stages:
                    near = did_you_mean(stage, stages)
                    self._fail(at, f"without: {reader.source} has no stage {stage!r}. {near}", end="")
                del stages[stage]
        return stages

    def _opened(self, root: Root) -> tuple[Reader, Root]:
        """The reader of the included manifest, and its root."""
        from clips_data.errors import UserError

        place, _ = root["include"]
        name = self._text(root, "include", default="")
        beside = self.folder / f"{name}.yaml"
        try:
            found = find_manifest(str(beside) if beside.is_file() else name)
        except UserError as error:
            self._fail(place, f"include: {error}", end="")
        if found.quoted in self.including:
            self._fail(place, f"include goes round in a circle: {' → '.join([*self.including, found.quoted])}")
        reader = Reader(found.quoted, found.folder, self.including)
        inner = reader._entries(reader._compose(found.text), "the manifest", TOP_KEYS)
        if "arms" in inner:
            self._fail(place, f"{found.quoted} has `arms`, so it cannot be included")
        return reader, inner

    def _configs(self, stages: Stages, run: str, place: str) -> dict[str, BaseModel]:
        return {stage: self._config(stage, entries, run, place) for stage, entries in stages.items()}

    def _config(self, stage: str, entries: dict[str, Entry], run: str, place: str) -> BaseModel:
        """``place`` is where to look for a mistake that is not in one of the entries."""
        from pydantic import ValidationError

        from clips_data.errors import did_you_mean

        from .values import validated

        config = stage_named(stage).config_class
        for key, entry in entries.items():
            if key not in config.model_fields:
                near = did_you_mean(key, config.model_fields)
                self._fail(entry.place, f"{stage} has no key {key!r}. {near}", end="")
        values = {key: entry.value for key, entry in entries.items()}
        if stage_named(stage).of_run and "name" in config.model_fields:
            values.setdefault("name", run)
        try:
            return validated(config, values)
        except ValidationError as error:
            self._refuse(stage, entries, error, place)

    def _refuse(self, stage: str, entries: dict[str, Entry], error: ValidationError, place: str) -> NoReturn:
        from .values import nearest_inside, what_is_right

        errors = error.errors(include_url=False)
        key = str(errors[0]["loc"][0]) if errors[0]["loc"] else ""
        if errors[0]["type"] == "missing" and len(errors[0]["loc"]) == 1:
            self._fail(place, f"{stage}.{key} is missing")
        if key not in entries:
            self._fail(place, f"{stage}: {what_is_right(errors[0])}")
        # A value of several types has an error for each of them; what comes deepest was meant.
        within = [found for found in errors if found["loc"][0] == key]
        found = max(within, key=lambda one: len(self._inside(entries[key], one["loc"])[0]))
        parts, at = self._inside(entries[key], found["loc"])
        name = ".".join([stage, *parts])
        if found["type"] == "missing":
            self._fail(at, f"{name}.{found['loc'][-1]} is missing")
        if found["type"] == "extra_forbidden":
            near = nearest_inside(stage_named(stage).config_class, parts[-1])
            self._fail(at, f"{name.rpartition('.')[0]} has no key {parts[-1]!r}. {near}", end="")
        self._fail(at, f"{name} is {found['input']!r}; {what_is_right(found)}")

    def _inside(self, entry: Entry, path: Sequence[Any]) -> tuple[list[str], str]:
        """As much of pydantic's ``path`` as was written in the manifest, and where its end is.

        Pydantic's paths also name the types of a union, which nobody wrote.
        """
        import yaml

        parts, place, node = [str(path[0])], entry.place, entry.node
        for part in path[1:]:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == part), None)
                if pair is None:
                    continue
                place, node = self._place(pair[0]), pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
                place = self._place(node)
            else:
                continue
            parts.append(str(part))
        return parts, place

    # --- YAML ---------------------------------------------------------------------------------------------------------

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

    def _entries(self, node: yaml.Node, what: str, known: Iterable[str] | None = None) -> Root:
        """Key -> (place, value node) of a mapping node; refuses other nodes, unknown keys and repeated ones."""
        import yaml

        from clips_data.errors import did_you_mean

        if not isinstance(node, yaml.MappingNode):
            self._fail(self._place(node), f"{what} should be a mapping of keys to values")
        found: Root = {}
        for key_node, value in node.value:
            key, place = str(key_node.value), self._place(key_node)
            if known is not None and key not in known:
                inside = "stages" in known and key.partition(" ")[0] in STAGES
                near = f"It is a stage; write it under `stages`, as `stages: {{{key}: …}}`." if inside else ""
                self._fail(place, f"{what} has no key {key!r}. {near or did_you_mean(key, known)}", end="")
            if key in found:
                self._fail(place, f"{key!r} is given a second time; it was first at {found[key][0]}")
            found[key] = (place, value)
        return found

    def _name(self, root: Root, overrides: Mapping[str, str]) -> str:
        name = overrides.get("name") or self._text(root, "name", default="")
        if not re.match(NAME_PATTERN, name):
            place = root["name"][0] if "name" in root else self.source
            self._fail(place, f"name is {name!r}; a manifest needs a name of letters, digits, _ and -")
        return name

    def _text(self, root: Root, key: str, default: str) -> str:
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


def _is_nothing(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"
