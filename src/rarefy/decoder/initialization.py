"""Draws the weights of a decoder, scaled for muP where the config asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from rarefy.decoder.decoder_config import GPTConfig
from rarefy.decoder.experts import FusedLinear
from rarefy.decoder.weight_initializer import InitializerConfig


@dataclass(frozen=True)
class Initializers:
    """The distribution of each kind of weight.

    Args:
        embedding: of tokens and positions.
        attention: queries, keys and values, and what is named nowhere else.
        attention_output: the projection after attention.
        ffn: the wide layers.
        ffn_output: the layers back to the hidden size.
        gate: the router of experts.
        head: the projection to the vocabulary where it has weights of its own.
    """

    embedding: InitializerConfig
    attention: InitializerConfig
    attention_output: InitializerConfig
    ffn: InitializerConfig
    ffn_output: InitializerConfig
    gate: InitializerConfig
    head: InitializerConfig

    @classmethod
    def of(cls, config: GPTConfig) -> Initializers:
        """What a config says, or a spread of `initializer_range`; projections back to the residual stream get less.

        Example:
            >>> round(Initializers.of(GPTConfig()).ffn_output.std * math.sqrt(24), 6)
            0.02
        """
        default = InitializerConfig(std=config.initializer_range)
        depth = math.sqrt(2 * config.num_hidden_layers)
        width = math.sqrt(config.hidden_width)
        attention = config.initializer or default
        output = config.output_layer_initializer or default
        ffn = config.ffn_initializer or (output if config.is_parallel else attention)
        ffn_output = config.ffn_output_layer_initializer or output
        is_mup = config.mup_base_hidden_size is not None
        if is_mup:
            ffn_output = config.ffn_output_layer_initializer or default
        # Depth divides what the file does not give, and everything under muP; in gptj and falcon nothing else.
        is_given = config.output_layer_initializer is not None
        divides_output = is_mup or not (config.is_parallel or is_given)
        is_given |= config.ffn_output_layer_initializer is not None
        divides_ffn = is_mup or not (config.is_parallel or is_given)
        return cls(
            embedding=config.embedding_initializer or default,
            attention=attention.divided(width),
            attention_output=output.divided((depth if divides_output else 1.0) * width),
            ffn=ffn.divided(width),
            ffn_output=ffn_output.divided((depth if divides_ffn else 1.0) * math.sqrt(config.filter_width)),
            gate=config.initializer or config.moe.gate_initializer or default,
            head=attention,
        )

    def for_layer(self, name: str) -> InitializerConfig:
        """The distribution of a linear layer by its name."""
        if name == "lm_head":
            return self.head
        if name.endswith(".gate"):
            return self.gate
        if name.endswith("proj_output_dense_layer"):
            return self.attention_output
        if ".ffn." in name:
            # In every layout of experts too, the number before the last part is 0 in the wide layer, 1 in the one back.
            return self.ffn_output if name.split(".")[-2] == "1" else self.ffn
        return self.attention


def initialize(decoder: nn.Module, config: GPTConfig) -> None:
    """Draws every weight in the order of the modules; biases become 0.

    Args:
        decoder: with the parts of `GPTDecoder`.
        config: that it was built with.
    """
    drawn = Initializers.of(config)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding):
            drawn.embedding.fill_(module.weight)
        elif isinstance(module, nn.Linear | FusedLinear):
            # A tied output layer was drawn as the embedding.
            if name != "lm_head" or not config.share_embedding_weights:
                drawn.for_layer(name).fill_(_weight(module))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _weight(module: Any) -> nn.Parameter:
    return module.expert_weights if isinstance(module, FusedLinear) else module.weight
