"""The normalisation layers by their Model Zoo names."""

from __future__ import annotations

from torch import nn

from rarefy.models.decoder.decoder_config import GPTConfig


def norm(config: GPTConfig) -> nn.Module:
    """A normalisation of hidden states as the config names it.

    Example:
        >>> norm(GPTConfig(norm_type="rmsnorm", hidden_size=8, num_heads=2))
        RMSNorm((8,), eps=1e-05, elementwise_affine=True)

    Reference:
        Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467 (rmsnorm).
    """
    size = config.hidden_size
    epsilon = config.layer_norm_epsilon
    if config.norm_type == "rmsnorm":
        return nn.RMSNorm(size, epsilon)
    if config.norm_type == "biasless-layernorm":
        return nn.LayerNorm(size, epsilon, bias=False)
    return nn.LayerNorm(size, epsilon, elementwise_affine=config.norm_type == "layernorm")
