"""``clips caption``: what it takes, what it prints, and how it ends."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runmaker
import shardmaker
import torch

from cli import caption_inputs
from cli.caption_inputs import ahead
from cli.main import main
from clips_train import generate, transforms
from clips_train.decoding import Decoding

load_trained = functools.cache(generate.load_trained)
ROOT = Path(__file__).resolve().parent.parent
Say = Callable[..., tuple[int, list[str], str]]
"""Exit code, lines of stdout, stderr."""
WEBS = {"one.jpg": "a red circle", "two.png": "", "three.webp": "seven words " * 3}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with captioners that nobody trained."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    for name, change in (
        ("default", {"decoder": "teacher_forced", "condition_drop": 0.5}),
        ("strict", {"decoder": "teacher_forced"}),
        ("image", {"decoder": "teacher_forced", "condition": None}),
        ("queries", {"decoder": "queries", "condition_drop": 0.5}),
    ):
        runmaker.write_run(folder / "runs" / name, spread=8.0, **change)
    return folder


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint is read once for all tests."""
    monkeypatch.setattr(generate, "load_trained", load_trained)


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images under ``photos``, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, (name, image_format) in enumerate(
        (("one.jpg", "JPEG"), ("two.png", "PNG"), ("more/three.webp", "WEBP"))
    ):
        (folder / name).write_bytes(shardmaker.sample(9 * number + 1, image_format=image_format)[0])
    return folder


@pytest.fixture
def say(work: Path, capfd: pytest.CaptureFixture[str]) -> Say:
    """Runs the command on the run ``name``."""

    def run(*words: str, name: str = "default") -> tuple[int, list[str], str]:
        code = main(["caption", *words, "--name", name, "--work", str(work), "--device", "cpu"])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    return run


def expected(work: Path, name: str, paths: Sequence[Path], webs: Sequence[str] | None = None) -> list[str]:
    trained = generate.load_trained(work / "runs" / name, "cpu")
    pixels = torch.stack([transforms.squash(transforms.decode(path.read_bytes(), 16), 16) for path in paths])
    return [" ".join(one.text.split()) for one in generate.captions(trained, pixels, webs)]


ALL = ("photos/one.jpg", "photos/two.png", "photos/more/three.webp")

# --- what it takes ----------------------------------------------------------------------------------------------------


def test_each_image_is_a_line_with_its_path_and_caption(work: Path, say: Say) -> None:
    paths = ["photos/two.png", "photos/one.jpg"]
    code, lines, err = say(*paths)
    captions = expected(work, "default", [Path(path) for path in paths])
    assert code == 0 and lines == [f"{path}\t{caption}" for path, caption in zip(paths, captions, strict=True)]
    assert captions[0] != captions[1] and "2 of 2 images captioned" in err


@pytest.mark.parametrize(("word", "order"), [("photos", ALL), ("photos/**/*.*", sorted(ALL))])
def test_folders_and_globs_mean_the_images_in_them(say: Say, word: str, order: Sequence[str]) -> None:
    Path("photos/.hidden.jpg").write_bytes(b"none")
    code, lines, _ = say(word)
    assert code == 0 and [line.partition("\t")[0] for line in lines] == list(order)


def test_what_is_passed_over_in_a_folder_is_told(say: Say) -> None:
    Path("photos/notes.doc").touch()
    assert "photos: 3 images by their suffix, 1 other files were passed over." in say("photos")[2]


