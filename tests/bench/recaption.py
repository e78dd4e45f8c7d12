"""`clips recaption` beside raw `LLM.generate`: same image files, prompt and settings, decoding counted on both sides.

    uv run python tests/bench/recaption.py rate     [--num-images 2000] [--rounds 3] [--model FOLDER]
    uv run python tests/bench/recaption.py memory   [--few 2000] [--many 20000]
    uv run python tests/bench/recaption.py forecast [--runs 10] [--num-images 1000]
    uv run python tests/bench/recaption.py poison   [--num-images 500]
    uv run python tests/bench/recaption.py kill     [--kills 20]

Each prints and writes its figures as JSON (--out). Start-up of the engine is reported and left out of the rates.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from download import family, proportional_bytes

from clips_data import joined, ledger
from clips_data.config import RecaptionConfig
from clips_data.executor import Job
from clips_data.recaption import prompts, rows
from clips_data.recaption.choose import DEMO_MODEL
from clips_data.recaption.vllm import BuildVllm

PROMPT = "describe"
CLIPS = (sys.executable, "-m", "clips_cli")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*BENCHES, "generate"])
    parser.add_argument("--num-images", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20_000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, help="Keep the demo images here for a next time.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with scratch(options.work) as folder:
        result = generate(folder, options) if options.what == "generate" else BENCHES[options.what](folder, options)
    text = json.dumps(result, indent=1)
    (options.out or Path(f"recaption_{options.what}.json")).write_text(text + "\n")
    print(text)


@contextlib.contextmanager
def scratch(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- rate -------------------------------------------------------------------------------------------------------------


def rate(folder: Path, options: Any) -> dict[str, Any]:
    """Rounds of one after the other, so that a busy machine is busy for both."""
    work = demo(folder, options.num_images or 2000)
    found: dict[str, list[float]] = {"clips": [], "raw": []}
    same = 0
    for number in range(options.rounds):
        ours = clips(work, folder / f"captions-{number}" / "synthetic", options.model)
        raw = peer(folder, options)
        found["clips"].append(ours["captions_per_s"])
        found["raw"].append(raw["captions_per_s"])
        same = sum(ours["texts"][key] == text for key, text in raw["texts"].items())
        print(f"round {number}: clips {ours['captions_per_s']}, raw LLM.generate {raw['captions_per_s']}", flush=True)
    ratios = [ours / raw for ours, raw in zip(found["clips"], found["raw"], strict=True)]
    return {
        "num_images": len(raw["texts"]),
        "captions_per_s": found,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
        "same_captions": same,
        "startup_s": {"clips": ours["startup_s"], "raw": raw["startup_s"]},
    }


def demo(folder: Path, num_images: int) -> Path:
    """Pairs of the demo world with at least ``num_images`` images."""
    work = folder / f"demo-{num_images}"
    if not (work / "pairs").is_dir():
        run_clips(
            "download", "demo", "--num-pairs", str(int(num_images * 1.05)), "--work", str(work), "--processes", "2"
        )
    return work


def run_clips(*arguments: str, watch: list[float] | None = None, **options: Any) -> dict[str, Any]:
    """The command's report. ``watch`` gets the memory of its processes in bytes, five times a second."""
    command = [*CLIPS, *arguments, "--json"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, **options)
        if watch is not None:
            while process.poll() is None:
                watch.append(sum(proportional_bytes(pid) for pid in family(process.pid)))
                time.sleep(0.2)
        text, _ = process.communicate()
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read().decode()}")
    report: dict[str, Any] = json.loads(text)
    return report


def clips(work: Path, out: Path, model: str) -> dict[str, Any]:
    """All that the command does after its engine is up: reading, checking, captioning, journal, tables."""
    options = ["--prompt", PROMPT, "--model", model, "--work", str(work), "--out", str(out)]
    report = run_clips("recaption", *options)
    table = pl.concat(pl.read_parquet(path) for path in sorted(out.glob("*.parquet")))
    seconds = report["seconds"] - report["facts"]["startup_s"]
    return {
        "captions_per_s": round(len(table) / seconds, 2),
        "startup_s": report["facts"]["startup_s"],
        "texts": dict(zip(table["key"], table["raw"], strict=True)),
    }


