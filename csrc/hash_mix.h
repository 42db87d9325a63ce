// The arithmetic of the weight hash, shared by host and device code. python/areal/ops/weights_hash.py defines the hash.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define AREAL_INLINE __host__ __device__ __forceinline__
#else
#define AREAL_INLINE inline __attribute__((always_inline))
#endif

namespace areal {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words.
AREAL_INLINE uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// The contribution of the word at a position of the tensor with this key.
AREAL_INLINE uint64_t mix_word(uint64_t word, uint64_t position, uint64_t key) { return mix64(word ^ (key + position * kGolden)); }

}  // namespace areal
