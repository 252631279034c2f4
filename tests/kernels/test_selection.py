import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import (
    block_sums,
    fill_inactive_,
    instruction_set,
    keep_in_groups,
    keep_top,
    keep_top_and_tie,
    zero_inactive_,
)

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = ["normal", "ties", "constant", "zeros", "nan", "special"]


def scores_of(kind: str, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator)
    if kind == "ties":
        return (scores * 2).round()
    if kind == "constant":
        return torch.full((size,), -1.5)
    if kind == "zeros":
        return torch.where(scores > 1.5, scores, scores.sign() * 0.0)
    if kind == "nan":
        return torch.where(scores > 0.5, float("nan"), scores)
    if kind == "special":
        special = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -1e-45, float("nan"), 1.0])
        return special[torch.randint(8, (size,), generator=generator)]
    return scores


def slow_keep_top(scores: Tensor, count: int, candidates: Tensor) -> Tensor:
    """Sorting Python tuples: the definition."""
    ranked = [(s != s, -s if s == s else 0.0, i) for i, s in enumerate(scores.tolist()) if candidates[i]]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[[i for _, _, i in sorted(ranked)[: max(0, count)]]] = True
    return mask


@FUZZ
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([0, 1, 5, 16, 257, 1000]),
    share=st.sampled_from([-0.1, 0, 0.01, 0.5, 0.99, 1, 1.5]),
    some=st.booleans(),
    seed=st.integers(0, 9),
)
def test_keep_top_is_the_definition(
    isa: str, kind: str, size: int, share: float, some: bool, seed: int
) -> None:
    scores = scores_of(kind, size, seed)
    candidates = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    wanted = slow_keep_top(
        scores, int(share * size), candidates if some else torch.ones(size, dtype=torch.bool)
    )
    assert torch.equal(keep_top(scores, int(share * size), candidates if some else None), wanted)


@FUZZ
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([0, 5, 257, 70_000, 300_000]),
    share=st.sampled_from([0, 0.01, 0.5, 0.99, 1]),
    some=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_tie_that_is_cut_is_told(
    isa: str, kind: str, size: int, share: float, some: bool, seed: int
) -> None:
    scores = scores_of(kind, size, seed)
    candidates = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    allowed = candidates if some else torch.ones_like(candidates)
    kept, is_cut = keep_top_and_tie(scores, int(share * size), candidates if some else None)
    inside, outside = values_of(scores[kept]), values_of(scores[allowed & ~kept])
    assert is_cut or not inside & outside
    if instruction_set() != "reference":
        assert is_cut == bool(inside & outside)


def sorted_keep_top(scores: Tensor, count: int, candidates: Tensor | None = None) -> Tensor:
    """The definition by two stable sorts: scores, then what may not be kept and NaN to the end."""
    flat = scores.reshape(-1)
    allowed = torch.ones_like(flat, dtype=torch.bool) if candidates is None else candidates
    order = flat.nan_to_num(0.0, float("inf"), float("-inf")).argsort(descending=True, stable=True)
    rank = torch.where(allowed, flat.isnan().to(torch.int8), 2)[order]
    mask = torch.zeros_like(allowed)
    mask[order[rank.argsort(stable=True)][: min(count, int(allowed.sum()))]] = True
    return mask.view(scores.shape)


@functools.cache
def many(kind: str) -> tuple[Tensor, list[tuple[int, Tensor | None, Tensor]]]:
    """Scores, and what is kept of how many candidates."""
    scores = scores_of(kind, 200_003, 1)
    candidates = torch.rand(200_003, generator=torch.Generator().manual_seed(0)) < 0.1
    asked = itertools.product((1, 700, 20_000, 150_000, 200_002), (None, candidates))
    return scores, [(count, allowed, sorted_keep_top(scores, count, allowed)) for count, allowed in asked]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_keep_top_of_many(isa: str, kind: str, threads: int) -> None:
    scores, cases = many(kind)
    torch.set_num_threads(threads)
    for count, allowed, expected in cases:
        assert torch.equal(keep_top(scores, count, allowed), expected)


