import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.nn import SparseConv1D, move_entries


class Conv1D(nn.Module):
    """The layer of Hugging Face's GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture
def pair() -> tuple[Conv1D, SparseConv1D, Tensor]:
    torch.manual_seed(0)
    module, mask = Conv1D(24, 40), torch.rand(40, 24) < 0.3
    with torch.no_grad():
        module.weight.mul_(mask)
    return module, SparseConv1D.from_conv1d(module, mask), mask


def test_computes_what_the_dense_layer_does(pair: tuple[Conv1D, SparseConv1D, Tensor]) -> None:
    module, sparse, mask = pair
    x = torch.randn(3, 5, 40)
    for layer in (module, sparse):
        layer(x).square().sum().backward()
    torch.testing.assert_close(sparse(x), module(x))
    torch.testing.assert_close(sparse.weight.grad.dense(), module.weight.grad * mask)
    assert torch.equal(sparse.weight.dense(), module.weight.detach()) and torch.equal(
        sparse.weight_mask, mask
    )
    bare = SparseConv1D(mask, bias=False)
    torch.testing.assert_close(bare(x), x @ bare.weight.dense())


def test_topology_and_state_in_the_layout_of_the_weight(pair: tuple[Conv1D, SparseConv1D, Tensor]) -> None:
    module, sparse, mask = pair
    new = torch.rand(40, 24) < 0.3
    state = torch.arange(1.0, 961).view(40, 24)
    entries = sparse.weight.topology.gather(state)
    sources = sparse.set_topology(new)
    assert torch.equal(sparse.weight.topology.dense(move_entries(entries, sources)), state * (mask & new))
    assert torch.equal(sparse.weight.dense(), module.weight.detach() * new)


def test_to_a_linear_layer_that_computes_the_same(pair: tuple[Conv1D, SparseConv1D, Tensor]) -> None:
    _, sparse, _ = pair
    x = torch.randn(3, 40)
    torch.testing.assert_close(sparse.to_linear()(x), sparse(x))


def test_state_dict_round_trip_and_back_to_dense(pair: tuple[Conv1D, SparseConv1D, Tensor]) -> None:
    module, sparse, mask = pair
    other = SparseConv1D(torch.ones(40, 24, dtype=torch.bool))
    other.load_state_dict({**module.state_dict(), "weight_mask": mask})
    dense = other.to_conv1d(Conv1D)
    assert torch.equal(dense.get_parameter("weight"), module.weight)
    assert torch.equal(sparse.state_dict()["weight"], module.weight)


def test_only_layers_with_a_weight_matrix() -> None:
    with pytest.raises(RarefyError, match="ReLU is not allowed"):
        SparseConv1D.from_conv1d(nn.ReLU(), torch.ones(2, 2, dtype=torch.bool))
