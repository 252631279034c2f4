"""Causal attention of a GPT on the CPU, forward and backward, against torch's at once: heads of 64, grouped or not."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from interleave import medians
from torch import Tensor
from torch.nn import functional

from rarefy.decoder.attention import causal_attention

LENGTHS = (64, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def at_once(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2)


def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the decoder layer does it."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
    return causal_attention(query, key, value)


def step(attend: Callable[..., Tensor], heads: list[Tensor], grad: Tensor) -> None:
    mixed = attend(*(head.transpose(1, 2) for head in heads))
    torch.autograd.grad(mixed, heads, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--tokens", type=int, default=2048, help="of all samples together")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--key_heads", type=int, default=12, help="fewer than --heads: grouped queries")
    parser.add_argument(
        "--cpu_time", action="store_true", help="of one thread, for a machine that others use"
    )
    given = parser.parse_args()
    torch.set_num_threads(1 if given.cpu_time else given.threads)
    clock = time.process_time if given.cpu_time else time.perf_counter
    for name in given.dtypes:
        for length in given.lengths:
            samples = max(1, given.tokens // length)
            sizes = [
                (samples, length, number, 64) for number in (given.heads, given.key_heads, given.key_heads)
            ]
            heads = [torch.randn(size, dtype=DTYPES[name], requires_grad=True) for size in sizes]
            run = partial(step, heads=heads, grad=torch.randn(sizes[0], dtype=DTYPES[name]))
            calls = {"at once": partial(run, at_once), "own": partial(run, own)}
            seconds = medians(calls, given.rounds, clock=clock)
            share = seconds["own"] / seconds["at once"]
            print(
                f"{name}, {samples} x {length} tokens: {share:.2f} of the time ({seconds['own']:.4f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
