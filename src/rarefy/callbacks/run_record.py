"""The facts of a run that no metric holds, for `rarefy report`."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rarefy.callbacks.events import Callback
from rarefy.callbacks.flops import ForwardFlops, is_compiled, with_unseen
from rarefy.callbacks.log_sparsity import actual_of, algorithms_of, parameters_of
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.disk import writing
from rarefy.distributed import is_first
from rarefy.filters import candidates
from rarefy.models.call import count

FILE_NAME = "run.json"
FORMAT = 1


class RunRecord(Callback):
    """Writes `model_dir/run.json`, and logs `sparsity/target` and `sparsity/actual` on log steps.

    The file holds when the run was started with which versions, the sparse parameters with their algorithms
    and balance, and the floating-point operations of the first forward pass by weight, every weight counted
    as dense. Both metrics are means over all sparse parameters, weighted by size.

    Args:
        now: the time as text.
    """

    def __init__(self, now: Callable[[], str] = lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z")) -> None:
        self._now = now
        self._record = dict[str, Any]()
        self._counting = ExitStack()
        self._flops: ForwardFlops | None = None

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Notes what is known before the first step."""
        # A run that begins at step 0 is another one, in whatever directory.
        before = read_record(trainer.model_dir) if trainer.global_step else {}
        session = {"started": self._now(), "first_step": trainer.global_step, **_versions(trainer)}
        self._record = {
            **before,
            "format": FORMAT,
            "total_steps": trainer.total_steps,
            "sessions": [*before.get("sessions", []), session],
            "checkpoint_root": _checkpoint_root(trainer),
            "weights": sum(one.shape.numel() for one in candidates(trainer.model)),
            "sparse": dict(_sparse_facts(trainer)),
        }
        self._flops = None
        self._write(trainer.model_dir)

    def on_before_forward(self, trainer: TrainerView, batch: Any) -> None:
        """Counts operations in the first forward pass of the run."""
        # A run that goes on has the count of its first session.
        starts = "sparse" in self._record and "forward" not in self._record
        if starts and trainer.model.training and not is_compiled(trainer.model):
            self._flops = self._counting.enter_context(ForwardFlops(trainer.model))

    def on_after_forward(self, trainer: TrainerView, outputs: Any, batch: Any) -> None:
        """Notes them."""
        if self._flops is not None:
            self._counting.close()
            self._record["forward"] = _forward_facts(self._flops, self._record["sparse"], batch)
            self._flops = None
            self._write(trainer.model_dir)

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Logs the sparsity of the whole model."""
        parameters = parameters_of(trainer)
        if trainer.is_log_step and parameters:
            actual = actual_of(parameters)["sparsity/model/actual"]
            trainer.log_metrics_dict({"sparsity/target": model_target(trainer), "sparsity/actual": actual})

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Notes when and where the fit ended."""
        # A forward pass that failed has left the mode on.
        self._counting.close()
        if self._record:
            self._record["sessions"][-1] |= {"ended": self._now(), "last_step": trainer.global_step}
            self._write(trainer.model_dir)

    def _write(self, folder: Path) -> None:
        if not is_first():
            return
        path = folder / FILE_NAME
        # Under another name first, as a report may be made while the run goes on.
        temporary = folder / f".tmp-{FILE_NAME}"
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._record, indent=1), encoding="utf-8")
            temporary.replace(path)


def read_record(folder: Path) -> dict[str, Any]:
    """What `run.json` of a model directory holds; nothing where it is missing, damaged or of another format.

    Example:
        >>> read_record(Path("no/such/folder"))
        {}
    """
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == FORMAT else {}


def model_target(trainer: TrainerView) -> float:
    """The target sparsity over all sparse parameters, as the latest update set it; 0 for a dense run."""
    sizes = [
        (leaf.target_sparsity, parameter.shape.numel())
        for leaf in algorithms_of(trainer)
        for parameter in leaf.parameters.values()
    ]
    return sum(target * size for target, size in sizes) / max(sum(size for _, size in sizes), 1)


def _sparse_facts(trainer: TrainerView) -> Iterator[tuple[str, dict[str, Any]]]:
    for leaf in algorithms_of(trainer):
        for name, parameter in leaf.parameters.items():
            facts = {"algorithm": leaf.label, "shape": list(parameter.shape)}
            pattern = leaf.pattern
            balance = {"balance": pattern.key, "groups": pattern.groups} if pattern.key else {}
            yield name, {**facts, "storage": parameter.storage.form, **balance}


def _checkpoint_root(trainer: TrainerView) -> str | None:
    root = getattr(trainer.checkpoint, "checkpoint_root", None)
    # A report may be made from another working directory.
    return None if root is None else str(root.absolute())


def _versions(trainer: TrainerView) -> dict[str, Any]:
    names = {"rarefy": version("rarefy"), "torch": torch.__version__, "python": platform.python_version()}
    machine = f"{platform.system()} {platform.machine()}"
    return {**names, "machine": machine, "device": str(trainer.device), "threads": torch.get_num_threads()}


def _forward_facts(flops: ForwardFlops, sparse: Mapping[str, Any], batch: Any) -> dict[str, Any]:
    samples, tokens = count(batch)
    sizes = {name: math.prod(facts["shape"]) for name, facts in sparse.items()}
    weights = with_unseen(flops.by_parameter, sizes, batch)
    total = sum(weights.values()) + flops.other
    return {"samples": samples, "tokens": tokens, "total": total, "weights": weights}