def test_keep_top_of_sorted_scores(isa: str) -> None:
    scores = torch.arange(100_000.0)
    assert keep_top(scores, 10).nonzero().flatten().tolist() == list(range(99_990, 100_000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keep_top_of_other_types(isa: str, dtype: torch.dtype) -> None:
    scores = torch.randn(50, 7).to(dtype).t()
    assert torch.equal(keep_top(scores, 30), sorted_keep_top(scores, 30))


@FUZZ
@given(
    kind=st.sampled_from(KINDS),
    groups=st.sampled_from([0, 1, 31, 32, 40, 100]),
    m=st.sampled_from([1, 2, 3, 4, 8, 16, 33]),
    some=st.booleans(),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 9),
)
def test_keep_in_groups(
    isa: str, kind: str, groups: int, m: int, some: bool, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    scores = scores_of(kind, groups * m, seed).view(groups, m)
    candidates = torch.rand(groups, m, generator=generator) < 0.7 if some else torch.ones(groups, m) > 0
    counts = torch.randint(-1, m + 2, (m + 1,), generator=generator)
    mask, contested = keep_in_groups(scores, counts, candidates if some else None)
    assert mask.shape == scores.shape and contested.shape == (groups,)
    for row, allowed, kept, is_cut in zip(scores, candidates, mask, contested, strict=True):
        assert torch.equal(kept, slow_keep_top(row, int(counts[int(allowed.sum())]), allowed))
        inside, outside = values_of(row[kept]), values_of(row[allowed & ~kept])
        assert bool(is_cut) == bool(inside & outside)


def values_of(scores: Tensor) -> set[float | str]:
    return {"nan" if score != score else score for score in scores.tolist()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keep_in_groups_of_other_types(isa: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 2.0], [2.0, 2.0]], dtype=dtype).t()
    mask, contested = keep_in_groups(scores, torch.tensor([0, 1, 1]))
    assert mask.int().tolist() == [[0, 1], [1, 0]] and contested.tolist() == [False, True]


@FUZZ
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 9),
    block=st.tuples(st.integers(1, 5), st.integers(1, 17)),
    seed=st.integers(0, 9),
)
def test_block_sums(isa: str, rows: int, columns: int, block: tuple[int, int], seed: int) -> None:
    # whole numbers: sums are exact in any order
    scores = torch.randint(
        0, 9, (rows * block[0], columns * block[1]), generator=torch.Generator().manual_seed(seed)
    ).float()
    sums = scores.view(rows, block[0], columns, block[1]).sum((1, 3))
    assert torch.equal(block_sums(scores, block), sums)


