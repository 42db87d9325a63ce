// One function a file csrc/bind_<op>.cpp adds an op's functions to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace areal {

void bind_decode_attention(pybind11::module_& module);
void bind_flatten_weights(pybind11::module_& module);
void bind_gae(pybind11::module_& module);
void bind_linear_ppo_loss(pybind11::module_& module);
void bind_logprob_entropy(pybind11::module_& module);
void bind_pack(pybind11::module_& module);
void bind_plan_microbatches(pybind11::module_& module);
void bind_ppo_loss(pybind11::module_& module);
void bind_weights_hash(pybind11::module_& module);

}  // namespace areal
