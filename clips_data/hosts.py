"""Politeness towards hosts, and the connections that are kept open to them. All of it per process and thread-safe.

A cluster's budget for a host is kept by giving each process its share of it; processes do not talk to each other.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from clips_data import draws
from clips_data.wire import Connection

MAX_HOSTS = 10_000
FIRST_BACK_OFF_S, MAX_DOUBLINGS = 0.5, 16
MAX_IDLE, MAX_IDLE_S = 64, 15.0


def back_off_s(times: int, key: str) -> float:
    """Seconds to wait after something has failed ``times`` times in a row: doubling, within half and one and a half."""
    return FIRST_BACK_OFF_S * 2.0 ** min(times, MAX_DOUBLINGS) * (0.5 + draws.uniform(0, "backoff", times, key))


@dataclass
class _Host:
    running: int = 0
    waiting: deque[threading.Lock] = field(default_factory=deque)  # each is released when its turn has come
    next_start: float = -math.inf
    paused_until: float = -math.inf
    times_busy: int = 0

    @property
    def ready_at(self) -> float:
        return max(self.next_start, self.paused_until)


@dataclass
class Turn:
    """One request's turn at a host. ``pause`` makes all of this process leave the host alone for a while."""

    host: str
    state: _Host
    lock: threading.Lock
    was_busy: bool = False

    def pause(self, asked_s: float | None, max_wait_s: float) -> None:
        """``asked_s`` is the server's own wish; without one the pause doubles each time the host is busy again."""
        self.was_busy = True
        with self.lock:
            now = time.monotonic()
            wait_s = back_off_s(self.state.times_busy, self.host) if asked_s is None else asked_s
            if now >= self.state.paused_until:  # answers to requests that were under way say nothing new
                self.state.times_busy += 1
            self.state.paused_until = max(self.state.paused_until, now + min(wait_s, max_wait_s))


class Turns:
    """Who may ask which host when. First come, first served, so that no row waits while later ones go on and on.

    A host that nobody uses, spaces or pauses is forgotten when there are many.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, _Host] = OrderedDict()

    @contextlib.contextmanager
    def turn(self, host: str, connections: int, spacing_s: float) -> Iterator[Turn]:
        """Waits until ``host`` has fewer than ``connections`` requests, ``spacing_s`` after the last one began."""
        state = self._enter(host, connections)
        turn = Turn(host, state, self._lock)
        try:
            self._wait_until_ready(state, spacing_s)
            yield turn
        finally:
            self._leave(turn)

    def _enter(self, host: str, connections: int) -> _Host:
        with self._lock:
            state = self._state(host)
            if state.running < connections:
                state.running += 1
                return state
            gate = threading.Lock()
            gate.acquire()
            state.waiting.append(gate)
        gate.acquire()
        return state

    def _wait_until_ready(self, state: _Host, spacing_s: float) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                wait_s = state.ready_at - now
                if wait_s <= 0:
                    state.next_start = now + spacing_s
                    return
            time.sleep(wait_s)

    def _leave(self, turn: Turn) -> None:
        state = turn.state
        with self._lock:
            if not turn.was_busy:
                state.times_busy = 0
            if state.waiting:
                state.waiting.popleft().release()  # which takes over the place among the running
            else:
                state.running -= 1

    def _state(self, host: str) -> _Host:
        state = self._hosts.get(host)
        if state is None:
            state = self._hosts[host] = _Host()
            self._forget()
        else:
            self._hosts.move_to_end(host)
        return state

    def _forget(self) -> None:
        now = time.monotonic()
        for host in list(itertools.islice(self._hosts, max(0, len(self._hosts) - MAX_HOSTS))):
            state = self._hosts[host]
            if not state.running and now >= state.ready_at:
                del self._hosts[host]


class IdleConnections:
    """Connections that wait for another request to the same place. The least recently used places lose theirs first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[Hashable, list[tuple[float, Connection]]] = OrderedDict()
        self._number = 0

    def take(self, place: Hashable) -> Connection | None:
        """A connection to ``place`` that is still open as far as one can see, or ``None``."""
        while True:
            with self._lock:
                waiting = self._idle.get(place)
                if not waiting:
                    return None
                since, connection = waiting.pop()
                self._number -= 1
                if not waiting:
                    del self._idle[place]
            if time.monotonic() < since + MAX_IDLE_S and connection.is_quiet():
                return connection
            connection.close()

    def give_back(self, place: Hashable, connection: Connection) -> None:
        """Keeps ``connection`` for the next request to ``place``, or closes it where none can follow."""
        if not connection.may_be_kept():
            connection.close()
            return
        dropped = None
        with self._lock:
            self._idle.setdefault(place, []).append((time.monotonic(), connection))
            self._idle.move_to_end(place)
            self._number += 1
            if self._number > MAX_IDLE:
                oldest = next(iter(self._idle))
                dropped = self._idle[oldest].pop(0)[1]
                self._number -= 1
                if not self._idle[oldest]:
                    del self._idle[oldest]
        if dropped is not None:
            dropped.close()

    def close(self) -> None:
        """Closes all that wait."""
        with self._lock:
            waiting = [connection for kept in self._idle.values() for _, connection in kept]
            self._idle.clear()
            self._number = 0
        for connection in waiting:
            connection.close()
