"""The doors between the rooms: who may import what, read from our own import statements."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names) | {"__future__"}
OPEN_TO_TRAINING = ("schema", "errors", "ledger", "journal", "draws", "split", "mixing", "mixing_rules")
HEAVY = {"torch", "transformers", "vllm", "img2dataset", "spacy", "polars"}
MAY_USE_TRAINING = ("recaption/clips.py", "score.py", "demo/captioner.py", "demo/scorer.py")


def top_imports(path: Path) -> Iterator[str]:
    """Dotted names that importing ``path`` imports; relative ones start with a dot."""
    yield from _names(_running(ast.parse(path.read_text()).body))


def all_imports(path: Path) -> Iterator[str]:
    """Imports anywhere in the file, also inside functions and for types."""
    yield from _names(ast.walk(ast.parse(path.read_text())))


def _names(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)


def _running(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What is executed on import: also what stands in a top-level ``if``, ``try``, ``with`` or class."""
    for node in statements:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _running(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef | ast.ExceptHandler):
            yield from _running(ast.iter_child_nodes(node))
        else:
            yield node


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return files


def package_of(name: str) -> str:
    return name.partition(".")[0]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", python_files("cli"), ids=name_of)
def test_cli_imports_only_click_and_the_standard_library_at_top(path: Path) -> None:
    foreign = {name for name in top_imports(path) if not name.startswith(".")}
    assert {package_of(name) for name in foreign} - STANDARD <= {"click"}


@pytest.mark.parametrize("room", OPEN_TO_TRAINING)
def test_open_modules_of_clips_data_import_only_the_standard_library_and_each_other(room: str) -> None:
    for name in top_imports(ROOT / "clips_data" / f"{room}.py"):
        if package_of(name) == "clips_data":
            assert name.split(".")[1] in OPEN_TO_TRAINING, name
        else:
            assert package_of(name) in STANDARD, name


@pytest.mark.parametrize("path", python_files("clips_train"), ids=name_of)
def test_clips_train_uses_only_the_open_modules_of_clips_data(path: Path) -> None:
    for name in all_imports(path):
        assert package_of(name) not in ("cli", "clips_cli"), name
        if package_of(name) == "clips_data":
            assert name.split(".")[1] in (*OPEN_TO_TRAINING, "__version__"), name


@pytest.mark.parametrize("path", python_files("clips_data"), ids=name_of)
def test_clips_data_reaches_torch_and_training_only_where_it_may_and_inside_functions(path: Path) -> None:
    inside = path.relative_to(ROOT / "clips_data").as_posix()
    everywhere = {package_of(name) for name in all_imports(path)}
    assert not everywhere & {"cli", "clips_cli"}
    assert not {package_of(name) for name in top_imports(path)} & {*HEAVY, "clips_train"}
    if inside not in MAY_USE_TRAINING:
        assert "clips_train" not in everywhere
    if inside not in (*MAY_USE_TRAINING, "recaption/vllm.py", "recaption/hf.py", "recaption/choosing.py"):
        assert "torch" not in everywhere


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["--help"], set()),
        (["doctor", "--help"], set()),
        (["caption", "--help"], set()),
        (["download", "--help"], {"pydantic"}),
        (["train", "--help"], {"pydantic"}),
        (["plan", "quickstart", "--sample", "0"], {"pydantic", "yaml"}),
    ],
)
def test_help_and_plan_load_no_heavy_library(words: list[str], allowed: set[str], tmp_path: Path) -> None:
    code = (
        "import contextlib, io, json, sys\n"
        "import cli.main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    assert cli.main.main({words!r}) == 0\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "click" in loaded
    assert not loaded & ({*HEAVY, "pydantic", "pyarrow", "numpy", "PIL", "yaml", "tqdm"} - allowed)
