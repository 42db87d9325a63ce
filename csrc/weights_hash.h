// Hashing, or copying and hashing, the bytes of tensors at the speed of memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace areal {

struct Segment {
  const uint8_t* source;
  uint8_t* target;  // null: hash only
  uint64_t bytes;
  uint64_t key;
};

// Sum of mix_word over all words of all segments, plus mix64(key) per segment. Independent of `threads` (>= 1) and of the instruction
// set: one of hash_instruction_sets(), or empty for the first of them; std::invalid_argument for any other.
uint64_t copy_and_hash(const std::vector<Segment>& segments, unsigned threads, const std::string& instruction_set);

// What this CPU can run, best first, out of "avx512", "avx2", "baseline".
std::vector<std::string> hash_instruction_sets();

}  // namespace areal
