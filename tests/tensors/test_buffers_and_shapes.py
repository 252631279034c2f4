"""What other code keeps beside a sparse weight, and operands of other shapes: as with the dense model, or refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import rarefy
from rarefy.errors import RarefyError
from rarefy.tensors import Role, SparseWeight

Setup = tuple[nn.Sequential, torch.optim.Optimizer, Any]


def setup(compute: str, algorithm: str = "static", kind: Any = torch.optim.SGD) -> Setup:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    optimizer = kind(model.parameters(), lr=0.05)
    final = {"type": "polynomial", "init": 0.5, "final": 0.75, "start": 0, "stop": 6}
    sparsity = final if algorithm == "movement" else 0.75
    options: dict[str, Any] = {"algorithm": algorithm, "sparsity": sparsity, "compute": compute, "seed": 1}
    if algorithm != "static":
        options["update"] = {"freq": 2, "stop": 100}
    applied = rarefy.configure(options)
    applied.apply(model)
    applied.apply(optimizer)
    return model, optimizer, applied


def backward(model: nn.Module) -> None:
    model(torch.randn(16, 24).double()).square().mean().backward()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.dense() if isinstance(tensor, SparseWeight) else tensor


def average(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    averages = [torch.zeros_like(one) for one in model.parameters()]
    for _ in range(9):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(averages, model.parameters(), strict=True):
                mean.copy_(0.9 * mean + 0.1 * parameter)
    return averages


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    buffers = [torch.zeros_like(one) for one in model.parameters()]
    for _ in range(9):
        optimizer.zero_grad()
        backward(model)
        for buffer, parameter in zip(buffers, model.parameters(), strict=True):
            buffer.copy_(0.9 * buffer + parameter.grad)
            parameter.grad = buffer.clone()
        optimizer.step()
    return list(model.parameters())


def normalized(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        for parameter in model.parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.clone()
            gradient.sub_(gradient.mean()).div_(gradient.std() + 1e-8)
            parameter.grad = gradient
        optimizer.step()
    return list(model.parameters())


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    sums = [torch.zeros_like(one) for one in model.parameters()]
    for _ in range(8):
        for one in sums:
            one.zero_()
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            for one, parameter in zip(sums, model.parameters(), strict=True):
                one.add_(parameter.grad)
        for one, parameter in zip(sums, model.parameters(), strict=True):
            parameter.grad = one.clone()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize(
    ("run", "algorithm"),
    [
        (average, "set"),
        (momentum, "set"),
        (normalized, "static"),
        (accumulated, "set"),
        (accumulated, "static"),
    ],
)
def test_loops_by_hand_compute_what_they_do_with_masks(
    run: Callable[..., list[Tensor]], algorithm: str
) -> None:
    results = [run(*setup(compute, algorithm)[:2]) for compute in ("masked", "compact")]
    for masked, compact in zip(*results, strict=True):
        torch.testing.assert_close(whole(compact), whole(masked), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["rigl", "mest", "movement"])
def test_sums_of_gradients_by_hand_train_with_methods_that_look_at_gradients(algorithm: str) -> None:
    model, optimizer, _ = setup("compact", algorithm)
    accumulated(model, optimizer)
    assert all(one.isfinite().all() for one in model.parameters())


def test_a_copy_of_a_gradient_is_changed_and_added_by_hand() -> None:
    model, _, _ = setup("compact")
    backward(model)
    weight = model[0].weight
    assert isinstance(weight, SparseWeight) and isinstance(weight.grad, SparseWeight)
    gradient, dense = weight.grad.clone(), weight.grad.dense()
    wanted = (weight.dense() - 0.1 * (dense - dense.mean())) * weight.topology.mask()
    gradient.sub_(gradient.mean())
    torch.testing.assert_close(gradient.norm(), (dense - dense.mean()).norm())
    with torch.no_grad():
        weight.add_(gradient, alpha=-0.1)
    torch.testing.assert_close(weight.detach().dense(), wanted)


def test_a_mean_that_leaves_out_nan_counts_zeros() -> None:
    model, _, _ = setup("compact")
    backward(model)
    gradient = model[0].weight.grad
    assert isinstance(gradient, SparseWeight)
    torch.testing.assert_close(gradient.nanmean(), gradient.dense().nanmean())


class WithoutGradient(torch.autograd.Function):
    """A product that leaves its weight without gradient, as where that is added up elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight, None


