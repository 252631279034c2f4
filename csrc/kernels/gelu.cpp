// GELU and its gradient. The nonlinearity of GPT-2 has the tangent in it: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)),
// which is x / 2 * (1 + tanh(...)); torch computes it with a tangent that takes several times as long as reading x. The
// exact one is for bfloat16.
#include "buffer.h"
#include "exponential.h"
#include "kernels.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

constexpr float kLinear = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
constexpr float kCubic = 0.07135481627159f;     // the same * 0.044715
// Here the sigmoid is 1 or 1e-38: beyond, it is taken for 1 or 0.
constexpr float kBound = 10;

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

struct Tanh {
  RAREFY_INLINE Vec forward(Vec x) { return x * Sigmoid(x).value; }

  // s + x * s * (1 - s) * du/dx, where 1 - s is e * s without cancellation.
  RAREFY_INLINE Vec backward(Vec grad, Vec x) {
    const Sigmoid s(x);
    const Vec slope = s.square * (3 * kCubic) + kLinear;
    return grad * (s.value + s.x * s.value * (s.e * s.value) * slope);
  }
};

// x * the normal distribution's share below x. Its tail is a polynomial in 1 / (1 + 0.23 |x|) times exp(-x^2 / 2)
// (Abramowitz and Stegun, 7.1.26), with an error below 1e-7.
struct Exact {
  RAREFY_INLINE Vec tail(Vec size, Vec bell) {
    const Vec t = 1.f / (size * 0.23164189f + 1.f);
    Vec sum = t * 0.5307027145f - 0.7265760135f;
    sum = sum * t + 0.7107068705f;
    sum = sum * t - 0.142248368f;
    sum = sum * t + 0.1274147960f;
    return sum * t * bell;
  }
  // |x| up to where the bell is 1e-37; NaN stays NaN.
  RAREFY_INLINE Vec size_of(Vec x) {
    const Vec size = choose(x < Vec{}, -x, x);
    return choose(size > all(13), all(13), size);
  }
  RAREFY_INLINE Vec share(Vec x, Vec size, Vec bell) {
    const Vec below = tail(size, bell);
    return choose(x < Vec{}, below, 1.f - below);
  }
  RAREFY_INLINE Vec forward(Vec x) {
    const Vec size = size_of(x);
    return x * choose(x < all(-13), Vec{}, share(x, size, exponential(size * size * -0.5f)));
  }
  RAREFY_INLINE Vec backward(Vec grad, Vec x) {
    const Vec size = size_of(x), bell = exponential(size * size * -0.5f);
    const Vec within = choose(x < Vec{}, -size, size);
    return grad * (share(x, size, bell) + within * bell * 0.3989422804f);
  }
};

// The last vector of a share overlaps the one before, so that one loop computes every entry and its bits do not depend
// on where it stands.
template <class Function, class Element>
void run(const GeluCall& c, int64_t begin, int64_t end) {
  const Element *x = static_cast<const Element*>(c.x), *grad = static_cast<const Element*>(c.grad);
  Element* result = static_cast<Element*>(c.result);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t at = min_of(i, end - kLanes);
    const Vec v = load(x + at);
    store(result + at, grad ? Function::backward(load(grad + at), v) : Function::forward(v));
  }
}

template <class Function, class Element>
void run_few(const GeluCall& c) {
  Element x[kLanes] = {}, grad[kLanes] = {}, result[kLanes];
  memcpy(x, c.x, c.size * sizeof(Element));
  if (c.grad) memcpy(grad, c.grad, c.size * sizeof(Element));
  const GeluCall whole{.x = x, .grad = c.grad ? grad : nullptr, .result = result, .size = kLanes, .element = c.element,
                       .threads = 1};
  run<Function, Element>(whole, 0, kLanes);
  memcpy(c.result, result, c.size * sizeof(Element));
}

template <class Function, class Element>
void run_all(const GeluCall& c) {
  if (c.size < kLanes) return run_few<Function, Element>(c);
  constexpr int64_t cost = 16;  // multiply-adds an entry
  const int threads = static_cast<int>(min_of(static_cast<int64_t>(useful_threads(c.threads, c.size * cost)), c.size / kLanes));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int k = 0; k < threads; k++)
    run<Function, Element>(c, share_begin(c.size, threads, k), share_begin(c.size, threads, k + 1));
}

#if defined(__AVX512F__) && RAREFY_VECTOR_BYTES == 64

// bfloat16 has 65536 numbers, and those of one tensor are so few that their part of a table stays in the nearest cache.
constexpr int kNumbers = 1 << 16;
constexpr int64_t kTablePays = 1 << 19;

RAREFY_INLINE Vec numbers_from(int first) {
  const __m512i bits = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(bits, 16));
}
RAREFY_INLINE __m512i halves_at(const Bfloat16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Of results as they are stored, in 16 bits; of slopes in float32, for the product with a gradient is still to be rounded.
RAREFY_INLINE void look_up(const GeluCall& c, const void* table, int64_t begin, int64_t end) {
  const Bfloat16 *x = static_cast<const Bfloat16*>(c.x), *grad = static_cast<const Bfloat16*>(c.grad);
  Bfloat16* result = static_cast<Bfloat16*>(c.result);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t at = min_of(i, end - kLanes);
    const __m512i number = halves_at(x + at);
    if (grad) {
      const __m512 slope = _mm512_i32gather_ps(number, table, 4);
      store(result + at, load(grad + at) * reinterpret_cast<Vec>(slope));
    } else {
      const __m512i found = _mm512_i32gather_epi32(number, table, 2);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + at), _mm512_cvtepi32_epi16(found));
    }
  }
}

// False: there is no memory for the table.
template <class Function>
bool run_table(const GeluCall& c) {
  constexpr int64_t cost = 8;
  const int threads = useful_threads(c.threads, c.size * cost);
  // The last number is read as a whole word.
  const Buffer table((kNumbers + 1) * (c.grad ? sizeof(float) : sizeof(Bfloat16)));
  if (!table.ok()) return false;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < kNumbers; i += kLanes) {
      if (c.grad)
        store(table.as<float>() + i, Function::backward(all(1), numbers_from(i)));
      else
        store(table.as<Bfloat16>() + i, Function::forward(numbers_from(i)));
    }
#pragma omp for schedule(static)
    for (int k = 0; k < threads; k++)
      look_up(c, table.as<void>(), share_begin(c.size, threads, k), share_begin(c.size, threads, k + 1));
  }
  return true;
}

#else

constexpr int64_t kTablePays = INT64_MAX;

template <class Function>
bool run_table(const GeluCall&) {
  return false;
}

#endif

template <class Function>
void run_element(const GeluCall& c) {
  if (c.element == Element::kFloat32) return run_all<Function, float>(c);
  if (c.size >= kTablePays && run_table<Function>(c)) return;
  run_all<Function, Bfloat16>(c);
}

}  // namespace

void tanh_gelu(const GeluCall& c) { run_element<Tanh>(c); }
void exact_gelu(const GeluCall& c) { run_element<Exact>(c); }

}  // namespace rarefy::RAREFY_ISA
