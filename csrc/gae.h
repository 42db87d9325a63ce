// Generalised advantage estimation over packed sequences.
#pragma once

#include <cstdint>
#include <string>

namespace areal {

struct Gae {
  const float* rewards;       // [total]
  const float* values;        // [total]
  const int32_t* cu_seqlens;  // [n + 1]
  const float* bootstrap;     // [n]: the value after each sequence; null: 0
  float* advantages;          // [total]
  float* returns;             // [total]
  int64_t n;
  int64_t total;
  double gamma;
  double lam;
};

// Independent of `threads` (>= 1). std::invalid_argument unless cu_seqlens rises from 0 to total.
void gae(const Gae& call, unsigned threads, const std::string& instruction_set);

}  // namespace areal
