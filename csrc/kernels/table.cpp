#include "operations.h"

namespace rarefy::RAREFY_ISA {

extern const KernelTable kernels;
const KernelTable kernels{
    .forward = forward,
    .backward = backward,
    .keep_top = keep_top,
    .select = select,
    .keep_n_of_m = keep_n_of_m,
    .block_sums = block_sums,
};

}  // namespace rarefy::RAREFY_ISA
