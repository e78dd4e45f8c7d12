from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clips_data import decoder, executor, images
from clips_data.decoder import Decoder
from clips_data.images import ImageRefused, ImageSettings

KEEP = ImageSettings(100_000_000)
RESIZE = ImageSettings(100_000_000, resize="keep_ratio", image_px=64, phash=True)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int, side_px: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side_px, side_px, 3)).astype(np.uint8))


def slow_image() -> bytes:
    """Takes a second to decode, and hardly any bytes."""
    return encoded(Image.new("RGB", (9900, 9900), "teal"), "PNG", compress_level=1)


@pytest.fixture(scope="module")
def slow() -> bytes:
    return slow_image()


@pytest.fixture
def child() -> Iterator[Decoder]:
    with Decoder(KEEP) as made:
        yield made


def refusal(child: Decoder, data: bytes) -> ImageRefused:
    with pytest.raises(ImageRefused) as refused:
        child.check(data)
    return refused.value


def is_alive(pid: int) -> bool:
    """Zombies of a fork server that has not yet looked are dead."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.02)


@pytest.mark.parametrize("settings", [KEEP, RESIZE], ids=["no", "keep_ratio"])
def test_answers_are_those_of_the_check_itself(settings: ImageSettings) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    inputs = [
        encoded(noise(1), "JPEG", exif=exif),
        encoded(noise(2), "PNG"),
        encoded(noise(3), "GIF"),
        encoded(noise(4, 1500), "PNG"),  # more bytes than a pipe holds
    ]
    with Decoder(settings) as child:
        for data in inputs:
            assert child.check(data) == images.check(data, settings)
        for data in (b"<html>", encoded(noise(1), "JPEG")[:-400]):
            with pytest.raises(ImageRefused) as wanted:
                images.check(data, settings)
            found = refusal(child, data)
            assert (found.code, found.detail) == (wanted.value.code, wanted.value.detail)


def test_kept_bytes_do_not_come_back_through_the_pipe(child: Decoder) -> None:
    data = encoded(noise(1), "JPEG")
    assert child.check(data).data is data


def test_one_child_serves_many_images_outside_this_process(child: Decoder) -> None:
    assert child.pid is None
    pids = set()
    for seed in range(5):
        child.check(encoded(noise(seed), "JPEG"))
        pids.add(child.pid)
    (pid,) = pids
    assert pid not in (None, os.getpid())


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGBUS])
def test_a_crash_costs_one_image(number: signal.Signals, child: Decoder, slow: bytes) -> None:
    good = encoded(noise(1), "JPEG")
    child.check(good)
    first = child.pid
    assert first is not None
    crash = threading.Timer(0.1, os.kill, (first, number))
    crash.start()
    refused = refusal(child, slow)
    crash.join()
    assert refused.code == "decode_failed"
    assert refused.detail == f"the decoder died: {number.name}"
    assert child.check(good).data == good
    assert child.pid not in (None, first)
    assert not is_alive(first)


def test_a_child_that_died_between_two_images_costs_none(child: Decoder) -> None:
    good = encoded(noise(1), "JPEG")
    child.check(good)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{first}").exists())
    assert child.check(good).data == good
    assert child.pid != first


def test_a_child_that_hangs_is_ended_at_the_deadline(slow: bytes) -> None:
    good = encoded(noise(1), "JPEG")
    with Decoder(KEEP, deadline_s=3.0) as child:
        child.check(good)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        refused = refusal(child, slow)
        assert (refused.code, refused.detail) == ("decode_failed", "the decoder died: no answer within 3 s")
        assert not is_alive(first)
        assert child.pid is None  # the next image has a new one, as after a crash


def test_an_image_that_takes_too_much_memory_costs_only_itself(monkeypatch: pytest.MonkeyPatch, slow: bytes) -> None:
    monkeypatch.setattr(decoder, "MIN_CHILD_BYTES", 380 << 20)
    monkeypatch.setattr(decoder, "CHILD_BYTES_PER_PIXEL", 1)
    good = encoded(noise(1), "JPEG")
    with Decoder(KEEP) as child:
        child.check(good)
        refused = refusal(child, slow)
        assert refused.code == "decode_failed"
        assert "the decoder died" in refused.detail and "memory" in refused.detail
        assert child.check(good).data == good


def test_a_jpeg_whose_data_stop_before_its_end_marker_is_refused(
    child: Decoder, capfd: pytest.CaptureFixture[str]
) -> None:
    """Decoders fill the rest with grey and only grumble; so do browsers."""
    whole = encoded(noise(1, 600), "JPEG")
    cut = whole[: len(whole) // 2] + b"\xff\xd9"
    refused = refusal(child, cut)
    assert (refused.code, refused.detail) == ("decode_failed", "the JPEG is damaged: premature end of data segment")
    assert child.check(whole).data == whole
    padded = whole[:-2] + b"\0" * 20 + whole[-2:]  # harmless, and frequent
    assert child.check(padded).data == padded
    assert refusal(child, cut).code == "decode_failed"
    assert capfd.readouterr().err == ""


def test_an_error_of_our_own_is_a_row_too() -> None:
    with Decoder(ImageSettings(10**6, encode="bmp")) as child:
        refused = refusal(child, encoded(noise(1), "GIF"))
    assert (refused.code, refused.detail) == ("decode_failed", "the decoder died: KeyError: 'bmp'")


def test_closing_ends_the_child() -> None:
    with Decoder(KEEP) as child:
        child.check(encoded(noise(1), "JPEG"))
        pid = child.pid
    assert pid is not None
    assert not is_alive(pid)
    with Decoder(KEEP):
        pass  # one that was never used has nothing to close


def test_an_error_in_the_block_ends_the_child() -> None:
    with pytest.raises(KeyError), Decoder(KEEP) as child:
        child.check(encoded(noise(1), "JPEG"))
        pid = child.pid
        raise KeyError
    assert pid is not None and not is_alive(pid)


def test_an_answer_that_nobody_took_is_not_given_to_the_next_image(
    child: Decoder, slow: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(end: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder, "_receive", stop)
        child.check(slow)
    good = encoded(noise(1), "JPEG")
    assert child.check(good).width_px == 200


def test_the_child_ends_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from clips_data.decoder import Decoder\n"
        "from clips_data.images import ImageSettings\n"
        "if __name__ == '__main__':\n"
        "    child = Decoder(ImageSettings(10**6))\n"
        "    child.check(open(sys.argv[1], 'rb').read())\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    image = tmp_path / "image.jpg"
    image.write_bytes(encoded(noise(1), "JPEG"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, str(script), str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    wait_until(lambda: not is_alive(pid))


def test_ctrl_c_does_not_reach_the_child(child: Decoder) -> None:
    good = encoded(noise(1), "JPEG")
    child.check(good)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGINT)
    child.check(good)
    assert child.pid == first


def parents_of_decoders(data: bytes) -> tuple[int, int, list[int]]:
    """In a worker: its own parent, and the parents of two decoders, the second after a crash of the first."""
    with Decoder(KEEP) as child:
        parents = []
        for _ in range(2):
            child.check(data)
            assert child.pid is not None
            stat = Path(f"/proc/{child.pid}/stat").read_text()
            parents.append(int(stat.rsplit(")", 1)[1].split()[1]))
            os.kill(child.pid, signal.SIGSEGV)
            child._child.join()
        return os.getpid(), os.getppid(), parents


def test_workers_decoders_come_from_the_workers_own_fork_server() -> None:
    data = encoded(noise(1), "JPEG")
    answers = list(executor.map_units(parents_of_decoders, [data] * 3, num_processes=2, preload=("cv2",)))
    assert len(answers) == 3
    for pid, server, parents in answers:
        assert pid != os.getpid()
        assert parents == [server, server]


def check_many(task: tuple[int, bytes]) -> list[int]:
    seed, slow = task
    widths = []
    with Decoder(RESIZE) as child:
        for turn in range(6):
            data = encoded(noise(seed * 100 + turn), "JPEG")
            if turn == 3:
                child.check(data)
                assert child.pid is not None
                crash = threading.Timer(0.1, os.kill, (child.pid, signal.SIGSEGV))
                crash.start()
                with pytest.raises(ImageRefused):
                    child.check(slow)
                crash.join()
            widths.append(child.check(data).width_px)
    return widths


def test_decoders_of_several_workers_do_not_meet(slow: bytes) -> None:
    tasks = [(seed, slow) for seed in range(3)]
    for widths in executor.map_units(check_many, tasks, num_processes=2, preload=("cv2",)):
        assert widths == [64] * 6


def test_no_process_is_left() -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    for _ in range(3):
        with Decoder(KEEP) as child:
            child.check(encoded(noise(1), "JPEG"))
    assert {child.pid for child in multiprocessing.active_children()} <= before
