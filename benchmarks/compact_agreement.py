"""Masked and compact runs of the same configuration, 200 steps of the 12-layer GPT: do they learn the same?

Prints, for static, GMP, SET and RigL, the share of active connections that both runs have in common at the end, and the
largest relative difference of their losses. Rounding may flip near-ties of a score in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from gpt_setup import CONFIG, batch_of, gpt_trainer, step_of
from torch import Tensor

ALGORITHMS: dict[str, dict[str, Any]] = {
    "static": {"sparsity": 0.9},
    "gmp": {
        "sparsity": {"type": "polynomial", "init": 0.5, "final": 0.9, "start": 0, "stop": 150},
        "update": {"freq": 25},
    },
    "set": {"sparsity": 0.9, "update": {"freq": 25}},
    "rigl": {"sparsity": 0.9, "update": {"freq": 25}},
}


def run(
    block: Mapping[str, Any], steps: int, layers: int, tokens: int
) -> tuple[dict[str, Tensor], list[float]]:
    """The masks at the end, and the loss of every step."""
    config = CONFIG.model_copy(update={"num_hidden_layers": layers})
    trainer = gpt_trainer(block, config=config)
    losses = [step_of(trainer, batch_of(step, 1, tokens)) for step in range(steps)]
    assert trainer.sparsity is not None
    parameters = [one for algorithm in trainer.sparsity.algorithms for one in algorithm.parameters.values()]
    kinds = {parameter.storage.kind for parameter in parameters}
    assert kinds == {block["compute"]}, kinds
    return {parameter.name: parameter.mask for parameter in parameters}, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS))
    arguments = parser.parse_args()
    sizes = arguments.steps, arguments.layers, arguments.tokens
    for name in arguments.algorithms:
        block = {"algorithm": name, **ALGORITHMS[name]}
        (masked, first), (compact, second) = (
            run({**block, "compute": c}, *sizes) for c in ("masked", "compact")
        )
        common = sum(int((mask & compact[key]).sum()) for key, mask in masked.items())
        share = common / sum(int(mask.sum()) for mask in masked.values())
        worst = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
        print(f"{name}: {share:.4%} of the active connections agree, losses within {worst:.1e}", flush=True)


if __name__ == "__main__":
    main()
