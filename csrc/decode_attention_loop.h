// The work items of decode_attention, compiled once per instruction set: included inside a namespace of its own.
//
// The query heads of one K/V head share every load of K and V. They go in runs of 4, 2 and 1: a run of `Heads` heads has 8 / Heads keys
// in eight accumulators, which one transposition sums, and blocks of keys stay in the first-level cache from run to run.

#include "vector8.h"
#include "vector8_bfloat16.h"

constexpr int64_t kKeyBlock = 64, kValueBlock = 32;  // positions
// Eight vectors of several rows at a time is an order of accesses in which the processor's own prefetching loses the track.
constexpr int64_t kAhead = 6144, kLine = 64;  // bytes

// Asks for `bytes` bytes at p, a multiple of a line.
template <int bytes>
AREAL_INLINE void fetch(const void* p) {
  for (int i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// The inner product of a, float, and b, float or bfloat16.
template <typename T>
AREAL_INLINE float dot(const float* a, const T* b, int64_t n) {
  Float8 sum{};
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) sum += load8(a + c) * load8(b + c);
  float total = sum8(sum);
  for (; c < n; ++c) total += a[c] * load1(b + c);
  return total;
}

// Scores of `Heads` heads (rows of q, d apart) for the 8 / Heads keys at k: head h, key j at scores[h * stride + j].
template <int Heads, typename T>
AREAL_INLINE void score_keys(const float* q, const T* k, int64_t d, float* scores, int64_t stride) {
  constexpr int kKeys = 8 / Heads;
  Float8 sums[8] = {};
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    fetch<kKeys * kWidth * sizeof(T)>(reinterpret_cast<const char*>(k + c * kKeys) + kAhead);
    Float8 keys[kKeys];
    for (int j = 0; j < kKeys; ++j) keys[j] = load8(k + j * d + c);
    for (int h = 0; h < Heads; ++h) {
      const Float8 query = load8(q + h * d + c);
      for (int j = 0; j < kKeys; ++j) sums[h * kKeys + j] += query * keys[j];
    }
  }
  float totals[8];
  store8(totals, sum_each8(sums));
  for (; c < d; ++c)
    for (int i = 0; i < 8; ++i) totals[i] += q[i / kKeys * d + c] * load1(k + i % kKeys * d + c);
  for (int h = 0; h < Heads; ++h) __builtin_memcpy(scores + h * stride, totals + h * kKeys, kKeys * sizeof(float));
}

template <int Heads, typename T>
AREAL_INLINE void score_block(const float* q, const T* k, int64_t n, int64_t d, float* scores, int64_t stride) {
  constexpr int64_t kKeys = 8 / Heads;
  int64_t j = 0;
  for (; j + kKeys <= n; j += kKeys) score_keys<Heads>(q, k + j * d, d, scores + j, stride);
  for (; j < n; ++j)
    for (int h = 0; h < Heads; ++h) scores[h * stride + j] = dot(q + h * d, k + j * d, d);
}

// out[h * d ..] += sum over j < n of weights[h * stride + j] * v[j * d ..], 8 * Vectors columns. Few accumulators come in two chains,
// since one would wait on its own results. From `ahead` on is what it fetches for the next block, the share of these columns.
template <int Heads, int Vectors, typename T>
AREAL_INLINE void add_values(const float* weights, int64_t stride, const T* v, const T* ahead, int64_t n, int64_t d, float* out) {
  constexpr int kChains = Heads * Vectors >= 8 ? 1 : 2;
  Float8 sums[kChains][Heads][Vectors] = {};
  int64_t j = 0;
  for (; j + kChains <= n; j += kChains)
    for (int chain = 0; chain < kChains; ++chain) {
      fetch<Vectors * kWidth * sizeof(T)>(ahead + (j + chain) * Vectors * kWidth);
      Float8 values[Vectors];
      for (int i = 0; i < Vectors; ++i) values[i] = load8(v + (j + chain) * d + i * kWidth);
      for (int h = 0; h < Heads; ++h)
        for (int i = 0; i < Vectors; ++i) sums[chain][h][i] += weights[h * stride + j + chain] * values[i];
    }
  if (j < n)
    for (int h = 0; h < Heads; ++h)
      for (int i = 0; i < Vectors; ++i) sums[0][h][i] += weights[h * stride + j] * load8(v + j * d + i * kWidth);
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Vectors; ++i) {
      float* const to = out + h * d + i * kWidth;
      store8(to, load8(to) + (kChains == 1 ? sums[0][h][i] : sums[0][h][i] + sums[kChains - 1][h][i]));
    }
}

// All columns from c on: as many vectors at a time as there are, `Vectors` at most, then single ones.
template <int Heads, int Vectors, typename T>
AREAL_INLINE void add_columns(const float* weights, int64_t stride, const T* v, int64_t n, int64_t d, int64_t c, float* out) {
  for (; c + Vectors * kWidth <= d; c += Vectors * kWidth)
    add_values<Heads, Vectors>(weights, stride, v + c, v + n * (d + c), n, d, out + c);
  if constexpr (Vectors > 1) {
    add_columns<Heads, Vectors - 1>(weights, stride, v, n, d, c, out);
  } else {
    for (; c < d; ++c)
      for (int h = 0; h < Heads; ++h) {
        float sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += weights[h * stride + j] * load1(v + j * d + c);
        out[h * d + c] += sum;
      }
  }
}

