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
// set: see find_instruction_set.
uint64_t copy_and_hash(const std::vector<Segment>& segments, unsigned threads, const std::string& instruction_set);

}  // namespace areal
