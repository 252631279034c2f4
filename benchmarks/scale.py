"""What a sparse run exchanges, holds and stores in each process, by formulas, and the formulas against small runs.

    python benchmarks/scale.py            # the tables of docs/scale.md, computed
    python benchmarks/scale.py --check    # two processes over gloo, and what the formulas say of them

Everything is in bytes. S are the entries of sparse weights, D those of all others, d the density, N the processes, w
the bytes of a number. A collective counts with the tensor that a process gives into it, or gets out of a gathering.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint_size
import torch
import torch.distributed as dist
from ddp_traffic import network_of, step_of
from gloo import run_in_processes
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard

import rarefy
from rarefy.distributed import merged

RANKS, WIDTH, DEPTH = 2, 512, 4
DIGIT_BYTES = 2048 * 8
"""Counts of one digit of the scores, which an exact choice over pieces adds up (`rarefy.distributed.highest`)."""
DIGITS, SUMS = 6, 11.5
"""For each weight that RigL updates: sums of counts (three digits of float32 to drop, three to grow; more where scores
tie at the border), and sums of all kinds, most of a few bytes; both measured."""
INDEX_BYTES = 8.3
"""Of compact storage for each active connection, measured at 90%."""
LINK, LATENCY = 50e9, 20e-6
"""Assumed of a network: bytes a second of each process, and seconds of the slowest hop."""


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder.

    Args:
        sparse: S.
        dense: D.
        weights: how many sparse weights.
        block: entries of the largest part that fsdp2 gathers at once.
    """

    sparse: int
    dense: int
    weights: int
    block: int

    @classmethod
    def llama(cls, vocabulary: int, width: int, layers: int, filters: int, keys: int) -> Model:
        """A decoder whose linear layers are sparse, and whose embedding, head and norms are dense.

        `keys` is the width of keys and of values, less than `width` with grouped queries.
        """
        block = 2 * width * width + 2 * width * keys + 3 * width * filters
        outside = 2 * vocabulary * width + width
        return cls(layers * block, outside + 2 * layers * width, 7 * layers, max(block, outside))


# arXiv:2307.09288 and its published configurations.
MODELS = {
    "7B": Model.llama(32_000, 4096, 32, 11_008, 4096),
    "70B": Model.llama(32_000, 8192, 80, 28_672, 1024),
}


# ---- formulas ----


def exchanged_by_ddp(model: Model, density: float, w: int = 4) -> float:
    """All-reduced in an ordinary step: w(dS + D), and a number a sparse weight: whether it has a gradient."""
    return w * (density * model.sparse + model.dense + model.weights)


def exchanged_before_update(model: Model, density: float, w: int = 4) -> float:
    """The same in the step before an update of RigL, with its dense gradients: w(dS + S + D).

    Up to 8 processes need less, which depends on their gradients (`merged_gradients.py`).
    """
    return exchanged_by_ddp(model, density, w) + w * model.sparse


def exchanged_by_fsdp2(model: Model, w: int = 4) -> float:
    """Gathered for the forward and the backward pass, and scattered once, whatever the density: 3w(S + D)."""
    return 3 * w * (model.sparse + model.dense)


def held_by_ddp(model: Model, density: float | None, index: float = 0, w: int = 4) -> float:
    """Weight, gradient and two moments: masked 4w(S + D) + S, compact 4w(dS + D) + the indices.

    Density None is masked storage; `index` are bytes for each active connection.
    """
    if density is None:
        return 4 * w * (model.sparse + model.dense) + model.sparse
    return 4 * w * (density * model.sparse + model.dense) + index * density * model.sparse


def held_by_fsdp2(model: Model, ranks: int, w: int = 4) -> float:
    """A piece of what masked storage holds, and two parts of the model that are gathered: one in use, one to come."""
    return held_by_ddp(model, None, w=w) / ranks + 2 * w * model.block


def stored(model: Model, density: float, w: int = 4) -> float:
    """A checkpoint with two moments: 3w(dS + D), and a bit a position in each of two files."""
    return 3 * w * (density * model.sparse + model.dense) + model.sparse / 4


