"""Every key of the decoder, with the Model Zoo's names and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from rarefy.decoder.feed_forward import NONLINEARITIES
from rarefy.decoder.weight_initializer import Finite, Initializer, Positive

Size = Annotated[int, Field(ge=1, description="a whole number ≥ 1")]
Rate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description="a rate from 0 to below 1")]
Switch = Annotated[bool, Field(description="true or false")]
OptionalSize = Annotated[Size | None, Field(description="a whole number ≥ 1, or null")]
OptionalPositive = Annotated[Positive | None, Field(description="a number above 0, or null")]
LossScaling = Literal["num_tokens", "batch_size"]
PositionType = Literal["learned", "fixed", "rotary", "alibi"]
# Which entries of a head turn together: 2i and 2i + 1 as in the Model Zoo, or i and i + d/2 as in most of Transformers.
RotaryPairs = Literal["adjacent", "halves"]
ScalingType = Literal["linear", "yarn", "llama3", "longrope"]
NormType = Literal["layernorm", "rmsnorm", "biasless-layernorm", "nonparametric-layernorm"]
Weighting = Literal["softmax", "sigmoid"]


class MoEConfig(BaseModel):
    """`moe`: a mixture of experts instead of one feed-forward part a layer.

    Example:
        >>> MoEConfig(num_experts=4, top_k=2).is_on, MoEConfig().is_on
        (True, False)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    num_experts: Annotated[int, Field(ge=0, description="a whole number; 0 for no experts")] = 0
    num_shared_experts: OptionalSize = None
    top_k: Size = 1
    load_balancing_loss_coef: Annotated[Finite, Field(ge=0, description="a number ≥ 0")] = 0.0
    null_expert_bias: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="a number ≥ 0, or null")
    ] = 0.0
    moe_implementation: Annotated[
        Literal["functional", "optimized", "experimental", "forge_experimental", "expert_parallel"],
        Field(description="functional, optimized, experimental, forge_experimental or expert_parallel"),
    ] = "experimental"
    router_use_bias: Switch | None = False
    router_fp32: Switch = True
    routing_algorithm: Annotated[
        Literal["learned", "hash", "uniform"], Field(description="learned, hash or uniform")
    ] = "learned"
    router_selection_nonlinearity: Annotated[Weighting | None, Field(description="softmax or sigmoid")] = (
        "softmax"
    )
    expert_weighting_nonlinearity: Annotated[Weighting | None, Field(description="softmax or sigmoid")] = (
        "softmax"
    )
    expert_weighting_normalization: Switch | None = True
    sinkhorn_n_iters: Annotated[int | None, Field(description="not used without sinkhorn")] = 1
    gate_initializer: Initializer = None
    probability_before_ffn: Switch = False

    @property
    def is_on(self) -> bool:
        """Whether there are several experts."""
        return self.num_experts + (self.num_shared_experts or 0) > 1


