#include "../csrc/hash_mix.h"
#include "tensor_list.cuh"
#include "weights_hash.cuh"

namespace areal {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread
constexpr uint64_t kWord = 8;
constexpr unsigned kBlocksPerMultiprocessor = 8;

// The word at `data`, in pieces of what its alignment allows; the GPU is little-endian, as the hash is.
__device__ __forceinline__ uint64_t load_word(const uint8_t* data, unsigned alignment) {
  uint64_t word = 0;
  if (alignment >= 8) return *reinterpret_cast<const uint64_t*>(data);
  if (alignment == 4) {
    const auto* parts = reinterpret_cast<const uint32_t*>(data);
    return parts[0] | static_cast<uint64_t>(parts[1]) << 32;
  }
  if (alignment == 2) {
    const auto* parts = reinterpret_cast<const uint16_t*>(data);
    for (int i = 0; i < 4; ++i) word |= static_cast<uint64_t>(parts[i]) << (16 * i);
    return word;
  }
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(data[i]) << (8 * i);
  return word;
}

// This thread's words of a chunk of `bytes` bytes that starts at the word `first` of its array.
__device__ __forceinline__ uint64_t hash_chunk(const uint8_t* data, uint64_t bytes, uint64_t first, uint64_t key) {
  const unsigned alignment = common_alignment(reinterpret_cast<uintptr_t>(data), 0);
  const uint64_t words = bytes / kWord;
  uint64_t sum = 0;
  uint64_t done = 0;  // words before this one are taken in pairs
  if (alignment == 16) {
    const uint64_t pairs = words / 2;
    const auto* source = reinterpret_cast<const ulonglong2*>(data);
    uint64_t i = threadIdx.x;
    for (; i + (kUnroll - 1) * kThreads < pairs; i += kUnroll * kThreads) {
      ulonglong2 pair[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) pair[u] = __ldcs(source + i + u * kThreads);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint64_t at = first + 2 * (i + u * kThreads);
        sum += mix_word(pair[u].x, at, key) + mix_word(pair[u].y, at + 1, key);
      }
    }
    for (; i < pairs; i += kThreads) {
      const ulonglong2 pair = __ldcs(source + i);
      sum += mix_word(pair.x, first + 2 * i, key) + mix_word(pair.y, first + 2 * i + 1, key);
    }
    done = 2 * pairs;
  }
  for (uint64_t i = done + threadIdx.x; i < words; i += kThreads) sum += mix_word(load_word(data + i * kWord, alignment), first + i, key);
  if (threadIdx.x == 0 && bytes % kWord != 0) {
    uint64_t word = 0;
    for (uint64_t b = 0; b < bytes % kWord; ++b) word |= static_cast<uint64_t>(data[words * kWord + b]) << (8 * b);
    sum += mix_word(word, first + words, key);
  }
  return sum;
}

// One atomic per block: sums over a warp by shuffles, over the warps through shared memory. Sums of integers, so in any order.
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

__global__ void __launch_bounds__(kThreads) weights_hash_kernel(const HashRow* rows, uint64_t n, uint64_t chunks, uint64_t* target) {
  uint64_t sum = 0;
  for (uint64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const HashRow row = row_of_chunk(rows, n, chunk);
    const uint64_t begin = (chunk - row.first_chunk) * kHashChunk;
    const uint64_t bytes = row.bytes - begin < kHashChunk ? row.bytes - begin : kHashChunk;
    sum += hash_chunk(row.data + begin, bytes, begin / kWord, row.key);
    if (begin == 0 && threadIdx.x == 0) sum += mix64(row.key);
  }
  add_block_sum(sum, target);
}

}  // namespace

const char* weights_hash_cuda(const HashRow* rows, uint64_t n, uint64_t chunks, uint64_t* sum, uintptr_t stream) {
  AREAL_LAUNCH(weights_hash_kernel, blocks_for(chunks, kBlocksPerMultiprocessor), kThreads, 0, stream, rows, n, chunks, sum);
  return launch_error();
}

}  // namespace areal
