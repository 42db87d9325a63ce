// Launcher of gae on the GPU.
#pragma once

#include <cstdint>

#include "../csrc/gae.h"

namespace areal {

constexpr int64_t kGaeTile = 1024;  // tokens a block

// Device pointers throughout; workspace: 2 floats a tile. cu_seqlens is not checked. Two launches on `stream` of the current device,
// one for a single tile. The result depends on nothing but the arguments. Returns an error text, or null. Asynchronous.
const char* gae_cuda(const Gae& call, float* workspace, uintptr_t stream);

}  // namespace areal
