"""The README's commands exist, and CI runs the test command that the README names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FENCED = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()]
CLIPS = re.findall(r"^clips (\w+)(.*)$", "\n".join(FENCED), re.M)


@pytest.mark.parametrize(("command", "rest"), CLIPS)
def test_every_command_line_of_the_readme_has_real_options(command: str, rest: str) -> None:
    assert command in COMMANDS
    below = rest.split()[:1] if command == "prompts" else []  # the one command that has commands
    help_text = CliRunner().invoke(cli, [command, *below, "--help"]).output
    for option in re.findall(r"--[a-z0-9-]+", rest):
        assert option in help_text, f"clips {command} has no {option}"


def test_the_readme_shows_the_stages_and_names_every_command() -> None:
    assert len(CLIPS) >= 8
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", README), command


def test_the_two_first_commands_are_on_the_first_screen_and_ci_runs_them() -> None:
    first_screen = "\n".join(README.splitlines()[:25])
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install uv && uv run clips run quickstart" in first_screen
    assert "pip install uv && uv run pytest" in first_screen
    assert "pip install uv && uv run pytest" in ci
    assert "clips run quickstart" in ci
