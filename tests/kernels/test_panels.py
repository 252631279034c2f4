import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rarefy.errors import RarefyError
from rarefy.kernels import Panels, reference

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.sampled_from([0, 1, 7, 16, 100, 300, 500])


def random_mask(rows: int, columns: int, density: float, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@FUZZ
@given(
    rows=sizes,
    columns=sizes,
    density=st.sampled_from([0, 0.1, 0.5, 1]),
    threads=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 5),
)
def test_mask_round_trip_and_transpose(
    isa: str, rows: int, columns: int, density: float, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    mask = random_mask(rows, columns, density, seed)
    panels = Panels.from_mask(mask)
    assert torch.equal(panels.mask(), mask)
    numbers = torch.arange(1, rows * columns + 1).view(rows, columns)
    values = panels.gather(numbers)
    assert torch.equal(panels.dense(values), numbers * mask)
    transpose = Panels(
        columns,
        rows,
        panels.transposed_width,
        panels.width,
        panels.transposed_starts,
        panels.transposed_offsets,
        *panels.tensors[:2],
        panels.order,
    )
    assert torch.equal(transpose.dense(values[panels.order.long()]), numbers.t() * mask.t())


def test_reference_builds_the_same_structure(isa: str) -> None:
    mask = random_mask(700, 900, 0.2, 0)
    panels = Panels.from_mask(mask)
    plain = reference.build(mask, panels.width, panels.transposed_width, panels.nonzeros)
    assert all(torch.equal(a, b) for a, b in zip(panels.tensors, plain, strict=True))


@FUZZ
@given(
    # Rows that are walked together are eight.
    rows=st.sampled_from([0, 1, 7, 8, 9, 31, 90]),
    columns=st.sampled_from([0, 1, 5, 100, 127, 700]),
    densities=st.tuples(*[st.sampled_from([0, 0.05, 0.3, 1])] * 2),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_sources_and_positions_are_those_that_are_found_one_by_one(
    isa: str, rows: int, columns: int, densities: tuple[float, float], threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    old, new = (
        Panels.from_mask(random_mask(rows, columns, density, seed + place))
        for place, density in enumerate(densities)
    )
    known = {position: place for place, position in enumerate(walked(old))}
    assert old.positions().tolist() == list(known)
    assert new.sources_in(old).tolist() == [known.get(position, -1) for position in walked(new)]


def walked(panels: Panels) -> list[int]:
    """The positions of connections, by panel, then row, then column."""
    active = [
        divmod(position, panels.columns) for position in panels.mask().flatten().nonzero().flatten().tolist()
    ]
    active.sort(key=lambda place: (place[1] // panels.width, *place))
    return [row * panels.columns + column for row, column in active]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.float32, torch.int32, torch.float64, torch.bfloat16]
)
def test_entries_of_any_size_are_gathered_and_put_back(isa: str, dtype: torch.dtype) -> None:
    mask = random_mask(90, 700, 0.3, 1)
    panels = Panels.from_mask(mask)
    matrix = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    values = panels.gather(matrix)
    assert values.dtype == dtype and torch.equal(panels.dense(values), matrix * mask)


def test_dense_is_differentiable(isa: str) -> None:
    panels = Panels.from_mask(random_mask(20, 30, 0.3, 0))
    values, factors = torch.randn(panels.nonzeros, requires_grad=True), torch.randn(20, 30)
    (panels.dense(values) * factors).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, panels.gather(factors))


def test_gather_is_differentiable(isa: str) -> None:
    panels = Panels.from_mask(random_mask(20, 30, 0.3, 0))
    matrix = torch.randn(20, 30, requires_grad=True)
    panels.gather(matrix).sum().backward()
    assert matrix.grad is not None and torch.equal(matrix.grad, panels.mask().float())


def test_density_of_an_empty_matrix_is_zero() -> None:
    assert Panels.from_mask(torch.zeros(0, 5, dtype=torch.bool)).density == 0


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(3, dtype=torch.bool)])
def test_only_bool_matrices_are_taken(mask: torch.Tensor) -> None:
    with pytest.raises(RarefyError, match="give a bool matrix"):
        Panels.from_mask(mask)
