#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "weights_hash.h"
#ifdef AREAL_CUDA_VERSION
#include "../kernels/weights_hash.cuh"
#endif

namespace py = pybind11;

namespace {

// Rows of (source address, target address or 0, bytes, key).
uint64_t call_copy_and_hash(const std::vector<std::array<uint64_t, 4>>& rows, unsigned threads, const std::string& instruction_set) {
  py::gil_scoped_release release;
  std::vector<areal::Segment> segments;
  segments.reserve(rows.size());
  for (const auto& [source, target, bytes, key] : rows)
    segments.push_back({reinterpret_cast<const uint8_t*>(source), reinterpret_cast<uint8_t*>(target), bytes, key});
  return areal::copy_and_hash(segments, threads, instruction_set);
}

#ifdef AREAL_CUDA_VERSION
void call_weights_hash_cuda(uintptr_t data, uint64_t bytes, uint64_t key, uintptr_t sum, uintptr_t stream) {
  const char* error = areal::weights_hash_cuda(reinterpret_cast<const void*>(data), bytes, key, reinterpret_cast<uint64_t*>(sum), stream);
  if (error != nullptr) throw std::runtime_error(std::string("weights_hash: ") + error);
}
#endif

}  // namespace

void areal::bind_weights_hash(py::module_& module) {
  module.def("copy_and_hash", &call_copy_and_hash, py::arg("rows"), py::arg("threads"), py::arg("instruction_set") = "");
#ifdef AREAL_CUDA_VERSION
  module.def("weights_hash_cuda", &call_weights_hash_cuda, py::arg("data"), py::arg("bytes"), py::arg("key"), py::arg("sum"),
             py::arg("stream"));
#endif
}
