"""Small decoders of every architecture, with the class of Transformers that computes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rarefy.models import GPTModel, build_model

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "filter_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
_NO_BIAS = {
    "use_projection_bias_in_attention": False,
    "use_ffn_bias_in_attention": False,
    "use_ffn_bias": False,
}
_TWO_GROUPS = {"attention_module": "multiquery_attention", "extra_attention_params": {"num_kv_groups": 2}}
_ONE_GROUP = {"attention_module": "multiquery_attention", "extra_attention_params": {"num_kv_groups": 1}}
MUP = {
    "mup_base_hidden_size": 16,
    "mup_base_filter_size": 8,
    "embeddings_scale": 3.0,
    "output_logits_alpha": 2.0,
    "attention_logits_alpha": 1.5,
}
LLAMA = {
    "name": "llama",
    **_SIZES,
    **_NO_BIAS,
    **_TWO_GROUPS,
    "position_embedding_type": "rotary",
    "rotary_dim": 8,
    "norm_type": "rmsnorm",
    "nonlinearity": "swiglu",
    "share_embedding_weights": False,
}
MISTRAL = {**LLAMA, "name": "mistral", "attention_sliding_window_length": 5}
MIXTRAL = {**LLAMA, "name": "mixtral", "moe": {"num_experts": 4, "top_k": 2}}
GEMMA2 = {
    **LLAMA,
    "name": "gemma2",
    "share_embedding_weights": True,
    "nonlinearity": "geglu",
    "norm_first_sandwich": True,
    "attention_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "attention_sliding_window_length": 5,
    "sliding_window_every_other_decoder_layer": True,
    "embeddings_scale": 5.0,
}
GPTJ = {
    "name": "gptj",
    **_SIZES,
    "rotary_dim": 4,
    "use_projection_bias_in_attention": False,
    "use_ffn_bias_in_attention": False,
    "use_bias_in_output": True,
}
FALCON = {"name": "falcon", **_SIZES, **_NO_BIAS, **_ONE_GROUP, "rotary_dim": 8}
BLOOM = {
    "name": "bloom",
    **_SIZES,
    "filter_size": 128,
    "position_embedding_type": "alibi",
    "embedding_layer_norm": True,
    "nonlinearity": "gelu_new",
}
GPT2 = {"name": "gpt2", **_SIZES}
STARCODER = {"name": "starcoder", **_SIZES, **_ONE_GROUP}

_LLAMA3 = {
    "rope_theta": 500000.0,
    "pos_scaling_type": "llama3",
    "pos_scaling_factor": 8.0,
    "pos_scaling_extra_args": {"original_max_position_embeddings": 16},
}
_YARN = {
    "pos_scaling_type": "yarn",
    "pos_scaling_factor": 4.0,
    "pos_scaling_extra_args": {"original_max_position_embeddings": 8},
}
# What a decoder is called in a test, its keys, and its class in Transformers.
DECODERS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (LLAMA, "LlamaForCausalLM"),
    "llama_halves": ({**LLAMA, "rotary_pairs": "halves"}, "LlamaForCausalLM"),
    "llama_llama3": ({**LLAMA, **_LLAMA3}, "LlamaForCausalLM"),
    "llama_yarn": ({**LLAMA, **_YARN}, "LlamaForCausalLM"),
    "llama_linear": (
        {**LLAMA, "pos_scaling_factor": 2.0, "share_embedding_weights": True},
        "LlamaForCausalLM",
    ),
    "llama_wide_heads": ({**LLAMA, "attention_inner_dim": 64, "rotary_dim": 16}, "LlamaForCausalLM"),
    "llama_biases": (
        {**LLAMA, "use_projection_bias_in_attention": True, "use_ffn_bias": True, "nonlinearity": "reglu"},
        "LlamaForCausalLM",
    ),
    "llama_mup": ({**LLAMA, **MUP}, "LlamaForCausalLM"),
    "llama_mup_tied": ({**LLAMA, **MUP, "share_embedding_weights": True}, "LlamaForCausalLM"),
    "mistral": (MISTRAL, "MistralForCausalLM"),
    "mixtral": (MIXTRAL, "MixtralForCausalLM"),
    "mixtral_fused": (
        {**MIXTRAL, "moe": {"num_experts": 3, "top_k": 1, "moe_implementation": "optimized"}},
        "MixtralForCausalLM",
    ),
    "mixtral_functional": (
        {
            **MIXTRAL,
            "moe": {"num_experts": 4, "top_k": 2, "moe_implementation": "functional"},
            "attention_sliding_window_length": 5,
        },
        "MixtralForCausalLM",
    ),
    "gemma2": (GEMMA2, "Gemma2ForCausalLM"),
    "gemma2_without_windows": (
        {
            **LLAMA,
            "name": "gemma2",
            "nonlinearity": "geglu_new",
            "norm_first_sandwich": True,
            "embeddings_scale": 5.0,
        },
        "Gemma2ForCausalLM",
    ),
    "gptj": (GPTJ, "GPTJForCausalLM"),
    "gptj_mup": (
        {**GPTJ, **MUP, "use_ffn_bias": True, "share_embedding_weights": False, "nonlinearity": "gelu_new"},
        "GPTJForCausalLM",
    ),
    "falcon": (FALCON, "FalconForCausalLM"),
    "falcon_grouped": (
        {**FALCON, **_TWO_GROUPS, **MUP, "use_untied_layer_norm": True},
        "FalconForCausalLM",
    ),
    "falcon_all_heads": (
        {
            **GPTJ,
            "name": "falcon",
            "rotary_dim": 8,
            "rope_theta": 500.0,
            "use_bias_in_output": False,
            "use_projection_bias_in_attention": True,
            "nonlinearity": "squared_relu",
        },
        "FalconForCausalLM",
    ),
    "bloom": (BLOOM, "BloomForCausalLM"),
    "bloom_scaled": (
        {
            **BLOOM,
            "embeddings_scale": 2.0,
            "output_logits_scale": 0.5,
            "use_projection_bias_in_attention": False,
        },
        "BloomForCausalLM",
    ),
    "gpt2": (GPT2, "GPT2LMHeadModel"),
    "gpt2_mup": ({**GPT2, **MUP}, "GPT2LMHeadModel"),
    "gpt2_by_layer": (
        {**GPT2, "norm_type": "biasless-layernorm", "scale_qk_dot_by_layer_idx": True, "use_ffn_bias": False},
        "GPT2LMHeadModel",
    ),
    "gpt2_bare_norms": (
        {**GPT2, "norm_type": "nonparametric-layernorm", "share_embedding_weights": False},
        "GPT2LMHeadModel",
    ),
    "starcoder": (STARCODER, "GPTBigCodeForCausalLM"),
    "santacoder_mup": (
        {**STARCODER, **MUP, "name": "santacoder", "nonlinearity": "gelu_new"},
        "GPTBigCodeForCausalLM",
    ),
}


def small_decoder(name: str) -> GPTModel:
    """A decoder of `DECODERS` in eval mode, all of whose parameters are random, biases and norms too."""
    torch.manual_seed(0)
    model = build_model(DECODERS[name][0])
    assert isinstance(model, GPTModel)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter.data)
    return model.eval()
