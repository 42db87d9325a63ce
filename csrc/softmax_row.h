// Softmax statistics of one row of logits, and the gradient through them: log-probability of a target and entropy, without ever storing
// the probabilities. Included after vector8.h and vector8_bfloat16.h, in the same namespace. E is float or BFloat16.
//
// With z the row, x_j = (z_j - max) / temperature and S = sum exp(x_j):  log p_j = x_j - log S,  entropy H = log S - sum exp(x_j) x_j / S.
// Differences to the largest logit are taken before they are divided, so large logits cost no precision. p_j is 0 where it is below
// exp(-87) / S, at -inf too, and such elements add nothing to H or to a gradient. NaN or +inf in the row makes its results NaN.

struct RowStatistics {
  float max;      // the largest logit, as it is (not divided by the temperature); -inf in a row without finite logits
  float log_sum;  // log S
  float entropy;  // H, in nats
};

constexpr int64_t kRowBlock = 2048;  // elements: a block stays in L1 from the pass for its maximum to the pass for its sums
constexpr int kChains = 4;           // independent chains of additions, which would wait on their own results

AREAL_INLINE float load1(const float* p) { return *p; }
AREAL_INLINE float load1(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
AREAL_INLINE void store1(float* p, float x) { *p = x; }
AREAL_INLINE void store1(BFloat16* p, float x) {
  BFloat16 all[kWidth];
  store8(all, Float8{} + x);
  *p = all[0];
}

// The last count < 8 elements of a row, filled up with -inf.
template <typename E>
AREAL_INLINE Float8 load_tail(const E* p, int64_t count) {
  float all[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) all[i] = i < count ? load1(p + i) : -__builtin_inff();
  return load8(all);
}

AREAL_INLINE float largest8(const Float8& x) {
  float largest = x[0];
  for (int i = 1; i < kWidth; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// exp(x) for x <= 0 (or NaN, which stays), 0 below -87; there x becomes -87, so that exp(x) * x is 0 at -inf too.
AREAL_INLINE Float8 exp8_limited(Float8& x) {
  const Int8 tiny = x < -87.0f;
  x = tiny ? Float8{} - 87.0f : x;
  const Float8 y = exp8_around(x, __builtin_convertvector(x * 1.44269504f - 0.5f, Int8));
  return tiny ? Float8{} : y;
}

template <typename E>
AREAL_INLINE float block_max(const E* z, int64_t n) {
  const Float8 lowest = Float8{} - __builtin_inff();
  Float8 chains[kChains] = {lowest, lowest, lowest, lowest};
  int64_t j = 0;
  for (; j + kChains * kWidth <= n; j += kChains * kWidth)
    for (int i = 0; i < kChains; ++i) chains[i] = max8(load8(z + j + i * kWidth), chains[i]);
  for (; j + kWidth <= n; j += kWidth) chains[0] = max8(load8(z + j), chains[0]);
  if (j < n) chains[1] = max8(load_tail(z + j, n - j), chains[1]);
  return largest8(max8(max8(chains[0], chains[1]), max8(chains[2], chains[3])));
}

// Sums of exp(x) and of exp(x) x over a block of at most kRowBlock elements.
template <typename E>
AREAL_INLINE void block_sums(const E* z, int64_t n, float max, float inverse_temperature, float* sum, float* weighted) {
  Float8 sums[kChains] = {}, products[kChains] = {};
  const auto add = [&](const Float8& logits, int i) __attribute__((always_inline)) {
    Float8 x = (logits - max) * inverse_temperature;
    const Float8 e = exp8_limited(x);
    sums[i] += e;
    products[i] += e * x;
  };
  int64_t j = 0;
  for (; j + kChains * kWidth <= n; j += kChains * kWidth)
    for (int i = 0; i < kChains; ++i) add(load8(z + j + i * kWidth), i);
  for (; j + kWidth <= n; j += kWidth) add(load8(z + j), 0);
  if (j < n) add(load_tail(z + j, n - j), 1);
  *sum = sum8((sums[0] + sums[1]) + (sums[2] + sums[3]));
  *weighted = sum8((products[0] + products[1]) + (products[2] + products[3]));
}

// One read of the row from memory: the maximum is that of the blocks so far, and the sums follow it when it grows.
template <typename E>
AREAL_INLINE RowStatistics row_statistics(const E* z, int64_t n, float inverse_temperature) {
  float max = -__builtin_inff();
  double sum = 0, weighted = 0;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const int64_t size = n - begin < kRowBlock ? n - begin : kRowBlock;
    const float largest = block_max(z + begin, size);
    if (largest > max) {
      if (sum != 0) {
        const double distance = double(max - largest) * inverse_temperature;
        const double step = distance < -1000 ? -1000 : distance;  // not -inf, as 0 * inf is NaN
        const double scale = __builtin_exp(step);
        weighted = scale * (weighted + sum * step);
        sum *= scale;
      }
      max = largest;
    }
    float block_sum, block_weighted;
    block_sums(z + begin, size, max == -__builtin_inff() ? 0.0f : max, inverse_temperature, &block_sum, &block_weighted);
    sum += block_sum;
    weighted += block_weighted;
  }
  const float log_sum = static_cast<float>(__builtin_log(sum));
  return {max, log_sum, static_cast<float>(__builtin_log(sum) - weighted / sum)};
}

// log p of an element of the row; -inf where the logit is.
AREAL_INLINE float row_logprob(const RowStatistics& row, float logit, float inverse_temperature) {
  return (logit - row.max) * inverse_temperature - row.log_sum;
}

// out_j = (grad_logprob (1[j = target] - p_j) - grad_entropy p_j (log p_j + H)) / temperature; `out` may be `z`: then this is in place.
template <typename E>
AREAL_INLINE void write_row_gradient(const E* z, E* out, int64_t n, int64_t target, const RowStatistics& row, float grad_logprob,
                                     float grad_entropy, float inverse_temperature) {
  const float constant = -inverse_temperature * (grad_logprob + grad_entropy * row.entropy);
  const float slope = -inverse_temperature * grad_entropy;
  const auto gradient = [&](const Float8& logits) __attribute__((always_inline)) {
    Float8 log_p = (logits - row.max) * inverse_temperature - row.log_sum;
    const Float8 p = exp8_limited(log_p);
    return p * (log_p * slope + constant);
  };
  const Float8 at_target = gradient(Float8{} + load1(z + target)) + grad_logprob * inverse_temperature;
  int64_t j = 0;
  for (; j + kChains * kWidth <= n; j += kChains * kWidth) {
    Float8 block[kChains];
    for (int i = 0; i < kChains; ++i) block[i] = gradient(load8(z + j + i * kWidth));
    for (int i = 0; i < kChains; ++i) store8(out + j + i * kWidth, block[i]);
  }
  for (; j + kWidth <= n; j += kWidth) store8(out + j, gradient(load8(z + j)));
  if (j < n) {
    E tail[kWidth];
    store8(tail, gradient(load_tail(z + j, n - j)));
    for (int64_t i = 0; j + i < n; ++i) out[j + i] = tail[i];
  }
  store1(out + target, at_target[0]);
}
