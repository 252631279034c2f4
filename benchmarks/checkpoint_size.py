"""What a checkpoint of a sparse run takes on the disk: `python benchmarks/checkpoint_size.py`.

Both runs train the same model with AdamW for two steps; what is written, as shares of what the dense run writes.
Limits at 90%: 0.16 for the sparse weights with their masks, 0.2 with the optimizer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import rarefy
from rarefy.checkpoint.directory import CheckpointParts, save


def sizes(
    width: int, sparsity: float, compute: str, algorithm_of: type[rarefy.SparsityAlgorithm] = rarefy.RigL
) -> tuple[int, int]:
    """Bytes of model.safetensors, and of all files."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    algorithm = algorithm_of(sparsity, compute=compute) if sparsity else None
    if algorithm is not None:
        algorithm.apply(model)
        algorithm.apply(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(32, width)).square().mean().backward()
        optimizer.step()
    state = None if algorithm is None else algorithm.state_dict()
    with tempfile.TemporaryDirectory() as root:
        path = save(Path(root), 2, CheckpointParts(model.state_dict(), optimizer.state_dict(), state))
        weights = (path / "model.safetensors").stat().st_size
        return weights, sum(file.stat().st_size for file in path.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    width = parser.parse_args().width
    dense = sizes(width, 0, "masked")
    for compute in ("masked", "compact"):
        for sparsity in (0.5, 0.8, 0.9, 0.95, 0.98):
            weights, everything = sizes(width, sparsity, compute)
            shares = f"weights and masks {weights / dense[0]:.3f}, all files {everything / dense[1]:.3f}"
            print(f"{compute:8}{sparsity:.0%}: {shares} of dense ({dense[1] / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
