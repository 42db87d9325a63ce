// One sequence of gae, from its end to its start. Compiled once per instruction set: included inside a namespace of its own.

#include "vector8.h"

// x moved down by kBy lanes: lane i gets lane i + kBy, and the last kBy lanes get 0.
template <int kBy>
AREAL_INLINE Float8 from_later(const Float8& x) {
#ifdef __clang__
  return __builtin_shufflevector(x, Float8{}, kBy, kBy + 1, kBy + 2, kBy + 3, kBy + 4, kBy + 5, kBy + 6, kBy + 7);
#else
  return __builtin_shuffle(x, Float8{}, Int8{kBy, kBy + 1, kBy + 2, kBy + 3, kBy + 4, kBy + 5, kBy + 6, kBy + 7});
#endif
}

// powers[i] = (gamma * lam)^i for i in 1 .. 8; last_value is the value after the sequence.
void gae_sequence(const float* rewards, const float* values, int64_t length, float last_value, float gamma, const float* powers,
                  float* advantages, float* returns) {
  const float decay = powers[1];
  const Float8 to_carry{powers[8], powers[7], powers[6], powers[5], powers[4], powers[3], powers[2], powers[1]};
  float carry = 0.0f;
  const auto step = [&](int64_t t, float next_value) {
    carry = rewards[t] + gamma * next_value - values[t] + decay * carry;
    advantages[t] = carry;
    returns[t] = carry + values[t];
  };
  int64_t t = length - 1;
  if (t >= 0) step(t, last_value);
  // Eight tokens at once: three steps sum the differences within the eight, and the advantage of the token after them comes last, so
  // that the chain from eight to eight is a single multiply and add.
  for (t -= kWidth; t >= 0; t -= kWidth) {
    const Float8 value = load8(values + t);
    Float8 sum = load8(rewards + t) + gamma * load8(values + t + 1) - value;
    sum += powers[1] * from_later<1>(sum);
    sum += powers[2] * from_later<2>(sum);
    sum += powers[4] * from_later<4>(sum);
    sum += to_carry * carry;
    carry = sum[0];
    store8(advantages + t, sum);
    store8(returns + t, sum + value);
  }
  for (t += kWidth - 1; t >= 0; --t) step(t, values[t + 1]);
}
