// Python module areal._C. Takes addresses and sizes as integers: everything is checked on the Python side (areal/ops), so that the
// module depends on no version of torch.
#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "instruction_sets.h"

namespace {

pybind11::dict build_info() {
  std::vector<std::string> sets;
  for (const areal::NamedSet& candidate : areal::supported_instruction_sets()) sets.emplace_back(candidate.name);
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = sets;
#ifdef AREAL_CUDA_VERSION
  info["cuda"] = AREAL_CUDA_VERSION;
#else
  info["cuda"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "areal's compiled host code and CUDA launchers; use it through areal.ops";
  module.def("build_info", &build_info,
             "What this module was built with, and the instruction sets of this CPU that it can use, best first.");
  areal::bind_decode_attention(module);
  areal::bind_flatten_weights(module);
  areal::bind_gae(module);
  areal::bind_linear_ppo_loss(module);
  areal::bind_logprob_entropy(module);
  areal::bind_pack(module);
  areal::bind_plan_microbatches(module);
  areal::bind_ppo_loss(module);
  areal::bind_weights_hash(module);
}