def update_of_rigl_by_ddp(model: Model, ranks: int, w: int = 4) -> float:
    """Seconds on the network of a ring: 2(N − 1)/N · wS / B; ranking is done by each process, without exchange."""
    return 2 * (ranks - 1) / ranks * w * model.sparse / LINK


def update_by_fsdp2(model: Model, ranks: int) -> float:
    """Seconds on the network: each sum takes 2 log2 N hops in a tree, and the bytes of counts go twice."""
    hops = 2 * (ranks - 1).bit_length()
    return model.weights * (SUMS * hops * LATENCY + DIGITS * 2 * DIGIT_BYTES / LINK)


# ---- the tables of docs/scale.md ----


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def table(density: float = 0.1, ranks: int = 64) -> Iterator[str]:
    """Rows of Markdown."""
    yield "| in each process, float32, 90% | " + " | ".join(MODELS) + " |"
    yield "|---|" + "---|" * len(MODELS)
    rows = {
        "sparse / dense entries": lambda m: f"{m.sparse / 1e9:.2f} / {m.dense / 1e9:.2f} billion",
        "`ddp`, dense model: exchanged a step": lambda m: gigabytes(exchanged_by_ddp(m, 1.0)),
        "`ddp`: exchanged a step": lambda m: gigabytes(exchanged_by_ddp(m, density)),
        "`ddp`, more than 8 processes: exchanged in the step before an update of RigL": lambda m: gigabytes(
            exchanged_before_update(m, density)
        ),
        "`fsdp2`: exchanged a step, dense or sparse": lambda m: gigabytes(exchanged_by_fsdp2(m)),
        "`ddp`, masked: held": lambda m: gigabytes(held_by_ddp(m, None)),
        "`ddp`, compact: held": lambda m: gigabytes(held_by_ddp(m, density, INDEX_BYTES)),
        f"`fsdp2`, {ranks} processes: held": lambda m: gigabytes(held_by_fsdp2(m, ranks)),
        "checkpoint of the dense model": lambda m: gigabytes(3 * 4 * (m.sparse + m.dense)),
        "checkpoint": lambda m: gigabytes(stored(m, density)),
        "update of RigL, `ddp`, 1,024 processes": lambda m: f"{update_of_rigl_by_ddp(m, 1024):.2f} s",
        "update of RigL, `fsdp2`, 1,024 processes": lambda m: f"{update_by_fsdp2(m, 1024):.2f} s",
    }
    for name, cell in rows.items():
        yield f"| {name} | " + " | ".join(cell(model) for model in MODELS.values()) + " |"


# ---- small runs ----


GATHERINGS = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")


class Counting:
    """Counts the bytes of collectives from now on, and the calls of `all_reduce`."""

    def __init__(self) -> None:
        self.bytes = 0
        self.sums = 0
        for name in ("all_reduce", *GATHERINGS):
            # Their names differ between versions of torch.
            if hasattr(dist, name):
                setattr(dist, name, self._counting(getattr(dist, name), name))

    def _counting(self, original: Any, name: str) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            # The whole tensor, of which each process has a piece: the larger of input and output.
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            tensor = max(given, key=torch.Tensor.numel)
            self.bytes += tensor.numel() * tensor.element_size()
            self.sums += name == "all_reduce"
            return original(*args, **kwargs)

        return counted

    def take(self) -> tuple[int, int]:
        """Bytes and sums since the last time."""
        found = self.bytes, self.sums
        self.bytes = 0
        self.sums = 0
        return found


def held(optimizer: torch.optim.Optimizer, sparsity: Any) -> tuple[float, float]:
    """Bytes of weights, gradients, moments and indices; and index bytes for each active connection."""
    one = next(iter(sparsity.parameters.values())).storage
    indices = sum(each.storage.index_bytes for each in sparsity.parameters.values())
    entries = sum(each.storage.entries.numel() for each in sparsity.parameters.values())
    biases = [p for group in optimizer.param_groups for p in group["params"] if p.dim() == 1]
    total = 4 * 4 * (entries + sum(bias.numel() for bias in biases)) + indices
    return total, indices / entries if one.kind == "compact" else 0.0


