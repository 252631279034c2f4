"""Every change of a layout has an exact way back."""

from __future__ import annotations

import pytest
import torch

from rarefy.architectures.changes import SAME, Apart, Chain, Change, Each, Halves, Joined, Plus, Transposed

CHANGES: list[tuple[Change, list[tuple[int, ...]]]] = [
    (SAME, [(3, 4)]),
    (Transposed(), [(3, 4), (3,)]),
    (Halves(heads=2), [(12, 5), (12,)]),
    (Joined(groups=2, sizes=(4, 2, 2)), [(8, 3), (4, 3), (4, 3)]),
    (Apart(), [(5, 3, 4)]),
    (Chain((Joined(1, (3, 3, 3)), Transposed())), [(3, 7), (3, 7), (3, 7)]),
    (Chain((Each((Halves(2), Halves(1), SAME)), Joined(1, (8, 4, 4)))), [(8, 2), (4, 2), (4, 2)]),
]


@pytest.mark.parametrize(("change", "shapes"), CHANGES, ids=lambda one: type(one).__name__)
def test_there_and_back(change: Change, shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape) for shape in shapes]
    found = change.back(change.out(given))
    assert len(found) == len(given)
    assert all(torch.equal(one, other) for one, other in zip(found, given, strict=True))
    assert sum(one.numel() for one in change.out(given)) == sum(one.numel() for one in given)


def test_distances_from_one() -> None:
    assert Plus(-1.0).out([torch.tensor([1.5])])[0].item() == 0.5
    assert Plus(-1.0).back([torch.tensor([0.5])])[0].item() == 1.5


def test_every_second_row_of_each_head() -> None:
    assert Halves(2).out([torch.arange(8)])[0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
