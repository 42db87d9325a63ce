// Launcher of the weight hash on the GPU.
#pragma once

#include <cstdint>

namespace areal {

// Adds the hash of `bytes` device bytes, and mix64(key), to the 64-bit word at `sum` (device memory), on `stream` of the current device.
// Returns an error text, or null. Asynchronous.
const char* weights_hash_cuda(const void* data, uint64_t bytes, uint64_t key, uint64_t* sum, uintptr_t stream);

}  // namespace areal
