"""Weights that are cut in pieces in a way that is not `fully_shard` with masked storage are refused in one line."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import rarefy
from foreign.networks import RIGL, STATIC, loss_of, network
from ranks import NEEDS_FULLY_SHARD
from rarefy.errors import ConfigError, RarefyError

pytestmark = [pytest.mark.filterwarnings("ignore"), NEEDS_FULLY_SHARD]


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_fully_shard(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def by_flat_parameters(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def by_flat_parameters_that_are_hidden(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WAYS = [by_flat_parameters, by_flat_parameters_that_are_hidden]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_before(way, compute):
    sparsity = rarefy.configure({**RIGL, "compute": compute})
    with pytest.raises(
        ConfigError, match=r"apply: a model whose .* \(as .* makes? it\).*DistributedDataParallel"
    ):
        sparsity.apply(way(network()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [STATIC, RIGL])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_after(way, block, compute):
    model = network()
    sparsity = rarefy.configure({**block, "compute": compute})
    sparsity.apply(model)
    wrapped = way(model)
    with pytest.raises(RarefyError, match=r"weight of a Linear .*wrap the model in DistributedDataParallel"):
        sparsity.apply(torch.optim.SGD(wrapped.parameters(), lr=0.1))


def test_compact_storage_before():
    with pytest.raises(ConfigError, match=r"compute: compact for 0.weight \(fully_shard cuts it in pieces\)"):
        rarefy.configure({**RIGL, "compute": "compact"}).apply(by_fully_shard(network()))


def test_compact_storage_after():
    model = network()
    sparsity = rarefy.configure({**STATIC, "compute": "compact"})
    sparsity.apply(model)
    by_fully_shard(model)
    with pytest.raises(
        RarefyError, match=r"weight of a Linear has compact storage, which fully_shard cannot"
    ):
        sparsity.apply(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_after_the_optimizer_was_followed(compute):
    model = network()
    sparsity = rarefy.configure({**STATIC, "compute": compute})
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    by_fully_shard(model)
    with pytest.raises(RarefyError, match=r"weight of a Linear .* fully_shard|fsdp.* set compute: masked"):
        loss_of(model).backward()
        optimizer.step()


def test_a_plain_layer_among_sharded_ones_is_whole():
    """The question is put to each weight."""
    model = nn.ModuleDict({"sharded": nn.Linear(4, 4), "whole": network()})
    by_fully_shard(model["sharded"])
    sparsity = rarefy.configure({**STATIC, "compute": "masked", "param_filter": "whole.*weight"})
    sparsity.apply(model)
    assert sorted(sparsity.parameters) == ["whole.0.weight", "whole.2.weight"]


def test_first_masks_from_data_need_whole_weights():
    method = {"name": "snip", "batches": [torch.ones(2, 8)], "loss": lambda model, x: model(x).sum()}
    with pytest.raises(
        RarefyError, match=r"init_method snip cannot measure 0.weight, which is sharded; apply the"
    ):
        rarefy.configure({**STATIC, "init_method": method}).apply(by_fully_shard(network()))
