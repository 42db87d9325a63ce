// Attention of new tokens over the K/V slots of their sequences (float32, host).
#pragma once

#include <cstdint>
#include <string>

namespace areal {

// Row r is the token at positions[r] of slot slots[r]: the K and V of all rows are stored first, then each row attends to what its slot
// holds up to its own position. All tensors are contiguous but for the row strides (in elements) of q, k and v.
struct DecodeAttention {
  const float* q;            // [rows, heads, d]
  const float* k;            // [rows, kv_heads, d]
  const float* v;            // [rows, kv_heads, d]
  float* k_cache;            // [slots, kv_heads, capacity, d]
  float* v_cache;            // [slots, kv_heads, capacity, d]
  const int64_t* positions;  // [rows]
  const int64_t* slots;      // [rows]; null: row r is in slot r
  float* out;                // [rows, heads, d]
  int64_t rows, heads, kv_heads, capacity, d;
  int64_t q_stride, k_stride, v_stride;
  int64_t window;  // a row sees positions above position - window; 0: all up to its own
  float scaling;
};

// A row's result depends on the row's own data and the instruction set only, not on the other rows or the number of threads.
void decode_attention(const DecodeAttention& call, unsigned threads, const std::string& instruction_set);

}  // namespace areal
