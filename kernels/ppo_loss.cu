#include <algorithm>

#include "launch.cuh"
#include "ppo_loss.cuh"
#include "ppo_token.cuh"

namespace areal {
namespace {

using device::LogRatio;
using device::PPOSequence;
using device::PPOTerm;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 4;  // tokens a thread takes at a time: 16 bytes of each tensor
constexpr unsigned kMaxBlocks = 2048;
constexpr unsigned kBlocksPerSm = 4;

struct Workspace {
  unsigned finished;                     // blocks of this launch; the last one sets it back to 0
  float sums[kStatistics * kMaxBlocks];  // [statistic][block]
};

// Of the tokens that a thread has seen.
struct Sums {
  float of[kStatistics] = {};
};

// The sums over the block of kCount values, for all its threads, always in the same order.
template <int kCount>
__device__ __forceinline__ void sum_over_block(float (&values)[kCount]) {
  __shared__ float warps[kWarps][kCount];
  __syncthreads();  // the last call's readers are done
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    for (int offset = 16; offset > 0; offset /= 2) values[s] += __shfl_xor_sync(0xFFFFFFFFu, values[s], offset);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][s] = values[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    values[s] = 0.0f;
    for (int w = 0; w < kWarps; ++w) values[s] += warps[w][s];
  }
}

__device__ __forceinline__ float full_scale(const PPOLoss& call) {
  return call.denominator == nullptr ? call.scale : call.scale / *call.denominator;
}

// The blocks leave their sums; the last one to come adds them up, a warp for a statistic, in an order that depends on the grid alone.
__device__ void finish(const PPOLoss& call, Sums& sums, Workspace* workspace) {
  sums.of[kClipped] = sums.of[kClippedHigh] + sums.of[kClippedLow];
  sum_over_block(sums.of);
  __shared__ bool last;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < kStatistics; ++s) __stcg(&workspace->sums[s * kMaxBlocks + blockIdx.x], sums.of[s]);
    __threadfence();
    last = atomicInc(&workspace->finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const unsigned lane = threadIdx.x % 32;
  for (int s = threadIdx.x / 32; s < kStatistics; s += kWarps) {
    double total = 0.0;
    for (unsigned block = lane; block < gridDim.x; block += 32) total += __ldcg(&workspace->sums[s * kMaxBlocks + block]);
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
    if (lane != 0) continue;
    if (s == kLoss) {
      total *= static_cast<double>(full_scale(call));
      *call.loss = static_cast<float>(total);
    }
    call.sums[s] = static_cast<float>(total);
  }
}

struct Token {
  float current, proximal, behavior, advantage, entropy;
  bool counted;
};

struct Gradients {
  float current, entropy;
  float slope;  // with a ratio of the sequence: what the token adds to its slope
};

// One token; kSequence: with what its sequence shares.
template <bool kSequence>
__device__ __forceinline__ Gradients add_token(const PPOLoss& call, float scale, const Token& x, const PPOSequence& shared, Sums& sums) {
  const PPOParameters& p = call.parameters;
  const LogRatio<float> stale = device::log_ratio(x.proximal, x.behavior, x.counted);
  const LogRatio<float> moved = device::log_ratio(x.current, p.decoupled ? x.proximal : x.behavior, x.counted);
  const float ratio = kSequence && call.sequence_ratio ? shared.ratio : moved.ratio;
  const float weight_ratio = kSequence && call.sequence_weight ? shared.weight_ratio : stale.ratio;
  const float filter_ratio = kSequence && call.sequence_filter ? shared.filter_ratio : stale.ratio;
  const PPOTerm<float> term = device::ppo_term(p, x.counted, x.current, x.advantage, ratio, weight_ratio, filter_ratio);
  const float loss_weight = kSequence ? shared.loss_weight : 1.0f;
  const float entropy = x.counted ? x.entropy : 0.0f;

  sums.of[kLoss] -= loss_weight * (term.objective + call.entropy_coef * entropy);
  sums.of[kTokens] += x.counted ? 1.0f : 0.0f;
  sums.of[kClippedHigh] += term.high ? 1.0f : 0.0f;
  sums.of[kClippedLow] += term.low ? 1.0f : 0.0f;
  sums.of[kDualClipped] += term.dual ? 1.0f : 0.0f;
  sums.of[kRatio] += x.counted ? ratio : 0.0f;
  sums.of[kImportanceWeight] += x.counted ? term.weight : 0.0f;
  sums.of[kWeightTruncated] += term.truncated ? 1.0f : 0.0f;
  sums.of[kFiltered] += x.counted && !term.kept ? 1.0f : 0.0f;
  sums.of[kKlProximal] += moved.ratio - 1.0f - moved.log;
  sums.of[kKlBehaviour] += stale.ratio - 1.0f - stale.log;
  sums.of[kEntropy] += entropy;

  const bool free = x.counted && (p.cispo || moved.free);
  return {free ? -scale * loss_weight * term.slope : 0.0f, x.counted ? -scale * loss_weight * call.entropy_coef : 0.0f, term.slope};
}

__device__ __forceinline__ bool counts(const PPOLoss& call, int64_t at) {
  return call.float_mask == nullptr ? call.mask[at] != 0 : call.float_mask[at] != 0.0f;
}

__device__ __forceinline__ Token load_token(const PPOLoss& call, int64_t at) {
  return {__ldcs(call.current + at),
          __ldcs(call.proximal + at),
          __ldcs(call.behavior + at),
          __ldcs(call.advantages + at),
          call.entropy == nullptr ? 0.0f : __ldcs(call.entropy + at),
          counts(call, at)};
}

__device__ __forceinline__ float4 load4(const float* p) { return __ldcs(reinterpret_cast<const float4*>(p)); }

// Not 0 where the token counts.
__device__ __forceinline__ uint4 load_mask4(const PPOLoss& call, int64_t at) {
  if (call.float_mask == nullptr) {
    const unsigned bytes = __ldcs(reinterpret_cast<const unsigned*>(call.mask + at));
    return make_uint4(bytes & 0xFFu, bytes & 0xFF00u, bytes & 0xFF0000u, bytes & 0xFF000000u);
  }
  const float4 mask = load4(call.float_mask + at);
  return make_uint4(mask.x != 0.0f, mask.y != 0.0f, mask.z != 0.0f, mask.w != 0.0f);
}

// Token level: one pass, four tokens a thread at a time. kAligned: all pointers are multiples of 16 bytes, that of a mask of bytes of 4.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) ppo_tokens_kernel(PPOLoss call, Workspace* workspace) {
  const float scale = full_scale(call);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t groups = kAligned ? call.tokens / kPerThread : 0;
  Sums sums;
  for (int64_t group = thread; group < groups; group += stride) {
    const int64_t at = group * kPerThread;
    const float4 current = load4(call.current + at), proximal = load4(call.proximal + at);
    const float4 behavior = load4(call.behavior + at), advantages = load4(call.advantages + at);
    const float4 entropy = call.entropy == nullptr ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : load4(call.entropy + at);
    const uint4 mask = load_mask4(call, at);
    const auto token = [&](float c, float p, float b, float a, float h, unsigned m) {
      return add_token<false>(call, scale, {c, p, b, a, h, m != 0}, {}, sums);
    };
    const Gradients g0 = token(current.x, proximal.x, behavior.x, advantages.x, entropy.x, mask.x);
    const Gradients g1 = token(current.y, proximal.y, behavior.y, advantages.y, entropy.y, mask.y);
    const Gradients g2 = token(current.z, proximal.z, behavior.z, advantages.z, entropy.z, mask.z);
    const Gradients g3 = token(current.w, proximal.w, behavior.w, advantages.w, entropy.w, mask.w);
    if (call.gradient != nullptr)
      __stcs(reinterpret_cast<float4*>(call.gradient + at), make_float4(g0.current, g1.current, g2.current, g3.current));
    if (call.entropy_gradient != nullptr)
      __stcs(reinterpret_cast<float4*>(call.entropy_gradient + at), make_float4(g0.entropy, g1.entropy, g2.entropy, g3.entropy));
  }
  for (int64_t at = groups * kPerThread + thread; at < call.tokens; at += stride) {
    const Gradients g = add_token<false>(call, scale, load_token(call, at), {}, sums);
    if (call.gradient != nullptr) call.gradient[at] = g.current;
    if (call.entropy_gradient != nullptr) call.entropy_gradient[at] = g.entropy;
  }
  finish(call, sums, workspace);
}

