"""Deliveries outside of the training step: order, bound, failures, the end, and forks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest

from hallo_numguard.trackers.background import BackgroundQueue


@pytest.fixture
def tracker():
    """A queue whose first delivery waits until `release` is set."""
    release = threading.Event()
    deliveries = BackgroundQueue("tracker", size=3)
    started = threading.Event()
    deliveries.put(lambda: (started.set(), release.wait()))
    assert started.wait(10)
    yield deliveries, release
    release.set()
    deliveries.close()


def test_deliveries_arrive_in_order_and_on_another_thread():
    deliveries, arrived = BackgroundQueue("tracker"), []
    for number in range(20):
        deliveries.put(lambda number=number: arrived.append((number, threading.current_thread().name)))
    deliveries.close()
    assert arrived == [(number, "numguard-tracker") for number in range(20)]


def test_a_full_queue_drops_and_counts_and_says_so_at_the_end(tracker, caplog):
    deliveries, release = tracker
    arrived = []
    for number in range(5):
        assert deliveries.is_full == (number >= 3)
        deliveries.put(lambda number=number: arrived.append(number))
    assert deliveries.dropped == 2
    release.set()
    with caplog.at_level(logging.WARNING, "hallo_numguard"):
        deliveries.close()
    assert arrived == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == ["tracker was too slow: 2 deliveries were dropped"]


def test_a_tracker_that_does_not_answer_costs_the_end_of_a_run_a_limited_time(tracker, caplog):
    deliveries, _ = tracker
    deliveries.put(lambda: None)
    assert not deliveries.flush(0.01)
    with caplog.at_level(logging.WARNING, "hallo_numguard"):
        deliveries.close(0.01)
    assert "tracker did not answer for 0.01 seconds" in caplog.text


def test_a_failure_is_raised_once_by_what_comes_next():
    deliveries, arrived = BackgroundQueue("tracker"), []
    deliveries.put(lambda: 1 / 0)
    deliveries.put(lambda: arrived.append("after the failure"))
    assert deliveries.flush(10)
    with pytest.raises(ZeroDivisionError):
        deliveries.put(lambda: None)
    deliveries.put(lambda: arrived.append("anew"))
    deliveries.close()
    assert arrived == ["anew"]
    deliveries.put(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        deliveries.close()


def test_the_end_of_the_process_waits_for_the_last_deliveries():
    code = (
        "import time\n"
        "from hallo_numguard.trackers.background import BackgroundQueue\n"
        "deliveries = BackgroundQueue('tracker')\n"
        "deliveries.put(lambda: time.sleep(0.2))\n"
        "deliveries.put(lambda: print('delivered', flush=True))\n"
        "deliveries.put(lambda: 1 / 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "delivered\n"
    assert done.stderr == "tracker: the last figures may be missing: division by zero\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_a_queue_of_its_own(tracker):
    deliveries, _ = tracker
    deliveries.put(lambda: None)
    child = os.fork()
    if child == 0:
        deliveries.close()  # of the parent's deliveries there is nothing to wait for
        arrived = []
        deliveries.put(lambda: arrived.append(1))
        deliveries.close()
        os._exit(0 if arrived == [1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
