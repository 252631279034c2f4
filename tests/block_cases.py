"""Linear layers of blocks, and a check of one against dense products in float64, for every kind of kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.kernels import BlockTopology, block_linear
from rarefy.kernels.instruction_sets import matrix_unit

HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


@dataclass
class Case:
    down: int
    across: int
    block: tuple[int, int]
    batch: tuple[int, ...]
    density: float
    bias: bool = True
    dtype: torch.dtype = torch.float32
    threads: int = 2
    strided: bool = False
    seed: int = 0
    device: str = "cpu"

    @property
    def rows(self) -> int:
        return self.down * self.block[0]

    @property
    def columns(self) -> int:
        return self.across * self.block[1]


def topology_of(case: Case) -> BlockTopology:
    active = torch.rand(case.down, case.across) < case.density
    if case.down > 2:
        active[1] = False
        active[2] = True
    return BlockTopology.from_blocks(active.to(case.device), case.block)


def activations(case: Case, size: int) -> Tensor:
    wide = torch.randn(*case.batch, size * (2 if case.strided else 1)).to(case.device, case.dtype)
    return wide[..., ::2] if case.strided else wide


def close(found: Tensor, wanted: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """Errors are measured against the sum of the magnitudes that were added."""
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= TOLERANCE[dtype] * bound + 1e-30).all()


def check(case: Case) -> None:
    """Forward pass and all gradients, against dense products in float64."""
    torch.manual_seed(case.seed)
    torch.set_num_threads(case.threads)
    topology = topology_of(case)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    x = activations(case, case.columns).requires_grad_()
    grad = activations(case, case.rows)
    values = torch.randn(topology.values_shape, dtype=wide).to(case.device).requires_grad_()
    bias = torch.randn(case.rows, dtype=wide).to(case.device).requires_grad_() if case.bias else None
    y = block_linear(x, values, bias, topology)
    y.backward(grad)
    assert y.dtype == case.dtype and y.shape == (*case.batch, case.rows)

    tokens = torch.Size(case.batch).numel()
    weight = topology.dense(values.detach()).double()
    offset = weight.new_zeros(case.rows) if bias is None else bias.detach().double()
    # Matrix units multiply rounded weights.
    if case.dtype in HALVES and (matrix_unit() or case.device == "cuda"):
        weight = weight.to(case.dtype).double()
    flat_x = x.detach().double().reshape(tokens, case.columns)
    flat_grad = grad.double().reshape(tokens, case.rows)
    flat_y = y.detach().reshape(tokens, case.rows)
    close(flat_y, flat_x @ weight.t() + offset, flat_x.abs() @ weight.abs().t() + offset.abs(), case.dtype)
    assert x.grad is not None and values.grad is not None
    flat_grad_x = x.grad.reshape(tokens, case.columns)
    close(flat_grad_x, flat_grad @ weight, flat_grad.abs() @ weight.abs(), case.dtype)
    bound = topology.gather(flat_grad.abs().t() @ flat_x.abs())
    close(values.grad, topology.gather(flat_grad.t() @ flat_x), bound, wide)
    if bias is not None and bias.grad is not None:
        close(bias.grad, flat_grad.sum(0), flat_grad.abs().sum(0), wide)