def peer(folder: Path, options: Any) -> dict[str, Any]:
    """Raw ``LLM.generate`` in a process of its own."""
    arguments = ["generate", "--num-images", str(options.num_images), "--model", options.model, "--work", str(folder)]
    out = folder / "generate.json"
    command = [sys.executable, __file__, *arguments, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def generate(folder: Path, options: Any) -> dict[str, Any]:
    """What a user's own script would do: decode the images of the tars, and generate for all of them at once."""
    import io

    from PIL import Image

    settings = BuildVllm(str(DEMO_MODEL) if options.model == "demo" else options.model)
    started = time.monotonic()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_cache_gib))
    import torch
    import vllm

    on_gpu = torch.cuda.is_available()
    llm = vllm.LLM(
        model=settings.model,
        seed=0,
        enforce_eager=not on_gpu,
        max_num_seqs=settings.max_batch_rows,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    startup_s = time.monotonic() - started
    prompt = prompts.load(PROMPT)
    asked = prompt.render({}, seed=0, key="")
    content = [{"type": "image"}, {"type": "text", "text": asked.user}]
    tokenizer: Any = llm.get_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=asked.decoding.max_tokens, seed=0)
    work = demo(folder, options.num_images or 2000)
    started = time.monotonic()
    keys, requests = [], []
    inputs = rows.open_inputs(work, prompt, "clip")
    for unit in inputs.units:
        table = inputs.table(unit)
        keys += table["key"].to_list()
        for image in joined.read_images(inputs.pairs, unit, table):
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            requests.append({"prompt_token_ids": ids, "multi_modal_data": {"image": picture}})
    outputs: list[Any] = llm.generate(requests, sampling, use_tqdm=False)
    seconds = time.monotonic() - started
    return {
        "captions_per_s": round(len(keys) / seconds, 2),
        "startup_s": round(startup_s, 1),
        "texts": {key: output.outputs[0].text for key, output in zip(keys, outputs, strict=True)},
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(folder: Path, options: Any) -> dict[str, Any]:
    """Largest sum of the processes' proportional memory while few and many images are captioned."""
    peaks = {}
    for number in (options.few, options.many):
        work = demo(folder, number)
        out, watched = folder / f"memory-{number}" / "synthetic", [0.0]
        report = run_clips("recaption", "--prompt", PROMPT, "--work", str(work), "--out", str(out), watch=watched)
        peaks[number] = round(max(watched) / 1e6, 1)
        print(f"{report['counts']}: {peaks[number]} MB", flush=True)
    return {"peak_mb": peaks, "ratio": round(peaks[options.many] / peaks[options.few], 3)}


# --- forecast ---------------------------------------------------------------------------------------------------------


def forecast(folder: Path, options: Any) -> dict[str, Any]:
    """How often the interval of a forecast holds what the run then takes."""
    from clips_data.recaption.forecast import measure

    work = demo(folder, options.num_images or 1000)
    found = []
    for number in range(options.runs):
        config = RecaptionConfig(prompt=PROMPT, column=f"run{number}")
        said = measure(config, Job(work=work), 64)
        least, likely, most = said.seconds()
        report = run_clips("recaption", "--prompt", PROMPT, "--column", f"run{number}", "--work", str(work))
        found.append({"least_s": least, "likely_s": likely, "most_s": most, "real_s": report["seconds"]})
        print({name: round(value, 1) for name, value in found[-1].items()}, flush=True)
    held = sum(run["least_s"] <= run["real_s"] <= run["most_s"] for run in found)
    return {"held": held, "of": len(found), "runs": found}


# --- bad luck ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildPoisoned(BuildVllm):
    """vLLM with an image decoder that kills the process on one image."""

    poison: str = ""

    def __call__(self) -> Any:
        from clips_data.recaption import vllm

        decode = vllm.decode_image

        def poisoned(data: bytes) -> Any:
            if hashlib.sha256(data).hexdigest() == self.poison:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(data)

        vllm.decode_image = poisoned
        return super().__call__()


def poison(folder: Path, options: Any) -> dict[str, Any]:
    """One image in 500 kills the engine's process, the real vLLM: what is lost, and how many engines that costs."""
    from clips_data.recaption import choose
    from clips_data.recaption import run as recaption

    work = demo(folder, options.num_images or 500)
    pairs = pl.read_parquet(work / "pairs" / "00000.parquet").filter(pl.col("status") == "success")
    choose.build = lambda config, prompt: (  # type: ignore[assignment]
        "vllm",
        BuildPoisoned(str(DEMO_MODEL), poison=pairs["sha256"][len(pairs) // 2]),
    )
    report = recaption.run(RecaptionConfig(prompt=PROMPT, column="poisoned"), Job(work=work, quiet=True))
    return {"counts": report.counts, "engine_deaths": report.facts["engine_deaths"], "seconds": report.seconds}


def kill(folder: Path, options: Any) -> dict[str, Any]:
    """SIGKILL at random moments of real captioning, until it is done; the captions against an undisturbed run's."""
    work = demo(folder, options.num_images or 2000)
    expected = clips(work, folder / "undisturbed" / "synthetic", options.model)["texts"]
    started = time.monotonic()
    arguments = ["--prompt", PROMPT, "--work", str(work), "--column", "killed", "--batch-rows", "64"]
    moments, kills = random.Random(0), 0
    while kills < options.kills:
        process = subprocess.Popen(
            [*CLIPS, "recaption", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        journals = work / "captions" / "killed"
        before = sum(path.stat().st_size for path in journals.glob("*.journal.jsonl")) if journals.is_dir() else 0
        while process.poll() is None and kills % 4:  # three of four wait until it has begun to caption
            now = sum(path.stat().st_size for path in journals.glob("*.journal.jsonl")) if journals.is_dir() else 0
            if now != before:
                break
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.0))
        os.killpg(process.pid, signal.SIGKILL) if kills % 2 else process.kill()
        process.wait()
        kills += 1
    report = run_clips("recaption", *arguments)
    table = pl.concat(pl.read_parquet(path) for path in sorted((work / "captions" / "killed").glob("*.parquet")))
    said = dict(zip(table["key"], table["raw"], strict=True))
    return {
        "kills": kills,
        "rows": len(table),
        "keys": table["key"].n_unique(),
        "expected_rows": len(expected),
        "same_captions": sum(said.get(key) == text for key, text in expected.items()),
        "journals_left": len(list((work / "captions" / "killed").glob("*.journal.jsonl"))),
        "counts": report["counts"],
        "seconds": round(time.monotonic() - started),
        "finished": len(ledger.finished_units(work / "captions" / "killed")),
    }


BENCHES: dict[str, Callable[[Path, Any], dict[str, Any]]] = {
    "rate": rate,
    "memory": memory,
    "forecast": forecast,
    "poison": poison,
    "kill": kill,
}

if __name__ == "__main__":
    main()
