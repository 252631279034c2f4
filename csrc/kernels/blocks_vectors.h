// Vectors of 4, 8 or 16 floats, for block sizes that the longest vectors do not divide.
#pragma once
#include "simd.h"

namespace rarefy::RAREFY_ISA {

template <int kLength>
struct VectorTypes;
#define RAREFY_VECTOR_TYPES(length)                                                           \
  template <>                                                                                 \
  struct VectorTypes<length> {                                                                \
    typedef float Floats __attribute__((vector_size(length * 4), may_alias));                 \
    typedef float Unaligned __attribute__((vector_size(length * 4), may_alias, aligned(4)));  \
    typedef uint32_t Bits __attribute__((vector_size(length * 4), may_alias));                \
    typedef uint16_t Halves __attribute__((vector_size(length * 2), may_alias, aligned(2)));  \
    static inline __attribute__((always_inline)) Bits widen(const Bfloat16* p) {              \
      return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits);              \
    }                                                                                         \
    static inline __attribute__((always_inline)) void narrow(Bits v, Bfloat16* p) {           \
      *reinterpret_cast<Halves*>(p) = __builtin_convertvector(v, Halves);                     \
    }                                                                                         \
  };
RAREFY_VECTOR_TYPES(4)
RAREFY_VECTOR_TYPES(8)
RAREFY_VECTOR_TYPES(16)
#undef RAREFY_VECTOR_TYPES

template <int kLength>
struct Lanes {
  using Types = VectorTypes<kLength>;
  using Floats = typename Types::Floats;
  using Bits = typename Types::Bits;

  static inline __attribute__((always_inline)) Floats load(const float* p) {
    return *reinterpret_cast<const typename Types::Unaligned*>(p);
  }
  static inline __attribute__((always_inline)) Floats load(const Bfloat16* p) {
    return reinterpret_cast<Floats>(Types::widen(p) << 16);
  }
  static inline __attribute__((always_inline)) void store(float* p, Floats v) {
    *reinterpret_cast<typename Types::Unaligned*>(p) = v;
  }
  static inline __attribute__((always_inline)) void store(Bfloat16* p, Floats v) {  // as `store` in simd.h
    const Bits bits = reinterpret_cast<Bits>(v);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits is_nan = reinterpret_cast<Bits>(v != v);
    Types::narrow((rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan), p);
  }
};

}  // namespace rarefy::RAREFY_ISA
