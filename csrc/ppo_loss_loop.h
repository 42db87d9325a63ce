// The loops of ppo_loss, compiled once per instruction set: included inside a namespace of its own.

#include "vector8.h"
// Needs what is above.
#include "ppo_token.h"

constexpr int64_t kFlushTokens = 1024;  // float sums of this many are added to double ones

typedef uint8_t Byte8 __attribute__((vector_size(8)));

// Eight tokens, or fewer and the rest not counted.
struct PPOTokens {
  Float8 current, proximal, behavior, advantage;
  Int8 counted;
};

AREAL_INLINE Float8 load_some(const float* p, int64_t n) {
  Float8 x{};
  if (n == kWidth) return load8(p);
  __builtin_memcpy(&x, p, n * sizeof(float));
  return x;
}

AREAL_INLINE void store_some(float* p, const Float8& x, int64_t n) {
  if (n == kWidth)
    store8(p, x);
  else
    __builtin_memcpy(p, &x, n * sizeof(float));
}

AREAL_INLINE Int8 load_mask(const PPOLoss& call, int64_t at, int64_t n) {
  if (call.float_mask != nullptr) return load_some(call.float_mask + at, n) != 0.0f;
  Byte8 mask{};
  if (n == kWidth)
    __builtin_memcpy(&mask, call.mask + at, kWidth);
  else
    __builtin_memcpy(&mask, call.mask + at, n);
  return __builtin_convertvector(mask, Int8) != 0;
}

AREAL_INLINE PPOTokens load_tokens(const PPOLoss& call, int64_t at, int64_t n) {
  return {load_some(call.current + at, n), load_some(call.proximal + at, n), load_some(call.behavior + at, n),
          load_some(call.advantages + at, n), load_mask(call, at, n)};
}

// Sums of some kFlushTokens tokens, in lanes; masks are counted as the -1 that they are.
struct PPOSums {
  Float8 objective, ratio, weight, kl_proximal, kl_behavior, entropy, entropy_bonus;
  Int8 tokens, high, low, dual, truncated, kept;
};

AREAL_INLINE double count8(const Int8& masks) {
  int64_t n = 0;
  for (int i = 0; i < kWidth; ++i) n -= masks[i];
  return static_cast<double>(n);
}

AREAL_INLINE void flush(PPOSums& from, double* to) {
  to[kLoss] -= static_cast<double>(sum8(from.objective)) + static_cast<double>(sum8(from.entropy_bonus));
  to[kTokens] += count8(from.tokens);
  to[kClipped] += count8(from.high) + count8(from.low);
  to[kClippedHigh] += count8(from.high);
  to[kClippedLow] += count8(from.low);
  to[kDualClipped] += count8(from.dual);
  to[kRatio] += static_cast<double>(sum8(from.ratio));
  to[kImportanceWeight] += static_cast<double>(sum8(from.weight));
  to[kWeightTruncated] += count8(from.truncated);
  to[kFiltered] += count8(from.tokens) - count8(from.kept);
  to[kKlProximal] += static_cast<double>(sum8(from.kl_proximal));
  to[kKlBehaviour] += static_cast<double>(sum8(from.kl_behavior));
  to[kEntropy] += static_cast<double>(sum8(from.entropy));
  from = PPOSums{};
}

