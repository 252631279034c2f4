"""An optimizer's state from a checkpoint: into the same run, or into another phase with another topology."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rarefy.checkpoint.directory import CheckpointParts
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.mask_names import mask_names
from rarefy.storage.optimizer_state import saved_indices
from rarefy.storage.optimizer_traits import trained_parameters
from rarefy.storage.saved_state import dense_entries
from rarefy.storage.sharded.whole_states import cut_states
from rarefy.trainer.session import Session

_REMEDY = "give the same optimizer, or load_checkpoint_states: model"


def carry_optimizer(session: Session, path: Path, parts: CheckpointParts) -> None:
    """Takes the optimizer's state of another phase over; learning rates and other settings stay this phase's own.

    A connection that was active before keeps its state, a new one begins with zeros, and that of a dropped one is gone.

    Args:
        session: whose model and masks are loaded.
        path: the checkpoint.
        parts: what it holds.

    Raises:
        CheckpointError: it has no state of this optimizer, or one of other parameters.
    """
    optimizer = session.needed_optimizer
    saved = parts.optimizer
    made_by = None if parts.state is None else parts.state["optimizer_class"]
    if saved is None or made_by != type(optimizer).__name__:
        problem = f"has {f'the state of {made_by}' if made_by else 'no optimizer state'}"
        raise CheckpointError(path, f"{problem}, but this run uses {type(optimizer).__name__}", _REMEDY)
    own = optimizer.state_dict()["param_groups"]
    # torch knows parameters by their numbers alone: as many in each group is all that can be compared.
    sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], own)]
    if sizes[0] != sizes[1]:
        problem = f"has an optimizer of {sizes[0]} parameters in its groups, but this run one of {sizes[1]}"
        raise CheckpointError(path, problem, _REMEDY)
    state = dense_entries(saved, _masks_by_index(session, parts.model))
    whole = {"state": state, "param_groups": own}
    load_states(optimizer, cut_states(optimizer, whole), path, _REMEDY)


def _masks_by_index(session: Session, state: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The masks of a checkpoint by the number that its optimizer gave to their weights."""
    indices = saved_indices(session.needed_optimizer)
    names = mask_names(state)
    return {
        indices[weight]: state[names[name]].bool()
        for name, weight in session.model.named_parameters()
        if name in names and weight in indices
    }


def load_states(optimizer: Optimizer, saved: dict[str, Any], path: Path, remedy: str) -> None:
    """Loads an optimizer's state in the number formats that it was saved in.

    Raises:
        CheckpointError: it does not fit.
    """
    loaded: list[Mapping[str, Any]] = []
    # The last of the hooks, so it sees what the storages have made of the state.
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state))
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise CheckpointError(path, f"has an optimizer state that does not fit ({error})", remedy) from error
    finally:
        handle.remove()
    _keep_dtypes(optimizer, loaded[0])


def _keep_dtypes(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Undoes torch's conversion of optimizer states to the dtype of their parameters.

    `saved` is what torch converted, in the order of the present storage.
    """
    parameters = list(trained_parameters(optimizer))
    for index, entries in saved["state"].items():
        own = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.dtype != own[key].dtype:
                own[key] = value.to(own[key].device)
