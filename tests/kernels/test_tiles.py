"""Regular tiles: what is compiled against plain torch, ties, infinities and NaN included."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import Tiles, instruction_set, keep_regular, takes_tiles
from rarefy.patterns import tiles
from rarefy.ties import TieOrder

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COUNTS = [
    (2, 1),
    (3, 1),
    (3, 2),
    (4, 1),
    (4, 2),
    (4, 3),
    (5, 2),
    (6, 5),
    (8, 4),
    (8, 1),
    (9, 3),
    (16, 15),
    (17, 5),
]
INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, 1.0, 0.5, -1.0, 3e38, -3e38, INF, INF, -INF, NAN]
KINDS = ["normal", "rough", "constant", "special", "half -inf", "some +inf", "nan", "far apart"]


def scores_of(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    chosen = torch.rand(shape, generator=generator)
    many = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    return {
        "normal": scores,
        "rough": (2 * scores).round(),
        "constant": torch.full(shape, -1.5),
        "special": many,
        "half -inf": scores.masked_fill(chosen < 0.5, -INF),
        "some +inf": scores.masked_fill(chosen < 0.3, INF),
        "nan": torch.full(shape, NAN),
        "far apart": 2.0 ** (20 * scores).clamp(-20, 20).round(),
    }[kind]


def plainly(
    scores: Tensor, case: tuple[int, int], order: TieOrder, marked: Tensor | None = None, fill: float = 0.0
) -> Tensor:
    filled = scores if marked is None else torch.where(marked, fill, scores)
    kept = tiles.keep_regular(tiles.to_tiles(filled, case[0]), *case, order)
    return tiles.from_tiles(kept, case[0], scores.shape[1])


@FUZZ
@given(
    kind=st.sampled_from(KINDS),
    case=st.sampled_from(COUNTS),
    number=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3, 7])),
    threads=st.sampled_from([1, 3]),
    fill=st.sampled_from([None, INF, -INF, NAN, 0.5]),
    moved=st.booleans(),
    by_size=st.booleans(),
    seed=st.integers(0, 99),
)
def test_compiled_tiles_are_those_of_plain_torch(
    isa: str,
    kind: str,
    case: tuple[int, int],
    number: tuple[int, int],
    threads: int,
    fill: float | None,
    moved: bool,
    by_size: bool,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    scores = scores_of(kind, (number[0] * case[0], number[1] * case[0]), seed)
    generator = torch.Generator().manual_seed(seed)
    marked = torch.rand(scores.shape, generator=generator) < 0.4 if fill is not None else None
    order = TieOrder(seed << 40)
    if moved:
        order = order.among(torch.randperm(2 * scores.numel(), generator=generator)[1::2])
    before = scores.clone()
    found = tiles.keep_regular_in(scores, *case, order, marked, fill or 0.0, by_size)
    ranked = before.abs() if by_size else before
    assert torch.equal(found, plainly(ranked, case, order, marked, fill or 0.0))
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("case", [(4, 2), (8, 4), (16, 8), (33, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_many_and_large_tiles(isa: str, case: tuple[int, int], kind: str) -> None:
    """Of the largest tiles of equal scores, some have keys that begin with the same 16 bits."""
    scores = scores_of(kind, (case[0], 20_000 // case[0] ** 2 * case[0]), 1)
    order = TieOrder(7)
    assert torch.equal(tiles.keep_regular_in(scores, *case, order), plainly(scores, case, order))


@pytest.mark.parametrize(("side", "seed"), [(8, 39), (12, 10), (16, 10)])
def test_equal_scores_whose_keys_begin_alike(isa: str, side: int, seed: int) -> None:
    """An item has room for 24 bits of the key that decides between equal scores."""
    order = TieOrder(seed)
    number = 80_000 // side**2
    first_bits = (order.keys(torch.arange(number * side**2)).view(number, -1) >> 40).sort(1).values
    assert (first_bits.diff() == 0).any()
    scores = torch.ones(side, number * side)
    found = tiles.keep_regular_in(scores, side, side // 2, order)
    assert torch.equal(found, plainly(scores, (side, side // 2), order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("side", [4, 8])
def test_other_types_and_strides(isa: str, dtype: torch.dtype, side: int) -> None:
    scores = torch.randn(2 * side, 3 * side, generator=torch.Generator().manual_seed(2)).to(dtype).t()
    marked = (scores > 0.5).t().contiguous().t()
    assert takes_tiles(scores, side) == (instruction_set() != "reference" and dtype != torch.float64)
    found = tiles.keep_regular_in(scores, side, 2, TieOrder(), marked, -1.0)
    assert torch.equal(found, plainly(scores, (side, 2), TieOrder(), marked, -1.0))


@pytest.mark.parametrize("count", [-1, 0, 4, 5])
def test_all_or_nothing_and_no_tiles(isa: str, count: int) -> None:
    assert torch.equal(
        tiles.keep_regular_in(torch.randn(4, 8), 4, count, TieOrder()), torch.full((4, 8), count > 3)
    )
    for shape in ((0, 8), (8, 0)):
        assert tiles.keep_regular_in(torch.ones(shape), 4, count, TieOrder()).shape == shape


def test_a_side_whose_places_take_more_than_two_bytes_is_not_taken(isa: str) -> None:
    scores = torch.zeros(257, 257)
    assert not takes_tiles(scores, 257)
    assert takes_tiles(scores, 256) == (instruction_set() != "reference")


PAIR = torch.tensor([[True, False, False, True], [False, True, True, False]])


@pytest.mark.parametrize(
    ("shape", "tile", "what"),
    [
        ((4,), Tiles(2, 1, PAIR, 0, None), r"tiles: side 2 with count 1 and shape \(4,\)"),
        ((2, 5), Tiles(2, 1, PAIR, 0, None), r"tiles: side 2 with count 1 and shape \(2, 5\)"),
        ((3, 2), Tiles(2, 1, PAIR, 0, None), r"tiles: side 2 with count 1 and shape \(3, 2\)"),
        ((2, 2), Tiles(2, 0, PAIR, 0, None), "tiles: side 2 with count 0"),
        ((2, 2), Tiles(2, 2, PAIR, 0, None), "tiles: side 2 with count 2"),
        ((2, 2), Tiles(2, 1, None, 0, None), "options: None"),
        ((5, 5), Tiles(5, 2, PAIR, 0, None), "options: a tensor"),
        ((2, 2), Tiles(2, 1, PAIR.float(), 0, None), r"options: torch.float32 with shape \(2, 4\)"),
        ((2, 2), Tiles(2, 1, PAIR[:, :3], 0, None), r"options: torch.bool with shape \(2, 3\)"),
        ((2, 2), Tiles(2, 1, PAIR[:0], 0, None), r"options: torch.bool with shape \(0, 4\)"),
        ((2, 2), Tiles(2, 1, PAIR.repeat(46, 1), 0, None), r"options: torch.bool with shape \(92, 4\)"),
        ((2, 2), Tiles(2, 1, PAIR, 0, torch.arange(3)), "places: 3"),
    ],
)
def test_keep_regular_refuses(shape: tuple[int, ...], tile: Tiles, what: str) -> None:
    with pytest.raises(RarefyError, match=f"{what}.* (is|are) not allowed; give "):
        keep_regular(torch.ones(shape), tile)


@pytest.mark.parametrize("marked", [torch.ones(2, 2), torch.ones(1, 2) > 0])
def test_keep_regular_refuses_other_marks(marked: Tensor) -> None:
    with pytest.raises(RarefyError, match=r"marked: .* is not allowed; give a bool mask"):
        keep_regular(torch.ones(2, 2), Tiles(2, 1, PAIR, 0, None), marked)
