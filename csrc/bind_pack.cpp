#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "pack.h"
#ifdef AREAL_CUDA_VERSION
#include "../kernels/pack.cuh"
#endif

namespace py = pybind11;

namespace {

// A row a column: source, target, bytes, shift, fill.
using Rows = std::vector<std::array<int64_t, 5>>;
// cu_seqlens, starts or 0, rows or 0, n, width, total.
using Layout = std::array<int64_t, 6>;
// position_ids, sequence_ids, has_next, or 0.
using Derived = std::array<int64_t, 3>;

std::vector<areal::PackColumn> columns_of(const Rows& rows) {
  std::vector<areal::PackColumn> columns;
  columns.reserve(rows.size());
  for (const auto& [source, target, bytes, shift, fill] : rows)
    columns.push_back({static_cast<uint64_t>(source), static_cast<uint64_t>(target), bytes, shift, fill});
  return columns;
}

areal::SequenceLayout layout_of(const Layout& layout) {
  const auto address = [&](int i) { return static_cast<uint64_t>(layout[i]); };
  return {address(0), address(1), address(2), layout[3], layout[4], layout[5]};
}

areal::PackDerived derived_of(const Derived& derived) {
  return {static_cast<uint64_t>(derived[0]), static_cast<uint64_t>(derived[1]), static_cast<uint64_t>(derived[2])};
}

void call_pack(const Rows& rows, const Layout& layout, const Derived& derived, int64_t threads) {
  py::gil_scoped_release release;
  areal::pack(columns_of(rows), layout_of(layout), derived_of(derived), threads);
}

void call_unpack(const Rows& rows, const Layout& layout, int64_t threads) {
  py::gil_scoped_release release;
  areal::unpack(columns_of(rows), layout_of(layout), threads);
}

int64_t call_find_runs(uintptr_t mask, int64_t bytes, int64_t n, int64_t width, uintptr_t starts, uintptr_t lengths, int64_t threads) {
  py::gil_scoped_release release;
  return areal::find_runs(mask, bytes, n, width, reinterpret_cast<int64_t*>(starts), reinterpret_cast<int64_t*>(lengths), threads);
}

#ifdef AREAL_CUDA_VERSION
void call_pack_cuda(const Rows& rows, const Layout& layout, const Derived& derived, uintptr_t stream) {
  const char* error = areal::pack_cuda(columns_of(rows), layout_of(layout), derived_of(derived), stream);
  if (error != nullptr) throw std::runtime_error(std::string("pack: ") + error);
}

void call_unpack_cuda(const Rows& rows, const Layout& layout, uintptr_t stream) {
  const char* error = areal::unpack_cuda(columns_of(rows), layout_of(layout), stream);
  if (error != nullptr) throw std::runtime_error(std::string("unpack: ") + error);
}
#endif

}  // namespace

void areal::bind_pack(py::module_& module) {
  module.def("pack", &call_pack, py::arg("columns"), py::arg("layout"), py::arg("derived"), py::arg("threads"));
  module.def("unpack", &call_unpack, py::arg("columns"), py::arg("layout"), py::arg("threads"));
  module.def("find_runs", &call_find_runs, py::arg("mask"), py::arg("bytes"), py::arg("n"), py::arg("width"), py::arg("starts"),
             py::arg("lengths"), py::arg("threads"));
#ifdef AREAL_CUDA_VERSION
  module.def("pack_cuda", &call_pack_cuda, py::arg("columns"), py::arg("layout"), py::arg("derived"), py::arg("stream"));
  module.def("unpack_cuda", &call_unpack_cuda, py::arg("columns"), py::arg("layout"), py::arg("stream"));
#endif
}