@pytest.mark.parametrize("algorithm", ["static", "rigl"])
def test_a_backward_pass_may_leave_a_weight_without_gradient(algorithm: str) -> None:
    model, optimizer, _ = setup("compact", algorithm)
    hidden = torch.tanh(model[0](torch.ones(4, 24).double()))
    WithoutGradient.apply(hidden, model[2].weight).square().mean().backward()  # type: ignore[attr-defined]
    assert model[2].weight.grad is None and model[0].weight.grad is not None
    optimizer.step()


def test_state_that_lost_its_connections_is_refused() -> None:
    model, optimizer, _ = setup("compact", kind=torch.optim.Adam)
    backward(model)
    optimizer.step()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    with pytest.raises(RarefyError, match=r"what tells of which is missing.*optimizer\.state_dict"):
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)


# ---- shapes ----


def sparse(rows: int, columns: int, role: Role = Role.FREE) -> SparseWeight:
    dense = torch.randn(rows, columns, dtype=torch.float64)
    return SparseWeight.from_dense(dense, torch.rand(rows, columns) < 0.6, role)


IN_PLACE: list[Callable[[Tensor, Tensor], Any]] = [
    lambda one, other: one.mul_(other),
    lambda one, other: one.add_(other, alpha=0.5),
    lambda one, other: one.lerp_(other, 0.3),
    lambda one, other: one.addcmul_(other, other),
    lambda one, other: one.copy_(other),
    lambda one, other: torch._foreach_mul_([one], [other]),
    lambda one, other: torch._foreach_add_([one], [other]),
]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(8, 1), (1, 4), (1, 1)])
def test_a_sparse_operand_of_another_shape_is_broadcast(
    change: Any, shape: tuple[int, int], role: Role
) -> None:
    torch.manual_seed(1)
    one = sparse(8, 4, role)
    other = sparse(*shape)
    mask = one.topology.mask()
    wanted = one.dense()
    change(wanted, other.dense())
    change(one, other)
    if role is not Role.FREE:
        wanted = wanted * mask
    torch.testing.assert_close(one.dense(), wanted)
    assert one.shape == (8, 4) and one.topology.shape == (8, 4)


@pytest.mark.parametrize("shape", [(8, 1), (1, 8)])
@pytest.mark.parametrize("operation", [torch.mul, torch.div, torch.hypot, torch.add])
def test_a_result_of_another_shape_is_dense(operation: Any, shape: tuple[int, int]) -> None:
    one = sparse(*shape)
    other = torch.arange(1.0, 6.0, dtype=torch.float64)
    other = other[:, None] if shape[0] == 1 else other
    assert torch.equal(operation(one, other), operation(one.dense(), other))


def test_a_tensor_of_torchs_own_sparse_layout_is_an_operand() -> None:
    one = sparse(4, 4)
    other = torch.eye(4, dtype=torch.float64).to_sparse()
    torch.testing.assert_close((one * other).to_dense(), one.dense() * other.to_dense())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_reduction_whose_gradient_reads_what_is_not_there_is_refused() -> None:
    weight = sparse(4, 4).requires_grad_()
    rows = torch.eye(4, dtype=torch.float64).to_sparse_csr()
    with pytest.raises(
        RarefyError, match="_sparse_mm_reduce_impl is not allowed with a sparse weight; give its"
    ):
        torch.sparse.mm(rows, weight, "amax")


def test_equal_takes_a_number() -> None:
    assert not torch.equal(sparse(4, 4), torch.tensor(1.0, dtype=torch.float64))


# ---- numbers that are written everywhere ----


