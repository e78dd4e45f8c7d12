"""Runs a function in several processes that know each other as torchrun's would, without torchrun's start-up time.

Their tokenizer is that of ``bytemaker``.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import bytemaker
import pytest
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """For a module that imports it: a server that has torch, in place of the one that other modules' tests share."""
    _start_anew(["ranks", "bytemaker", "clips_train.distributed", "clips_train.run"])
    yield
    _start_anew([])


def _start_anew(preload: list[str]) -> None:
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    _CONTEXT.set_forkserver_preload(preload)


class Failed(Exception):
    """What a process raised: its type's name, and message."""


def run(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returned in each process, by rank; a ``Failed`` where it raised.

    ``function`` is one of a test module's own, and imports what it needs.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe()
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
        }
        process = _CONTEXT.Process(target=_main, args=(theirs, environment, function, arguments), daemon=False)
        process.start()
        theirs.close()
        started.append((process, ours))
    found = []
    for process, ours in started:
        try:
            found.append(ours.recv())
        except EOFError:
            found.append(Failed("killed", ""))
        process.join()
    return found


def _main(
    result: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    bytemaker.install(pytest.MonkeyPatch())
    try:
        found = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        found = Failed(type(error).__name__, str(error))
    result.send(found)
