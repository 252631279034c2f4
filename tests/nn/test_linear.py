import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.nn import SparseLinear, move_entries


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


def test_values_are_the_only_weight_parameter(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    shapes = {name: tuple(p.shape) for name, p in sparse.named_parameters()}
    assert shapes == {"values": (int(mask_of().sum()),), "bias": (24,)}


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
    assert torch.equal(sparse.weight.detach(), linear.weight.detach())


def test_weight_reads_dense_and_differentiable(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    assert torch.equal(sparse.weight.detach(), linear.weight.detach())
    assert torch.equal(sparse.weight_mask, mask_of())
    sparse.weight.square().sum().backward()
    assert sparse.values.grad is not None
    torch.testing.assert_close(sparse.values.grad, 2 * sparse.values.detach())


@pytest.mark.parametrize("value", [torch.zeros(24, 40), nn.Parameter(torch.zeros(24, 40)), None])
def test_weight_cannot_be_assigned(pair: tuple[nn.Linear, SparseLinear], value: Tensor | None) -> None:
    with pytest.raises(RarefyError, match="set_topology"):
        pair[1].weight = value  # pyright: ignore


def test_back_to_dense(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    dense = sparse.eval().to_linear()
    assert type(dense) is nn.Linear and not dense.training and dense.bias is linear.bias
    assert torch.equal(dense.weight, linear.weight) and set(dense.state_dict()) == {"weight", "bias"}


def test_copies_are_independent_and_equal(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    x = torch.randn(5, 40)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), sparse(x))
        other.values.data.zero_()
        assert sparse.values.abs().sum() > 0


def test_dtype_changes(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    wanted = sparse.weight.detach()
    assert torch.equal(sparse.double().weight.float(), wanted)
    assert sparse(torch.randn(3, 40, dtype=torch.float64)).dtype == torch.float64
    assert sparse.bfloat16()(torch.randn(3, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_keeps_values_in_float32(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(torch.randn(3, 40))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert sparse.values.grad is not None and sparse.values.grad.dtype == torch.float32


def test_compiled_module(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    torch._dynamo.reset()
    x = torch.randn(5, 40)
    torch.testing.assert_close(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), sparse(x))


# ---- topology ------------------------------------------------------------------------------------------------------


def test_surviving_connections_keep_value_and_state(pair: tuple[nn.Linear, SparseLinear]) -> None:
    linear, sparse = pair
    old, new, parameter = mask_of(), mask_of(seed=1, density=0.4), sparse.values
    state = torch.arange(1.0, 961).view(24, 40)
    entries = sparse.gather(state)
    sources = sparse.set_topology(new)
    assert sparse.values is parameter and torch.equal(sparse.weight_mask, new)
    assert torch.equal(sparse.weight.detach(), linear.weight.detach() * new)
    assert torch.equal(sparse.scatter(move_entries(entries, sources)), state * (old & new))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_entries_of_any_dtype_are_moved(dtype: torch.dtype) -> None:
    moved = move_entries(torch.tensor([0, 1]).to(dtype), torch.tensor([1, -1, 0, 1]))
    assert moved.dtype == dtype and moved.float().tolist() == [1, 0, 0, 1]


def test_training_goes_on_after_a_change_while_the_old_graph_lives(
    pair: tuple[nn.Linear, SparseLinear],
) -> None:
    _, sparse = pair
    x = torch.randn(5, 40)
    loss = sparse(x).sum()
    loss.backward()
    sparse.set_topology(mask_of(seed=1, density=0.4))
    assert sparse.values.grad is None
    sparse(x).sum().backward()
    assert sparse.values.grad is not None and sparse.values.grad.shape == sparse.values.shape
    assert loss.requires_grad


def test_set_topology_refuses_another_shape(pair: tuple[nn.Linear, SparseLinear]) -> None:
    with pytest.raises(RarefyError, match=r"give the weight's, \(24, 40\)"):
        pair[1].set_topology(mask_of(3, 4))


def test_from_linear_refuses_another_shape() -> None:
    with pytest.raises(RarefyError, match=r"give the weight's, \(24, 40\)"):
        SparseLinear.from_linear(nn.Linear(40, 24), mask_of(3, 4))


def test_new_layers_start_like_dense_ones() -> None:
    layer = SparseLinear(mask_of(density=1.0))
    assert layer.bias is not None and 0.1 < layer.values.abs().max() <= 40**-0.5
    assert layer.bias.abs().max() <= 40**-0.5
    assert SparseLinear(mask_of(), bias=False, dtype=torch.float64).values.dtype == torch.float64


# ---- dense gradient ------------------------------------------------------------------------------------------------


def test_dense_gradient_adds_up_over_micro_batches_until_released(
    pair: tuple[nn.Linear, SparseLinear],
) -> None:
    linear, sparse = pair
    assert sparse.dense_gradient is None
    sparse.request_dense_gradient()
    for _ in range(2):
        x = torch.randn(3, 40)
        for module in (linear, sparse):
            F.gelu(module(x)).sum().backward()
    assert sparse.dense_gradient is not None and linear.weight.grad is not None
    torch.testing.assert_close(sparse.dense_gradient, linear.weight.grad)
    torch.testing.assert_close(sparse.values.grad, sparse.gather(linear.weight.grad))
    sparse.release_dense_gradient()
    assert sparse.dense_gradient is None


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


def test_assigning_load(pair: tuple[nn.Linear, SparseLinear]) -> None:
    _, sparse = pair
    other = SparseLinear(mask_of(seed=3, density=0.5))
    other.load_state_dict(sparse.state_dict(), assign=True)
    x = torch.randn(3, 40)
    assert torch.equal(other(x), sparse(x)) and isinstance(other.values, nn.Parameter)


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
