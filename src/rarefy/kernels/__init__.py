"""Kernels that skip the zeros of a weight, and exact selections; README.md in this directory explains them."""

from rarefy.kernels.block_index import BlockIndex, index_of, sources_between, takes_blocks
from rarefy.kernels.block_ops import block_linear
from rarefy.kernels.blocks import BlockTopology, active_blocks, whole_blocks
from rarefy.kernels.dense import (
    exact_gelu,
    native_attention,
    norm_for_products,
    plus,
    takes_attention,
    tanh_gelu,
)
from rarefy.kernels.instruction_sets import available, half_obstacle, instruction_set
from rarefy.kernels.linear_gradients import check_activations, dense_gradient
from rarefy.kernels.moving import move_entries
from rarefy.kernels.native import Layout
from rarefy.kernels.ops import infer, infer_gradients, sparse_linear, zero_inactive_
from rarefy.kernels.panels import Panels
from rarefy.kernels.selection import (
    block_sums,
    check_blocks,
    fill_inactive_,
    holds_zeros,
    keep_in_groups,
    keep_top,
    keep_top_and_tie,
)
from rarefy.kernels.tile_masks import Tiles, keep_regular, takes_tiles

__all__ = [
    "BlockIndex",
    "BlockTopology",
    "Layout",
    "Panels",
    "Tiles",
    "active_blocks",
    "available",
    "block_linear",
    "block_sums",
    "check_activations",
    "check_blocks",
    "dense_gradient",
    "exact_gelu",
    "fill_inactive_",
    "half_obstacle",
    "holds_zeros",
    "index_of",
    "infer",
    "infer_gradients",
    "instruction_set",
    "keep_in_groups",
    "keep_regular",
    "keep_top",
    "keep_top_and_tie",
    "move_entries",
    "native_attention",
    "norm_for_products",
    "plus",
    "sources_between",
    "sparse_linear",
    "takes_attention",
    "takes_blocks",
    "takes_tiles",
    "tanh_gelu",
    "whole_blocks",
    "zero_inactive_",
]
