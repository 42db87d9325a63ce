// Work over a list of arrays in one launch. Each array is cut into chunks, which are numbered through the whole list; blocks take turns
// at them, and find the array of a chunk in a table in device memory whose rows have a field first_chunk.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.cuh"

namespace areal {

// The last of the n >= 1 rows with first_chunk <= chunk. An array without chunks has the first_chunk of its successor, and is passed over.
template <typename Row>
__device__ __forceinline__ const Row& row_of_chunk(const Row* rows, uint64_t n, uint64_t chunk) {
  uint64_t low = 0, high = n;
  while (high - low > 1) {
    const uint64_t middle = (low + high) / 2;
    if (rows[middle].first_chunk <= chunk)
      low = middle;
    else
      high = middle;
  }
  return rows[low];
}

// The largest power of two, 16 at most, that divides both addresses.
__device__ __forceinline__ unsigned common_alignment(uintptr_t a, uintptr_t b) {
  const auto bits = static_cast<unsigned>((a | b) & 15);
  return bits == 0 ? 16 : bits & -bits;
}

inline unsigned blocks_for(uint64_t chunks, unsigned per_multiprocessor) {
  return static_cast<unsigned>(std::clamp<uint64_t>(chunks, 1, static_cast<uint64_t>(multiprocessors()) * per_multiprocessor));
}

}  // namespace areal
