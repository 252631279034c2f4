"""RigL's dense gradient gradᵀ · x, as a sparse layer multiplies it, against `torch.mm`: float32."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from interleave import medians

from rarefy.kernels import linear_gradients

LAYERS = [(768, 768, 2048), (3072, 768, 2048), (768, 3072, 2048), (4096, 4096, 1024)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for rows, columns, tokens in LAYERS:
        grad, x = torch.randn(tokens, rows), torch.randn(tokens, columns)
        candidates = {
            "torch": partial(torch.mm, grad.t(), x),
            "own": partial(linear_gradients.dense_gradient, grad, x),
        }
        seconds = medians(candidates, rounds)
        share = seconds["own"] / seconds["torch"]
        print(f"[{rows},{columns}] x {tokens}: {share:.2f} of the time of torch's product", flush=True)


if __name__ == "__main__":
    main()
