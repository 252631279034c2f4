"""How much an exact choice of the largest means of dense gradients exchanges, against the mean of all of them.

RigL under `ddp` grows where the mean gradient over all processes is largest (`rarefy.distributed.merged`):

1. each process marks the m inactive entries that are largest in it; the marks are united (a bit an entry, from everyone
   to everyone) and the values of the marked places summed. The m-th largest mean of these is at most that of
   the border.
2. each process marks whatever it has of at least that. A place that nobody marks has a smaller mean. The marks are
   united, and the values of those places summed that are new.

The ratio on each link of a ring is N/32 + marked places / all places for N processes. The other way that is exact sends
lists (value and place) from everyone to everyone, and is given the border for nothing.

A decoder of 4 layers of 128 learns the text of this documentation, 90% of its linear layers inactive. Gradients are
real: of N processes with batches of their own, at several moments.

    python benchmarks/merged_gradients.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy.models import GPTConfig, GPTModel

SPARSITY, DROP_FRACTION, LENGTH = 0.9, 0.3, 64
CONFIG = GPTConfig(
    vocab_size=256,
    max_position_embeddings=LENGTH,
    hidden_size=128,
    num_heads=4,
    num_hidden_layers=4,
    filter_size=512,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
)
MARK_BITS, NUMBER_BITS, PLACE_BITS = 1, 32, 32


def highest(sizes: Tensor, count: int) -> Tensor:
    """Bool: the `count` largest, and what ties with the last of them."""
    return sizes >= sizes.kthvalue(len(sizes) - count + 1).values


def by_sums(gradients: Sequence[Tensor], count: int) -> float:
    """What is exchanged by sums, for each byte of the whole sum."""
    mean = torch.stack(list(gradients)).mean(0).abs()
    first = torch.stack([highest(one.abs(), count) for one in gradients]).any(0)
    bound = mean[first].kthvalue(int(first.sum()) - count + 1).values
    second = torch.stack([one.abs() >= bound for one in gradients]).any(0)
    return len(gradients) * MARK_BITS / NUMBER_BITS + float((first | second).float().mean())


def by_lists(gradients: Sequence[Tensor], count: int) -> float:
    """The same for lists: a ring carries N − 1 of them over each link, and 2 (N − 1)/N times the whole sum."""
    total = torch.stack(list(gradients)).sum(0)
    border = total.abs()[highest(total.abs(), count)].min()
    listed = [float((one.abs() >= border / len(gradients)).float().mean()) for one in gradients]
    share = sum(listed) / len(listed) * (NUMBER_BITS + PLACE_BITS) / NUMBER_BITS
    return share * len(gradients) / 2


def batch(text: Tensor, rows: int, seed: int) -> dict[str, Tensor]:
    starts = torch.randint(0, len(text) - LENGTH - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}


def dense_gradients(model: nn.Module, sparsity: Any, data: dict[str, Tensor]) -> list[Tensor]:
    """Those of inactive entries, by weight."""
    parameters = list(sparsity.parameters.values())
    # Not accumulated, so that nothing is selected.
    found = torch.autograd.grad(model(data), [one.weight for one in parameters])
    return [dense[~one.mask] for dense, one in zip(found, parameters, strict=True)]


def measure(found: Sequence[list[Tensor]]) -> tuple[float, float]:
    """Both ratios over all weights, of the gradients of some processes."""
    sums = lists = entries = 0.0
    for gradients in zip(*found, strict=True):
        inactive = len(gradients[0])
        count = round(inactive / SPARSITY * (1 - SPARSITY) * DROP_FRACTION)
        sums += inactive * by_sums(gradients, count)
        lists += inactive * by_lists(gradients, count)
        # Today all entries of a weight are summed, active ones too.
        entries += inactive / SPARSITY
    return sums / entries, lists / entries


def trained(text: Tensor, moments: Sequence[int], rows: int) -> Iterator[tuple[int, nn.Module, Any]]:
    """The model after so many steps."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    sparsity = rarefy.configure({"algorithm": "static", "sparsity": SPARSITY, "compute": "masked", "seed": 1})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sparsity.apply(optimizer)
    for step in range(max(moments) + 1):
        if step in moments:
            yield step, model, sparsity
        optimizer.zero_grad()
        model(batch(text, rows, step)).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 60])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="samples in each process")
    args = parser.parse_args()
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    text = torch.tensor(list(b"".join(page.read_bytes() for page in pages)))
    print("| step | samples a process | processes | exchanged | by lists |\n|---|---|---|---|---|")
    for step, model, sparsity in trained(text, args.moments, max(args.rows)):
        for rows in args.rows:
            batches = [batch(text, rows, 1_000_000 + rank) for rank in range(max(args.ranks))]
            found = [dense_gradients(model, sparsity, one) for one in batches]
            for ranks in args.ranks:
                sums, lists = measure(found[:ranks])
                print(f"| {step} | {rows} | {ranks} | {sums:.2f} | {lists:.2f} |", flush=True)


if __name__ == "__main__":
    main()
