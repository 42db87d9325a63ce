// Attention of one query a row over the K/V slots of the rows' sequences (host; float32 or bfloat16 caches).
#pragma once

#include <cstdint>
#include <string>

#include "bfloat16.h"

namespace areal {

// Row r sees the first lengths[r] positions of slot slots[r], or the last `window` of those. With new_k and new_v, those of all rows are
// stored at position lengths[r] - 1 before any row attends. Strides are in elements, of rows and of heads; the last dimension is
// contiguous, and so are the caches and out.
struct DecodeAttention {
  const float* q;          // [rows, heads, d]
  const void* new_k;       // [rows, kv_heads, d] like the caches; null: the caches hold all
  const void* new_v;       // the same
  void* k_cache;           // [slots, kv_heads, capacity, d], float or, if bf16, bfloat16
  void* v_cache;           // the same
  const int64_t* lengths;  // [rows]
  const int64_t* slots;    // [rows]; null: row r is in slot r
  float* out;              // [rows, heads, d]
  int64_t rows, heads, kv_heads, n_slots, capacity, d;
  int64_t q_strides[2], new_k_strides[2], new_v_strides[2];
  int64_t window;  // 0: none
  bool bf16;
  float scaling;
  float softcap;  // scores become softcap * tanh(score / softcap); 0: they stay
};

// A row's result depends on the row's own data and the instruction set only, not on the other rows or the number of threads; one of
// length 0 stores nothing and gives 0. std::invalid_argument, before anything is stored, for a length or slot out of range.
void decode_attention(const DecodeAttention& call, unsigned threads, const std::string& instruction_set);

}  // namespace areal
