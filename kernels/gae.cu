// Advantages as a segmented scan from the end: A_t = b_t + a_t A_{t+1} is an affine map of A_{t+1}, with a_t = 0 at the last token of a
// sequence, and such maps compose. One launch composes each tile of tokens into one map, a second one applies them: a block joins the
// maps of the tiles after its own until a sequence ends in one, and scans its own tile again. How the tokens are cut into sequences
// makes no difference to the work, and everything is joined in a fixed order.
#include "gae.cuh"
#include "launch.cuh"

namespace areal {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = kGaeTile / kThreads;
constexpr int kWarps = kThreads / 32;
static_assert(kPerThread == 4, "a thread's tokens are one float4");

// x -> a x + b. a = 0 means that x does not matter, infinite or not a number though it may be.
struct Affine {
  float a, b;
};

__device__ __forceinline__ Affine identity() { return {1.0f, 0.0f}; }

__device__ __forceinline__ float apply(const Affine& map, float x) { return map.a == 0.0f ? map.b : map.b + map.a * x; }

// The map of a range of tokens from those of its earlier and its later part.
__device__ __forceinline__ Affine join(const Affine& earlier, const Affine& later) {
  return {earlier.a * later.a, apply(earlier, later.b)};
}

struct Scratch {
  Affine warps[kWarps];
  int32_t ends[kGaeTile];  // the sequence whose last token is this one, else -1
};

// The join of all threads' maps, earlier threads being earlier tokens, and of those after this thread.
__device__ __forceinline__ Affine join_block(Affine map, Affine& after, Affine* warps) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (unsigned offset = 1; offset < 32; offset *= 2) {
    Affine other;
    other.a = __shfl_down_sync(0xFFFFFFFFu, map.a, offset);
    other.b = __shfl_down_sync(0xFFFFFFFFu, map.b, offset);
    if (lane + offset < 32) map = join(map, other);
  }
  after.a = __shfl_down_sync(0xFFFFFFFFu, map.a, 1);
  after.b = __shfl_down_sync(0xFFFFFFFFu, map.b, 1);
  if (lane == 31) after = identity();
  __syncthreads();  // the last use of `warps` is over
  if (lane == 0) warps[warp] = map;
  __syncthreads();
  Affine total = identity(), later = identity();
  for (int w = kWarps - 1; w >= 0; --w) {
    total = join(warps[w], total);
    if (w == static_cast<int>(warp) + 1) later = total;
  }
  after = join(after, later);
  return total;
}

// Marks the last tokens of the sequences that end in the tile. Every sequence that is not empty ends in exactly one place.
__device__ __forceinline__ void find_ends(const Gae& call, int64_t begin, int32_t* ends) {
  for (int i = threadIdx.x; i < kGaeTile; i += kThreads) ends[i] = -1;
  int64_t low = 1, high = call.n + 1;  // the first i >= 1 with cu_seqlens[i] > begin
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (call.cu_seqlens[middle] > begin)
      high = middle;
    else
      low = middle + 1;
  }
  __syncthreads();
  for (int64_t i = low + threadIdx.x; i <= call.n && call.cu_seqlens[i] <= begin + kGaeTile; i += kThreads) {
    const int64_t at = call.cu_seqlens[i] - 1 - begin;
    if (at >= 0 && call.cu_seqlens[i - 1] < call.cu_seqlens[i]) ends[at] = static_cast<int32_t>(i - 1);
  }
  __syncthreads();
}

// kAligned: all four arrays begin at multiples of 16 bytes.
template <bool kAligned>
__device__ __forceinline__ void load4(const float* data, int64_t at, int64_t total, float* out) {
  if (kAligned && at + 4 <= total) {
    const float4 x = *reinterpret_cast<const float4*>(data + at);
    out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
    return;
  }
  for (int k = 0; k < 4; ++k) out[k] = at + k < total ? data[at + k] : 0.0f;
}

