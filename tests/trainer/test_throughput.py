"""Rates since the last log step, and the share of the time that was spent in exchanges."""

import time

import pytest
import torch

from rarefy.distributed import Traffic
from rarefy.trainer.throughput import Throughput


def test_what_was_exchanged_since_the_last_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    traffic = Traffic(7, 1.0)
    throughput = Throughput(lambda: traffic)
    throughput.restart()
    for _ in range(2):
        throughput.add([torch.zeros(3, 2)])
    now[0] = 4.0
    traffic = Traffic(107, 2.0)
    assert throughput.take() == {
        "samples_per_second": 1.5,
        "communication/seconds": 0.5,
        "communication/bytes": 50.0,
        "communication/share": 0.25,
    }
    throughput.add([torch.zeros(3, 2)])
    now[0] = 5.0
    assert throughput.take() == pytest.approx({"samples_per_second": 3.0})
