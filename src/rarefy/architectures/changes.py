"""How tensors of the decoder become those of a file, and back: each change has both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Tensors = list[Tensor]


class Change(Protocol):
    """A way to lay out numbers, without loss."""

    def out(self, tensors: Tensors) -> Tensors:
        """From the decoder to the file."""
        ...

    def back(self, tensors: Tensors) -> Tensors:
        """From the file to the decoder."""
        ...


@dataclass(frozen=True)
class Same:
    """Nothing but the name changes."""

    def out(self, tensors: Tensors) -> Tensors:
        """As they are."""
        return tensors

    def back(self, tensors: Tensors) -> Tensors:
        """As they are."""
        return tensors


SAME = Same()


@dataclass(frozen=True)
class Transposed:
    """Matrices [out, in] become [in, out]; vectors stay."""

    def out(self, tensors: Tensors) -> Tensors:
        """Rows and columns change places."""
        return [tensor.t() if tensor.dim() == 2 else tensor for tensor in tensors]

    def back(self, tensors: Tensors) -> Tensors:
        """The same once more."""
        return self.out(tensors)


@dataclass(frozen=True)
class Halves:
    """Rows of each head in the order of models that turn entries i and i + d/2 together; here it is 2i and 2i + 1.

    Args:
        heads: of the tensor.

    Example:
        >>> Halves(heads=1).out([torch.arange(4)])
        [tensor([0, 2, 1, 3])]
    """

    heads: int

    def out(self, tensors: Tensors) -> Tensors:
        """First all even rows of a head, then all odd ones."""
        # Weights [out, in] and biases [out] alike: only rows move.
        return [one.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2) for one in tensors]

    def back(self, tensors: Tensors) -> Tensors:
        """Even and odd rows in turn."""
        return [one.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2) for one in tensors]


@dataclass(frozen=True)
class Joined:
    """Queries, keys and values in one tensor, group by group: all queries of a group, its key, its value.

    Args:
        groups: of heads that share a key; 1 puts all queries first.
        sizes: rows of a group in each of the three.

    Example:
        >>> query, key, value = torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6])
        >>> Joined(groups=2, sizes=(1, 1, 1)).out([query, key, value])
        [tensor([1, 3, 5, 2, 4, 6])]
    """

    groups: int
    sizes: tuple[int, ...]

    def out(self, tensors: Tensors) -> Tensors:
        """Three tensors become one."""
        return [torch.cat([one.unflatten(0, (self.groups, -1)) for one in tensors], dim=1).flatten(0, 1)]

    def back(self, tensors: Tensors) -> Tensors:
        """One tensor becomes three."""
        parts = tensors[0].unflatten(0, (self.groups, -1)).split(self.sizes, dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class Plus:
    """A number is added on the way out: a norm's weight that is stored as its distance from 1, say.

    Args:
        amount: that number.
    """

    amount: float

    def out(self, tensors: Tensors) -> Tensors:
        """With the number added."""
        return [tensor + self.amount for tensor in tensors]

    def back(self, tensors: Tensors) -> Tensors:
        """With the number taken away."""
        return [tensor - self.amount for tensor in tensors]


@dataclass(frozen=True)
class Apart:
    """One tensor [outputs, experts, inputs] becomes a matrix for each expert."""

    def out(self, tensors: Tensors) -> Tensors:
        """A list of matrices."""
        return list(tensors[0].unbind(1))

    def back(self, tensors: Tensors) -> Tensors:
        """The matrices in one tensor."""
        return [torch.stack(tensors, dim=1)]


@dataclass(frozen=True)
class Each:
    """A change of its own for each of several tensors.

    Args:
        changes: one a tensor.
    """

    changes: tuple[Change, ...]

    def out(self, tensors: Tensors) -> Tensors:
        """Each tensor changed."""
        return [change.out([one])[0] for change, one in zip(self.changes, tensors, strict=True)]

    def back(self, tensors: Tensors) -> Tensors:
        """Each tensor changed back."""
        return [change.back([one])[0] for change, one in zip(self.changes, tensors, strict=True)]


@dataclass(frozen=True)
class Chain:
    """Several changes, one after the other.

    Args:
        changes: in the order of the way out.
    """

    changes: tuple[Change, ...]

    def out(self, tensors: Tensors) -> Tensors:
        """The first change first."""
        for change in self.changes:
            tensors = change.out(tensors)
        return tensors

    def back(self, tensors: Tensors) -> Tensors:
        """The last change first."""
        for change in reversed(self.changes):
            tensors = change.back(tensors)
        return tensors
