"""What other code keeps beside a sparse weight, and operands of other shapes: as with the dense model, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
