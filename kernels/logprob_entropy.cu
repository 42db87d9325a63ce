#include <algorithm>

#include "launch.cuh"
#include "logprob_entropy.cuh"

namespace areal {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kNothing = -150.0f;   // 2^-150 is 0; what is smaller is replaced by this, since 0 * -inf is NaN
constexpr int kUnroll = 4;            // 16-byte loads in flight per thread
constexpr int64_t kNarrow = 2048;     // rows up to this many elements get a warp each
constexpr int64_t kWide = 16384;      // from here on, a few rows alone are spread over more threads
constexpr unsigned kBlocksPerSm = 4;  // of 256 threads
constexpr unsigned kMostSplits = 64;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// 16 bytes of elements, as floats.
template <typename E>
struct Vector {
  static constexpr int kSize = 16 / sizeof(E);

  static __device__ __forceinline__ void unpack(const uint4& bits, float* values) {
    E elements[kSize];
    memcpy(elements, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(elements[i]);
  }

  static __device__ __forceinline__ uint4 pack(const float* values);
};

template <>
__device__ __forceinline__ uint4 Vector<float>::pack(const float* values) {
  uint4 bits;
  memcpy(&bits, values, sizeof(bits));
  return bits;
}
template <>
__device__ __forceinline__ uint4 Vector<__nv_bfloat16>::pack(const float* values) {
  __nv_bfloat162 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  uint4 bits;
  memcpy(&bits, pairs, sizeof(bits));
  return bits;
}
template <>
__device__ __forceinline__ uint4 Vector<__half>::pack(const float* values) {
  __half2 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  uint4 bits;
  memcpy(&bits, pairs, sizeof(bits));
  return bits;
}

__device__ __forceinline__ void store_one(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_one(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_one(__half* p, float x) { *p = __float2half_rn(x); }

// Elements before the first that is 16 bytes aligned in both arrays; all of them where there is none.
template <typename E>
__device__ __forceinline__ int64_t unaligned(const E* z, const E* out, int64_t n) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(z) % 16;
  if (at != reinterpret_cast<uintptr_t>(out) % 16) return n;
  return min(n, static_cast<int64_t>((16 - at) % 16 / sizeof(E)));
}

// Part of a row: its largest logit z, and over x = (z - max) log2(e) / temperature the sums of 2^x and of 2^x x. NaN and +inf show in
// the sums, which they make NaN.
struct Partial {
  float max, sum, weighted;
};

template <int kSize>
__device__ __forceinline__ void add(Partial& part, const float* z, float to_log2) {
  float largest = z[0];
#pragma unroll
  for (int i = 1; i < kSize; ++i) largest = fmaxf(largest, z[i]);
  if (largest > part.max) {
    if (part.sum > 0.0f) {
      const float step = fmaxf((part.max - largest) * to_log2, kNothing);
      const float scale = exp2_fast(step);
      part.weighted = scale * (part.weighted + part.sum * step);
      part.sum *= scale;
    }
    part.max = largest;
  }
  const float base = part.max == -infinity() ? 0.0f : part.max;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float x = (z[i] - base) * to_log2;
    const float e = exp2_fast(x);
    part.sum += e;
    part.weighted += e * fmaxf(x, kNothing);
  }
}

__device__ __forceinline__ Partial merge(const Partial& a, const Partial& b, float to_log2) {
  const Partial& high = a.max < b.max ? b : a;
  const Partial& low = a.max < b.max ? a : b;
  // Without finite logits, sums are 0 or NaN.
  if (low.max == -infinity()) return {high.max, high.sum + low.sum, high.weighted + low.weighted};
  const float step = fmaxf((low.max - high.max) * to_log2, kNothing);
  const float scale = exp2_fast(step);
  return {high.max, high.sum + scale * low.sum, high.weighted + scale * (low.weighted + low.sum * step)};
}

__device__ __forceinline__ Partial merge_warp(Partial part, float to_log2) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Partial other = {__shfl_down_sync(0xFFFFFFFFu, part.max, offset), __shfl_down_sync(0xFFFFFFFFu, part.sum, offset),
                           __shfl_down_sync(0xFFFFFFFFu, part.weighted, offset)};
    part = merge(part, other, to_log2);
  }
  return part;
}