def small() -> tuple[nn.Sequential, Model]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    return model, Model(DEPTH * WIDTH * WIDTH, DEPTH * WIDTH, DEPTH, WIDTH * WIDTH)


def of_ddp(counting: Counting, rank: int) -> Iterator[tuple[str, float, float]]:
    """What was counted, and what the formulas say."""
    model, sizes = small()
    for name, block, expected in (
        ("an ordinary step, dense", None, 4 * (sizes.sparse + sizes.dense)),
        ("an ordinary step", {"algorithm": "rigl", "update": {"steps": [0]}}, exchanged_by_ddp(sizes, 0.1)),
        (
            "a step before an update",
            {"algorithm": "rigl", "update": {"freq": 1}},
            exchanged_before_update(sizes, 0.1),
        ),
    ):
        network, optimizer = network_of(copy.deepcopy(model), block and {**block, "compute": "compact"})
        network.register_comm_hook(None, allreduce_hook)
        step = step_of(network, optimizer, rank, WIDTH, 8)
        step()
        counting.take()
        step()
        yield f"ddp: bytes of {name}", counting.take()[0], expected


def of_fsdp2(counting: Counting, rank: int) -> Iterator[tuple[str, float, float]]:
    """The same for `fully_shard`; how many sums an update takes is measured alone."""
    for freq, name in ((None, "an ordinary step"), (1, "a step with an update")):
        model, sizes = small()
        sparsity = rarefy.configure(
            {
                "algorithm": "rigl",
                "sparsity": 0.9,
                "seed": 1,
                "compute": "masked",
                "update": {"freq": freq} if freq else {"steps": [0]},
            }
        )
        sparsity.apply(model)
        for layer in model:
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        sparsity.apply(optimizer)
        step = step_of(model, optimizer, rank, WIDTH, 8)
        step()
        counting.take()
        step()
        found, sums = counting.take()
        counts = DIGITS * DIGIT_BYTES * sizes.weights if freq else 0
        yield f"fsdp2: bytes of {name}", found, exchanged_by_fsdp2(sizes) + counts
        if freq:
            yield "fsdp2: sums for each weight in an update", sums / sizes.weights, SUMS


def of_memory() -> Iterator[tuple[str, float, float]]:
    for compute in ("masked", "compact"):
        model, sizes = small()
        sparsity = rarefy.configure({"sparsity": 0.9, "seed": 1, "compute": compute})
        sparsity.apply(model)
        optimizer = torch.optim.AdamW(model.parameters())
        sparsity.apply(optimizer)
        total, index = held(optimizer, sparsity)
        expected = held_by_ddp(sizes, None if compute == "masked" else 0.1, INDEX_BYTES)
        yield f"held, {compute}", total, expected
        if index:
            yield "index bytes for each active connection", index, INDEX_BYTES
    for sparsity in (0.9, 0.8):
        _, everything = checkpoint_size.sizes(WIDTH, sparsity, "masked", rarefy.Static)
        size = Model(4 * WIDTH * WIDTH, 0, 4, 0)
        yield f"a checkpoint at {sparsity:.0%}", everything, stored(size, 1 - sparsity)


def work(rank: int, folder: str) -> None:
    # As more processes than merge their gradients.
    merged.MOST = 1
    counting = Counting()
    rows = [*of_ddp(counting, rank), *of_fsdp2(counting, rank)]
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")


def checked() -> list[tuple[str, float, float]]:
    """What was measured of small runs, beside what the formulas say of them."""
    with tempfile.TemporaryDirectory() as folder:
        run_in_processes(RANKS, work, folder)
        rows = torch.load(Path(folder) / "rows.pt", weights_only=True)
    return [*rows, *of_memory()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure small runs")
    if not parser.parse_args().check:
        print("\n".join(table()))
        return
    print("| of 4 layers of 512, two processes | measured | formula | ratio |\n|---|---|---|---|")
    for name, found, expected in checked():
        print(f"| {name} | {found:,.7g} | {expected:,.7g} | {found / expected:.3f} |")


if __name__ == "__main__":
    main()
