"""First masks by the weights of another checkpoint: rounds of iterative pruning with rewinding."""

from __future__ import annotations

from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from rarefy.checkpoint.saved_model import SavedModel, open_saved
from rarefy.errors import RarefyError
from rarefy.first_masks.from_data import FromData, Scope
from rarefy.first_masks.task import Task
from rarefy.validation import worded

Checkpoint = Annotated[
    Path, Field(description="a checkpoint, or the model_dir of a run", examples=["./model_dir/round_0"])
]


@worded
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TopKOf(FromData):
    """The largest weights of another checkpoint of the same model; what is inactive there stays so.

    score = |w| of the checkpoint, over its active connections

    With weights from early in the training of that checkpoint it makes the lottery tickets of Frankle et al.
    (arXiv:1912.05671). No data is looked at.

    Args:
        checkpoint: of the trained weights: a checkpoint, or a `model_dir`, whose newest is taken when training begins.
        scope: `layer`, where each weight has its own target, or `global`, where connections of all weights compete.

    Example:
        >>> import rarefy, tempfile
        >>> late = torch.nn.Linear(4, 1)
        >>> late.weight.data.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
        tensor([[4., 1., 3., 2.]])
        >>> file = Path(tempfile.mkdtemp()) / "late.pt"
        >>> torch.save(late.state_dict(), file)
        >>> early = torch.nn.Linear(4, 1)
        >>> rarefy.Static(0.5, init_method=TopKOf(checkpoint=file)).apply(early)
        >>> early.weight_mask.tolist()
        [[True, False, True, False]]
    """

    name: ClassVar[str] = "topk_of"
    looks_at_data: ClassVar[bool] = False
    batches: ClassVar[Any] = 0
    loss: ClassVar[Any] = None
    checkpoint: Checkpoint
    _: KW_ONLY
    scope: Scope = "layer"

    def masks(self, task: Task) -> dict[str, Tensor]:
        """The masks of all weights; see `FromData.masks`."""
        saved = open_saved(Path(self.checkpoint))
        scores = {name: self._score(saved, name, weight) for name, weight in task.weights.items()}
        masks = self.chosen(task, scores)
        for name, mask in masks.items():
            self._refuse_more(name, mask, scores[name])
        return masks

    def _score(self, saved: SavedModel, name: str, weight: Tensor) -> Tensor:
        late = saved.dense.get(name)
        if late is None or late.shape != weight.shape:
            what = f"no {name}" if late is None else f"{name} {list(late.shape)}, not {list(weight.shape)}"
            raise RarefyError(f"{saved.path} has {what}; give a checkpoint of the same model")
        size = late.abs().to(torch.promote_types(late.dtype, torch.float32))
        if name in saved.masks:
            size = size.masked_fill(~saved.masks[name], -torch.inf)
        return size.to(weight.device)

    def _refuse_more(self, name: str, mask: Tensor, score: Tensor) -> None:
        """Refuses a mask with connections that the checkpoint has no weight of."""
        if bool((mask & score.isneginf()).any()):
            there = int(score.isfinite().sum())
            raise RarefyError(
                f"{name} would have {int(mask.sum())} connections, and {self.checkpoint} has {there} of them; give a "
                "higher sparsity than that of the checkpoint"
            )