// Tokens [begin, end); with kSequence they are of one sequence, and the sum of their slopes is returned. With a ratio of the sequence,
// `gradient` is left 1 where the current log-prob has influence and 0 elsewhere.
template <bool kSequence>
AREAL_INLINE float ppo_tokens(const PPOLoss& call, int64_t begin, int64_t end, const PPOSequence& shared, PPOSums& sums) {
  const PPOParameters p = call.parameters;
  const float loss_weight = kSequence ? shared.loss_weight : 1.0f;
  const bool of_sequence = kSequence && call.sequence_ratio && !p.cispo;
  Float8 slopes{};
  for (int64_t at = begin; at < end; at += kWidth) {
    const int64_t n = end - at < kWidth ? end - at : kWidth;
    const PPOTokens x = load_tokens(call, at, n);
    const LogRatio<Float8> stale = log_ratio(x.proximal, x.behavior, x.counted);
    const LogRatio<Float8> moved = log_ratio(x.current, p.decoupled ? x.proximal : x.behavior, x.counted);
    const Float8 ratio = kSequence && call.sequence_ratio ? Float8{} + shared.ratio : moved.ratio;
    const Float8 weight_ratio = kSequence && call.sequence_weight ? Float8{} + shared.weight_ratio : stale.ratio;
    const Float8 filter_ratio = kSequence && call.sequence_filter ? Float8{} + shared.filter_ratio : stale.ratio;
    const PPOTerm<Float8> term = ppo_term(p, x.counted, x.current, x.advantage, ratio, weight_ratio, filter_ratio);

    sums.objective += term.objective * loss_weight;
    sums.ratio += x.counted ? ratio : Float8{};
    sums.weight += x.counted ? term.weight : Float8{};
    sums.kl_proximal += moved.ratio - 1.0f - moved.log;
    sums.kl_behavior += stale.ratio - 1.0f - stale.log;
    sums.tokens += x.counted;
    sums.high += term.high;
    sums.low += term.low;
    sums.dual += term.dual;
    sums.truncated += term.truncated;
    sums.kept += term.kept;
    if (call.entropy != nullptr) {
      const Float8 entropy = x.counted ? load_some(call.entropy + at, n) : Float8{};
      sums.entropy += entropy;
      sums.entropy_bonus += entropy * (call.entropy_coef * loss_weight);
    }

    const Int8 free = p.cispo ? x.counted : moved.free & x.counted;
    if (call.gradient != nullptr) {
      const Float8 own = term.slope * (-call.scale * loss_weight);
      store_some(call.gradient + at, free ? (of_sequence ? Float8{} + 1.0f : own) : Float8{}, n);
    }
    if (call.entropy_gradient != nullptr)
      store_some(call.entropy_gradient + at, x.counted ? Float8{} - call.entropy_coef * call.scale * loss_weight : Float8{}, n);
    if (of_sequence) slopes += term.slope;
  }
  return of_sequence ? sum8(slopes) : 0.0f;
}

AREAL_INLINE PPOSequence summarise(const PPOLoss& call, int64_t begin, int64_t end) {
  double log_moved = 0, log_stale = 0, n = 0;
  for (int64_t from = begin; from < end; from += kFlushTokens) {
    const int64_t to = from + kFlushTokens < end ? from + kFlushTokens : end;
    Float8 moved{}, stale{};
    Int8 counted{};
    for (int64_t at = from; at < to; at += kWidth) {
      const PPOTokens x = load_tokens(call, at, to - at < kWidth ? to - at : kWidth);
      moved += log_ratio(x.current, call.parameters.decoupled ? x.proximal : x.behavior, x.counted).log;
      stale += log_ratio(x.proximal, x.behavior, x.counted).log;
      counted += x.counted;
    }
    log_moved += static_cast<double>(sum8(moved));
    log_stale += static_cast<double>(sum8(stale));
    n += count8(counted);
  }
  return ppo_sequence(static_cast<float>(n), static_cast<float>(log_moved), static_cast<float>(log_stale), call.sequence_mean != 0);
}

AREAL_INLINE void scale_gradient(float* gradient, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) gradient[i] = gradient[i] != 0.0f ? gradient[i] * factor : 0.0f;  // 0 * NaN is not 0
}

// Tokens [begin, end) without anything of the sequence's level; sums[kStatistics] is added to.
void ppo_span(const PPOLoss& call, int64_t begin, int64_t end, double* sums) {
  for (int64_t at = begin; at < end; at += kFlushTokens) {
    PPOSums local{};
    ppo_tokens<false>(call, at, at + kFlushTokens < end ? at + kFlushTokens : end, {}, local);
    flush(local, sums);
  }
}

// The sequences [first, last).
void ppo_sequences(const PPOLoss& call, int64_t first, int64_t last, double* sums) {
  PPOSums local{};
  int64_t unflushed = 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = call.cu_seqlens[i], end = call.cu_seqlens[i + 1];
    const PPOSequence shared = summarise(call, begin, end);
    double slopes = 0;
    for (int64_t at = begin; at < end; at += kFlushTokens) {
      const int64_t to = at + kFlushTokens < end ? at + kFlushTokens : end;
      slopes += static_cast<double>(ppo_tokens<true>(call, at, to, shared, local));
      unflushed += to - at;
      if (unflushed >= kFlushTokens) {
        flush(local, sums);
        unflushed = 0;
      }
    }
    // d(log of the geometric mean) / d(log-prob) is 1 / n for each of its tokens.
    if (call.gradient != nullptr && call.sequence_ratio && !call.parameters.cispo)
      scale_gradient(call.gradient + begin, end - begin, -call.scale * shared.loss_weight * shared.mean * static_cast<float>(slopes));
  }
  flush(local, sums);
}
