"""`clips shard` beside what others do with the same bytes: tar writing, samples per second, memory.

    uv run python tests/bench/shard.py tar    [--num-samples 4000] [--rounds 5]
    uv run python tests/bench/shard.py shard  [--num-samples 20000] [--rounds 3]
    uv run python tests/bench/shard.py memory [--few 50000] [--many 500000]

Each prints and writes its figures as JSON (--out). Rounds of rivals follow one another, so that a busy machine is busy
for all of them; figures are of the best round of each, ratios of the medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from recaption import run_clips, scratch

from clips_data import ledger, schema, tars

IMAGE_BYTES, SMALL_IMAGE_BYTES = 25_000, 300
PAIRS_SHARD_ROWS = 1000
NUM_DIFFERENT_CAPTIONS = 5000
COLUMN = "synthetic"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*BENCHES])
    parser.add_argument("--num-samples", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--few", type=int, default=50_000)
    parser.add_argument("--many", type=int, default=500_000)
    parser.add_argument("--work", type=Path, help="Keep the synthetic work folders here for a next time.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with scratch(options.work) as folder:
        result = BENCHES[options.what](folder, options)
    text = json.dumps(result, indent=1)
    (options.out or Path(f"shard_{options.what}.json")).write_text(text + "\n")
    print(text)


# --- a synthetic work folder ------------------------------------------------------------------------------------------

SUBJECTS = ("a man", "an old woman", "a small dog", "a red bicycle", "two children", "a wooden table", "a white boat")
ADJECTIVES = ("bright", "narrow", "weathered", "colourful", "quiet", "crowded", "blurred", "sunlit", "modern", "round")
THINGS = ("street", "window", "mountain", "kitchen", "market", "river", "sign", "garden", "bridge", "shelf", "sky")
VERBS = ("stands beside", "leans against", "is seen behind", "rests on", "is framed by", "faces", "moves towards")
OPENINGS = ("The image shows", "In the foreground,", "In the background,", "To the left,", "Above it,")


def make_captions(num: int, seed: int = 0) -> list[str]:
    """Long captions as a multimodal model writes them: four sentences, about fifty words."""
    drawn = random.Random(seed)

    def sentence() -> str:
        return (
            f"{drawn.choice(OPENINGS)} {drawn.choice(SUBJECTS)} {drawn.choice(VERBS)} the {drawn.choice(ADJECTIVES)} "
            f"{drawn.choice(THINGS)} near a {drawn.choice(THINGS)}."
        )

    return [" ".join(sentence() for _ in range(4)) for _ in range(num)]


def make_work(work: Path, num_samples: int, image_bytes: int) -> Path:
    """``pairs/`` and one caption column. Images are random bytes: sharding copies them and never decodes."""
    if (work / schema.CAPTIONS).is_dir():
        return work
    shutil.rmtree(work, ignore_errors=True)
    pairs, captions = work / schema.PAIRS, work / "captions.part" / COLUMN
    pairs.mkdir(parents=True)
    captions.mkdir(parents=True)
    texts = make_captions(NUM_DIFFERENT_CAPTIONS)
    for number, first in enumerate(range(0, num_samples, PAIRS_SHARD_ROWS)):
        num_rows = min(PAIRS_SHARD_ROWS, num_samples - first)
        hashes = _write_pairs(pairs, number, num_rows, image_bytes)
        _write_captions(captions, number, hashes, [texts[(first + row) % len(texts)] for row in range(num_rows)])
    captions.parent.rename(work / schema.CAPTIONS)
    return work


def _write_pairs(folder: Path, number: int, num_rows: int, image_bytes: int) -> list[str]:
    unit = schema.shard_name(number)
    keys = [schema.sample_key(number, row) for row in range(num_rows)]
    webs = [f"photo {key} for sale, free shipping" for key in keys]
    hashes = []
    with ledger.part(folder / f"{unit}.tar").open("wb") as file:
        writer = tars.TarWriter(file)
        noise = random.Random(number).randbytes(num_rows * image_bytes)
        for row, (key, web) in enumerate(zip(keys, webs, strict=True)):
            image = noise[row * image_bytes : (row + 1) * image_bytes]
            hashes.append(hashlib.sha256(image).hexdigest())
            writer.add(f"{key}.jpg", image)
            writer.add(f"{key}.txt", web.encode())
            writer.add(f"{key}.json", b"{}")
        writer.close()
    same = {"status": "success", "code": "ok", "width": 256, "height": 256, "image_ext": "jpg", "bytes": image_bytes,
            "attempts": 1, "host": "images.test", "error_message": None}  # fmt: skip
    columns = {name: [value] * num_rows for name, value in same.items()}
    urls = [f"http://images.test/{key}.jpg" for key in keys]
    table = pa.table({"url": urls, "caption": webs, "key": keys, "sha256": hashes, **columns})
    pq.write_table(table, ledger.part(folder / f"{unit}.parquet"))
    files = [f"{unit}.tar", f"{unit}.parquet"]
    ledger.commit(folder, unit, files, inputs={}, config={}, counts={"ok": num_rows})
    return hashes


def _write_captions(folder: Path, number: int, hashes: list[str], texts: list[str]) -> None:
    unit, num_rows = schema.shard_name(number), len(hashes)
    same = {"status": "success", "code": "ok", "finish_reason": "stop", "num_tokens": 60}
    columns: dict[str, Sequence[Any]] = {name: [value] * num_rows for name, value in same.items()}
    columns["flags"] = pa.array([[]] * num_rows, pa.list_(pa.string()))
    keys = [schema.sample_key(number, row) for row in range(num_rows)]
    about = schema.caption_metadata(
        model="none", model_revision="0", engine="bench", engine_version="0", prompt="describe", prompt_digest="0",
        sampling={}, seed=0,
    )  # fmt: skip
    table = pa.table({"key": keys, "sha256": hashes, "caption": texts, "raw": texts, **columns})
    pq.write_table(table.replace_schema_metadata(about), ledger.part(folder / f"{unit}.parquet"))
    ledger.commit(folder, unit, [f"{unit}.parquet"], inputs={}, config={}, counts={"ok": num_rows})


# --- tar --------------------------------------------------------------------------------------------------------------


def tar(folder: Path, options: Any) -> dict[str, Any]:
    """Our writer, webdataset's and `cp`, each making the same file."""
    import webdataset

    num_samples, rounds = options.num_samples or 4000, options.rounds or 5
    drawn = random.Random(0)
    caption = make_captions(1)[0].encode()
    about = json.dumps({"web": "photo", COLUMN: caption.decode() * 3, "sub_captions": {COLUMN: [[0, 9]] * 4}}).encode()
    samples = [(f"{number:09d}", drawn.randbytes(IMAGE_BYTES)) for number in range(num_samples)]

    def clips(path: Path) -> None:
        with path.open("wb") as file:
            writer = tars.TarWriter(file)
            for key, image in samples:
                writer.add(f"{key}.jpg", image)
                writer.add(f"{key}.json", about)
                writer.add(f"{key}.txt", caption)
            writer.close()

    def peer(path: Path) -> None:
        with path.open("wb") as file, webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0) as writer:
            for key, image in samples:
                writer.write({"__key__": key, "jpg": image, "json": about, "txt": caption})

    def copy(path: Path) -> None:
        os.spawnvp(os.P_WAIT, "cp", ["cp", str(folder / "clips.tar"), str(path)])

    rivals: dict[str, Callable[[Path], None]] = {"clips": clips, "webdataset": peer, "cp": copy}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, write in rivals.items():
            path = folder / f"{name}.tar"
            path.unlink(missing_ok=True)
            seconds[name].append(timed(lambda write=write, path=path: write(path)))  # type: ignore[misc]
    assert len({ledger.digest_file(folder / f"{name}.tar") for name in rivals}) == 1, "the rivals wrote different bytes"
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "num_samples": num_samples,
        "bytes": (folder / "clips.tar").stat().st_size,
        "samples_per_s": {name: round(num_samples / min(found)) for name, found in seconds.items()},
        "times_webdataset": round(medians["webdataset"] / medians["clips"], 2),
        "times_cp": round(medians["cp"] / medians["clips"], 2),
    }


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- shard ------------------------------------------------------------------------------------------------------------


