#include "gae.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace areal {

using GaeSequence = void(const float* rewards, const float* values, int64_t length, float last_value, float gamma, const float* powers,
                         float* advantages, float* returns);

namespace baseline {
#include "gae_loop.h"
}  // namespace baseline

AREAL_VARIANTS(GaeSequence, gae_sequence)

namespace {

constexpr int kMaxPower = 9;             // of gamma * lam, that gae_sequence wants
constexpr int64_t kChunk = 1 << 15;      // tokens, at least, that a thread takes at a time: whole sequences
constexpr int64_t kPerThread = 1 << 17;  // fewer tokens than this are not worth starting a thread for

void check(const Gae& call) {
  if (call.cu_seqlens[0] != 0 || call.cu_seqlens[call.n] != call.total)
    throw std::invalid_argument("gae: cu_seqlens begins with " + std::to_string(call.cu_seqlens[0]) + " and ends with " +
                                std::to_string(call.cu_seqlens[call.n]) + "; it must lead from 0 to the " + std::to_string(call.total) +
                                " tokens");
  for (int64_t i = 0; i < call.n; ++i)
    if (call.cu_seqlens[i] > call.cu_seqlens[i + 1])
      throw std::invalid_argument("gae: cu_seqlens falls after entry " + std::to_string(i) + "; it must not");
}

}  // namespace

void gae(const Gae& call, unsigned threads, const std::string& instruction_set) {
  GaeSequence* const gae_sequence = select_gae_sequence(instruction_set);
  check(call);
  double power = 1.0;
  float powers[kMaxPower];
  for (float& p : powers) {
    p = static_cast<float>(power);
    power *= call.gamma * call.lam;
  }
  std::vector<int64_t> chunks{0};  // first sequences
  for (int64_t i = 0; i < call.n; ++i)
    if (call.cu_seqlens[i + 1] - call.cu_seqlens[chunks.back()] >= kChunk) chunks.push_back(i + 1);
  if (chunks.back() != call.n) chunks.push_back(call.n);
  const int64_t useful = std::min<int64_t>(threads, call.total / kPerThread);
  parallel_for(static_cast<int64_t>(chunks.size()) - 1, useful, [&](int64_t chunk) {
    for (int64_t i = chunks[chunk]; i < chunks[chunk + 1]; ++i) {
      const int64_t begin = call.cu_seqlens[i];
      gae_sequence(call.rewards + begin, call.values + begin, call.cu_seqlens[i + 1] - begin,
                   call.bootstrap == nullptr ? 0.0f : call.bootstrap[i], static_cast<float>(call.gamma), powers, call.advantages + begin,
                   call.returns + begin);
    }
  });
}

}  // namespace areal
