// The nonlinearity of GPT-2 and its gradient, with the tangent in it: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)),
// which is x / 2 * (1 + tanh(...)). torch computes it with a tangent that takes several times as long as reading x.
#include "kernels.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

constexpr float kLinear = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
constexpr float kCubic = 0.07135481627159f;     // the same * 0.044715
// Here the sigmoid is 1 or 1e-38: beyond, it is taken for 1 or 0.
constexpr float kBound = 10;

RAREFY_INLINE Vec all(float x) { return Vec{} + x; }
RAREFY_INLINE Vec choose(IntVec condition, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((condition & reinterpret_cast<IntVec>(yes)) | (~condition & reinterpret_cast<IntVec>(no)));
}

// For |x| < 88: 2^n * e^r with |r| <= log(2) / 2, e^r by its series. NaN stays NaN.
RAREFY_INLINE Vec exponential(Vec x) {
  constexpr float to_whole = 12582912;  // 1.5 * 2^23: adding it leaves whole numbers in the last bits
  const Vec shifted = x * 1.4426950408889634f + to_whole;
  const Vec whole = shifted - to_whole;
  const Vec rest = (x - whole * 0.693145751953125f) - whole * 1.4286068203094172e-06f;
  Vec sum = rest * (1 / 5040.f) + 1 / 720.f;
  sum = sum * rest + 1 / 120.f;
  sum = sum * rest + 1 / 24.f;
  sum = sum * rest + 1 / 6.f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.f;
  sum = sum * rest + 1.f;
  const UintVec power = (reinterpret_cast<UintVec>(shifted) + 127u) << 23;
  return sum * reinterpret_cast<Vec>(power);
}

struct Sigmoid {
  Vec x, square, e, value;  // x within the bounds, its square, exp(-u), 1 / (1 + exp(-u))

  explicit Sigmoid(Vec given) {
    x = choose(given > all(kBound), all(kBound), given);
    x = choose(x < all(-kBound), all(-kBound), x);
    square = x * x;
    e = exponential(-x * (square * kCubic + kLinear));
    const Vec quotient = 1.f / (e + 1.f);
    value = choose(given < all(-kBound), Vec{}, quotient);
  }
};

RAREFY_INLINE Vec forward_of(Vec x) { return x * Sigmoid(x).value; }

// s + x * s * (1 - s) * du/dx, where 1 - s is e * s without cancellation.
RAREFY_INLINE Vec backward_of(Vec grad, Vec x) {
  const Sigmoid s(x);
  const Vec slope = s.square * (3 * kCubic) + kLinear;
  return grad * (s.value + s.x * s.value * (s.e * s.value) * slope);
}

// The last vector of a share overlaps the one before, so that one loop computes every entry and its bits do not depend
// on where it stands.
RAREFY_INLINE void run(const GeluCall& c, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t at = min_of(i, end - kLanes);
    const Vec x = load(c.x + at);
    store(c.result + at, c.grad ? backward_of(load(c.grad + at), x) : forward_of(x));
  }
}

void run_few(const GeluCall& c) {
  float x[kLanes] = {}, grad[kLanes] = {}, result[kLanes];
  memcpy(x, c.x, c.size * sizeof(float));
  if (c.grad) memcpy(grad, c.grad, c.size * sizeof(float));
  run({.x = x, .grad = c.grad ? grad : nullptr, .result = result, .size = kLanes, .threads = 1}, 0, kLanes);
  memcpy(c.result, result, c.size * sizeof(float));
}

}  // namespace

void tanh_gelu(const GeluCall& c) {
  if (c.size < kLanes) return run_few(c);
  constexpr int64_t cost = 16;  // multiply-adds an entry
  const int threads = static_cast<int>(min_of(static_cast<int64_t>(useful_threads(c.threads, c.size * cost)), c.size / kLanes));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int k = 0; k < threads; k++) run(c, share_begin(c.size, threads, k), share_begin(c.size, threads, k + 1));
}

}  // namespace rarefy::RAREFY_ISA
