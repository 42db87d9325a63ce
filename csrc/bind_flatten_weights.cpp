#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "flatten_weights.h"
#ifdef AREAL_CUDA_VERSION
#include "../kernels/flatten_weights.cuh"
#endif

namespace py = pybind11;

namespace {

// Rows of (source address, target address, count, bytes to clear behind the target, conversion, 0).
void call_copy_list(const std::vector<std::array<uint64_t, 6>>& table, unsigned threads, const std::string& instruction_set) {
  py::gil_scoped_release release;
  std::vector<areal::ListCopy> rows;
  rows.reserve(table.size());
  for (const auto& [source, target, count, zeros, conversion, unused] : table) {
    if (conversion > static_cast<uint64_t>(areal::Conversion::bfloat16_to_float))
      throw std::invalid_argument("copy_list: no such conversion");
    rows.push_back({reinterpret_cast<const uint8_t*>(source), reinterpret_cast<uint8_t*>(target), count, zeros,
                    static_cast<areal::Conversion>(conversion), unused});
  }
  areal::copy_list(rows, threads, instruction_set);
}

#ifdef AREAL_CUDA_VERSION
// table: the same n rows in device memory, the last entry being the row's first chunk.
void call_copy_list_cuda(uintptr_t table, uint64_t n, uint64_t chunks, uintptr_t stream) {
  py::gil_scoped_release release;
  const char* error = areal::copy_list_cuda(reinterpret_cast<const areal::ListCopy*>(table), n, chunks, stream);
  if (error != nullptr) throw std::runtime_error(std::string("flatten_weights: ") + error);
}
#endif

}  // namespace

void areal::bind_flatten_weights(py::module_& module) {
  module.def("copy_list", &call_copy_list, py::arg("rows"), py::arg("threads"), py::arg("instruction_set") = "");
#ifdef AREAL_CUDA_VERSION
  module.attr("copy_list_cuda_chunk") = areal::kCopyChunk;
  module.def("copy_list_cuda", &call_copy_list_cuda, py::arg("table"), py::arg("n"), py::arg("chunks"), py::arg("stream"));
#endif
}