__device__ __forceinline__ void clear(const PPOLoss& call, int64_t begin, int64_t end) {
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    if (call.gradient != nullptr) call.gradient[at] = 0.0f;
    if (call.entropy_gradient != nullptr) call.entropy_gradient[at] = 0.0f;
  }
}

// A block for a sequence at a time: its log-ratios are added up, then its tokens taken, then, where the ratio is the sequence's, the
// gradients written; the second and third time the tokens come out of the cache.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) ppo_sequences_kernel(PPOLoss call, Workspace* workspace) {
  const PPOParameters& p = call.parameters;
  const float scale = full_scale(call);
  const bool of_sequence = call.sequence_ratio && !p.cispo;
  const auto bound = [&](int64_t i) { return max(int64_t{0}, min(static_cast<int64_t>(call.cu_seqlens[i]), call.tokens)); };
  Sums sums;
  if (blockIdx.x == 0) {  // tokens outside of all sequences
    clear(call, 0, bound(0));
    clear(call, bound(call.sequences), call.tokens);
  }
  for (int64_t sequence = blockIdx.x; sequence < call.sequences; sequence += gridDim.x) {
    const int64_t begin = bound(sequence), end = bound(sequence + 1);
    float log_sums[3] = {};
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const bool counted = counts(call, at);
      log_sums[0] += counted ? 1.0f : 0.0f;
      log_sums[1] += device::log_ratio(call.current[at], p.decoupled ? call.proximal[at] : call.behavior[at], counted).log;
      log_sums[2] += device::log_ratio(call.proximal[at], call.behavior[at], counted).log;
    }
    sum_over_block(log_sums);
    const PPOSequence shared = device::ppo_sequence(log_sums[0], log_sums[1], log_sums[2], call.sequence_mean != 0);
    float slope[1] = {};
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const Gradients g = add_token<true>(call, scale, load_token(call, at), shared, sums);
      if (call.gradient != nullptr && !of_sequence) call.gradient[at] = g.current;
      if (call.entropy_gradient != nullptr) call.entropy_gradient[at] = g.entropy;
      slope[0] += g.slope;
    }
    if (!of_sequence || call.gradient == nullptr) continue;
    sum_over_block(slope);
    // d(log of the geometric mean) / d(log-prob) is 1 / n for each of its tokens.
    const float gradient = -scale * shared.loss_weight * shared.mean * slope[0];
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const bool counted = counts(call, at);
      const bool free = device::log_ratio(call.current[at], p.decoupled ? call.proximal[at] : call.behavior[at], counted).free;
      call.gradient[at] = counted && free ? gradient : 0.0f;
    }
  }
  finish(call, sums, workspace);
}

}  // namespace

