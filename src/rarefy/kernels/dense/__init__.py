"""What a model of sparse layers does beside them, where torch takes longer for it than it needs to."""

from rarefy.kernels.dense.attention_kernels import native_attention, takes_attention
from rarefy.kernels.dense.gelu import exact_gelu, tanh_gelu
from rarefy.kernels.dense.norm import norm_for_products, plus

__all__ = ["exact_gelu", "native_attention", "norm_for_products", "plus", "takes_attention", "tanh_gelu"]
