// What the files with bindings share.
#pragma once
#include <nanobind/nanobind.h>

#include <new>
#include <stdexcept>

#include "kernels.h"
#include "pages.h"

namespace nb = nanobind;
using Address = uintptr_t;

namespace rarefy {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}
inline void finish(bool ok) {
  if (!ok) throw std::bad_alloc();
}
inline Element element_of(int number) {
  require(number == 0 || number == 1, "element: give 0 (float32) or 1 (bfloat16)");
  return static_cast<Element>(number);
}

// Of an activation or its gradient.
inline int64_t bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// The kernels of an instruction set of this machine, by its place in `instruction_sets`.
const KernelTable& table(int index);

void bind_blocks(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_dense(nb::module_& m);
void bind_half(nb::module_& m);

}  // namespace rarefy