// Of a row's elements, those of this one of its `threads`.
template <typename E>
__device__ __forceinline__ Partial read_row(const E* z, int64_t n, int thread, int threads, float to_log2) {
  constexpr int kSize = Vector<E>::kSize;
  Partial part = {-infinity(), 0.0f, 0.0f};
  const int64_t head = unaligned(z, z, n);
  const int64_t vectors = (n - head) / kSize;
  const auto* source = reinterpret_cast<const uint4*>(z + head);
  float values[kUnroll * kSize];
  int64_t i = thread;
  for (; i + (kUnroll - 1) * threads < vectors; i += kUnroll * threads) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) bits[u] = __ldcs(source + i + u * threads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) Vector<E>::unpack(bits[u], values + u * kSize);
    add<kUnroll * kSize>(part, values, to_log2);
  }
  for (; i < vectors; i += threads) {
    Vector<E>::unpack(__ldcs(source + i), values);
    add<kSize>(part, values, to_log2);
  }
  const int64_t others = n - vectors * kSize;  // before and behind the vectors
  for (i = thread; i < others; i += threads) {
    values[0] = to_float(z[i < head ? i : i + vectors * kSize]);
    add<1>(part, values, to_log2);
  }
  return part;
}

// kRowThreads threads a row: a warp, or a block of as many.
template <typename E, int kRowThreads>
__global__ void __launch_bounds__(kRowThreads == 32 ? 256 : kRowThreads, 1024 / (kRowThreads == 32 ? 256 : kRowThreads))
    logprob_entropy_kernel(LogprobEntropy call) {
  constexpr int kWarps = kRowThreads / 32;
  const float to_log2 = call.inverse_temperature * kLog2E;
  const int thread = threadIdx.x % kRowThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= call.rows) return;  // whole warps
  const E* z = static_cast<const E*>(call.logits) + row * call.n;
  Partial part = merge_warp(read_row(z, call.n, thread, kRowThreads, to_log2), to_log2);
  if constexpr (kWarps > 1) {
    __shared__ Partial warps[kWarps];
    if (thread % 32 == 0) warps[thread / 32] = part;
    __syncthreads();
    if (thread >= 32) return;
    part = thread < kWarps ? warps[thread] : Partial{-infinity(), 0.0f, 0.0f};
    part = merge_warp(part, to_log2);
  }
  if (thread != 0) return;
  const int64_t target = call.targets[row];
  const float log_sum = logf(part.sum);
  const float logit = target >= 0 && target < call.n ? to_float(z[target]) : __int_as_float(0x7FC00000);
  call.logprobs[row] = (logit - part.max) * call.inverse_temperature - log_sum;
  call.entropy[row] = log_sum - kLn2 * (part.weighted / part.sum);
  call.max[row] = part.max;
  call.log_sum[row] = log_sum;
}

// What turns a logit of this row into its gradient.
struct RowGradient {
  float max, to_log2, log2_sum, constant, slope, at_target;
  int64_t target;

  __device__ __forceinline__ float operator()(float z) const {
    const float log2_p = (z - max) * to_log2 - log2_sum;
    return exp2_fast(log2_p) * (fmaxf(log2_p, kNothing) * slope + constant);
  }
};

__device__ __forceinline__ RowGradient row_gradient(const LogprobEntropyGradient& call, int64_t row) {
  const LogprobEntropy& forward = call.forward;
  const float inverse = forward.inverse_temperature, g_logprob = call.grad_logprob[row], g_entropy = call.grad_entropy[row];
  return {forward.max[row],
          inverse * kLog2E,
          forward.log_sum[row] * kLog2E,
          -inverse * (g_logprob + g_entropy * forward.entropy[row]),
          -inverse * g_entropy * kLn2,
          inverse * g_logprob,
          forward.targets[row]};
}