class GPTConfig(BaseModel):
    """Every key of the decoder family; any other key is refused.

    The defaults are those of gpt2. `loss_weight` counts with `loss_scaling: batch_size` only.

    Example:
        >>> GPTConfig(hidden_size=64, num_heads=4).vocab_size
        50257
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    # Whether attention and feed-forward part read the same input, as in gptj and falcon.
    is_parallel: ClassVar[bool] = False
    # Model Zoo 2.10 hands the number of sink tokens to the attention of gptj and falcon only.
    sees_sinks: ClassVar[bool] = False

    vocab_size: Size = 50257
    hidden_size: Size = 768
    max_position_embeddings: Size = 1024
    position_embedding_type: Annotated[
        PositionType | None, Field(description="learned, fixed, rotary, alibi or null")
    ] = "learned"
    rotary_dim: OptionalSize = None
    rotary_pairs: Annotated[RotaryPairs, Field(description="adjacent or halves")] = "adjacent"
    rope_theta: Positive = 10000.0
    pos_scaling_factor: Positive = 1.0
    pos_scaling_type: Annotated[
        Literal["linear", "yarn", "YaRN", "llama3", "longrope"],
        Field(description="linear, yarn, llama3 or longrope"),
    ] = "linear"
    pos_scaling_extra_args: Annotated[
        dict[str, Any] | None, Field(description="a map of the scaling's options, or null")
    ] = None
    alibi_trainable_slopes: Switch = False
    share_embedding_weights: Switch = True
    embedding_layer_norm: Switch = False
    num_hidden_layers: Size = 12
    norm_type: Annotated[
        NormType, Field(description="layernorm, rmsnorm, biasless-layernorm or nonparametric-layernorm")
    ] = "layernorm"
    norm_first_sandwich: Switch = False
    layer_norm_epsilon: Positive = 1e-5
    num_heads: Size = 12
    attention_module: Annotated[
        Literal["aiayn_attention", "multiquery_attention"],
        Field(description="aiayn_attention or multiquery_attention"),
    ] = "aiayn_attention"
    extra_attention_params: Annotated[
        dict[str, int | str | None], Field(description="a map", examples=["{num_kv_groups: 8}"])
    ] = {}
    attention_inner_dim: OptionalSize = None
    attention_type: Annotated[
        Literal["scaled_dot_product", "dot_product"], Field(description="scaled_dot_product or dot_product")
    ] = "scaled_dot_product"
    attention_sliding_window_length: OptionalSize = None
    attention_sink_tokens: Annotated[int | None, Field(ge=0, description="a whole number ≥ 0, or null")] = (
        None
    )
    sliding_window_every_other_decoder_layer: Switch = False
    sliding_window_every_other_decoder_layer_pattern: Annotated[
        Literal["full_attention_first", "sliding_window_first"] | None,
        Field(description="full_attention_first or sliding_window_first"),
    ] = "full_attention_first"
    attention_logit_softcapping: OptionalPositive = None
    final_logit_softcapping: OptionalPositive = None
    filter_size: Size = 3072
    nonlinearity: Annotated[
        Literal[NONLINEARITIES],  # pyright: ignore[reportInvalidTypeForm]
        Field(description=f"one of {', '.join(NONLINEARITIES)}"),
    ] = "gelu"
    moe: MoEConfig = Field(
        default=MoEConfig(),
        description="a map of the experts' options",
        examples=["{num_experts: 8, top_k: 2}"],
    )
    dropout_rate: Rate = 0.1
    embedding_dropout_rate: Annotated[Rate | None, Field(description="a rate from 0 to below 1, or null")] = (
        None
    )
    attention_dropout_rate: Annotated[Rate | None, Field(description="a rate from 0 to below 1, or null")] = (
        0.1
    )
    use_projection_bias_in_attention: Switch = True
    use_ffn_bias_in_attention: Switch = True
    use_ffn_bias: Switch = True
    use_bias_in_output: Switch = False
    initializer_range: Positive = 0.02
    initializer: Initializer = None
    embedding_initializer: Initializer = None
    output_layer_initializer: Initializer = None
    ffn_initializer: Initializer = None
    ffn_output_layer_initializer: Initializer = None
    mup_base_hidden_size: OptionalPositive = None
    mup_base_filter_size: OptionalPositive = None
    embeddings_scale: Annotated[Finite | None, Field(description="a number, or null")] = 1.0
    output_logits_alpha: Annotated[Finite | None, Field(description="a number, or null")] = None
    output_logits_scale: Annotated[Finite | None, Field(description="a number, or null")] = None
    scale_output_logits_by_d: Switch | None = True
    scale_qk_dot_by_d: Annotated[Switch | None, Field(description="true, false or null")] = None
    scale_qk_dot_by_layer_idx: Switch = False
    attention_logits_alpha: Annotated[Finite | None, Field(description="a number, or null")] = 1.0
    loss_scaling: Annotated[LossScaling, Field(description="num_tokens or batch_size")] = "num_tokens"
    loss_weight: Positive = 1.0

    @property
    def inner_size(self) -> int:
        """Size of the queries of all heads together."""
        return self.attention_inner_dim or self.hidden_size

    @property
    def head_size(self) -> int:
        """Size of one head."""
        return self.inner_size // self.num_heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values: all, or the groups of multi-query attention."""
        if self.attention_module == "aiayn_attention":
            return self.num_heads
        return int(self.extra_attention_params.get("num_kv_groups") or 1)

    @property
    def sinks(self) -> int:
        """How many of the first positions a sliding window never leaves behind."""
        return (self.attention_sink_tokens or 0) if self.sees_sinks else 0

    @property
    def rotary_size(self) -> int:
        """Entries of a head that turn with the position; a quarter of a head where the config says nothing."""
        return self.rotary_dim or int(self.hidden_size // self.num_heads * 0.25)

    @property
    def scaling_type(self) -> ScalingType:
        """`pos_scaling_type` in lower case."""
        return "yarn" if self.pos_scaling_type == "YaRN" else self.pos_scaling_type

    @property
    def has_untied_norm(self) -> bool:
        """Whether the feed-forward part has a norm of its own."""
        return True

    @property
    def hidden_width(self) -> float:
        """How many times as wide as muP's base model the hidden states are; 1 without muP."""
        return self.hidden_size / (self.mup_base_hidden_size or self.hidden_size)

    @property
    def filter_width(self) -> float:
        """How many times as wide as muP's base model the feed-forward parts are; 1 without muP."""
        return self.filter_size / (self.mup_base_filter_size or self.filter_size)

    @property
    def score_scale(self) -> float:
        """What the product of a query and a key is multiplied by."""
        by_size = self.mup_base_hidden_size is not None
        if self.scale_qk_dot_by_d is not None:
            by_size = self.scale_qk_dot_by_d
        power = 0.0 if self.attention_type == "dot_product" else -1.0 if by_size else -0.5
        alpha = 1.0 if self.attention_logits_alpha is None else self.attention_logits_alpha
        return alpha * self.head_size**power

    @property
    def logits_scale(self) -> float:
        """What the logits are multiplied by."""
        if self.mup_base_hidden_size is None:
            return self.output_logits_scale or 1.0
        power = 1.0 if self.scale_output_logits_by_d else 0.5
        return (self.output_logits_alpha or 1.0) / self.hidden_width**power

    def options(self) -> Mapping[str, Any]:
        """The keys that were given, as plain data."""
        return self.model_dump(exclude_unset=True)


class ParallelConfig(GPTConfig):
    """The keys of gptj and falcon: attention and feed-forward part side by side, rotary positions.

    Example:
        >>> ParallelConfig().has_untied_norm, ParallelConfig().position_embedding_type
        (False, 'rotary')
    """

    is_parallel: ClassVar[bool] = True
    sees_sinks: ClassVar[bool] = True

    position_embedding_type: Annotated[
        PositionType | None, Field(description="learned, fixed, rotary, alibi or null")
    ] = "rotary"
    embedding_dropout_rate: Annotated[Rate | None, Field(description="a rate from 0 to below 1, or null")] = (
        0.1
    )
    use_ffn_bias: Switch = False
    use_untied_layer_norm: Switch = False

    @property
    def has_untied_norm(self) -> bool:
        """Whether the feed-forward part has a norm of its own."""
        return self.use_untied_layer_norm
