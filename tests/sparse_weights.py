"""A model with sparse weights, and its dense twin whose zeros are held by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.tensors import Role, SparseWeight, Topology, become, set_topology


def layers(columns: int = 24) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 8))


# The block in which masks come; a fixture sets it, so that the same tests hold for weights of blocks.
BLOCK: tuple[int, int] | None = None


def masks_of(model: nn.Module, density: float = 0.3, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    return {name: random_mask(p.shape, density, generator) for name, p in matrices}


def random_mask(shape: torch.Size, density: float, generator: torch.Generator) -> Tensor:
    """Of single connections, or of whole blocks where they fit."""
    height, width = BLOCK or (1, 1)
    if shape[0] % height or shape[1] % width:
        return torch.rand(shape, generator=generator) < density
    active = torch.rand(shape[0] // height, shape[1] // width, generator=generator) < density
    return active.repeat_interleave(height, 0).repeat_interleave(width, 1)


def make_sparse(parameter: Any, mask: Tensor, role: Role = Role.MANAGED, is_transposed: bool = False) -> None:
    weight = SparseWeight.from_dense(parameter.detach(), mask, role, is_transposed, BLOCK)
    become(parameter, weight.requires_grad_(parameter.requires_grad))


class Pair:
    """The two models; `run` does the same to both.

    Args:
        make: builds a model; matrices become sparse.
        role: of the sparse weights.
    """

    def __init__(self, make: Callable[[], Any] = layers, role: Role = Role.MANAGED) -> None:
        self.dense: Any = make()
        self.sparse: Any = make()
        self.masks = masks_of(self.dense)
        for name, mask in self.masks.items():
            parameter = self.dense.get_parameter(name)
            parameter.data.mul_(mask)
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
            make_sparse(self.sparse.get_parameter(name), mask, role)

    def run(self, action: Callable[[Any], object]) -> tuple[Any, Any]:
        results = []
        for model in (self.dense, self.sparse):
            torch.manual_seed(5)
            results.append(action(model))
        return results[0], results[1]

    def assert_equal(self, rtol: float = 1e-5, atol: float = 1e-6, held: bool = True) -> None:
        """Every parameter is the same, the dense one's at active connections where zeros are `held`."""
        for name, expected in self.dense.named_parameters():
            found = self.sparse.get_parameter(name)
            if held and name in self.masks:
                assert type(found) is SparseWeight, name
                expected = expected * self.masks[name]
            torch.testing.assert_close(whole(found), expected.detach(), rtol=rtol, atol=atol, msg=name)


def whole(tensor: Any) -> Tensor:
    """A tensor as a plain dense one."""
    plain: Any = tensor.detach()
    return plain.dense() if isinstance(tensor, SparseWeight) else plain


def move(weight: SparseWeight, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Gives a weight, its gradient and its optimizer state other connections."""
    state = optimizer.state.get(weight, {}) if optimizer is not None else {}
    followers = [t for t in (weight.grad, *state.values()) if isinstance(t, SparseWeight)]
    topology = Topology.from_mask(mask, block=BLOCK)
    set_topology(weight, topology)
    for one in followers:
        one._cell.move_to(topology)


def inputs(seed: int, rows: int = 16, columns: int = 24) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
