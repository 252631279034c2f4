// Which instructions for pairs of bfloat16 this processor has, and lets this process use.
#include "blocks.h"
#include "half.h"

#if defined(RAREFY_X86)
#include <cpuid.h>
#endif
#if defined(RAREFY_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rarefy {

#if defined(RAREFY_PAIRS)
namespace v4_bf16 {
extern const BlocksTable blocks_kernels;
}
namespace v4_amx {
extern const BlocksTable blocks_kernels;
}
#endif
#if defined(RAREFY_HALF)
namespace v4_fp16 {
extern const HalfTable half_table;
}
#endif

namespace {

#if defined(RAREFY_PAIRS)

struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned sub_leaf) {
  Registers r{0, 0, 0, 0};
  if (!__get_cpuid_count(leaf, sub_leaf, &r.a, &r.b, &r.c, &r.d)) return {0, 0, 0, 0};
  return r;
}
bool has(unsigned registers, int bit) { return registers >> bit & 1u; }

bool has_fourth() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

bool has_dot() { return has_fourth() && cpuid(7, 0).a >= 1 && has(cpuid(7, 1).a, 5); }

#if defined(RAREFY_HALF)
// Leaf 7 with bit 23 of edx; bfloat16 is stored with avx512_bf16, which all processors with the one have.
bool has_half() { return has_dot() && has(cpuid(7, 0).d, 23); }
#endif

#if defined(RAREFY_EMULATE_TILES)
bool has_matrix() { return has_dot(); }
#elif defined(__linux__)
// The processor has the unit (AMX-TILE, AMX-BF16), the system saves its registers (XCR0, bits 17 and 18), and it grants
// this process the permission to use them, without which the first instruction would end the process.
bool has_matrix() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  if (!has_fourth() || !has(cpuid(7, 0).d, 24) || !has(cpuid(7, 0).d, 22)) return false;
  if (!has(cpuid(1, 0).c, 27)) return false;  // XGETBV
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3u) != 3u) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool has_matrix() { return false; }
#endif

MatrixUnits detect() {
  const bool dot = has_dot(), matrix = has_matrix();
#if defined(RAREFY_EMULATE_TILES)
  const bool fast = false;
#else
  const bool fast = true;
#endif
  // Two products an instruction, but one instruction in two cycles on Intel's processors: half of float32's rate there.
  const bool dot_pays = __builtin_cpu_is("amd");
  return {
      .dot = {"v4_bf16", &v4_bf16::blocks_kernels, dot, dot_pays},
      .matrix = {"v4_amx", &v4_amx::blocks_kernels, matrix, fast},
  };
}

#else

MatrixUnits detect() { return {.dot = {"v4_bf16", nullptr, false, false}, .matrix = {"v4_amx", nullptr, false, false}}; }

#endif

}  // namespace

const MatrixUnits& matrix_units() {
  static const MatrixUnits units = detect();
  return units;
}

const HalfTable* half_kernels() {
#if defined(RAREFY_HALF)
  static const HalfTable* found = has_half() ? &v4_fp16::half_table : nullptr;
  return found;
#else
  return nullptr;
#endif
}

const char* half_obstacle() {
#if defined(RAREFY_HALF)
  return half_kernels() ? "" : "this processor has no avx512_fp16";
#else
  return "this build of rarefy has none: its compiler does not know avx512_fp16";
#endif
}

}  // namespace rarefy
