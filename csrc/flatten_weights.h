// Copies of many arrays in one call, some cast on the way: flatten_weights and unflatten_weights. Shared by host and device code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace areal {

enum class Conversion : uint64_t { none, float_to_bfloat16, bfloat16_to_float };

// One array: a row of the device's table too, where first_chunk numbers the pieces that the GPU's blocks take.
struct ListCopy {
  const uint8_t* source;
  uint8_t* target;
  uint64_t count;  // elements of a conversion, else bytes
  uint64_t zeros;  // bytes to clear behind the target
  Conversion conversion;
  uint64_t first_chunk;
};

// Sources and targets, at any addresses, must not overlap. Big lists are written around the caches.
void copy_list(const std::vector<ListCopy>& rows, unsigned threads, const std::string& instruction_set);

}  // namespace areal