@FUZZ
@given(
    size=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    threads=st.sampled_from([1, 2, 3, 5]),
)
def test_zero_inactive(isa: str, size: int, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    grad, mask = torch.randn(size).to(dtype), torch.rand(size) < 0.4
    grad[torch.rand(size) < 0.2] = float("nan")
    kept = grad[mask].clone()
    assert zero_inactive_(grad, mask) is grad
    assert (grad[~mask] == 0).all() and torch.equal(grad[mask].nan_to_num(7), kept.nan_to_num(7))


@FUZZ
@given(
    size=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    number=st.sampled_from([0.0, -0.0, 1.5, -3.0, float("inf"), float("-inf"), float("nan")]),
    threads=st.sampled_from([1, 3]),
)
def test_filled_positions_have_the_bits_of_the_number(
    isa: str, size: int, dtype: torch.dtype, number: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    tensor, mask = torch.randn(size).to(dtype), torch.rand(size) < 0.4
    tensor[torch.rand(size) < 0.2] = float("nan")
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    wanted = torch.where(mask, tensor, torch.tensor(number, dtype=dtype)).view(word)
    assert fill_inactive_(tensor, mask, number) is tensor
    assert torch.equal(tensor.view(word), wanted)


def test_a_strided_view_is_filled(isa: str) -> None:
    storage = torch.ones(6, 4)
    fill_inactive_(storage.t(), torch.zeros(4, 6, dtype=torch.bool), 2.0)
    assert (storage == 2).all()


def test_filling_refuses_other_masks() -> None:
    with pytest.raises(RarefyError, match=r"mask: .* is not allowed; give a bool mask with shape \(3,\)"):
        fill_inactive_(torch.ones(3), torch.ones(4, dtype=torch.bool), 0.0)


def test_zero_inactive_of_a_strided_view(isa: str) -> None:
    storage = torch.ones(6, 4)
    zero_inactive_(storage.t(), torch.zeros(4, 6, dtype=torch.bool))
    assert (storage == 0).all()


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("write", [zero_inactive_, lambda tensor, mask: fill_inactive_(tensor, mask, 3.0)])
def test_autograd_notices_what_was_written(
    isa: str, write: Callable[[Tensor, Tensor], Tensor], is_strided: bool
) -> None:
    y = torch.ones(4, 2, requires_grad=True) * 2
    square = y * y
    mask = torch.zeros(2, 4, dtype=torch.bool).t() if is_strided else torch.zeros(4, 2, dtype=torch.bool)
    write(y.detach(), mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_zero_inactive_in_a_compiled_function(isa: str) -> None:
    mask = torch.tensor([True, False, True])
    compiled = torch.compile(lambda x: zero_inactive_(x * 2, mask) + 1, backend="aot_eager", fullgraph=True)
    assert compiled(torch.tensor([1.0, float("nan"), 3.0])).tolist() == [3.0, 1.0, 7.0]


def test_zero_inactive_contract(isa: str) -> None:
    torch.library.opcheck(torch.ops.rarefy.zero_inactive_, (torch.randn(4, 4), torch.rand(4, 4) < 0.5))


def test_zero_inactive_refuses_other_masks() -> None:
    with pytest.raises(RarefyError, match=r"mask: .* is not allowed; give a bool mask with shape \(3,\)"):
        zero_inactive_(torch.ones(3), torch.ones(4, dtype=torch.bool))


def test_keep_top_refuses_other_candidates() -> None:
    with pytest.raises(RarefyError, match=r"candidates: .* is not allowed"):
        keep_top(torch.ones(3), 1, torch.ones(3))


@pytest.mark.parametrize(
    ("scores", "counts", "candidates", "what"),
    [
        (torch.ones(4), torch.zeros(5, dtype=torch.int32), None, r"scores: a shape of \(4,\)"),
        (torch.ones(4, 0), torch.zeros(1, dtype=torch.int32), None, r"scores: a shape of \(4, 0\)"),
        (torch.ones(1, 4), torch.zeros(4, dtype=torch.int32), None, r"counts: torch.int32 with shape \(4,\)"),
        (torch.ones(1, 4), torch.zeros(5), None, r"counts: torch.float32 with shape \(5,\)"),
        (torch.ones(1, 4), torch.zeros(5, dtype=torch.int32), torch.ones(4, 1) > 0, "candidates: torch.bool"),
        (torch.ones(1, 4), torch.zeros(5, dtype=torch.int32), torch.ones(1, 4), "candidates: torch.float32"),
    ],
)
def test_keep_in_groups_refuses(scores: Tensor, counts: Tensor, candidates: Tensor | None, what: str) -> None:
    with pytest.raises(RarefyError, match=f"{what}.* is not allowed; give "):
        keep_in_groups(scores, counts, candidates)


@pytest.mark.parametrize(("block", "shape"), [((2, 3), (4, 4)), ((0, 1), (4, 4)), ((1, 1), (4,))])
def test_block_sums_refuses(block: tuple[int, int], shape: tuple[int, ...]) -> None:
    with pytest.raises(RarefyError, match=r"block: .* is not allowed"):
        block_sums(torch.ones(shape), block)
