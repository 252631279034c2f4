"""Optimizer state between memory and a state dict, so that a run may go on with another storage or machine.

Sparse states of a weight with compact storage are saved as their active entries in row-major order. Beside `state` the
state dict has `topology`, for each sparse weight with a state the checksum of its mask, and `entries`, the keys that
lead to what was saved so. Files from before have no such keys; in them it is told by shape and meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.distributed import whole
from rarefy.errors import RarefyError
from rarefy.storage.optimizer_state import all_dense, changed, saved_indices
from rarefy.storage.optimizer_traits import Path, belongs_to_connections, entries
from rarefy.storage.parameter import SparseParameter
from rarefy.tensors import SparseWeight

KEY = "topology"
MARKS = "entries"


def save_entries(
    parameters: Mapping[str, SparseParameter], optimizer: Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """The state dict in the form to be saved.

    Args:
        parameters: sparse weights by name; those that the optimizer does not train are left out.
        optimizer: whose state dict it is.
        state_dict: as torch makes it; left as it is.
    """
    indices = saved_indices(optimizer)
    saved = dict(state_dict["state"])
    topology = dict(state_dict.get(KEY, {}))
    marks = dict(state_dict.get(MARKS, {}))
    for parameter in parameters.values():
        index = indices.get(parameter.weight)
        storage = parameter.storage
        if index is None or index not in saved:
            continue
        topology[index] = storage.fingerprint
        if isinstance(parameter.weight, SparseWeight):
            own = partial(_has_its_connections, parameter.weight)
            marks[index] = [list(path) for path, state in entries(saved[index]) if own(path, state)]
            as_entries = changed(saved[index], own, lambda _, state, save=storage.saved_entries: save(state))
            # What is sparse still has other connections than the weight.
            saved[index] = all_dense(as_entries)
    return {**state_dict, "state": saved, **_notes(topology, marks)}


def load_entries(
    parameters: Mapping[str, SparseParameter], optimizer: Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """The state dict in the form that the optimizer takes at present.

    Args:
        parameters: sparse weights by name, whose masks are loaded already.
        optimizer: that is about to load.
        state_dict: as `save_entries` or a run with other storage left it; left as it is.

    Raises:
        RarefyError: a state was saved with another topology than the weight has.
    """
    indices = _loaded_indices(optimizer, state_dict)
    saved = dict(state_dict["state"])
    topology = {int(index): value for index, value in state_dict.get(KEY, {}).items()}
    marks = {int(index): value for index, value in state_dict.get(MARKS, {}).items()}
    for parameter in parameters.values():
        index = indices.get(parameter.weight)
        if index is None or index not in saved:
            continue
        shapes = {parameter.shape}
        if index in topology:
            # Loaded before the model's, it would be pruned by a mask that is about to go.
            if topology.pop(index) != parameter.storage.fingerprint:
                raise RarefyError(
                    f"the optimizer's state of {parameter.name} belongs to another topology; load the model's state "
                    "dict first, and the optimizer's of the same moment after it"
                )
            shapes.add(torch.Size([parameter.active]))
        elif _are_bare(optimizer, parameter, entries(saved[index])):
            raise RarefyError(
                f"the optimizer's state of {parameter.name} has one entry for each connection, and what tells of which "
                f"is missing: {KEY!r} and {MARKS!r} beside 'state', which torch.distributed.checkpoint.state_dict "
                "leaves out; save and load optimizer.state_dict() itself"
            )
        if index in marks:
            wanted = partial(_is_marked, {tuple(path) for path in marks.pop(index)})
        else:
            # Files from before there were marks.
            wanted = partial(_is_of, optimizer, parameter.weight, shapes)
        load = parameter.storage.loaded_entries
        saved[index] = changed(saved[index], wanted, lambda _, state, load=load: load(state))
    rest = {key: value for key, value in state_dict.items() if key not in (KEY, MARKS)}
    return {**rest, "state": saved, **_notes(topology, marks)}


def _loaded_indices(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[nn.Parameter, Any]:
    """Under which key a state dict has each parameter; torch goes by the order, and takes names for numbers too."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return dict(zip(saved_indices(optimizer), keys, strict=False))


def refuse_entries(parameters: Mapping[str, SparseParameter], optimizer: Optimizer) -> None:
    """Refuses an optimizer that has loaded what `save_entries` saved, before anything could tell of which connections.

    Args:
        parameters: sparse weights by name; those that the optimizer does not train are left out.
        optimizer: that is followed from now on.

    Raises:
        RarefyError: it has.
    """
    for parameter in parameters.values():
        weight = parameter.weight
        if weight in optimizer.state and _are_bare(optimizer, parameter, entries(optimizer.state[weight])):
            raise RarefyError(
                f"the optimizer's state of {parameter.name} has one entry for each connection, as compact storage "
                "saves it, and was loaded before sparsity.apply(optimizer), so that nothing tells of which "
                "connections; apply it first, then call optimizer.load_state_dict"
            )


def _are_bare(
    optimizer: Optimizer, parameter: SparseParameter, states: Iterable[tuple[Path, Tensor]]
) -> bool:
    """Whether there are states with one entry for each connection."""
    weight = parameter.weight
    found = list(states)
    # One that has another state of the whole shape has not loaded entries, whatever length the rest has.
    if weight.dim() == 1 or any(state.shape == weight.shape for _, state in found):
        return False
    shapes = {torch.Size([parameter.active])}
    return any(state.dim() == 1 and _is_of(optimizer, weight, shapes, path, state) for path, state in found)


def dense_entries(state_dict: Mapping[str, Any], masks: Mapping[int, Tensor]) -> dict[int, Any]:
    """What `save_entries` saved, in the shapes of dense weights, for weights that have another topology by now.

    Args:
        state_dict: left as it is.
        masks: with which it was saved, bool, by the number of the weight; those that were dense are left out. Of
            DTensors all processes bring their pieces.

    Returns:
        State by number, zeros where a connection had none.
    """
    saved = dict(state_dict["state"])
    for index, paths in state_dict.get(MARKS, {}).items():
        wanted = partial(_is_marked, {tuple(path) for path in paths})
        # Entries have no rows by which they could be cut; states that were dense may be DTensors already.
        spread = partial(_spread, whole(masks[int(index)]).cpu())
        saved[int(index)] = changed(saved[int(index)], wanted, lambda _, state, spread=spread: spread(state))
    return saved


def _spread(mask: Tensor, entries: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=entries.dtype)
    dense[mask] = entries.reshape(-1).cpu()
    return dense


def _notes(topology: Mapping[int, int], marks: Mapping[int, Any]) -> dict[str, Any]:
    """What stands beside the state; a plain optimizer's state dict has nothing of it."""
    return {**({KEY: topology} if topology else {}), **({MARKS: marks} if marks else {})}


def _has_its_connections(weight: SparseWeight, path: Path, tensor: Tensor) -> bool:
    return isinstance(tensor, SparseWeight) and tensor.topology.equals(weight.topology)


def _is_marked(marked: set[Path], path: Path, tensor: Tensor) -> bool:
    return path in marked


def _is_of(
    optimizer: Optimizer, weight: nn.Parameter, shapes: set[torch.Size], path: Path, tensor: Tensor
) -> bool:
    """Whether a saved tensor has one entry for each connection."""
    return tensor.shape in shapes and belongs_to_connections(optimizer, weight, path, tensor.shape)
