"""`parallel`: how several processes train one model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rarefy.distributed.agreement import ranks, sending_device
from rarefy.distributed.means import Traffic, count_exchanges
from rarefy.errors import ConfigError


class ParallelConfig(BaseModel):
    """`parallel`: how several processes train one model; a single process trains as without it.

    Args:
        strategy: `ddp`: a whole model in each process, gradients averaged; `fsdp2`: a piece of each weight in each
            process, gathered for its forward and backward pass; `auto`: what fits, today `ddp`.
        shard_size: for `fsdp2`, how many processes share one copy of the model; None for all.
        mixed_precision: for `fsdp2`, the format of gathered weights and of what is computed with them.
        reshard_after_forward: for `fsdp2`, whether gathered weights are put away between forward and backward pass;
            None keeps those outside of the model's blocks.
        cpu_offload: for `fsdp2`, whether each process keeps its pieces, with gradients and optimizer states, in the
            CPU's memory, where the optimizer steps; they go to the device for the forward and backward pass alone.

    Example:
        >>> ParallelConfig().strategy
        'auto'
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    strategy: Annotated[
        Literal["auto", "ddp", "fsdp2"], Field(description="auto, ddp or fsdp2", examples=["ddp"])
    ] = "auto"
    shard_size: Annotated[
        int | None, Field(strict=True, ge=1, description="a whole number of processes ≥ 1", examples=[8])
    ] = None
    mixed_precision: Annotated[
        Literal["none", "bfloat16"], Field(description="none or bfloat16", examples=["bfloat16"])
    ] = "none"
    reshard_after_forward: Annotated[
        bool | None, Field(strict=True, description="true or false", examples=["true"])
    ] = None
    cpu_offload: Annotated[bool, Field(strict=True, description="true or false", examples=["true"])] = False

    @model_validator(mode="after")
    def _check_strategy(self) -> ParallelConfig:
        given = self.model_fields_set - {"strategy"}
        if given and self.strategy != "fsdp2":
            problem = f"beside strategy: {self.strategy}"
            raise ConfigError(min(given), problem, "this key with fsdp2 only", "strategy: fsdp2")
        return self


class Parallel:
    """Applies a `ParallelConfig` to a model.

    Args:
        config: what to do.

    Attributes:
        traffic: what this process gave into averages of gradients so far.
    """

    def __init__(self, config: ParallelConfig) -> None:
        self.config = config
        self.traffic = Traffic()

    @property
    def cuts(self) -> bool:
        """Whether each process holds a piece of each weight."""
        return self.config.strategy == "fsdp2" and ranks() > 1

    def cut(self, model: nn.Module, device: torch.device) -> None:
        """Cuts a model in pieces in place, if that is asked for; its parameters are others then.

        Args:
            model: on its device, its sparsity applied, no optimizer made of it yet.
            device: of this process.

        Raises:
            ConfigError: a `shard_size` that does not divide the number of processes, `cpu_offload` where the process
                group sends nothing from the CPU, or a torch that cuts no model on the CPU.
        """
        if self.cuts:
            self._check_device(device)
            self._check_offload()
            # Here, as the module behind it takes long to import and few runs cut their model.
            from rarefy.distributed.fully_shard import cut_model

            config = self.config
            dtype = torch.bfloat16 if config.mixed_precision == "bfloat16" else None
            later = config.reshard_after_forward
            cut_model(model, device, config.shard_size, dtype, later, config.cpu_offload)

    def _check_device(self, device: torch.device) -> None:
        """Refuses what fails in torch 2.6, in the first forward pass."""
        if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            given = f"fsdp2 on the CPU with torch {torch.__version__}"
            raise ConfigError("parallel.strategy", given, "ddp, or install a newer torch", "strategy: ddp")

    def _check_offload(self) -> None:
        """Refuses what torch would, in the first gradient norm."""
        if self.config.cpu_offload and sending_device(torch.device("cpu")).type != "cpu":
            given = f"true in a process group of {dist.get_backend()} alone"
            allowed = "false, or join the processes by a group that sends from the CPU too"
            example = 'torch.distributed.init_process_group("cpu:gloo,cuda:nccl")'
            raise ConfigError("parallel.cpu_offload", given, allowed, example)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward pass average the gradients over all processes.

        Args:
            model: on its device, its sparsity applied.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> Parallel(ParallelConfig()).wrapped(model) is model
            True
        """
        if ranks() == 1 or self.cuts:
            return model
        ddp = DistributedDataParallel(model)
        count_exchanges(ddp, self.traffic)
        return ddp

    def accumulating(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch of a step: only the last one exchanges gradients.

        Args:
            model: what `wrapped` returned.
            is_last: whether it is the last micro-batch.
        """
        return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()
