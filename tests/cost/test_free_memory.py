"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forks import Script
from rarefy.cost.free_memory import available_bytes


def test_it_is_less_than_the_machine_has() -> None:
    found = available_bytes(torch.device("cpu"))
    if not Path("/proc/meminfo").exists():
        pytest.skip("the system does not tell")
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    assert found is not None and 0 < found <= int(total.split()[1]) * 1024


def test_a_limit_of_the_process_counts(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell")
    code = (
        "import resource, torch\n"
        "from rarefy.cost.free_memory import available_bytes\n"
        "used = int(next(x for x in open('/proc/self/status') if x.startswith('VmSize')).split()[1]) * 1024\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))\n"
        "print(available_bytes(torch.device('cpu')) <= 2**28)\n"
    )
    assert Script(code, folder=tmp_path).end() == (0, "True\n", "")


def test_other_devices_do_not_tell() -> None:
    assert available_bytes(torch.device("meta")) is None
