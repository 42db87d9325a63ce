#include <algorithm>

#include "../csrc/hash_mix.h"
#include "launch.cuh"
#include "weights_hash.cuh"

namespace areal {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread
constexpr uint64_t kWord = 8;
constexpr unsigned kBlocksPerSm = 8;

__device__ __forceinline__ uint64_t load_tail(const uint8_t* data, uint64_t bytes) {
  uint64_t word = 0;
  for (uint64_t b = 0; b < bytes; ++b) word |= static_cast<uint64_t>(data[b]) << (8 * b);
  return word;
}

// One atomic per block: sums over a warp by shuffles, over the warps through shared memory.
__device__ __forceinline__ void add_block_sum(uint64_t sum, uint64_t* target) {
  __shared__ uint64_t warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (const uint64_t part : warps) sum += part;
    atomicAdd(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(sum));
  }
}

// kAligned: data is a multiple of 16 bytes, and words travel in pairs. Otherwise (a view into a tensor) they are put together from bytes.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    weights_hash_kernel(const uint8_t* __restrict__ data, uint64_t bytes, uint64_t key, uint64_t* target) {
  const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * kThreads;
  const uint64_t words = bytes / kWord;
  uint64_t sum = 0;
  uint64_t done = 0;  // words before this one are taken by the vector loop
  if constexpr (kAligned) {
    const uint64_t pairs = words / 2;
    const auto* source = reinterpret_cast<const ulonglong2*>(data);
    uint64_t i = thread;
    for (; i + (kUnroll - 1) * stride < pairs; i += kUnroll * stride) {
      ulonglong2 pair[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) pair[u] = __ldcs(source + i + u * stride);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint64_t at = 2 * (i + u * stride);
        sum += mix_word(pair[u].x, at, key) + mix_word(pair[u].y, at + 1, key);
      }
    }
    for (; i < pairs; i += stride) {
      const ulonglong2 pair = __ldcs(source + i);
      sum += mix_word(pair.x, 2 * i, key) + mix_word(pair.y, 2 * i + 1, key);
    }
    done = 2 * pairs;
  }
  for (uint64_t i = done + thread; i < words; i += stride) sum += mix_word(load_tail(data + i * kWord, kWord), i, key);
  if (thread == 0) {
    sum += mix64(key);
    if (bytes % kWord != 0) sum += mix_word(load_tail(data + words * kWord, bytes % kWord), words, key);
  }
  add_block_sum(sum, target);
}

}  // namespace

const char* weights_hash_cuda(const void* data, uint64_t bytes, uint64_t key, uint64_t* sum, uintptr_t stream) {
  const uint64_t wanted = (bytes / kWord + 2 * kThreads - 1) / (2 * kThreads);
  const auto blocks = static_cast<unsigned>(std::clamp<uint64_t>(wanted, 1, static_cast<uint64_t>(multiprocessors()) * kBlocksPerSm));
  const auto* start = static_cast<const uint8_t*>(data);
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0)
    AREAL_LAUNCH(weights_hash_kernel<true>, blocks, kThreads, 0, stream, start, bytes, key, sum);
  else
    AREAL_LAUNCH(weights_hash_kernel<false>, blocks, kThreads, 0, stream, start, bytes, key, sum);
  return launch_error();
}

}  // namespace areal
