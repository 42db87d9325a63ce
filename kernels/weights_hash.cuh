// Launcher of the weight hash on the GPU.
#pragma once

#include <cstdint>

namespace areal {

constexpr uint64_t kHashChunk = 64 * 1024;  // bytes

// A row of the table in device memory. An array has its bytes / kHashChunk chunks, rounded up, and at least one.
struct HashRow {
  const uint8_t* data;
  uint64_t bytes;
  uint64_t key;
  uint64_t first_chunk;
};

// Adds to the 64-bit word at `sum` (device memory) the hash of n >= 1 arrays, which have `chunks` chunks in all, in one launch on
// `stream` of the current device. Returns an error text, or null. Asynchronous.
const char* weights_hash_cuda(const HashRow* rows, uint64_t n, uint64_t chunks, uint64_t* sum, uintptr_t stream);

}  // namespace areal
