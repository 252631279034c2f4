"""One batch: moved, given to the model, counted; and the loss that comes back."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.models.call import ModelCall, count, loss_of, to_device

Pair = namedtuple("Pair", ["x", "y"])


def call(forward, batch: object) -> object:
    return ModelCall(type("Model", (nn.Module,), {"forward": forward})())(batch)


def test_batches_move_as_a_whole_and_keep_their_form() -> None:
    meta = torch.device("meta")
    batch = {"a": [torch.ones(1), (torch.ones(2), "text")], "b": Pair(torch.ones(3), None), "c": 5}
    moved = to_device(batch, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].x.device == meta
    assert type(moved["b"]) is Pair and moved["b"].y is None
    assert type(moved["a"][1]) is tuple and moved["a"][1][1] == "text" and moved["c"] == 5


def test_a_mapping_becomes_keyword_arguments_where_forward_names_its_keys() -> None:
    batch = {"input_ids": 1, "labels": 2}
    assert call(lambda self, input_ids=None, labels=None, cache=None: (input_ids, labels), batch) == (1, 2)
    assert call(lambda self, input_ids, **rest: (input_ids, rest), batch) == (1, {"labels": 2})
    assert call(lambda self, batch: batch, batch) is batch
    assert call(lambda self, batch, labels=None: labels, batch) is None
    assert call(lambda self, data: data, batch) is batch
    assert call(lambda self, data, training=True: data, batch) is batch
    assert call(lambda self, input_ids, other: input_ids, {"input_ids": 1, "other": 3}) == 1


def test_other_batches_are_the_single_argument() -> None:
    assert call(lambda self, x, y=None: (x, y), (1, 2)) == ((1, 2), None)


def test_models_may_refuse_a_batch() -> None:
    class Picky(nn.Module):
        def forward(self, batch: object) -> object:
            return batch

        def check_batch(self, batch: object) -> None:
            raise RarefyError(f"{batch} is too large")

    with pytest.raises(RarefyError, match="5 is too large"):
        ModelCall(Picky()).check(5)
    ModelCall(nn.Linear(1, 1)).check(5)


@pytest.mark.parametrize(
    "outputs",
    [
        torch.tensor(3.0),
        torch.tensor([3.0]),
        (torch.tensor(3.0), "logits"),
        [torch.tensor([[3.0]])],
        {"loss": torch.tensor(3.0)},
        SimpleNamespace(loss=torch.tensor(3.0)),
    ],
)
def test_the_loss_of_every_form_of_outputs(outputs: object) -> None:
    loss = loss_of(outputs)
    assert loss.shape == () and loss.item() == 3.0


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (torch.ones(2), r"a tensor of shape \[2\]"),
        (None, "NoneType"),
        ((), "NoneType"),
        ({"logits": torch.ones(1)}, "NoneType"),
        (SimpleNamespace(loss=None), "NoneType"),
        ((2.5, "logits"), "float"),
    ],
)
def test_no_loss_is_named(outputs: object, found: str) -> None:
    with pytest.raises(RarefyError, match=f"the model returned {found} as its loss; forward must return"):
        loss_of(outputs)


def test_counting() -> None:
    assert count({"input_ids": torch.zeros(2, 8), "labels": torch.zeros(2, 8)}) == (2, 16)
    assert count((torch.zeros(3, 4), torch.zeros(3))) == (3, None)
    assert count({"meta": "text", "x": [torch.zeros(5)]}) == (5, None)
    assert count(torch.tensor(1.0)) == (1, None)
    assert count("text") == (1, None)
