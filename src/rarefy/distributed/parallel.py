"""`parallel`: how several processes train one model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rarefy.distributed.membership import ranks


class ParallelConfig(BaseModel):
    """`parallel`: how several processes train one model; a single process trains as without it.

    Args:
        strategy: `ddp`: a whole model in each process, gradients averaged; `auto`: what fits, today `ddp`.

    Example:
        >>> ParallelConfig().strategy
        'auto'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Annotated[Literal["auto", "ddp"], Field(description="auto or ddp", examples=["ddp"])] = "auto"


class Parallel:
    """Applies a `ParallelConfig` to a model.

    Args:
        config: what to do.
    """

    def __init__(self, config: ParallelConfig) -> None:
        self.config = config

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward pass average the gradients over all processes.

        Args:
            model: on its device, its sparsity applied.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> Parallel(ParallelConfig()).wrapped(model) is model
            True
        """
        return model if ranks() == 1 else DistributedDataParallel(model)

    def accumulating(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch of a step: only the last one exchanges gradients.

        Args:
            model: what `wrapped` returned.
            is_last: whether it is the last micro-batch.
        """
        return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()
