"""What a model of sparse layers does beside them, where torch takes longer for it than it needs to."""

from rarefy.kernels.dense.gelu import tanh_gelu
from rarefy.kernels.dense.matrix_attention import matrix_attention, takes_attention

__all__ = ["matrix_attention", "takes_attention", "tanh_gelu"]