template <bool kAligned>
__device__ __forceinline__ void store4(float* data, int64_t at, int64_t total, const float* x) {
  if (kAligned && at + 4 <= total) {
    *reinterpret_cast<float4*>(data + at) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
  for (int k = 0; k < 4; ++k)
    if (at + k < total) data[at + k] = x[k];
}

// The maps of this thread's four tokens; `values` [4] is filled on the way. Tokens past the end are the identity.
template <bool kAligned>
__device__ __forceinline__ void load_maps(const Gae& call, int64_t at, const int32_t* ends, float decay, float* values, Affine* maps) {
  const auto gamma = static_cast<float>(call.gamma);
  float rewards[kPerThread];
  load4<kAligned>(call.rewards, at, call.total, rewards);
  load4<kAligned>(call.values, at, call.total, values);
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t t = at + k;
    if (t >= call.total) {
      maps[k] = identity();
      continue;
    }
    const int32_t sequence = ends[kPerThread * threadIdx.x + k];
    float next = 0.0f;
    if (sequence >= 0)
      next = call.bootstrap == nullptr ? 0.0f : call.bootstrap[sequence];
    else if (k + 1 < kPerThread)
      next = values[k + 1];
    else if (t + 1 < call.total)
      next = call.values[t + 1];
    maps[k] = {sequence >= 0 ? 0.0f : decay, rewards[k] + gamma * next - values[k]};
  }
}

__device__ __forceinline__ Affine join_four(const Affine* maps) { return join(join(maps[0], maps[1]), join(maps[2], maps[3])); }

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) gae_tiles_kernel(Gae call, Affine* tiles) {
  __shared__ Scratch scratch;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kGaeTile;
  find_ends(call, begin, scratch.ends);
  float values[kPerThread];
  Affine maps[kPerThread], after;
  load_maps<kAligned>(call, begin + kPerThread * threadIdx.x, scratch.ends, static_cast<float>(call.gamma * call.lam), values, maps);
  const Affine tile = join_block(join_four(maps), after, scratch.warps);
  if (threadIdx.x == 0) tiles[blockIdx.x] = tile;
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) gae_kernel(Gae call, const Affine* tiles) {
  __shared__ Scratch scratch;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kGaeTile;
  find_ends(call, begin, scratch.ends);

  // The advantage of the token after the tile. All threads see the same maps, so they leave the loop together.
  Affine rest = identity(), after;
  if (scratch.ends[kGaeTile - 1] < 0)
    for (int64_t tile = static_cast<int64_t>(blockIdx.x) + 1; tile < gridDim.x && rest.a != 0.0f; tile += kThreads) {
      const int64_t mine = tile + threadIdx.x;
      rest = join(rest, join_block(mine < gridDim.x ? tiles[mine] : identity(), after, scratch.warps));
    }

  const int64_t at = begin + kPerThread * threadIdx.x;
  float values[kPerThread], advantages[kPerThread], returns[kPerThread];
  Affine maps[kPerThread];
  load_maps<kAligned>(call, at, scratch.ends, static_cast<float>(call.gamma * call.lam), values, maps);
  join_block(join_four(maps), after, scratch.warps);
  float advantage = apply(after, rest.b);
  for (int k = kPerThread - 1; k >= 0; --k) {
    advantage = apply(maps[k], advantage);
    advantages[k] = advantage;
    returns[k] = advantage + values[k];
  }
  store4<kAligned>(call.advantages, at, call.total, advantages);
  store4<kAligned>(call.returns, at, call.total, returns);
}

template <bool kAligned>
void launch(const Gae& call, Affine* tiles, uintptr_t stream) {
  const auto blocks = static_cast<unsigned>((call.total + kGaeTile - 1) / kGaeTile);
  if (blocks > 1) AREAL_LAUNCH(gae_tiles_kernel<kAligned>, blocks, kThreads, 0, stream, call, tiles);
  AREAL_LAUNCH(gae_kernel<kAligned>, blocks, kThreads, 0, stream, call, tiles);
}

}  // namespace

const char* gae_cuda(const Gae& call, float* workspace, uintptr_t stream) {
  if (call.total == 0) return nullptr;
  bool aligned = true;
  for (const float* p : {call.rewards, call.values, static_cast<const float*>(call.advantages), static_cast<const float*>(call.returns)})
    aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  static_assert(sizeof(Affine) == 2 * sizeof(float));
  auto* const tiles = reinterpret_cast<Affine*>(workspace);
  if (aligned)
    launch<true>(call, tiles, stream);
  else
    launch<false>(call, tiles, stream);
  return launch_error();
}

}  // namespace areal
