#include "decode_attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace areal {

using DecodeItems = void(const DecodeAttention& call, int64_t begin, int64_t end, float* scratch, int64_t stride);

namespace baseline {
#include "decode_attention_loop.h"
}  // namespace baseline

AREAL_VARIANTS(DecodeItems, decode_items)

namespace {

constexpr int64_t kPerThread = int64_t{1} << 21;  // products: fewer are not worth starting a thread for

void check(const DecodeAttention& call) {
  const auto in_range = [&](const int64_t* values, int64_t end) {
    return std::all_of(values, values + call.rows, [end](int64_t value) { return value >= 0 && value < end; });
  };
  if (!in_range(call.lengths, call.capacity + 1))
    throw std::invalid_argument("decode_attention: lengths must lie in [0, " + std::to_string(call.capacity) + "], the caches' capacity");
  if (call.slots != nullptr && !in_range(call.slots, call.n_slots))
    throw std::invalid_argument("decode_attention: slots must lie in [0, " + std::to_string(call.n_slots) + ")");
}

void store(const DecodeAttention& call, const void* source, const int64_t* strides, void* cache) {
  const int64_t size = call.bf16 ? 2 : 4;
  for (int64_t row = 0; row < call.rows; ++row) {
    if (call.lengths[row] == 0) continue;
    const int64_t slot = call.slots == nullptr ? row : call.slots[row];
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      const int64_t to = ((slot * call.kv_heads + head) * call.capacity + call.lengths[row] - 1) * call.d;
      std::memcpy(static_cast<char*>(cache) + to * size, static_cast<const char*>(source) + (row * strides[0] + head * strides[1]) * size,
                  call.d * size);
    }
  }
}

}  // namespace

void decode_attention(const DecodeAttention& call, unsigned threads, const std::string& instruction_set) {
  DecodeItems* const decode_items = select_decode_items(instruction_set);
  check(call);
  if (call.new_k != nullptr) {
    store(call, call.new_k, call.new_k_strides, call.k_cache);
    store(call, call.new_v, call.new_v_strides, call.v_cache);
  }
  const auto seen = [&](int64_t row) { return call.window > 0 ? std::min(call.lengths[row], call.window) : call.lengths[row]; };
  int64_t longest = 0, total = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    longest = std::max(longest, seen(row));
    total += seen(row);
  }
  const int64_t group = call.heads / call.kv_heads, items = call.rows * call.kv_heads;
  const int64_t useful = total * call.heads * call.d * 2 / kPerThread;
  const int64_t n_threads = std::max<int64_t>(1, std::min<int64_t>({int64_t{threads}, items, useful}));
  // Thread t has the items that begin in the t-th part of the work.
  std::vector<int64_t> ends(n_threads, items);
  int64_t before = 0, t = 0;
  for (int64_t item = 0; item < items && t + 1 < n_threads; ++item) {
    before += seen(item / call.kv_heads);
    while (t + 1 < n_threads && before * n_threads >= (t + 1) * total * call.kv_heads) ends[t++] = item + 1;
  }
  const int64_t stride = (longest + 7) / 8 * 8;
  const int64_t scratch = group * (call.d + 1 + stride);
  const std::unique_ptr<float[]> scratches(new float[n_threads * scratch]);
  parallel_for(n_threads, n_threads,
               [&](int64_t i) { decode_items(call, i == 0 ? 0 : ends[i - 1], ends[i], &scratches[i * scratch], stride); });
}

}  // namespace areal
