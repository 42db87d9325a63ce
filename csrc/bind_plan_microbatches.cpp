#include <pybind11/stl.h>

#include "bindings.h"
#include "plan_microbatches.h"

namespace py = pybind11;

namespace {

areal::MicrobatchPlan call_plan_microbatches_ffd(uintptr_t lengths, int64_t n, int64_t capacity, int64_t world_size, int64_t k_min) {
  py::gil_scoped_release release;
  return areal::plan_microbatches_ffd(reinterpret_cast<const int64_t*>(lengths), n, capacity, world_size, k_min);
}

}  // namespace

void areal::bind_plan_microbatches(py::module_& module) {
  module.def("plan_microbatches_ffd", &call_plan_microbatches_ffd, py::arg("lengths"), py::arg("n"), py::arg("capacity"),
             py::arg("world_size"), py::arg("k_min"));
}
