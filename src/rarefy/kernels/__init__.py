"""Kernels that skip the zeros of a weight, and exact selections; README.md in this directory explains them."""

from rarefy.kernels.cost import break_even_sparsity, pays_off, relative_time
from rarefy.kernels.csr import CSR
from rarefy.kernels.dispatch import available, instruction_set
from rarefy.kernels.ops import infer, select_gradient_, sparse_linear
from rarefy.kernels.selection import block_sums, keep_n_of_m, keep_top, keep_top_blocks

__all__ = [
    "CSR",
    "available",
    "block_sums",
    "break_even_sparsity",
    "infer",
    "instruction_set",
    "keep_n_of_m",
    "keep_top",
    "keep_top_blocks",
    "pays_off",
    "relative_time",
    "select_gradient_",
    "sparse_linear",
]
