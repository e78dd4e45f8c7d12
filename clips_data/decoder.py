"""Image checks in a child process: what crashes, hangs or eats memory there costs one row and not a shard.

The child comes from the fork server, so it holds nothing of the worker: no connection, no lock, no signed URL.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import struct
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from typing import Any, Final

from clips_data import images
from clips_data.executor import die_with_parent

MIN_CHILD_BYTES: Final = 4 << 30
CHILD_BYTES_PER_PIXEL: Final = 32  # of the largest image allowed: a few copies of it in different modes
GRACE_S: Final = 5.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES: Final = 64 << 20
CUT_SHORT: Final = b"premature end of data segment"
_LENGTHS: Final = struct.Struct(">IQ")  # of a message's head, which is JSON, and of its body


class Decoder:
    """``images.check`` in a child. Not for several threads at once; close it, or use it as a context manager."""

    def __init__(self, settings: images.ImageSettings, deadline_s: float = 60.0) -> None:
        self._settings, self._deadline_s = settings, deadline_s
        self._child: Any = None
        self._end: socket.socket | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id, ``None`` before the first image and after a death."""
        return self._child.pid if self._child is not None else None

    def check(self, data: bytes) -> images.CheckedImage:
        """As ``images.check``. A child that dies or takes longer than the deadline is ``decode_failed``.

        Stricter in one thing: a JPEG whose data stop short of its end marker is refused.
        """
        end = self._ready()
        try:
            _send(end, {}, data)
            head, body = _receive(end)
        except BlockingIOError:
            self._bury(kill=True)
            detail = f"the decoder died: no answer within {self._deadline_s:g} s"
            raise images.ImageRefused("decode_failed", detail) from None
        except (EOFError, OSError):
            raise images.ImageRefused("decode_failed", f"the decoder died: {self._bury()}") from None
        except BaseException:  # an answer that nobody took must not become the next image's
            self._bury(kill=True)
            raise
        if "refused" in head:
            raise images.ImageRefused(*head["refused"])
        return images.CheckedImage(data=body if head.pop("made_again") else data, **head)

    def close(self) -> None:
        if self._end is not None:
            self._bury()

    def _ready(self) -> socket.socket:
        """The way to a living child: one that died while it waited is replaced, the next image is not its fault."""
        if self._end is not None and not _is_open(self._end):
            self._bury()
        if self._end is None:
            _share_fork_server()
            context = multiprocessing.get_context("forkserver")
            ours, theirs = socket.socketpair()
            _set_deadline(ours, self._deadline_s)
            max_bytes = max(MIN_CHILD_BYTES, CHILD_BYTES_PER_PIXEL * self._settings.max_pixels)
            child = context.Process(target=_serve, args=(theirs, self._settings, max_bytes), daemon=True)
            child.start()
            theirs.close()
            self._end, self._child = ours, child
        return self._end

    def _bury(self, *, kill: bool = False) -> str:
        """Says how the child ended, after it has: closing its connection is its sign to go."""
        child, self._child = self._child, None
        assert self._end is not None
        self._end.close()
        self._end = None
        if not kill:
            child.join(GRACE_S)
        if child.is_alive():
            child.kill()
            child.join()
        code = child.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _set_deadline(end: socket.socket, deadline_s: float) -> None:
    """By the kernel: reading and writing raise ``BlockingIOError`` when the other side has done nothing for so long."""
    timeval = struct.pack("ll", int(deadline_s), int(deadline_s % 1 * 1e6))
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def _is_open(end: socket.socket) -> bool:
    try:
        return bool(end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _send(end: socket.socket, head: Mapping[str, Any], body: bytes) -> None:
    """One system call, as a rule. ``multiprocessing``'s connections take four times as long for a megabyte."""
    text = json.dumps(head).encode()
    message = _LENGTHS.pack(len(text), len(body)), text, body
    num_sent = end.sendmsg(message)
    if num_sent < _LENGTHS.size + len(text) + len(body):  # a signal came in between
        end.sendall(b"".join(message)[num_sent:])


def _receive(end: socket.socket) -> tuple[dict[str, Any], bytes]:
    head_bytes, body_bytes = _LENGTHS.unpack(_exactly(end, _LENGTHS.size))
    return json.loads(_exactly(end, head_bytes)), _exactly(end, body_bytes)


def _exactly(end: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = end.recv(num_bytes - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data


def _share_fork_server() -> None:
    """Children of a fork server's child come from the same server.

    The standard library means it to be so, and passes the server's address on, but then starts another one, which
    would load OpenCV again for every worker.
    """
    if forkserver.get_inherited_fds() is not None:
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]


def _serve(end: socket.socket, settings: images.ImageSettings, max_bytes: int) -> None:
    """The child: one image in, one answer out, until the connection closes."""
    import resource

    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    die_with_parent()
    _keep_freed_memory()
    cv2.setNumThreads(1)
    with contextlib.suppress(EOFError, ConnectionError), tempfile.TemporaryFile() as complaints:
        os.dup2(complaints.fileno(), 2)  # the image libraries speak of damage only there
        while True:
            _, data = _receive(end)
            _send(end, *_answer(data, settings))


def _keep_freed_memory() -> None:
    """The next image goes where the last one was. Fresh pages took a quarter of a small image's time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _answer(data: bytes, settings: images.ImageSettings) -> tuple[dict[str, Any], bytes]:
    """The image's fields, and its bytes where they are others than came in."""
    try:
        image = images.check(data, settings)
        if CUT_SHORT in _complaints():
            return _refused("decode_failed", f"the JPEG is damaged: {CUT_SHORT.decode()}")
    except images.ImageRefused as refused:
        return _refused(refused.code, refused.detail)
    except MemoryError:
        return _refused("decode_failed", "the decoder died: decoding takes more memory than it may have")
    except Exception as error:  # a row of its own tells more than a shard that stops
        return _refused("decode_failed", f"the decoder died: {type(error).__name__}: {error}"[:200])
    about = {name: value for name, value in vars(image).items() if name != "data"}
    made_again = image.data is not data
    return {**about, "made_again": made_again}, image.data if made_again else b""


def _refused(code: str, detail: str) -> tuple[dict[str, Any], bytes]:
    _complaints()
    return {"refused": (code, detail)}, b""


def _complaints() -> bytes:
    """What was written to standard error since the last call."""
    length = os.lseek(2, 0, os.SEEK_CUR)
    if not length:
        return b""
    os.lseek(2, 0, os.SEEK_SET)
    said = os.read(2, length)
    os.lseek(2, 0, os.SEEK_SET)
    os.ftruncate(2, 0)
    return said
