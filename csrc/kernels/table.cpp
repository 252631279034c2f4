#include "operations.h"

namespace rarefy::RAREFY_ISA {

extern const KernelTable kernels;
const KernelTable kernels{
    .forward = forward,
    .backward = backward,
    .keep_top = keep_top,
    .select = select,
    .holds_zeros = holds_zeros,
    .keep_n_of_m = keep_n_of_m,
    .block_sums = block_sums,
    .blocks_forward = blocks_forward,
    .blocks_backward = blocks_backward,
};

}  // namespace rarefy::RAREFY_ISA
