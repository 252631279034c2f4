"""Forward pass of `SparseLinear` at 90% against `nn.Linear`, for 1, 8, 32 and 512 tokens."""

from __future__ import annotations

from functools import partial

import torch
from interleave import medians
from torch import nn

from rarefy.nn import SparseLinear

SHAPES, TOKENS, SPARSITY = [(768, 768), (3072, 768), (4096, 4096)], (1, 8, 32, 512), 0.9


def main() -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        dense = nn.Linear(columns, rows)
        sparse = SparseLinear.from_linear(dense, torch.rand(rows, columns) >= SPARSITY)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns)
            with torch.inference_mode():
                seconds = medians({"dense": partial(dense, x), "sparse": partial(sparse, x)}, 60)
            print(
                f"[{rows},{columns}] x {tokens}: {seconds['dense'] / seconds['sparse']:.1f} times faster",
                flush=True,
            )


if __name__ == "__main__":
    main()
