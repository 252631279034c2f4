"""`generate()` at batch 1 with a model of Transformers: `rarefy.compact` against the same dense model, in turns."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from interleave import medians

import rarefy
from rarefy.cost.calibration import processor

PROMPT, NEW = 16, 24


def model_of(kind: str, layers: int) -> Any:
    """With random weights: how fast it is does not depend on them."""
    import transformers

    transformers.logging.set_verbosity_error()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers or 12))
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers or 22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def measure(kind: str, layers: int, sparsity: float, rounds: int, clock: Callable[[], float]) -> None:
    torch.manual_seed(0)
    dense = model_of(kind, layers).eval()
    size = sum(weight.numel() for weight in dense.parameters())
    rarefy.Static(sparsity, compute="masked").apply(dense)
    rarefy.finalize(dense)
    sparse = copy.deepcopy(dense)
    chosen = rarefy.compact(sparse)
    ids = torch.randint(0, 30_000, (1, PROMPT))
    same = int((generate(dense, ids) == generate(sparse, ids)).sum()) - PROMPT
    seconds = medians(
        {"dense": partial(generate, dense, ids), "sparse": partial(generate, sparse, ids)}, rounds
    )
    print(
        f"{kind}, {size / 1e6:.0f}M, {sparsity:.0%}: {seconds['dense'] / seconds['sparse']:.2f} times faster "
        f"({NEW / seconds['dense']:.1f} → {NEW / seconds['sparse']:.1f} tokens a second, "
        f"{same} of {NEW} tokens the same, {chosen!r})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu_time", action="store_true", help="for a busy machine, with one thread")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}", flush=True)
    for kind in options.models:
        for sparsity in options.sparsity:
            measure(kind, options.layers, sparsity, options.rounds, clock)


if __name__ == "__main__":
    main()
