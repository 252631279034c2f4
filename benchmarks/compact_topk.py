"""Exact top-k masks of 16.8 million scores against `torch.topk` + scatter; zeroing against `masked_fill_`."""

from __future__ import annotations

import torch
from interleave import medians
from torch import Tensor

from rarefy.kernels import keep_top, zero_inactive_

SIZE, SHARE, ROUNDS = 1 << 24, 0.1, 5


def torch_keep_top(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask


def main() -> None:
    torch.manual_seed(0)
    scores, count = torch.randn(SIZE), int(SIZE * SHARE)
    active = torch.rand(SIZE) < SHARE
    seconds = medians(
        {
            "topk + scatter": lambda: torch_keep_top(scores, count),
            "keep_top": lambda: keep_top(scores, count),
            "keep_top among the active": lambda: keep_top(scores, count // 2, active),
        },
        ROUNDS,
    )
    for name in ("keep_top", "keep_top among the active"):
        print(f"{name}: {seconds['topk + scatter'] / seconds[name]:.1f} times faster than topk + scatter")
    grad, mask = torch.randn(2048, 2048), torch.rand(2048, 2048) < SHARE
    inverse = ~mask
    seconds = medians(
        {
            "masked_fill_": lambda: grad.masked_fill_(inverse, 0),
            "select": lambda: zero_inactive_(grad, mask),
        },
        50,
    )
    print(
        f"zero_inactive_ of 2048²: {seconds['masked_fill_'] / seconds['select']:.1f} times faster than masked_fill_"
    )


if __name__ == "__main__":
    main()
