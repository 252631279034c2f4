#include "operations.h"

namespace rarefy::RAREFY_ISA {

extern const KernelTable kernels;
const KernelTable kernels{
    .forward = forward,
    .backward = backward,
    .keep_top = keep_top,
    .select = select,
    .holds_zeros = holds_zeros,
    .keep_in_groups = keep_in_groups,
    .keep_regular = keep_regular,
    .block_sums = block_sums,
    .tanh_gelu = tanh_gelu,
    .exact_gelu = exact_gelu,
    .norm_forward = norm_forward,
    .norm_backward = norm_backward,
    .add_part = add_part,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .blocks_forward = blocks_forward,
    .blocks_backward = blocks_backward,
};

}  // namespace rarefy::RAREFY_ISA
