// The PPO loss of one token and its derivative, for F = float and, on the host, for eight tokens at a time (F = Float8). Included inside
// the namespace of an instruction set behind ppo_parameters.h and, for Float8, vector8.h; it has no include guard and includes nothing.
// kernels/ppo_token.cuh takes it for device code. A NaN in a token that counts comes through, so that somebody notices it.

#ifdef __CUDACC__
#define AREAL_PPO_FUNCTION __device__ __forceinline__
#else
#define AREAL_PPO_FUNCTION static inline __attribute__((always_inline))
#endif

AREAL_PPO_FUNCTION float exp_within(float x) {
#ifdef __CUDACC__
  return expf(x);
#else
  return __builtin_expf(x);
#endif
}

template <typename F>
using MaskOf = decltype(F{} < F{});  // bool, or Int8 with all bits of a lane set

template <typename F>
struct LogRatio {
  F log;           // clamped to +-kMaxLogRatio; 0 where the token does not count
  F ratio;         // its exp
  MaskOf<F> free;  // not clamped: it has a gradient
};

// above / below from their log-probs.
template <typename F>
AREAL_PPO_FUNCTION LogRatio<F> log_ratio(const F& above, const F& below, const MaskOf<F>& counted) {
  const F x = counted ? above - below : F{};
  const MaskOf<F> high = x > kMaxLogRatio, low = x < -kMaxLogRatio;
  const F clamped = high ? F{} + kMaxLogRatio : low ? F{} - kMaxLogRatio : x;
  return {clamped, exp_within(clamped), !(high | low)};
}

// What the loss tokens of a sequence share.
struct PPOSequence {
  float ratio;         // current / proximal (or behaviour): the geometric mean of its tokens'
  float weight_ratio;  // proximal / behaviour: the product of its tokens', clamped like a token's
  float filter_ratio;  // proximal / behaviour: the geometric mean
  float loss_weight;   // of each of its tokens
  float mean;          // 1 / n
};

// From its n loss tokens' sums of log(current / proximal) and log(proximal / behaviour); sequence_mean: it counts 1, not each token.
AREAL_PPO_FUNCTION PPOSequence ppo_sequence(float n, float log_moved, float log_stale, bool sequence_mean) {
  const float mean = n > 0.0f ? 1.0f / n : 0.0f;
  const float product = log_stale > kMaxLogRatio ? kMaxLogRatio : log_stale < -kMaxLogRatio ? -kMaxLogRatio : log_stale;
  return {exp_within(log_moved * mean), exp_within(product), exp_within(log_stale * mean), sequence_mean ? mean : 1.0f, mean};
}

template <typename F>
struct PPOTerm {
  F objective;          // importance weight * objective; 0 where the token is filtered or does not count
  F slope;              // its derivative by log(ratio), or, for CISPO, by the current log-prob
  F weight;             // the importance weight
  MaskOf<F> kept;       // counts, and is not filtered
  MaskOf<F> high, low;  // clipped at the upper, at the lower end
  MaskOf<F> dual;       // dual-clipped
  MaskOf<F> truncated;  // the weight was above its cap
};

// ratio: current / proximal (or behaviour), of the token or of its sequence; weight_ratio and filter_ratio: proximal / behaviour likewise.
template <typename F>
AREAL_PPO_FUNCTION PPOTerm<F> ppo_term(const PPOParameters& p, const MaskOf<F>& counted, const F& logprob, const F& given_advantage,
                                       const F& ratio, const F& weight_ratio, const F& filter_ratio) {
  PPOTerm<F> term;
  term.weight = p.decoupled ? weight_ratio : F{} + 1.0f;
  const MaskOf<F> heavy = term.weight > p.weight_cap;
  term.weight = heavy ? F{} + (p.mask_weights ? 0.0f : p.weight_cap) : term.weight;
  term.truncated = counted & heavy;

  const F advantage = counted ? given_advantage : F{};
  MaskOf<F> far = filter_ratio > p.filter_upper, near = filter_ratio < p.filter_lower;
  if (p.filter_by_advantage) {
    far = far & (advantage > 0.0f);
    near = near & (advantage < 0.0f);
  }
  term.kept = counted & !(far | near);
  const MaskOf<F> above = ratio > p.upper, below = ratio < p.lower;
  const F clipped = (above ? F{} + p.upper : below ? F{} + p.lower : ratio) * advantage;
  F objective, slope;
  if (p.cispo) {
    objective = clipped * (counted ? logprob : F{});
    slope = clipped;
    term.high = term.kept & above;
    term.low = term.kept & below;
    term.dual = term.kept & !term.kept;
  } else {
    const F plain = ratio * advantage;
    const MaskOf<F> bound = clipped < plain;
    objective = bound ? clipped : plain;
    const F floor = advantage * p.c_clip;  // minus infinity, or NaN, without dual clip: never above the objective
    const MaskOf<F> dual = (advantage < 0.0f) & (objective < floor);
    objective = dual ? floor : objective;
    slope = (bound | dual) ? F{} : plain;
    term.high = term.kept & bound & above;
    term.low = term.kept & bound & below;
    term.dual = term.kept & dual;
  }
  term.objective = term.kept ? term.weight * objective : F{};
  term.slope = term.kept ? term.weight * slope : F{};
  return term;
}

// d(loss) / d(current log-prob) at token level, where loss = -sum over tokens of loss_weight * importance weight * objective. A token with
// loss weight 0 does not count: whatever else it holds, its gradient is 0.
template <typename F>
AREAL_PPO_FUNCTION F ppo_token_gradient(const PPOParameters& p, const F& current, const F& proximal, const F& behavior, const F& advantage,
                                        const F& loss_weight) {
  const MaskOf<F> counted = loss_weight != 0.0f;
  const LogRatio<F> to_behavior = log_ratio(proximal, behavior, counted);
  const LogRatio<F> moved = log_ratio(current, p.decoupled ? proximal : behavior, counted);
  const PPOTerm<F> term = ppo_term(p, counted, current, advantage, moved.ratio, to_behavior.ratio, to_behavior.ratio);
  const F slope = p.cispo ? term.slope : moved.free ? term.slope : F{};
  return counted ? -loss_weight * slope : F{};
}
