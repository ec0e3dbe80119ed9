"""Deliveries to a tracker that may be slow, outside of the training step."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger("hallo_numguard")

Delivery = Callable[[], object]

MAX_WAITING = 64
CLOSE_SECONDS = 10.0


class BackgroundQueue:
    """Runs deliveries in order on a daemon thread; the training step only puts them into a bounded queue.

    A full queue drops and counts new deliveries. The first delivery that fails ends all of them: the next `put` or
    `close` raises its error. A forked process begins with an empty queue of its own.

    Args:
        name: Name of the tracker, for messages.
        size: Number of deliveries that may wait.

    Attributes:
        dropped: Number of deliveries dropped so far.
    """

    def __init__(self, name: str, size: int = MAX_WAITING) -> None:
        self.dropped = 0
        self._name = name
        self._size = size
        self._failure: Exception | None = None
        self._process = -1  # that the thread runs in
        self._queue: queue.Queue[Delivery | threading.Event | None] = queue.Queue(size)

    @property
    def is_full(self) -> bool:
        """Whether the next `put` would be dropped."""
        return self._process == os.getpid() and self._queue.full()

    def put(self, delivery: Delivery) -> None:
        """Adds a delivery, or drops it. Never waits.

        Raises:
            Exception: The error of an earlier delivery.
        """
        self._raise_failure()
        if self._process != os.getpid():
            self._start()
        try:
            self._queue.put_nowait(delivery)
        except queue.Full:
            self.dropped += 1

    def flush(self, seconds: float) -> bool:
        """Waits until all deliveries so far are done, but not longer; returns whether they are."""
        if self._process != os.getpid():
            return True
        done = threading.Event()
        try:
            self._queue.put(done, timeout=seconds)
        except queue.Full:
            return False
        return done.wait(seconds)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Waits for the last deliveries, ends the thread and logs dropped ones. A later `put` starts anew.

        Args:
            seconds: Longest time to wait.

        Raises:
            Exception: The error of a delivery.
        """
        if self._process != os.getpid():
            return
        atexit.unregister(self._close_at_exit)
        is_done = self.flush(seconds)
        self._process = -1
        if is_done:
            self._queue.put(None)
        else:
            _log.warning("%s did not answer for %g seconds: the last figures may be missing", self._name, seconds)
        if self.dropped:
            _log.warning("%s was too slow: %d deliveries were dropped", self._name, self.dropped)
            self.dropped = 0
        self._raise_failure()

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except Exception as error:  # noqa: BLE001 - the run is over, and its own error is what counts
            _log.warning("%s: the last figures may be missing: %s", self._name, error)

    def _start(self) -> None:
        self._process = os.getpid()
        self._queue = queue.Queue(self._size)  # a fork may have copied one whose lock is held
        threading.Thread(target=self._run, args=(self._queue,), name=f"numguard-{self._name}", daemon=True).start()
        atexit.register(self._close_at_exit)

    def _run(self, items: queue.Queue[Delivery | threading.Event | None]) -> None:
        while (item := items.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif self._failure is None:
                try:
                    item()
                except Exception as error:  # noqa: BLE001 - raised again on the thread that trains
                    self._failure = error

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
