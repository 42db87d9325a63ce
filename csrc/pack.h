// Sequences to packed columns and back. Plain data: the device code takes the same structures.
#pragma once

#include <cstdint>
#include <vector>

namespace areal {

// One column to write, elements of 1, 2, 4 or 8 bytes, moved as bits.
struct PackColumn {
  uint64_t source;  // address; with SequenceLayout::rows: which row of that table is the first sequence's
  uint64_t target;  // address
  int64_t bytes;
  int64_t shift;  // pack: 0, or 1 for the next token's value, at a sequence's end `fill`
  int64_t fill;   // bits of what goes where no token is
};

// n sequences: packed, tokens [cu_seqlens[i], cu_seqlens[i + 1]); padded, columns from starts[i] on of row i of [n, width].
struct SequenceLayout {
  uint64_t cu_seqlens;  // int32 [n + 1]
  uint64_t starts;      // int64 [n], or 0 where all are 0
  uint64_t rows;        // uint64 [fields, n], addresses of each sequence's values, or 0: sources are padded
  int64_t n, width;
  int64_t total;  // packed elements; the last cu_seqlens may be less
};

// Outputs of pack that only depend on the layout; addresses, 0 where not wanted.
struct PackDerived {
  uint64_t position_ids;  // int64 [total], 0 where no token is
  uint64_t sequence_ids;  // int32 [total], -1 there
  uint64_t has_next;      // bool [total], whether the sequence goes on
};

void pack(const std::vector<PackColumn>& columns, const SequenceLayout& layout, const PackDerived& derived, int64_t threads);
void unpack(const std::vector<PackColumn>& columns, const SequenceLayout& layout, int64_t threads);

// Where the non-zero entries of each row of mask [n, width], elements of `bytes`, begin (starts[n], 0 without any) and how many there are
// (lengths[n]). Returns a row in which they are not side by side, or -1.
int64_t find_runs(uint64_t mask, int64_t bytes, int64_t n, int64_t width, int64_t* starts, int64_t* lengths, int64_t threads);

}  // namespace areal
