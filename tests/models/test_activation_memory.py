"""The estimate of activations against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.models import GPTModel, build_model

SIZES: dict[str, Any] = {
    "name": "gpt2",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "filter_size": 128,
    "max_position_embeddings": 128,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}
LLAMA = {
    "position_embedding_type": "rotary",
    "rotary_dim": 8,
    "norm_type": "rmsnorm",
    "nonlinearity": "swiglu",
}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"dropout_rate": 0.1, "attention_dropout_rate": 0.1},
        LLAMA,
        {**LLAMA, "attention_logit_softcapping": 50.0, "norm_first_sandwich": True},
        {**LLAMA, "moe": {"num_experts": 4, "top_k": 2}},
        {"position_embedding_type": "alibi"},
        {"name": "gptj", "rotary_dim": 8},
    ],
)
def test_what_is_kept_for_the_backward_pass(keys: dict[str, Any]) -> None:
    model = build_model({**SIZES, **keys}).train()
    assert isinstance(model, GPTModel)
    ids = torch.zeros(3, 100, dtype=torch.int64)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model({"input_ids": ids, "labels": ids})
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # Of the four copies of the logits that the estimate counts, autograd keeps one.
    estimate = model.activation_bytes(3, 100) - 3 * (3 * 100 * 128 * 4)
    assert 0.7 < estimate / found < 1.3
