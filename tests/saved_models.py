"""Checkpoints of small sparse models, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import rarefy
import tiny_run
from rarefy.checkpoint.directory import CheckpointParts, save
from rarefy.models import build_model

GPT = {
    "name": "gpt2",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "filter_size": 32,
    "max_position_embeddings": 16,
}
GPT2 = {
    "name": "transformers:GPT2LMHeadModel",
    "config": {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    | {"bos_token_id": 0, "eos_token_id": 0},
}
BERT = {
    "name": "transformers:BertForSequenceClassification",
    "config": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"intermediate_size": 32, "max_position_embeddings": 16},
}
TINY = {"name": "./tiny.py:Tiny"}


def checkpoint(root: Path, model: dict[str, Any], sparsity: Any = 0.8, step: int = 6) -> tuple[Path, Any]:
    """A checkpoint of a sparse model beside the file of its run; and the model, in eval mode."""
    root.mkdir(exist_ok=True)
    content = tiny_run.configuration(root, sparsity)
    content["trainer"]["init"]["model"] = model
    tiny_run.write(root, content)
    torch.manual_seed(0)
    made = build_model(model, base_dir=root)
    rarefy.configure(sparsity, seed=1).apply(made)
    for parameter in made.parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter.data)
    parts = CheckpointParts(made.state_dict(), params=content)
    return save(root / "out", step, parts), made.eval()


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 32, (rows, columns), generator=torch.Generator().manual_seed(3))
