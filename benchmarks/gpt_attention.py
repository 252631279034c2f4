"""The GPT's causal attention on the CPU, forward and backward, against torch's: 4 samples, 12 heads of 64."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from interleave import medians
from torch import Tensor
from torch.nn import functional

from rarefy.decoder.attention import causal_attention


def at_once(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def step(attend: Callable[..., Tensor], heads: list[Tensor], grad: Tensor) -> None:
    mixed = attend(*(head.transpose(1, 2) for head in heads))
    torch.autograd.grad(mixed, heads, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for dtype in (torch.float32, torch.bfloat16):
        for length in (256, 512, 1024):
            heads = [torch.randn(4, length, 12, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
            run = partial(step, heads=heads, grad=torch.randn(4, length, 12, 64, dtype=dtype))
            seconds = medians(
                {"at once": partial(run, at_once), "own": partial(run, causal_attention)}, rounds
            )
            share = seconds["own"] / seconds["at once"]
            print(f"{dtype}, {length} tokens: {share:.2f} of the time", flush=True)


if __name__ == "__main__":
    main()
