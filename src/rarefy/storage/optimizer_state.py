"""The part of an optimizer's state that belongs to connections: changed, moved, and put to rest where none is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import masks
from rarefy.distributed import local_part
from rarefy.errors import RarefyError
from rarefy.storage.optimizer_traits import Path, belongs_to_connections, entries, rest_value, with_inner
from rarefy.tensors import SparseWeight

Change = Callable[[Tensor], Tensor]
Wanted = Callable[[Path, Tensor], bool]


def changed(state: Any, wanted: Wanted, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """A nested state in which every wanted tensor is replaced by what `change` makes of it.

    Args:
        state: tensors in dicts, lists and tuples, other values among them; left as it is.
        wanted: of the keys that lead to a tensor, and the tensor.
        change: of the same → tensor.
        path: keys that lead to `state`.

    Returns:
        New containers; values that are not replaced are shared.

    Example:
        >>> state = {"step": torch.tensor(1.0), "m": torch.ones(2)}
        >>> changed(state, lambda path, tensor: path == ("m",), lambda path, tensor: -tensor)
        {'step': tensor(1.), 'm': tensor([-1., -1.])}
    """
    if isinstance(state, Tensor):
        return change(path, state) if wanted(path, state) else state
    if isinstance(state, dict):
        # An optimizer's dict may be of a class of its own.
        copied = copy.copy(state)
        copied.update({key: changed(value, wanted, change, (*path, key)) for key, value in state.items()})
        return copied
    if type(state) in (list, tuple):
        return type(state)(
            [changed(value, wanted, change, (*path, index)) for index, value in enumerate(state)]
        )
    return state


def stored_numbers(tensor: Tensor) -> int:
    """How many numbers a tensor keeps in memory; of a sparse one, those of its connections.

    Example:
        >>> stored_numbers(torch.ones(2, 3))
        6
    """
    return tensor.connections if isinstance(tensor, SparseWeight) else tensor.numel()


def sparse_states(optimizers: Iterable[Optimizer], weight: nn.Parameter) -> list[SparseWeight]:
    """Every sparse tensor among the states that optimizers keep for `weight`."""
    states = (optimizer.state.get(weight) for optimizer in with_inner(optimizers))
    return [tensor for state in states for _, tensor in entries(state) if isinstance(tensor, SparseWeight)]


def parts_in_step(optimizer: Optimizer, weight: nn.Parameter) -> Iterator[Tensor]:
    """What sparse tensors are made of that an optimizer computes with in a step; nothing of dense ones.

    Args:
        optimizer: that of the step.
        weight: trained by it.
    """
    for one in (weight, weight.grad, *sparse_states([optimizer], weight)):
        if isinstance(one, SparseWeight):
            yield from one.parts


def begin_entries(
    optimizers: Iterable[Optimizer], weight: nn.Parameter, is_new: Callable[[], Tensor]
) -> None:
    """Gives new connections of a compact weight the state that the optimizer begins with, where that is not zero.

    Args:
        optimizers: and those inside them.
        weight: the parameter.
        is_new: bool [connections], made where it is needed: of most optimizers it is not.
    """
    for optimizer in with_inner(optimizers):
        for path, tensor in entries(optimizer.state.get(weight)):
            first = rest_value(optimizer, weight, path)
            if first != 0 and isinstance(tensor, SparseWeight):
                tensor.entries.masked_fill_(is_new(), first)


def make_states_dense(optimizers: Iterable[Optimizer], weight: nn.Parameter) -> None:
    """Replaces every sparse tensor among the states that optimizers keep for `weight`."""
    for optimizer in with_inner(optimizers):
        if weight in optimizer.state:
            optimizer.state[weight] = all_dense(optimizer.state[weight])


def make_unrelated_dense(optimizers: Iterable[Optimizer], weight: nn.Parameter) -> None:
    """Replaces sparse states of a compact weight that do not belong to connections, as those in a rotated basis.

    An optimizer made them like the weight, so they have room for connections alone.

    Args:
        optimizers: and those inside them.
        weight: the parameter.

    Raises:
        RarefyError: something was written to one already, of which the rest had no room.

    Example:
        >>> weight = nn.Parameter(torch.ones(2)); optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> make_unrelated_dense([optimizer], weight)
    """
    for optimizer in with_inner(optimizers):
        # Bound as defaults, since a closure would see the optimizer of the last turn.
        def wanted(path: Path, tensor: Tensor, optimizer: Optimizer = optimizer) -> bool:
            is_sparse = isinstance(tensor, SparseWeight)
            return is_sparse and not belongs_to_connections(optimizer, weight, path, tensor.shape)

        def replace(path: Path, tensor: Tensor, optimizer: Optimizer = optimizer) -> Tensor:
            if bool(tensor.any()):
                raise RarefyError(
                    f"{type(optimizer).__name__} keeps {path[-1]!r} in the shape of a weight, but not one number a "
                    "connection, and compact storage had no room for it; set compute: masked"
                )
            return _dense(tensor)

        state = optimizer.state.get(weight)
        if any(wanted(path, tensor) for path, tensor in entries(state)):
            optimizer.state[weight] = changed(state, wanted, replace)


def all_dense(state: Any) -> Any:
    """A nested state in which every sparse tensor is a dense one.

    Example:
        >>> all_dense({"m": SparseWeight.from_dense(torch.ones(1, 2), torch.tensor([[True, False]]))})
        {'m': tensor([[1., 0.]])}
    """
    return changed(
        state, lambda _, tensor: isinstance(tensor, SparseWeight), lambda _, tensor: _dense(tensor)
    )


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dense() if isinstance(tensor, SparseWeight) else tensor


def change_state(
    optimizers: Iterable[Optimizer],
    weight: nn.Parameter,
    shape: Iterable[int],
    change: Change,
) -> None:
    """Replaces what optimizers keep for each connection of `weight`.

    Args:
        optimizers: those that know nothing of the weight are left alone.
        weight: the parameter.
        shape: of the tensors to replace.
        change: tensor → tensor; called without gradients.

    Example:
        >>> weight = nn.Parameter(torch.ones(2)); optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> change_state([optimizer], weight, weight.shape, torch.zeros_like)
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([0., 0.])
    """
    wanted_shape = torch.Size(shape)
    with torch.no_grad():
        for optimizer in with_inner(optimizers):
            if weight not in optimizer.state:
                continue

            def wanted(path: Path, tensor: Tensor, optimizer: Optimizer = optimizer) -> bool:
                is_shaped = tensor.shape == wanted_shape
                return is_shaped and belongs_to_connections(optimizer, weight, path, tensor.shape)

            def replace(path: Path, tensor: Tensor, optimizer: Optimizer = optimizer) -> Tensor:
                _refuse_codes(optimizer, path, tensor)
                return change(tensor)

            optimizer.state[weight] = changed(optimizer.state[weight], wanted, replace)


def rest_inactive(optimizers: Iterable[Optimizer], weight: nn.Parameter, mask: Tensor) -> None:
    """Makes the state of inactive connections exact zeros.

    Args:
        optimizers: and those inside them.
        weight: the parameter.
        mask: bool, the shape of the weight; a DTensor where the weight is one.

    Raises:
        RarefyError: the optimizer keeps codes of another number format for which no zero is known.

    Example:
        >>> weight = nn.Parameter(torch.ones(2)); optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> rest_inactive([optimizer], weight, torch.tensor([True, False]))
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([1., 0.])
    """
    with torch.no_grad():
        # Of a sharded weight the piece of this process: states are cut as the weight is.
        own_mask = local_part(mask)
        for optimizer, path, found in _of_connections(optimizers, weight, mask.shape):
            tensor = local_part(found)
            if type(tensor) is not Tensor and hasattr(tensor, "dequantize"):
                _rest_quantized(optimizer, path, tensor, own_mask)
            elif not tensor.is_floating_point() and not tensor.is_complex():
                # As bitsandbytes keeps them: codes in `state1`, and in `qmap1` what each code means.
                qmap = optimizer.state[weight].get(str(path[-1]).replace("state", "qmap"))
                tensor.masked_fill_(~own_mask, _zero_code(optimizer, path, qmap))
            else:
                masks.zero_inactive_(tensor, own_mask)


def begin_state(optimizers: Iterable[Optimizer], weight: nn.Parameter, grown: Tensor) -> None:
    """Gives new connections the state that the optimizer begins with, where that is not zero.

    Args:
        optimizers: and those inside them.
        weight: the parameter.
        grown: bool, the shape of the weight.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=0.5)
        >>> _ = optimizer.state[weight]["sum"].fill_(7.0)
        >>> begin_state([optimizer], weight, torch.tensor([False, True]))
        >>> optimizer.state[weight]["sum"]
        tensor([7.0000, 0.5000])
    """
    with torch.no_grad():
        for optimizer, path, tensor in _of_connections(optimizers, weight, grown.shape):
            first = rest_value(optimizer, weight, path)
            if first != 0:
                local_part(tensor).masked_fill_(local_part(grown), first)


def _of_connections(
    optimizers: Iterable[Optimizer], weight: nn.Parameter, shape: torch.Size
) -> Iterator[tuple[Optimizer, Path, Tensor]]:
    for optimizer in with_inner(optimizers):
        for path, tensor in entries(optimizer.state.get(weight)):
            if tensor.shape == shape and belongs_to_connections(optimizer, weight, path, shape):
                yield optimizer, path, tensor


def _zero_code(optimizer: Optimizer, path: Path, qmap: Any) -> int:
    """The code that stands for the number zero."""
    if not isinstance(qmap, Tensor) or not bool((qmap == 0).any()):
        raise _no_zero(optimizer, path)
    return int((qmap == 0).nonzero()[0])


def _rest_quantized(optimizer: Optimizer, path: Path, tensor: Any, mask: Tensor) -> None:
    """A tensor that holds codes beside their scales, as torchao's do."""
    codes = getattr(tensor, "codes", None)
    if isinstance(codes, Tensor) and codes.shape == mask.shape and not codes.is_floating_point():
        codes.masked_fill_(~mask, _zero_code(optimizer, path, getattr(tensor, "qmap", None)))
        return
    if isinstance(codes, Tensor) and codes.numel() == mask.numel() and codes.is_floating_point():
        zeros = torch.zeros_like(codes.view(mask.shape))
        # By way of float32, in which every float8 is exact; float8 has few operations of its own.
        codes.copy_(
            torch.where(mask, codes.view(mask.shape).float(), zeros.float()).to(codes.dtype).view(codes.shape)
        )
        return
    raise _no_zero(optimizer, path)


def _refuse_codes(optimizer: Optimizer, path: Path, tensor: Tensor) -> None:
    """Codes with one scale for a block of neighbours cannot move to other places."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or hasattr(tensor, "codes"):
        raise RarefyError(
            f"{type(optimizer).__name__} keeps {path[-1]!r} as codes with a scale for each block, which cannot follow "
            "connections in compact storage; set compute: masked, or take an optimizer with states in floating point"
        )


def _no_zero(optimizer: Optimizer, path: Path) -> RarefyError:
    return RarefyError(
        f"{type(optimizer).__name__} keeps {path[-1]!r} as codes, and no code is known to mean exactly zero, so that "
        "dropped connections would keep their state; take an optimizer with states in floating point"
    )


def saved_indices(optimizer: Optimizer) -> dict[nn.Parameter, int]:
    """Under which number an optimizer's state dict keeps each of its parameters.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> saved_indices(torch.optim.SGD(layer.parameters(), lr=0.1))[layer.bias]
        1
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: index for index, parameter in enumerate(parameters)}
