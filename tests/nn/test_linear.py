import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.nn import SparseLinear, WeightMask, move_entries
from rarefy.tensors import SparseWeight


def mask_of(rows: int = 24, columns: int = 40, density: float = 0.2, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@pytest.fixture
def pair() -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    linear, mask = nn.Linear(40, 24), mask_of()
    with torch.no_grad():
        linear.weight.mul_(mask)
    return linear, SparseLinear.from_linear(linear, mask)


def masked_state(linear: nn.Linear, mask: Tensor) -> dict[str, Tensor]:
    return {**linear.state_dict(), "weight_mask": mask}


def test_computes_what_the_dense_layer_does(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(sparse(x), linear(x))
    assert isinstance(sparse, nn.Linear) and sparse.bias is linear.bias


def test_parameters_are_those_of_a_linear_layer(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    shapes = {name: tuple(p.shape) for name, p in sparse.named_parameters()}
    assert shapes == {"weight": (24, 40), "bias": (24,)} and type(sparse.weight) is SparseWeight
    assert sparse.weight.connections == int(mask_of().sum())


def test_training_follows_the_masked_layer(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    linear, sparse, mask = linear.double(), copy.deepcopy(sparse).double(), mask_of()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (linear, sparse)]
    for _ in range(5):
        x = torch.randn(8, 40, dtype=torch.float64)
        for module, optimizer in zip((linear, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is linear:
                assert linear.weight.grad is not None
                linear.weight.grad.mul_(mask)
            optimizer.step()
    torch.testing.assert_close(sparse.weight.dense(), linear.weight.detach())


def test_the_mask_reads_as_a_bool_tensor(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    shown = sparse.weight_mask
    assert isinstance(shown, WeightMask) and shown.shape == (24, 40) and shown.dtype == torch.bool
    assert torch.equal(shown, mask_of()) and torch.equal(~shown, ~mask_of()) and (shown & ~shown).sum() == 0
    assert torch.equal(shown.t()[3], mask_of().t()[3]) and shown.tolist() == mask_of().tolist()
    assert torch.equal(torch.from_numpy(shown.numpy().copy()), mask_of()) and "connections=" in repr(shown)
    memory = torch.empty(0, dtype=torch.bool).set_(shown.untyped_storage(), 0, (24, 40))  # pyright: ignore
    assert torch.equal(memory, mask_of()) and shown.data_ptr() == memory.data_ptr()
    for copied in (copy.deepcopy(shown), pickle.loads(pickle.dumps(shown))):
        assert (
            isinstance(copied, Tensor)
            and not isinstance(copied, WeightMask)
            and torch.equal(copied, mask_of())
        )
    sparse.set_topology(mask_of(seed=1))
    assert torch.equal(shown, mask_of(seed=1)) and torch.equal(shown.detach(), mask_of(seed=1))
    again = torch.empty(0, dtype=torch.bool).set_(shown.untyped_storage(), 0, (24, 40))  # pyright: ignore
    assert torch.equal(again, mask_of(seed=1))


def test_another_mask_cannot_be_written(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    assert torch.equal(sparse.weight_mask.copy_(mask_of()), mask_of())
    with pytest.raises(RarefyError, match="load a state dict that has weight and mask"):
        sparse.weight_mask.fill_(True)
    assert torch.equal(sparse.weight_mask, mask_of())


def test_back_to_dense(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    dense = sparse.eval().to_linear()
    assert type(dense) is nn.Linear and not dense.training and dense.bias is linear.bias
    assert torch.equal(dense.weight, linear.weight) and set(dense.state_dict()) == {"weight", "bias"}


def test_copies_are_independent_and_equal(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    x = torch.randn(5, 40)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        torch.testing.assert_close(other(x), sparse(x))
        other.weight.data.zero_()
        assert sparse.weight.abs().sum() > 0


def test_dtype_changes(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    wanted = sparse.weight.dense()
    assert torch.equal(sparse.double().weight.float(), wanted)
    assert sparse(torch.randn(3, 40, dtype=torch.float64)).dtype == torch.float64
    assert sparse.bfloat16()(torch.randn(3, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiled_module(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    torch._dynamo.reset()
    x = torch.randn(5, 40)
    torch.testing.assert_close(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), sparse(x))


# ---- topology ------------------------------------------------------------------------------------------------------


def test_surviving_connections_keep_value_and_state(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    old, new, parameter = mask_of(), mask_of(seed=1, density=0.4), sparse.weight
    state = torch.arange(1.0, 961).view(24, 40)
    entries = sparse.weight.topology.gather(state)
    sources = sparse.set_topology(new)
    assert sparse.weight is parameter and torch.equal(sparse.weight_mask, new)
    assert torch.equal(sparse.weight.dense(), linear.weight.detach() * new)
    assert torch.equal(sparse.weight.topology.dense(move_entries(entries, sources)), state * (old & new))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.int32, torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.int64, torch.bool],
)
def test_entries_of_any_dtype_are_moved(dtype: torch.dtype) -> None:
    moved = move_entries(torch.tensor([0, 1]).to(dtype), torch.tensor([1, -1, 0, 1]))
    assert moved.dtype == dtype and moved.float().tolist() == [1, 0, 0, 1]
    none = move_entries(moved[4:], torch.tensor([-1, -1]))
    assert none.dtype == dtype and none.float().tolist() == [0, 0]


def test_training_goes_on_after_a_change_while_the_old_graph_lives(
    pair: tuple[nn.Linear, SparseLinear],
) -> None:
    _, sparse = pair
    x = torch.randn(5, 40)
    loss = sparse(x).sum()
    loss.backward()
    sparse.set_topology(mask_of(seed=1, density=0.4))
    assert sparse.weight.grad is None
    sparse(x).sum().backward()
    assert sparse.weight.grad is not None and sparse.weight.grad.shape == sparse.weight.shape
    assert loss.requires_grad


def test_set_topology_refuses_another_shape(pair: tuple[nn.Linear, SparseLinear]) -> None:
    with pytest.raises(RarefyError, match=r"give the weight's, \(24, 40\)"):
        pair[1].set_topology(mask_of(3, 4))


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(3, dtype=torch.bool)])
def test_a_layer_is_born_of_a_bool_matrix(mask: Tensor) -> None:
    with pytest.raises(RarefyError, match="give a bool matrix"):
        SparseLinear(mask)


def test_from_linear_refuses_another_shape() -> None:
    with pytest.raises(RarefyError, match=r"give the weight's, \(24, 40\)"):
        SparseLinear.from_linear(nn.Linear(40, 24), mask_of(3, 4))


def test_new_layers_start_like_dense_ones() -> None:
    layer = SparseLinear(mask_of(density=1.0))
    assert layer.bias is not None and 0.1 < layer.weight.abs().max() <= 40**-0.5
    assert layer.bias.abs().max() <= 40**-0.5
    assert SparseLinear(mask_of(), bias=False, dtype=torch.float64).weight.dtype == torch.float64


# ---- state dict ----------------------------------------------------------------------------------------------------


def test_state_dict_is_that_of_masked_storage(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    wanted, found = masked_state(linear, mask_of()), sparse.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_loads_what_masked_storage_saved(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    state = masked_state(linear, mask_of())
    given = dict(state)
    other = nn.Sequential(SparseLinear(mask_of(seed=3, density=0.5)))
    assert not other.load_state_dict({f"0.{name}": t for name, t in state.items()}).missing_keys
    assert torch.equal(other.state_dict()["0.weight"], sparse.weight) and state == given


def test_loads_what_another_sparse_layer_has(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    other = SparseLinear(mask_of(seed=3, density=0.5))
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other.weight_mask, mask_of()) and torch.equal(other.weight, sparse.weight)
    other.load_state_dict({**other.state_dict(), "weight_mask": torch.zeros(24, 40, dtype=torch.bool)})
    assert not other.weight.any() and other.weight.connections == 0


@pytest.mark.parametrize("missing", ["weight", "weight_mask", "bias"])
def test_missing_entries_are_reported(pair: tuple[nn.Linear, SparseLinear], missing: str) -> None:
    linear, sparse = pair
    state = masked_state(linear, mask_of())
    del state[missing]
    with pytest.raises(RuntimeError, match=f'"{missing}"'):
        SparseLinear(mask_of()).load_state_dict(state)
    assert sparse.load_state_dict(state, strict=False).missing_keys == [missing]


def test_unexpected_and_misshapen_entries_are_reported(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    with pytest.raises(RuntimeError, match="extra"):
        sparse.load_state_dict({**sparse.state_dict(), "extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        sparse.load_state_dict({**sparse.state_dict(), "weight": torch.ones(40, 24)})


def test_representation_shows_the_sparsity() -> None:
    layer = SparseLinear(torch.eye(2, dtype=torch.bool))
    assert "in_features=2, out_features=2, bias=True, sparsity=0.5" in repr(layer)
