#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"
#include "plan_microbatches.h"

namespace py = pybind11;

namespace {

// addresses: lengths, costs, order; sizes: n, capacity, world_size, least, k_min.
areal::MicrobatchPlan call_plan_microbatches(const std::string& algorithm, const std::array<uintptr_t, 3>& addresses,
                                             const std::array<int64_t, 5>& sizes) {
  py::gil_scoped_release release;
  return areal::plan_microbatches(algorithm,
                                  {reinterpret_cast<const int64_t*>(addresses[0]), reinterpret_cast<const double*>(addresses[1]),
                                   reinterpret_cast<const int64_t*>(addresses[2]), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]});
}

}  // namespace

void areal::bind_plan_microbatches(py::module_& module) {
  module.def("plan_microbatches", &call_plan_microbatches, py::arg("algorithm"), py::arg("addresses"), py::arg("sizes"));
}
