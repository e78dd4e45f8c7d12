"""The commands that are one stage: options -> config -> call -> report."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from .options import ConfigCommand
from .stages import DEFAULT_RUN, STAGES, Stage, run_name

if TYPE_CHECKING:
    from pydantic import BaseModel

    from clips_data.executor import Job


class StageCommand(ConfigCommand):
    """The command of one stage. Stages of a run whose config has no name of its own get ``--name`` here."""

    def __init__(self, stage: Stage, summary: str) -> None:
        super().__init__(
            stage.name,
            config=stage.config,
            call=self._run,
            common=stage.options,
            example=stage.example,
            help=f"{summary}\n\n{stage.about}",
            positional=stage.positional,
        )
        self.stage = stage

    def extra_options(self) -> list[click.Parameter]:
        if not self.stage.of_run or "name" in self.stage.config_class.model_fields:
            return []
        text = f"Name of the training run, a folder under runs/.  [default: {DEFAULT_RUN}]"
        return [click.Option(["--name", "run_name"], metavar="TEXT", help=text)]

    def _run(self, config: BaseModel, job: Job, context: click.Context) -> None:
        from clips_data.errors import EndedShort
        from clips_data.executor import stop_on_sigterm

        from .present import say, show_report

        stop_on_sigterm()
        given: dict[str, Any] = context.params
        run = run_name(self.stage, config, given.get("run_name"))
        is_first = os.environ.get("RANK", "0") == "0"  # torchrun starts several processes; the first one talks
        quiet = job.quiet or job.dry_run or not is_first
        say(f"{self.stage.name}: writing to {self.stage.output(config, job, run)}", quiet=quiet)
        try:
            report = self.stage.call(self.stage, config, job, run)
        except EndedShort as error:
            if error.report is not None:
                show_report(error.report, as_json=given["as_json"], quiet=job.quiet)
            raise
        if is_first:
            show_report(report, as_json=given["as_json"], quiet=job.quiet)


def build(name: str, summary: str) -> click.Command:
    return StageCommand(STAGES[name], summary)