// blockIdx.y: which of gridDim.y parts of the row. Every thread reads an element before it writes it, and no other does either, so `out`
// may be the logits (hence no __restrict__ and no loads through the read-only path).
template <typename E, int kRowThreads>
__global__ void __launch_bounds__(256, kBlocksPerSm) logprob_entropy_gradient_kernel(LogprobEntropyGradient call) {
  constexpr int kSize = Vector<E>::kSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (256 / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= call.forward.rows) return;
  const int64_t n = call.forward.n;
  const E* z = static_cast<const E*>(call.forward.logits) + row * n;
  E* out = static_cast<E*>(call.out) + row * n;
  const RowGradient gradient = row_gradient(call, row);
  const int64_t thread = static_cast<int64_t>(blockIdx.y) * kRowThreads + threadIdx.x % kRowThreads;
  const int64_t threads = static_cast<int64_t>(gridDim.y) * kRowThreads;
  const int64_t head = unaligned(z, out, n);
  const int64_t vectors = (n - head) / kSize;
  const int64_t target = gradient.target - head;  // counted from the first vector
  const auto* source = reinterpret_cast<const uint4*>(z + head);
  auto* sink = reinterpret_cast<uint4*>(out + head);
  const auto write = [&](int64_t at, const uint4& bits) {
    float values[kSize];
    Vector<E>::unpack(bits, values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = gradient(values[i]);
    if (target >= at * kSize && target < (at + 1) * kSize) {
      const int64_t offset = target - at * kSize;
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] += i == offset ? gradient.at_target : 0.0f;
    }
    __stcs(sink + at, Vector<E>::pack(values));
  };
  int64_t i = thread;
  for (; i + (kUnroll - 1) * threads < vectors; i += kUnroll * threads) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) bits[u] = __ldcs(source + i + u * threads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) write(i + u * threads, bits[u]);
  }
  for (; i < vectors; i += threads) write(i, __ldcs(source + i));
  const int64_t others = n - vectors * kSize;
  for (i = thread; i < others; i += threads) {
    const int64_t at = i < head ? i : i + vectors * kSize;
    store_one(out + at, gradient(to_float(z[at])) + (at == gradient.target ? gradient.at_target : 0.0f));
  }
}

template <typename E>
void launch_forward(const LogprobEntropy& call, uintptr_t stream) {
  const auto rows = static_cast<unsigned>(call.rows);
  if (call.n <= kNarrow)
    AREAL_LAUNCH((logprob_entropy_kernel<E, 32>), (rows + 7) / 8, 256, 0, stream, call);
  else if (call.n >= kWide && rows < kBlocksPerSm * static_cast<unsigned>(multiprocessors()))
    AREAL_LAUNCH((logprob_entropy_kernel<E, 1024>), rows, 1024, 0, stream, call);
  else
    AREAL_LAUNCH((logprob_entropy_kernel<E, 256>), rows, 256, 0, stream, call);
}

template <typename E>
void launch_gradient(const LogprobEntropyGradient& call, uintptr_t stream) {
  const auto rows = static_cast<unsigned>(call.forward.rows);
  if (call.forward.n <= kNarrow) {
    AREAL_LAUNCH((logprob_entropy_gradient_kernel<E, 32>), (rows + 7) / 8, 256, 0, stream, call);
    return;
  }
  const unsigned wanted = 2 * kBlocksPerSm * static_cast<unsigned>(multiprocessors()) / rows;
  const auto useful = static_cast<unsigned>(std::min<int64_t>(call.forward.n / kNarrow, kMostSplits));
  const dim3 grid(rows, std::clamp(wanted, 1u, useful));
  AREAL_LAUNCH((logprob_entropy_gradient_kernel<E, 256>), grid, 256, 0, stream, call);
}

}  // namespace

const char* logprob_entropy_cuda(const LogprobEntropy& call, uintptr_t stream) {
  switch (call.element) {
    case 0:
      launch_forward<float>(call, stream);
      break;
    case 1:
      launch_forward<__nv_bfloat16>(call, stream);
      break;
    default:
      launch_forward<__half>(call, stream);
  }
  return launch_error();
}

const char* logprob_entropy_gradient_cuda(const LogprobEntropyGradient& call, uintptr_t stream) {
  switch (call.forward.element) {
    case 0:
      launch_gradient<float>(call, stream);
      break;
    case 1:
      launch_gradient<__nv_bfloat16>(call, stream);
      break;
    default:
      launch_gradient<__half>(call, stream);
  }
  return launch_error();
}

}  // namespace areal
