import pytest

import sparse_weights

OF_BOTH_KINDS = {"test_copies", "test_optimizers", "test_products", "test_transforms", "test_writes"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests of these files run for weights of single connections, then for the same of whole blocks."""
    if metafunc.definition.path.stem in OF_BOTH_KINDS:
        metafunc.fixturenames.append("block")
        metafunc.parametrize("block", [None, (8, 8)], ids=["connections", "blocks"], indirect=True)


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int] | None:
    """The block in which masks come; None for single connections."""
    monkeypatch.setattr(sparse_weights, "BLOCK", request.param)
    return request.param