EVERYWHERE: dict[str, Callable[[Tensor], Any]] = {
    "fill": lambda one: torch.zeros_like(one).fill_(1.5).sum(),
    "rsqrt": lambda one: one.pow(2).add_(1e-8).rsqrt_().mean(),
    "log": lambda one: one.abs().add_(1e-8).log_().mean(),
    "norm": lambda one: one.abs().add_(0.5).norm(),
    "equal": lambda one: torch.tensor(torch.equal(one.abs().add_(1), one.abs())),
    "copy": lambda one: torch.zeros_like(one).copy_(one.abs().add_(0.5)).std(),
    "clone": lambda one: one.abs().add_(0.5).clone().mul_(2).sum(),
    "deep copy": lambda one: copy.deepcopy(one.abs().add_(0.5)).sum(),
    "zero": lambda one: one.abs().add_(0.5).zero_().add(one).sum(),
    "times": lambda one: (one.abs().add_(0.5) * torch.ones_like(one).mul_(3)).sum(),
    "quotient": lambda one: (one / one.abs().add_(1e-3)).sum(),
    "product": lambda one: F.linear(torch.ones(2, one.shape[1], dtype=one.dtype), one.abs().add_(0.5)),
    "lists": lambda one: _lists(one),
    "clamp": lambda one: one.abs().clamp_(min=0.1).sum(0),
    "another topology": lambda one: torch.zeros_like(one).add_(1).mul_(sparse(*one.shape)).abs().sum(),
    "absolute": lambda one: one.abs().add_(-1).abs_().sum(),
    "view": lambda one: _then(one.abs().add_(1), lambda other: other.t().mul_(2)).sum(),
    "out": lambda one: _then(one.abs(), lambda other: torch.add(other, 1, out=other)).sum(),
    "one element": lambda one: one.abs().add_(1).mul_(torch.full((1, 1), 2.0, dtype=one.dtype)).sum(),
    "dense": lambda one: _then(torch.zeros_like(one), lambda other: other.copy_(one.abs() + 1)).sum(),
    "no number": lambda one: one.abs().log_().isinf().sum(),
}


def _then(one: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(one)
    return one


def _lists(one: Tensor) -> Tensor:
    roots = torch._foreach_sqrt([one.abs()])
    torch._foreach_add_(roots, 0.25)
    torch._foreach_mul_(roots, 2)
    [norm] = torch._foreach_norm(roots)
    [quotient] = torch._foreach_div([one], roots)
    return torch.stack([norm, roots[0].sum(), quotient.sum()])


@pytest.mark.parametrize("computed", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_a_number_that_is_written_in_place_counts_at_inactive_positions(computed: Any) -> None:
    torch.manual_seed(2)
    gradient = sparse(6, 9, Role.COMPANION)
    state = torch.get_rng_state()
    found = computed(gradient)
    torch.set_rng_state(state)
    torch.testing.assert_close(whole(found), whole(computed(gradient.dense())))


def test_a_number_at_inactive_positions_stays_out_of_the_weight_and_of_an_update() -> None:
    model, optimizer, _ = setup("compact")
    backward(model)
    weight = model[0].weight
    assert isinstance(weight, SparseWeight) and isinstance(weight.grad, SparseWeight)
    weight.grad.add_(1.0)
    assert weight.grad.dense()[~weight.topology.mask()].eq(1).all()
    wanted = weight.entries - 0.05 * weight.grad.entries
    optimizer.step()
    torch.testing.assert_close(weight.detach().entries, wanted.detach())
    assert weight.grad.dense()[~weight.topology.mask()].eq(0).all()


def test_new_connections_begin_with_the_number_that_was_there() -> None:
    torch.manual_seed(3)
    state = sparse(5, 6, Role.COMPANION).abs().add_(0.5)
    wanted = state.dense()
    state.add_(sparse(5, 6, Role.COMPANION).mul_(0))
    assert torch.equal(state.dense(), wanted)


def test_a_number_at_inactive_positions_goes_to_other_processes() -> None:
    filled = sparse(5, 6, Role.COMPANION).abs().add_(0.5)
    received = pickle.loads(ForkingPickler.dumps(filled))
    assert torch.equal(whole(received), filled.dense())
