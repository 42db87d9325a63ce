// The rows of decode_attention, compiled once per instruction set: included inside a namespace of its own.

#include "vector8.h"

AREAL_INLINE float dot(const float* a, const float* b, int64_t d) {
  Float8 sum{};
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) sum += load8(a + c) * load8(b + c);
  float total = sum8(sum);
  for (; c < d; ++c) total += a[c] * b[c];
  return total;
}

// out[0 .. 8 * N) = sum over j of weights[j] * v[j * d + ...]; two chains of additions, since one would wait on its own results.
template <int N>
AREAL_INLINE void weighted_sum(const float* weights, const float* v, int64_t n, int64_t d, float* out) {
  Float8 even[N] = {}, odd[N] = {};
  int64_t j = 0;
  for (; j + 2 <= n; j += 2)
    for (int i = 0; i < N; ++i) {
      even[i] += weights[j] * load8(v + j * d + i * kWidth);
      odd[i] += weights[j + 1] * load8(v + (j + 1) * d + i * kWidth);
    }
  if (j < n)
    for (int i = 0; i < N; ++i) even[i] += weights[j] * load8(v + j * d + i * kWidth);
  for (int i = 0; i < N; ++i) store8(out + i * kWidth, even[i] + odd[i]);
}

AREAL_INLINE void attend_head(const float* q, const float* k, const float* v, int64_t n, int64_t d, float scaling, float* scores,
                              float* out) {
  float largest = -__builtin_inff();
  for (int64_t j = 0; j < n; ++j) {
    const float score = dot(q, k + j * d, d) * scaling;
    scores[j] = score;
    largest = score > largest ? score : largest;
  }
  const int64_t padded = (n + kWidth - 1) / kWidth * kWidth;
  for (int64_t j = n; j < padded; ++j) scores[j] = -__builtin_inff();
  Float8 sums{};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Float8 e = exp8(load8(scores + j) - largest);
    store8(scores + j, e);
    sums += e;
  }
  const float norm = 1.0f / sum8(sums);
  for (int64_t j = 0; j < n; ++j) scores[j] *= norm;
  int64_t c = 0;
  for (; c + 4 * kWidth <= d; c += 4 * kWidth) weighted_sum<4>(scores, v + c, n, d, out + c);
  const int64_t vectors = (d - c) / kWidth;
  if (vectors == 3) weighted_sum<3>(scores, v + c, n, d, out + c);
  if (vectors == 2) weighted_sum<2>(scores, v + c, n, d, out + c);
  if (vectors == 1) weighted_sum<1>(scores, v + c, n, d, out + c);
  for (c += vectors * kWidth; c < d; ++c) {
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += scores[j] * v[j * d + c];
    out[c] = sum;
  }
}

void decode_rows(const DecodeAttention& call, int64_t begin, int64_t end, float* scores) {
  const int64_t group = call.heads / call.kv_heads, d = call.d;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = call.positions[row];
    const int64_t first = call.window > 0 && position >= call.window ? position - call.window + 1 : 0;
    const int64_t slot = call.slots == nullptr ? row : call.slots[row];
    for (int64_t head = 0; head < call.heads; ++head) {
      const int64_t start = ((slot * call.kv_heads + head / group) * call.capacity + first) * d;
      attend_head(call.q + row * call.q_stride + head * d, call.k_cache + start, call.v_cache + start, position + 1 - first, d,
                  call.scaling, scores, call.out + (row * call.heads + head) * d);
    }
  }
}
