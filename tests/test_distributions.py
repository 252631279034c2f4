"""From one sparsity to one per parameter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.distributions import check_distribution, uniform
from rarefy.errors import ConfigError


@given(st.floats(0, 1), st.integers(0, 5))
def test_uniform_gives_everyone_the_same(sparsity, count):
    assert uniform(sparsity, [(2, 3)] * count) == [sparsity] * count


def test_known_name():
    assert check_distribution("uniform") == "uniform"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("er", "er (not available yet)"), ("erk", "erk (not available yet)"), ("unform", "'unform'"), (3, "3")],
)
def test_other_names_are_refused(name, shown):
    with pytest.raises(ConfigError) as caught:
        check_distribution(name)
    assert str(caught.value) == (
        f"distribution: {shown} is not allowed; give uniform (example: distribution: uniform)"
    )
