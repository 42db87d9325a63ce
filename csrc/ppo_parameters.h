// The switches of a PPO loss that act on single tokens, for host and device. python/areal/ops/ppo_loss.py says what they mean.
#pragma once

namespace areal {

constexpr float kMaxLogRatio = 20.0f;  // log-ratios are clamped here: exp must not overflow, since 0 * inf in its gradient is NaN

struct PPOParameters {
  float lower, upper;                // range of the ratio: 1 - eps_clip, 1 + eps_clip_higher
  float c_clip;                      // infinity: no dual clip
  float weight_cap;                  // largest importance weight; infinity: none
  float filter_lower, filter_upper;  // range of proximal / behaviour where a token is kept; 0 and infinity: all
  int cispo;                         // 1: clipped ratio * advantage * log-prob; 0: the clipped ratio of PPO
  int decoupled;                     // 1: ratio to the proximal policy and importance weight; 0: ratio to the behaviour policy, weight 1
  int mask_weights;                  // 1: a weight above its cap becomes 0; 0: it becomes the cap
  int filter_by_advantage;           // 1: filtered above the range only where the advantage is positive, below it where it is negative
};

}  // namespace areal
