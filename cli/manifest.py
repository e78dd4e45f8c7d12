"""A manifest: one YAML file that names a run, or several to be compared, and says what the stages are to do.

With ``arms`` it is an experiment: the stages that make data are done once, and those that work on a run are done for
every arm and every seed, each as a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .stages import stage_named

if TYPE_CHECKING:
    from pydantic import BaseModel

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


@dataclass(frozen=True)
class Manifest:
    """What a manifest says, resolved: every stage in order with its whole config. ``work`` is as written.

    Where there are ``arms``, ``stages`` are those that all arms share, and ``results`` is the file of their figures.
    """

    name: str
    work: Path
    stages: Mapping[str, BaseModel]
    source: str
    arms: Sequence[Arm] = ()
    results: Path | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What it says of itself as a recipe: system, source, changes and so on."""

    def resolved(self) -> dict[str, Any]:
        """The manifest with every default written out, as it is saved beside the outputs."""
        stages = {name: self.saved(name) for name in self.stages}
        return {"name": self.name, "work": str(self.work), "stages": stages}

    def saved(self, stage: str, *, defaults: bool = True) -> dict[str, Any]:
        """The stage's config as it may be written down: addresses in it without their secrets."""
        from clips_data.redact import redact

        values = self.stages[stage].model_dump(mode="json", exclude_defaults=not defaults)
        return {
            name: redact(value) if isinstance(value, str) and "://" in value else value
            for name, value in values.items()
        }

    def run_of(self, stage: str) -> str:
        """The training run that ``stage`` works on: its own ``name``, else that of ``train``, else the manifest's."""
        if not stage_named(stage).of_run:
            return self.name
        own = getattr(self.stages[stage], "name", None)
        trained = getattr(self.stages.get("train"), "name", None)
        return str(own or trained or self.name)


@dataclass(frozen=True)
class Arm:
    """One variant of an experiment. ``expected`` is what is known of it from elsewhere, for the table of results."""

    name: str
    expected: str
    core: bool
    runs: Mapping[int, Manifest]
    """By seed: a manifest of all stages with the arm's values, named after the experiment, the arm and the seed."""


def load_manifest(
    name: str, settings: Sequence[str] = (), work: Path | None = None, scale: str | None = None
) -> Manifest:
    """Reads the manifest at a path or of a packaged name; ``settings`` are ``stage.key=value`` overrides.

    ``scale`` names a packaged file of values for the stages of any manifest, ``scales/NAME.yaml``. Raises ``UserError``
    naming file, line, key and the nearest right one.
    """
    from clips_data.errors import UserError, did_you_mean

    from .manifest_reader import Reader

    found = find_manifest(name)
    values = None
    if scale is not None:
        path = packaged_file(f"scales/{scale}.yaml")
        if not path.is_file():
            known = [file.stem for file in path.parent.glob("*.yaml")]
            raise UserError(f"There is no scale {scale!r}. {did_you_mean(scale, known)}")
        values = (scale, Reader(f"scales/{path.name}", path.parent).scale(path.read_text()))
    return Reader(found.quoted, found.folder).manifest(found.text, settings, work, values)


@dataclass(frozen=True)
class Found:
    """A manifest's text, the name under which messages quote it, and the folder that it lies in."""

    quoted: str
    text: str
    folder: Path


def find_manifest(name: str) -> Found:
    from clips_data.errors import UserError, did_you_mean

    path = Path(name)
    if path.is_file():
        return Found(name, path.read_text(), path.parent)
    packaged = packaged_manifests()
    if name.startswith("recipe/"):
        name = f"recipes/{name.removeprefix('recipe/')}"
    if name in packaged:
        return Found(f"{name}.yaml", packaged[name], packaged_file(name).parent)
    kind = "no such file" if path.suffix in (".yaml", ".yml") or "/" in name else "no such file or packaged manifest"
    nearest = did_you_mean(name if name.startswith("recipes/") else path.stem, packaged)
    raise UserError(f"There is no manifest {name!r}: {kind}. {nearest}")


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
