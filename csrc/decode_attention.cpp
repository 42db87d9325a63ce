#include "decode_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace areal {

using DecodeRows = void(const DecodeAttention& call, int64_t begin, int64_t end, float* scores);

namespace baseline {
#include "decode_attention_loop.h"
}  // namespace baseline

AREAL_VARIANTS(DecodeRows, decode_rows)

namespace {

constexpr int64_t kPerThread = int64_t{1} << 21;  // products: fewer are not worth starting a thread for

void store(const DecodeAttention& call) {
  const int64_t d = call.d;
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t slot = call.slots == nullptr ? row : call.slots[row];
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      const int64_t to = ((slot * call.kv_heads + head) * call.capacity + call.positions[row]) * d;
      std::memcpy(call.k_cache + to, call.k + row * call.k_stride + head * d, d * sizeof(float));
      std::memcpy(call.v_cache + to, call.v + row * call.v_stride + head * d, d * sizeof(float));
    }
  }
}

}  // namespace

void decode_attention(const DecodeAttention& call, unsigned threads, const std::string& instruction_set) {
  DecodeRows* const decode_rows = select_decode_rows(instruction_set);
  int64_t longest = 0, total = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    longest = std::max(longest, call.positions[row] + 1);
    total += call.positions[row] + 1;
  }
  store(call);
  const int64_t useful = total * call.heads * call.d * 2 / kPerThread;
  const int64_t n_threads = std::max<int64_t>(1, std::min<int64_t>({int64_t{threads}, call.rows, useful}));
  const int64_t per_thread = (longest + 7) / 8 * 8;
  std::vector<float> scores(n_threads * per_thread);
  parallel_for(n_threads, n_threads,
               [&](int64_t t) { decode_rows(call, call.rows * t / n_threads, call.rows * (t + 1) / n_threads, &scores[t * per_thread]); });
}

}  // namespace areal
