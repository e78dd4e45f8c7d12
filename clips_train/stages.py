"""Training in stages: the config of a run becomes one config for each of them (METHOD §6)."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from clips_data.errors import UserError, did_you_mean
from clips_train.config import TrainConfig

OF_THE_WHOLE_RUN = ("name", "stages", "init")


def stages_of(config: TrainConfig) -> list[TrainConfig]:
    """The config of each stage: the run's own, with what differs in the stage. One without ``stages`` is its only one.

    Raises ``UserError`` for a stage that is no YAML mapping of settings, or that gives settings that make no sense.
    """
    whole = config.model_dump(exclude={"stages"}, exclude_unset=True)
    if not config.stages:
        return [config]
    return [_stage(whole, number, line) for number, line in enumerate(config.stages)]


def _stage(whole: dict[str, Any], number: int, line: str) -> TrainConfig:
    changes = _read(number, line)
    for name in changes:
        if name in OF_THE_WHOLE_RUN:
            raise UserError(f"Stage {number} sets {name!r}, which belongs to the whole run. Set it beside stages.")
        if name not in TrainConfig.model_fields:
            hint = did_you_mean(name, TrainConfig.model_fields)
            raise UserError(f"Stage {number} sets {name!r}, which is no setting of training. {hint}")
    if "lr_base" in changes:  # a stage that says how its rate follows from its batch does not keep the run's fixed one
        whole = {name: value for name, value in whole.items() if name != "lr"}
    try:
        return TrainConfig(**whole | changes)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc'])) or 'settings'}: {p['msg']}" for p in error.errors())
        raise UserError(f"Stage {number} ({line}) makes no sense: {'; '.join(problems)}.") from None


def _read(number: int, line: str) -> dict[str, Any]:
    import yaml

    try:
        # Settings in one line, as in "image_px: 224, batch: 64", are a mapping once they stand in braces.
        changes = yaml.safe_load(line if "\n" in line or line.lstrip().startswith("{") else "{" + line + "}")
    except yaml.YAMLError as error:
        raise UserError(f"Stage {number} is not YAML ({' '.join(str(error).split())}): {line}") from None
    if not isinstance(changes, dict) or not all(isinstance(name, str) for name in changes):
        raise UserError(f"Stage {number} is no mapping of settings, such as 'image_px: 224, batch: 64': {line}")
    return changes