def shard(folder: Path, options: Any) -> dict[str, Any]:
    """The whole command with one process, start-up of Python and libraries included; processor seconds beside it."""
    num_samples, rounds = options.num_samples or 20_000, options.rounds or 3
    work = make_work(folder / f"images-{num_samples}", num_samples, IMAGE_BYTES)
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        shutil.rmtree(work / "out", ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.monotonic()
        report = run_clips(*command(work), env=one_thread())
        total_s = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        made = sum(report["counts"].values())
        assert made == num_samples, report
        figures = {"samples_per_s": made / total_s, "per_cpu_s": made / cpu_s, "stage_per_s": made / report["seconds"]}
        found.append({name: round(value) for name, value in figures.items()})
        print(found[-1], flush=True)
    best = {name: max(run[name] for run in found) for name in found[0]}
    return {"num_samples": num_samples, "image_bytes": IMAGE_BYTES, "rule": "sentence", "best": best, "runs": found}


def command(work: Path) -> list[str]:
    return ["shard", "--work", str(work), "--out", str(work / "out"), "--split", "sentence", "--processes", "1"]


def one_thread() -> dict[str, str]:
    """Per core: libraries with threads of their own get one."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(folder: Path, options: Any) -> dict[str, Any]:
    """Largest sum of the processes' proportional memory while few and many samples are sharded."""
    peaks, rates = {}, {}
    for number in (options.few, options.many):
        work = make_work(folder / f"small-{number}", number, SMALL_IMAGE_BYTES)
        shutil.rmtree(work / "out", ignore_errors=True)
        watched = [0.0]
        report = run_clips(*command(work), watch=watched, env=one_thread())
        peaks[number] = round(max(watched) / 1e6, 1)
        rates[number] = round(number / report["seconds"])
        print(f"{number} samples: {peaks[number]} MB at most, {rates[number]} samples/s", flush=True)
        if options.work is None:
            shutil.rmtree(work)
    ratio = round(peaks[options.many] / peaks[options.few], 3)
    return {"peak_mb": peaks, "ratio": ratio, "samples_per_s": rates}


BENCHES: dict[str, Callable[[Path, Any], dict[str, Any]]] = {
    "tar": tar,
    "shard": shard,
    "memory": memory,
}

if __name__ == "__main__":
    main()
