"""Forward pass at 90% against dense: single layers for 1, 8, 32 and 512 tokens, the 12-layer GPT for 1 and 512."""

from __future__ import annotations

from functools import partial

import torch
from gpt_setup import batch_of, gpt_trainer, step_of
from interleave import medians
from torch import nn

from rarefy.kernels import native
from rarefy.nn import SparseLinear

SHAPES, TOKENS, SPARSITY = [(768, 768), (3072, 768), (4096, 4096)], (1, 8, 32, 512), 0.9


def layers() -> None:
    """Also without the module and the checks around the kernel."""
    for rows, columns in SHAPES:
        dense = nn.Linear(columns, rows)
        sparse = SparseLinear.from_linear(dense, torch.rand(rows, columns) >= SPARSITY)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns)
            index = native.index_for(x)
            assert index is not None, "the compiled kernels are missing"
            entries, layout = sparse.weight.entries, sparse.weight.topology.layout
            assert layout is not None, "single connections have a layout"
            kernel = partial(native.forward, index, x, entries, sparse.bias, layout)
            with torch.inference_mode():
                seconds = medians(
                    {"dense": partial(dense, x), "layer": partial(sparse, x), "kernel": kernel}, 60
                )
            layer, alone = (seconds["dense"] / seconds[name] for name in ("layer", "kernel"))
            print(
                f"[{rows},{columns}] x {tokens}: {layer:.1f} times faster, its kernel {alone:.1f}", flush=True
            )


def gpt() -> None:
    """Its weights do not fit into a cache, so that a lone token waits for them."""
    trainers = {"dense": gpt_trainer(None), "sparse": gpt_trainer(SPARSITY)}
    for trainer in trainers.values():
        step_of(trainer, batch_of(0, 4, 512))
        trainer.model.eval()
    for tokens in (1, 512):
        ids = torch.randint(0, 256, (1, tokens))
        with torch.inference_mode():
            seconds = medians(
                {name: partial(t.model.get_submodule("model"), ids) for name, t in trainers.items()}, 30
            )
        print(f"GPT x {tokens}: {seconds['dense'] / seconds['sparse']:.1f} times faster", flush=True)


def main() -> None:
    torch.manual_seed(0)
    layers()
    gpt()


if __name__ == "__main__":
    main()
