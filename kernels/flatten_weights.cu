#include "flatten_weights.cuh"
#include "tensor_list.cuh"

namespace areal {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread
constexpr unsigned kBlocksPerMultiprocessor = 8;

// To nearest, ties to even; not a number stays that. Integer arithmetic, so that host and device agree in every bit.
__device__ __forceinline__ uint32_t to_bfloat16(uint32_t bits) {
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
__device__ __forceinline__ uint32_t two_to_bfloat16(uint32_t low, uint32_t high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }

// store(i, load(i)) for every i in [0, n) that is this thread's; kUnroll loads come before the first of their stores.
template <typename Load, typename Store>
__device__ __forceinline__ void in_flight(uint64_t n, const Load& load, const Store& store) {
  uint64_t i = threadIdx.x;
  for (; i + (kUnroll - 1) * kThreads < n; i += kUnroll * kThreads) {
    decltype(load(i)) loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load(i + u * kThreads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store(i + u * kThreads, loaded[u]);
  }
  for (; i < n; i += kThreads) store(i, load(i));
}

template <typename T>
__device__ __forceinline__ void copy_as(const uint8_t* source, uint8_t* target, uint64_t bytes) {
  const auto* from = reinterpret_cast<const T*>(source);
  auto* const to = reinterpret_cast<T*>(target);
  const uint64_t n = bytes / sizeof(T);
  in_flight(n, [&](uint64_t i) { return __ldcs(from + i); }, [&](uint64_t i, const T& value) { __stcs(to + i, value); });
  for (uint64_t b = n * sizeof(T) + threadIdx.x; b < bytes; b += kThreads) target[b] = source[b];
}

__device__ __forceinline__ void copy_bytes(const uint8_t* source, uint8_t* target, uint64_t bytes) {
  switch (common_alignment(reinterpret_cast<uintptr_t>(source), reinterpret_cast<uintptr_t>(target))) {
    case 16:
      return copy_as<uint4>(source, target, bytes);
    case 8:
      return copy_as<uint2>(source, target, bytes);
    case 4:
      return copy_as<unsigned>(source, target, bytes);
    case 2:
      return copy_as<unsigned short>(source, target, bytes);
    default:
      return copy_as<unsigned char>(source, target, bytes);
  }
}

// Four floats, 16 bytes, to four bfloat16, 8 bytes: a warp writes whole 128-byte lines either way.
__device__ __forceinline__ void narrow(const uint8_t* source, uint8_t* target, uint64_t n) {
  const auto* words = reinterpret_cast<const uint32_t*>(source);
  auto* const halves = reinterpret_cast<uint16_t*>(target);
  uint64_t done = 0;
  if (common_alignment(reinterpret_cast<uintptr_t>(source), 2 * reinterpret_cast<uintptr_t>(target)) == 16) {
    const auto* from = reinterpret_cast<const uint4*>(source);
    auto* const to = reinterpret_cast<uint2*>(target);
    done = n / 4 * 4;
    in_flight(
        n / 4, [&](uint64_t i) { return __ldcs(from + i); },
        [&](uint64_t i, const uint4& x) { __stcs(to + i, make_uint2(two_to_bfloat16(x.x, x.y), two_to_bfloat16(x.z, x.w))); });
  }
  for (uint64_t i = done + threadIdx.x; i < n; i += kThreads) halves[i] = static_cast<uint16_t>(to_bfloat16(words[i]));
}

__device__ __forceinline__ void widen(const uint8_t* source, uint8_t* target, uint64_t n) {
  const auto* halves = reinterpret_cast<const uint16_t*>(source);
  auto* const words = reinterpret_cast<uint32_t*>(target);
  uint64_t done = 0;
  if (common_alignment(2 * reinterpret_cast<uintptr_t>(source), reinterpret_cast<uintptr_t>(target)) == 16) {
    const auto* from = reinterpret_cast<const uint2*>(source);
    auto* const to = reinterpret_cast<uint4*>(target);
    done = n / 4 * 4;
    in_flight(
        n / 4, [&](uint64_t i) { return __ldcs(from + i); },
        [&](uint64_t i, const uint2& x) { __stcs(to + i, make_uint4(x.x << 16, x.x & 0xFFFF0000u, x.y << 16, x.y & 0xFFFF0000u)); });
  }
  for (uint64_t i = done + threadIdx.x; i < n; i += kThreads) words[i] = static_cast<uint32_t>(halves[i]) << 16;
}

__global__ void __launch_bounds__(kThreads) copy_list_kernel(const ListCopy* rows, uint64_t n, uint64_t chunks) {
  for (uint64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const ListCopy row = row_of_chunk(rows, n, chunk);
    const uint64_t begin = (chunk - row.first_chunk) * kCopyChunk;
    const uint64_t count = row.count - begin < kCopyChunk ? row.count - begin : kCopyChunk;
    uint64_t target_size = 1;
    switch (row.conversion) {
      case Conversion::none:
        copy_bytes(row.source + begin, row.target + begin, count);
        break;
      case Conversion::float_to_bfloat16:
        target_size = 2;
        narrow(row.source + 4 * begin, row.target + 2 * begin, count);
        break;
      case Conversion::bfloat16_to_float:
        target_size = 4;
        widen(row.source + 2 * begin, row.target + 4 * begin, count);
        break;
    }
    if (begin + count == row.count)
      for (uint64_t b = threadIdx.x; b < row.zeros; b += kThreads) row.target[row.count * target_size + b] = 0;
  }
}

}  // namespace

const char* copy_list_cuda(const ListCopy* rows, uint64_t n, uint64_t chunks, uintptr_t stream) {
  AREAL_LAUNCH(copy_list_kernel, blocks_for(chunks, kBlocksPerMultiprocessor), kThreads, 0, stream, rows, n, chunks);
  return launch_error();
}

}  // namespace areal