// scores[0 .. n), with a soft cap what that makes of them, become exp(score - largest); n is rounded up to whole vectors, which must be
// there. Returns their sum.
AREAL_INLINE float exponentiate(float* scores, int64_t n, float softcap) {
  const int64_t padded = (n + kWidth - 1) / kWidth * kWidth;
  for (int64_t j = n; j < padded; ++j) scores[j] = scores[n - 1];
  Float8 largest = Float8{} - __builtin_inff();
  for (int64_t j = 0; j < padded; j += kWidth) {
    Float8 score = load8(scores + j);
    if (softcap > 0) {
      score = softcap * tanh8(score);
      store8(scores + j, score);
    }
    largest = max8(largest, score);
  }
  for (int64_t j = n; j < padded; ++j) scores[j] = -__builtin_inff();
  const float top = largest8(largest);
  Float8 sums{};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Float8 e = exp8(load8(scores + j) - top);
    store8(scores + j, e);
    sums += e;
  }
  return sum8(sums);
}

// run(Heads, h) for runs of the heads h to h + Heads - 1 that make up `group`.
#define AREAL_HEAD_RUNS(group, run)             \
  do {                                          \
    int64_t h = 0;                              \
    for (; h + 4 <= (group); h += 4) run(4, h); \
    if (h + 2 <= (group)) {                     \
      run(2, h);                                \
      h += 2;                                   \
    }                                           \
    if (h < (group)) run(1, h);                 \
  } while (false)

// The `group` query heads of one row and one K/V head over n keys. q [group, d] is scaled already (with a soft cap: divided by it);
// scores is [group, stride], stride >= n rounded up to whole vectors; out [group, d] may hold anything.
template <typename T>
AREAL_INLINE void attend_group(const float* q, const T* k, const T* v, int64_t group, int64_t n, int64_t d, float softcap, float* sums,
                               float* scores, int64_t stride, float* out) {
  for (int64_t j = 0; j < n; j += kKeyBlock) {
    const int64_t keys = n - j < kKeyBlock ? n - j : kKeyBlock;
#define AREAL_SCORE(heads, h) score_block<heads>(q + h * d, k + j * d, keys, d, scores + h * stride + j, stride)
    AREAL_HEAD_RUNS(group, AREAL_SCORE);
  }
  for (int64_t h = 0; h < group; ++h) sums[h] = exponentiate(scores + h * stride, n, softcap);
  for (int64_t i = 0; i < group * d; ++i) out[i] = 0;
  for (int64_t j = 0; j < n; j += kValueBlock) {
    const int64_t keys = n - j < kValueBlock ? n - j : kValueBlock;
#define AREAL_ADD(heads, h) add_columns<heads, 8 / heads>(scores + h * stride + j, stride, v + j * d, keys, d, 0, out + h * d)
    AREAL_HEAD_RUNS(group, AREAL_ADD);
  }
  for (int64_t h = 0; h < group; ++h) {
    const float norm = 1.0f / sums[h];
    for (int64_t c = 0; c < d; ++c) out[h * d + c] *= norm;
  }
}

template <typename T>
AREAL_INLINE void attend_items(const DecodeAttention& call, int64_t begin, int64_t end, float* scratch, int64_t stride) {
  const int64_t group = call.heads / call.kv_heads, d = call.d;
  const float scaling = call.softcap > 0 ? call.scaling / call.softcap : call.scaling;
  float* const queries = scratch;
  float* const sums = queries + group * d;
  float* const scores = sums + group;
  int64_t row = begin / call.kv_heads, kv_head = begin % call.kv_heads;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t length = call.lengths[row];
    float* const out = call.out + (row * call.heads + kv_head * group) * d;
    const int64_t first = call.window > 0 && length > call.window ? length - call.window : 0;
    const int64_t slot = call.slots == nullptr ? row : call.slots[row];
    const int64_t start = ((slot * call.kv_heads + kv_head) * call.capacity + first) * d;
    for (int64_t h = 0; h < group; ++h)
      for (int64_t c = 0; c < d; ++c)
        queries[h * d + c] = call.q[row * call.q_strides[0] + (kv_head * group + h) * call.q_strides[1] + c] * scaling;
    if (length == 0)
      for (int64_t i = 0; i < group * d; ++i) out[i] = 0;
    else
      attend_group(queries, static_cast<const T*>(call.k_cache) + start, static_cast<const T*>(call.v_cache) + start, group, length - first,
                   d, call.softcap, sums, scores, stride, out);
    if (++kv_head == call.kv_heads) {
      kv_head = 0;
      ++row;
    }
  }
}

// Items (row, K/V head) from begin to end. scratch has heads / kv_heads * (d + 1 + stride) floats; stride is the largest number of
// positions that a row sees, rounded up to whole vectors.
void decode_items(const DecodeAttention& call, int64_t begin, int64_t end, float* scratch, int64_t stride) {
  if (call.bf16)
    attend_items<BFloat16>(call, begin, end, scratch, stride);
  else
    attend_items<float>(call, begin, end, scratch, stride);
}

#undef AREAL_HEAD_RUNS
#undef AREAL_SCORE
#undef AREAL_ADD
