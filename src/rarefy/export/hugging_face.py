"""Models as folders that Hugging Face's `from_pretrained` reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.decoder.decoder_config import GPTConfig
from rarefy.errors import RarefyError
from rarefy.export.job import Fill, Job
from rarefy.export.llama_folder import is_llama, llama_of
from rarefy.models.gpt import GPTModel
from rarefy.models.hugging_face import HuggingFaceCausalModel, HuggingFaceModel

GPT2_VOCABULARY = 50257
GPT2_LAST_TOKEN = 50256


class ExportError(RarefyError):
    """A model without a counterpart in Transformers."""

    def __init__(self, given: str) -> None:
        super().__init__(f"--to hf: {given} is not allowed; give a model without it, or use --to safetensors")


def hugging_face(job: Job) -> Fill:
    """A folder that `save_pretrained` writes; the built-in decoder becomes a GPT-2, Llama or Mistral.

    Raises:
        RarefyError: the model is no Hugging Face model and has no counterpart there.
    """
    model: Any = _counterpart(job.model())

    def save(path: Path) -> None:
        with _without_progress_bars():
            model.save_pretrained(path)

    return save


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _counterpart(model: nn.Module) -> nn.Module:
    if isinstance(model, GPTModel):
        _need_transformers()
        return llama_of(model) if is_llama(model.config) else gpt2_of(model)
    inner: Any = model.model if isinstance(model, HuggingFaceCausalModel | HuggingFaceModel) else model
    if isinstance(model, HuggingFaceCausalModel):
        inner.config.use_cache = True
    if hasattr(inner, "save_pretrained"):
        return inner
    kinds = "a model of Transformers, or the built-in gpt2 or gpt3"
    raise RarefyError(
        f"--to hf: {type(model).__name__} is not allowed; give {kinds}, or use --to safetensors"
    )


def _need_transformers() -> None:
    try:
        import transformers  # pyright: ignore[reportMissingImports] # noqa: F401
    except ImportError as error:
        raise RarefyError("--to hf needs transformers: pip install 'rarefy[transformers]'") from error


def gpt2_of(model: GPTModel) -> nn.Module:
    """The same function as a `GPT2LMHeadModel` of Transformers.

    Args:
        model: dense; its projections may lack biases, which become zeros.

    Returns:
        The model in eval mode.

    Raises:
        RarefyError: Transformers is not installed, or the model has something that GPT-2 has not.
    """
    _check_counterpart(model.config)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RarefyError("--to hf needs transformers: pip install 'rarefy[transformers]'") from error
    converted = GPT2LMHeadModel(GPT2Config(**_gpt2_options(model.config)))
    converted.load_state_dict(_gpt2_state(model))
    return converted.eval()


# What GPT-2 has of the keys that change what is computed.
_OF_GPT2: Mapping[str, Any] = MappingProxyType(
    {
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "nonlinearity": "gelu",
        "embedding_layer_norm": False,
        "norm_first_sandwich": False,
        "attention_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_sliding_window_length": None,
        "attention_inner_dim": None,
        "embeddings_scale": 1.0,
        "scale_qk_dot_by_layer_idx": False,
    }
)


def _check_counterpart(config: GPTConfig) -> None:
    for key, value in _OF_GPT2.items():
        given = getattr(config, key)
        if given != value:
            raise ExportError(f"{key}: {given}")
    is_plain = config.logits_scale == 1.0 and math.isclose(config.score_scale, config.head_size**-0.5)
    if not is_plain or config.is_parallel or config.moe.is_on or config.key_heads != config.num_heads:
        raise ExportError("a decoder that GPT-2 cannot express")
    if config.use_bias_in_output:
        raise ExportError("use_bias_in_output: true (the output layer of GPT-2 has no bias)")


def _gpt2_options(config: GPTConfig) -> dict[str, Any]:
    embedding_rate = config.embedding_dropout_rate
    last = GPT2_LAST_TOKEN if config.vocab_size == GPT2_VOCABULARY else None
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_heads,
        "n_inner": config.filter_size,
        "activation_function": "gelu",
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.dropout_rate if embedding_rate is None else embedding_rate,
        "attn_pdrop": config.attention_dropout_rate,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "tie_word_embeddings": config.share_embedding_weights,
        "bos_token_id": last,
        "eos_token_id": last,
    }


def _gpt2_state(model: GPTModel) -> dict[str, Tensor]:
    state, embedding = model.model.state_dict(), "embedding_layer"
    converted = {
        "transformer.wte.weight": state[f"{embedding}.word_embeddings.weight"],
        "transformer.wpe.weight": state[f"{embedding}.position_embeddings.embed.weight"],
        "lm_head.weight": state["lm_head.weight"],
        **_moved(state, "ln_f", "transformer.ln_f"),
    }
    for index in range(model.config.num_hidden_layers):
        here, there = f"transformer_decoder.layers.{index}", f"transformer.h.{index}"
        query_key_value = [f"{here}.self_attn.proj_{name}_dense_layer" for name in "qkv"]
        converted |= _moved(state, f"{here}.norm1", f"{there}.ln_1")
        converted |= _moved(state, f"{here}.norm3", f"{there}.ln_2")
        converted |= _transposed(state, query_key_value, f"{there}.attn.c_attn")
        converted |= _transposed(state, [f"{here}.self_attn.proj_output_dense_layer"], f"{there}.attn.c_proj")
        converted |= _transposed(state, [f"{here}.ffn.ffn.0.linear_layer"], f"{there}.mlp.c_fc")
        converted |= _transposed(state, [f"{here}.ffn.ffn.1.linear_layer"], f"{there}.mlp.c_proj")
    return converted


def _moved(state: Mapping[str, Tensor], here: str, there: str) -> dict[str, Tensor]:
    return {f"{there}.{leaf}": state[f"{here}.{leaf}"] for leaf in ("weight", "bias")}


def _transposed(state: Mapping[str, Tensor], layers: list[str], there: str) -> dict[str, Tensor]:
    """Linear layers beside each other as one `Conv1D`, whose weight is [in, out]; missing biases are zeros."""
    weights = [state[f"{layer}.weight"] for layer in layers]
    biases = [
        state.get(f"{layer}.bias", weight.new_zeros(len(weight)))
        for layer, weight in zip(layers, weights, strict=True)
    ]
    return {f"{there}.weight": torch.cat(weights).t().contiguous(), f"{there}.bias": torch.cat(biases)}