int64_t ppo_loss_cuda_workspace() { return (sizeof(Workspace) + 3) / 4; }

const char* ppo_loss_cuda(const PPOLoss& call, void* workspace, uintptr_t stream) {
  auto* const space = static_cast<Workspace*>(workspace);
  const int64_t most = std::min<int64_t>(kMaxBlocks, static_cast<int64_t>(multiprocessors()) * kBlocksPerSm);
  const auto blocks = [&](int64_t wanted) { return static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, most))); };
  if (call.cu_seqlens != nullptr) {
    AREAL_LAUNCH(ppo_sequences_kernel, blocks(call.sequences), kThreads, 0, stream, call, space);
    return launch_error();
  }
  constexpr int64_t kPerBlock = kThreads * kPerThread;
  const unsigned grid = blocks((call.tokens + kPerBlock - 1) / kPerBlock);
  uintptr_t bits = reinterpret_cast<uintptr_t>(call.mask) * 4;
  for (const float* p : {call.float_mask, call.current, call.proximal, call.behavior, call.advantages, call.entropy,
                         static_cast<const float*>(call.gradient), static_cast<const float*>(call.entropy_gradient)})
    bits |= reinterpret_cast<uintptr_t>(p);
  if (bits % 16 == 0)
    AREAL_LAUNCH(ppo_tokens_kernel<true>, grid, kThreads, 0, stream, call, space);
  else
    AREAL_LAUNCH(ppo_tokens_kernel<false>, grid, kThreads, 0, stream, call, space);
  return launch_error();
}

}  // namespace areal
