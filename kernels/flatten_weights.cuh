// Launcher of flatten_weights and unflatten_weights on the GPU.
#pragma once

#include <cstdint>

#include "../csrc/flatten_weights.h"

namespace areal {

constexpr uint64_t kCopyChunk = 32 * 1024;  // elements of a conversion, else bytes; a multiple of 16

// Copies the n >= 1 rows of a table in device memory, in one launch on `stream` of the current device. A row has count / kCopyChunk
// chunks, rounded up, and one if it has none but zeros to write; `chunks` is their sum. Returns an error text, or null. Asynchronous.
const char* copy_list_cuda(const ListCopy* rows, uint64_t n, uint64_t chunks, uintptr_t stream);

}  // namespace areal
