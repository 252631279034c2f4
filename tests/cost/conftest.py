from collections.abc import Iterator

import pytest
import torch

from rarefy import kernels


@pytest.fixture(params=kernels.available())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kernel that this machine can run, the plain-torch reference included."""
    monkeypatch.setenv("RAREFY_KERNELS", request.param)
    return request.param


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
