"""What a run left behind: metrics, `run.json`, the newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.callbacks.rank_log import COMMUNICATION, DIRECTORY_NAME, table_of
from rarefy.callbacks.run_record import read_record
from rarefy.checkpoint.directory import load, newest_valid
from rarefy.checkpoint.mask_names import mask_names
from rarefy.errors import RarefyError
from rarefy.patterns import Pattern
from rarefy.report.logged_metrics import read_metrics, read_table
from rarefy.report.series import Series

PLAIN = ("loss", "lr", "grad_norm", "tokens_per_second", "samples_per_second", "skipped_steps")
AXES = {"balance_out_groups": 0, "balance_in_groups": 1}


@dataclass(frozen=True)
class MaskFacts:
    """What is told of a mask.

    Args:
        name: of its parameter.
        shape: of the weight.
        active: connections.
        groups: share of active connections in each balanced group; empty without any.
    """

    name: str
    shape: tuple[int, ...]
    active: int
    groups: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Number of positions."""
        total = 1
        for length in self.shape:
            total *= length
        return total

    @property
    def sparsity(self) -> float:
        """Share of inactive connections."""
        return 1 - self.active / max(self.size, 1)


@dataclass(frozen=True)
class Run:
    """A run to look at.

    Args:
        folder: its model directory.
        metrics: by name.
        record: what `run.json` holds; empty without one.
        step: of the newest checkpoint, or None.
        params: the configuration in the checkpoint; empty without one.
        masks: of the newest checkpoint.
        ranks: what each of several processes told of itself, by rank.
    """

    folder: Path
    metrics: Mapping[str, Series] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    masks: tuple[MaskFacts, ...] = ()
    ranks: Mapping[int, Mapping[str, Series]] = field(default_factory=dict)

    @property
    def sparse(self) -> Mapping[str, Mapping[str, Any]]:
        """Facts of each sparse parameter by name, from `run.json`."""
        return self.record.get("sparse", {})

    @property
    def is_dense(self) -> bool:
        """Whether it is known that nothing is sparse."""
        known = bool(self.record) or self.step is not None
        return known and not self.masks and not self.sparse

    def of_parameters(self, kind: str) -> dict[str, Series]:
        """The metrics `sparsity/<parameter>/<kind>` by parameter, those of the whole model left out."""
        prefix = "sparsity/"
        suffix = f"/{kind}"
        found = {
            name[len(prefix) : -len(suffix)]: series
            for name, series in self.metrics.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }
        return {name: series for name, series in found.items() if name not in ("", "model")}


def read_run(folder: Path, warn: Callable[[str], None]) -> Run:
    """Reads a model directory.

    Args:
        folder: where a run left its logs and checkpoints.
        warn: called with one line for each damaged checkpoint that is passed over.

    Raises:
        RarefyError: no such directory, or nothing of a run in it.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise RarefyError(f"{folder} {problem}; give the model_dir of a run")
    record = read_record(folder)
    metrics = read_metrics(folder, is_wanted)
    checkpoint = newest_valid(Path(record.get("checkpoint_root") or folder), warn)
    if not (record or metrics or checkpoint):
        raise RarefyError(
            f"{folder} holds no metrics.csv, events, run.json or checkpoint; give the model_dir of a run"
        )
    if checkpoint is None:
        return Run(folder, metrics, record, ranks=read_ranks(folder))
    # An optimizer's state may be twice as large as the weights, and nothing of it is shown.
    parts = load(checkpoint, only=("model",))
    masks = tuple(mask_facts(parts.model, record.get("sparse", {})))
    # The newest may be a `checkpoint_5.replaced`.
    step = int(checkpoint.name.split("_")[1].split(".")[0])
    return Run(folder, metrics, record, step, parts.params, masks, read_ranks(folder))


def read_ranks(folder: Path) -> dict[int, dict[str, Series]]:
    """What each process of a run told of itself, by rank; empty where there was one.

    Args:
        folder: the model directory.

    Example:
        >>> read_ranks(Path("no/such/folder"))
        {}
    """
    names = [path.stem.removeprefix("rank_") for path in (folder / DIRECTORY_NAME).glob("rank_*.csv")]
    found = sorted(int(name) for name in names if name.isdecimal())
    return {rank: read_table(table_of(folder, rank), is_wanted) for rank in found}


def is_wanted(name: str) -> bool:
    """Whether a report shows a metric.

    Example:
        >>> is_wanted("eval/loss"), is_wanted("per_layer_grad_norm/fc.weight")
        (True, False)
    """
    # The rest may be norms of every layer: thousands of columns that nothing here draws.
    return name in PLAIN or name.startswith(("eval/", "sparsity/", "flops/", "memory/", COMMUNICATION))


def mask_facts(state: Mapping[str, Tensor], sparse: Mapping[str, Mapping[str, Any]]) -> Iterator[MaskFacts]:
    """Facts of every mask of a model's state dict.

    Args:
        state: weights and masks.
        sparse: the balance of each parameter, from `run.json`.

    Example:
        >>> import torch
        >>> state = {"w": torch.ones(2, 2), "w_mask": torch.tensor([[True, False], [True, False]])}
        >>> next(mask_facts(state, {"w": {"balance": "balance_out_groups", "groups": 2}})).groups
        (0.5, 0.5)
    """
    for name, mask_name in mask_names(state).items():
        mask = state[mask_name]
        if mask.dtype is torch.bool:
            facts = sparse.get(name, {})
            pattern = Pattern(AXES.get(facts.get("balance", "")), int(facts.get("groups", 1)))
            pieces = pattern.split(mask) if pattern.axis is not None else ()
            shares = tuple(int(piece.count_nonzero()) / piece.numel() for piece in pieces)
            yield MaskFacts(name, tuple(mask.shape), int(mask.count_nonzero()), shares)