def test_paths_come_from_stdin_or_from_a_list(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("list.txt").write_bytes("\r\n".join(["photos/one.jpg", "", "photos/two.png"]).encode())
    code, lines, _ = say("list.txt")
    assert code == 0 and [line.partition("\t")[0] for line in lines] == ["photos/one.jpg", "photos/two.png"]
    with Path("list.txt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert say("-")[:2] == (0, lines)


def write_table(path: Path, rows: list[dict[str, str | None]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("beside", [False, True], ids=["from here", "from the table"])
def test_a_table_names_images_and_their_web_captions(work: Path, say: Say, suffix: str, beside: bool) -> None:
    start = "" if beside else "photos/"
    names = ["one.jpg", "two.png", "more/three.webp"]
    webs = [WEBS[Path(name).name] for name in names]
    rows: list[dict[str, str | None]] = [
        {"path": start + name, "web": web, "alt": "other"} for name, web in zip(names, webs, strict=True)
    ]
    table = f"photos/list.{suffix}"
    write_table(Path(table), rows)
    files = [Path("photos") / name for name in names]
    code, lines, _ = say(table)
    with_webs = expected(work, "default", files, webs)
    assert code == 0 and lines == [f"{start}{name}\t{text}" for name, text in zip(names, with_webs, strict=True)]
    for words, given in ((["--web-column", "alt"], "other"), (["--web", "a lake"], "a lake")):
        assert [line.partition("\t")[2] for line in say(table, *words)[1]] == expected(
            work, "default", files, [given] * 3
        )
    assert with_webs != expected(work, "default", files, ["other"] * 3)


def test_a_table_may_have_other_names_for_its_columns_and_rows_without_path(
    say: Say,
) -> None:
    write_table(Path("list.jsonl"), [{"file": "photos/one.jpg"}, {"file": None}])
    code, _, err = say("list.jsonl")
    assert code == 1 and "no column 'path'" in err and "--image-column" in err
    code, lines, err = say("list.jsonl", "--image-column", "file", "--min-success", "0.5")
    assert (code, len(lines)) == (0, 1) and "1 of 2 no_such_file" in err
    code, _, err = say("list.jsonl", "--image-column", "file", "--web-column", "alt")
    assert code == 1 and "no column 'alt'" in err


def test_its_own_json_can_be_its_input(say: Say) -> None:
    _, lines, _ = say("photos", "--web", "a lake", "--json")
    Path("again.jsonl").write_text("\n".join(lines))
    assert say("again.jsonl", "--json")[1] == lines


# --- what it prints ---------------------------------------------------------------------------------------------------


def test_json_tells_how_each_caption_ended(work: Path, say: Say) -> None:
    _, lines, _ = say("photos/one.jpg", "--web", "ein größerer See", "--json", "--max-tokens", "4")
    trained = generate.load_trained(work / "runs" / "default", "cpu")
    pixels = transforms.squash(transforms.decode(Path("photos/one.jpg").read_bytes(), 16), 16)[None]
    [one] = generate.captions(trained, pixels, ["ein größerer See"], decoding=Decoding(max_tokens=4))
    assert [json.loads(line) for line in lines] == [
        {
            "path": "photos/one.jpg",
            "caption": one.text,
            "web": "ein größerer See",
            "finish": "length",
            "tokens": 4,
            "log_probability": round(one.log_probability, 4),
        }
    ]
    assert "größerer" in lines[0]


def test_captions_do_not_depend_on_batch_order_or_name(say: Say) -> None:
    Path("photos/more/copy.jpg").write_bytes(Path("photos/one.jpg").read_bytes())
    for decoding in (
        ["--decoding", "top_p", "--temperature", "2", "--seed", "4"],
        ["--decoding", "beam", "--beams", "3"],
        [],
    ):
        of = dict(line.split("\t") for line in say("photos", *decoding, "--batch", "16")[1])
        assert of["photos/more/copy.jpg"] == of["photos/one.jpg"] != of["photos/two.png"]
        alone = say("photos/two.png", "photos/one.jpg", *decoding, "--batch", "1")[1]
        assert [line.split("\t") for line in alone] == [
            [path, of[path]] for path in ("photos/two.png", "photos/one.jpg")
        ]


def test_seeds_draw_other_captions(say: Say) -> None:
    hot = ["photos/one.jpg", "--decoding", "top_p", "--temperature", "2", "--top-p", "1"]
    assert len({tuple(say(*hot, "--seed", str(seed))[1]) for seed in range(4)}) == 4


def test_images_that_cannot_be_read_are_told_counted_and_passed_over(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("photos/broken.jpg").write_bytes(b"none")
    Path("photos/cut.png").write_bytes(Path("photos/two.png").read_bytes()[:-90])
    Path("photos/large.png").write_bytes(bytes(5000))
    monkeypatch.setattr(caption_inputs, "MAX_IMAGE_BYTES", 4999)
    Path("list.txt").write_text("photos/gone.jpg\nphotos\n")
    code, lines, err = say("photos", "list.txt", "--batch", "2")
    assert code == 3 and [line.partition("\t")[0] for line in lines] == list(ALL)
    for path, reason in (
        ("photos/broken.jpg", "not_an_image"), ("photos/cut.png", "decode_failed"),
        ("photos/gone.jpg", "no_such_file"), ("photos", "no_such_file"), ("photos/large.png", "too_large"),
    ):  # fmt: skip
        assert f"{path}\t{reason}" in err
    assert "3 of 8 images captioned" in err and "2 of 8 no_such_file" in err
    assert "3 of 8 images got a caption, less than --min-success 0.95" in err
    assert say("photos", "--min-success", "0.5")[0] == 0


def test_a_caption_is_one_line_and_steers_no_terminal(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    from clips_train.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "a\nred\t\x1b[31mcircle")
    assert say("photos/one.jpg")[1] == ["photos/one.jpg\ta red �[31mcircle"]


# --- what it is asked -------------------------------------------------------------------------------------------------


def test_a_captioner_that_always_had_a_text_is_warned_of_once(say: Say) -> None:
    code, lines, err = say("photos", "--batch", "1", name="strict")
    assert code == 0 and len(lines) == 3 and err.count("never trained without a text") == 1
    assert "never trained" not in say("photos", "--web", "a lake", name="strict")[2]
    assert "never trained" not in say("photos")[2]


def test_a_captioner_of_the_image_alone_takes_no_web_caption(work: Path, say: Say) -> None:
    code, lines, err = say("photos/one.jpg", name="image")
    assert code == 0 and lines == [f"photos/one.jpg\t{expected(work, 'image', [Path('photos/one.jpg')])[0]}"]
    code, _, err = say("photos/one.jpg", "--web", "a lake", name="image")
    assert code == 1 and "reads the image alone" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--beams", "3"], 2, "--beams is for --decoding beam, and this is greedy"),
        (["--decoding", "beam", "--top-p", "0.5"], 2, "--top-p is for --decoding top_p, and this is beam"),
        (["--decoding", "top_p", "--top-p", "0"], 2, "--top-p"),
        (["--web", "a", "--web-column", "b"], 2, "--web and --web-column"),
        (["photos/gone.jpg"], 1, "photos/gone.jpg is not a file"),
        (["photos/*.gif"], 1, "means no file"),
        (["photos.tar"], 1, "clips adopt"),
        (["--name", "nobody"], 1, "holds no checkpoint"),
        (["--name", "queries", "--decoding", "beam"], 1, "never see each other's words"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(
    work: Path, words: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", "photos/one.jpg", "--work", str(work), *words]) == code
    out, err = capfd.readouterr()
    assert message in err and out == ""


def test_no_image_at_all_is_said(say: Say) -> None:
    Path("empty").mkdir()
    code, _, err = say("empty")
    assert code == 1 and "There was no image to caption" in err and "empty: 0 images" in err


def test_queries_caption_too(say: Say, work: Path) -> None:
    _, lines, _ = say("photos/one.jpg", "--web", "a lake", name="queries")
    assert lines == [f"photos/one.jpg\t{expected(work, 'queries', [Path('photos/one.jpg')], ['a lake'])[0]}"]


# --- pipes ------------------------------------------------------------------------------------------------------------


def test_in_a_pipe_captions_come_as_paths_do_and_a_reader_who_leaves_ends_it(work: Path) -> None:
    command = [sys.executable, "-m", "cli", "caption", "-", "--batch", "1", "--work", str(work), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        for path in ("photos/one.jpg", "photos/two.png"):  # the second is sent when the first is back
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith(f"{path}\t")
        process.stdout.close()
        process.stdin.write("photos/one.jpg\n")
        process.stdin.flush()
        assert process.wait(60) == 0  # although stdin is still open
        assert "Traceback" not in process.stderr.read()


# --- reading ahead ----------------------------------------------------------------------------------------------------


def test_what_is_read_ahead_is_bounded_and_keeps_its_order() -> None:
    made: list[int] = []
    lock = threading.Lock()

    def make(number: int) -> int:
        with lock:
            made.append(number)
        return number

    for taken, number in enumerate(ahead(range(200), make, num_ahead=5)):
        assert number == taken
        assert len(made) <= taken + 1 + 5
    assert sorted(made) == list(range(200))


def test_errors_of_what_is_read_and_of_reading_it_arrive() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("the list")

    found = ahead(items(), str, num_ahead=3)
    assert next(found) == "1"
    with pytest.raises(LookupError, match="the list"):
        next(found)
    with pytest.raises(ZeroDivisionError):
        list(ahead([1, 0], lambda number: 1 / number, num_ahead=3))


def test_leaving_early_ends_the_reading() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    found = ahead(items(), str, num_ahead=4)
    assert next(found) == "0"
    found.close()
    for thread in threading.enumerate():
        if thread.name == caption_inputs.FEEDER:
            thread.join(10)
            assert not thread.is_alive()
    assert len(taken) <= 7
