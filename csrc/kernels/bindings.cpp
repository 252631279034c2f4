// Python bindings. Tensors come as addresses: an ndarray argument costs microseconds and may be a silent copy.
// The Python side checks shapes, types and contiguity.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using Address = uintptr_t;

namespace rarefy {
#define RAREFY_DECLARE(isa) \
  namespace isa {           \
  extern const KernelTable kernels; \
  }
#ifdef RAREFY_X86
RAREFY_DECLARE(v2)
RAREFY_DECLARE(v3)
RAREFY_DECLARE(v4)
#else
RAREFY_DECLARE(base)
#endif

namespace {

struct InstructionSet {
  const char* name;
  const KernelTable* kernels;
  bool available;
};

// From the oldest to the newest.
std::vector<InstructionSet> instruction_sets() {
#ifdef RAREFY_X86
  __builtin_cpu_init();
  const bool second = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool third = second && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool fourth = third && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return {{"v2", &v2::kernels, second}, {"v3", &v3::kernels, third}, {"v4", &v4::kernels, fourth}};
#else
  return {{"base", &base::kernels, true}};
#endif
}

const KernelTable& table(int index) {
  static const std::vector<InstructionSet> all = instruction_sets();
  if (index < 0 || index >= static_cast<int>(all.size()) || !all[index].available)
    throw std::invalid_argument("no such instruction set on this machine");
  return *all[index].kernels;
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const auto& isa : instruction_sets())
    if (isa.available) names.emplace_back(isa.name);
  return names;
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
Panels panels(int rows, int columns, int width, Address starts, Address offsets) {
  return {rows, columns, width, at<const int32_t>(starts), at<const uint16_t>(offsets)};
}
void check(bool ok) {
  if (!ok) throw std::bad_alloc();
}

void forward(int isa, int64_t tokens, int rows, int columns, int width, Address starts, Address offsets,
             Address values, Address x, Address bias, Address y, int element, int threads) {
  check(table(isa).forward({tokens, panels(rows, columns, width, starts, offsets), at<const float>(values), at<void>(x),
                            at<const float>(bias), at<void>(y), static_cast<Element>(element), threads}));
}

void backward(int isa, int64_t tokens, int rows, int columns, int width, Address starts, Address offsets,
              Address order, Address values, Address x, Address grad, Address grad_x, Address grad_values,
              Address grad_bias, int element, int threads) {
  check(table(isa).backward({tokens, panels(rows, columns, width, starts, offsets), at<const int32_t>(order),
                             at<const float>(values), at<void>(x), at<void>(grad), at<void>(grad_x),
                             at<float>(grad_values), at<float>(grad_bias), static_cast<Element>(element), threads}));
}

void keep_top(int isa, Address scores, Address candidates, int64_t size, int64_t count, Address mask, int threads) {
  check(table(isa).keep_top({at<const float>(scores), at<const uint8_t>(candidates), size, count, at<uint8_t>(mask),
                             threads}));
}

void select(int isa, Address data, Address mask, int64_t size, int element_bytes, int threads) {
  table(isa).select(at<void>(data), at<const uint8_t>(mask), size, element_bytes, threads);
}

void keep_n_of_m(int isa, Address scores, int64_t groups, int n, int m, Address mask, int threads) {
  table(isa).keep_n_of_m(at<const float>(scores), groups, n, m, at<uint8_t>(mask), threads);
}

void block_sums(int isa, Address scores, int64_t rows, int64_t columns, int block_rows, int block_columns,
                Address sums, int threads) {
  table(isa).block_sums(at<const float>(scores), rows, columns, block_rows, block_columns, at<float>(sums), threads);
}

void count(Address mask, int rows, int columns, int width, Address starts, int threads) {
  panels_count(at<const uint8_t>(mask), rows, columns, width, at<int32_t>(starts), threads);
}

void fill(Address mask, int rows, int columns, int width, Address starts, Address offsets, int threads) {
  panels_fill(at<const uint8_t>(mask), panels(rows, columns, width, starts, 0), at<uint16_t>(offsets), threads);
}

void transpose(int rows, int columns, int width, Address starts, Address offsets, int transposed_width,
               Address transposed_starts, Address transposed_offsets, Address order, int threads) {
  panels_transpose(panels(rows, columns, width, starts, offsets), transposed_width, at<int32_t>(transposed_starts),
                   at<uint16_t>(transposed_offsets), at<int32_t>(order), threads);
}

void positions(int rows, int columns, int width, Address starts, Address offsets, Address result, int threads) {
  panels_positions(panels(rows, columns, width, starts, offsets), at<int64_t>(result), threads);
}

void sources(int rows, int columns, int width, Address starts, Address offsets, int previous_width,
             Address previous_starts, Address previous_offsets, Address result, int threads) {
  panels_sources(panels(rows, columns, width, starts, offsets),
                 panels(rows, columns, previous_width, previous_starts, previous_offsets), at<int64_t>(result), threads);
}

void scatter(int rows, int columns, int width, Address starts, Address offsets, Address values, Address matrix,
             int element_bytes, int threads) {
  panels_scatter(panels(rows, columns, width, starts, offsets), at<const void>(values), at<void>(matrix),
                 element_bytes, threads);
}

void gather(int rows, int columns, int width, Address starts, Address offsets, Address matrix, Address values,
            int threads) {
  panels_gather(panels(rows, columns, width, starts, offsets), at<const uint32_t>(matrix), at<uint32_t>(values),
                threads);
}

}  // namespace
}  // namespace rarefy

NB_MODULE(_C, m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.def("instruction_sets", &rarefy::available);
  m.def("forward", &rarefy::forward, Release());
  m.def("backward", &rarefy::backward, Release());
  m.def("keep_top", &rarefy::keep_top, Release());
  m.def("select", &rarefy::select, Release());
  m.def("keep_n_of_m", &rarefy::keep_n_of_m, Release());
  m.def("block_sums", &rarefy::block_sums, Release());
  m.def("panels_count", &rarefy::count, Release());
  m.def("panels_fill", &rarefy::fill, Release());
  m.def("panels_transpose", &rarefy::transpose, Release());
  m.def("panels_positions", &rarefy::positions, Release());
  m.def("panels_sources", &rarefy::sources, Release());
  m.def("panels_scatter", &rarefy::scatter, Release());
  m.def("panels_gather", &rarefy::gather, Release());
}
