#include "flatten_weights.h"

#include <algorithm>
#include <cstring>

#include "instruction_sets.h"
#include "parallel.h"
#include "streaming.h"

namespace areal {

using CopyPiece = void(const uint8_t* source, uint8_t* target, uint64_t count, Conversion conversion, bool stream);

namespace baseline {
#include "flatten_weights_loop.h"
}  // namespace baseline

AREAL_VARIANTS(CopyPiece, copy_piece)

namespace {

constexpr uint64_t kChunk = 512 * 1024;             // elements or bytes that a thread takes at a time
constexpr uint64_t kPerThread = 2 * 1024 * 1024;    // bytes: fewer are not worth starting a thread for
constexpr uint64_t kStreamFrom = 16 * 1024 * 1024;  // bytes: lists larger than this would only flush the caches

struct Sizes {
  uint64_t source, target;  // bytes of an element
};

Sizes element_sizes(Conversion conversion) {
  switch (conversion) {
    case Conversion::float_to_bfloat16:
      return {4, 2};
    case Conversion::bfloat16_to_float:
      return {2, 4};
    default:
      return {1, 1};
  }
}

struct Piece {
  const ListCopy* row;
  uint64_t begin, end;
};

}  // namespace

void copy_list(const std::vector<ListCopy>& rows, unsigned threads, const std::string& instruction_set) {
  CopyPiece* const copy_piece = select_copy_piece(instruction_set);
  std::vector<Piece> pieces;
  uint64_t total = 0;
  for (const ListCopy& row : rows) {
    const Sizes sizes = element_sizes(row.conversion);
    total += row.count * sizes.target;
    std::memset(row.target + row.count * sizes.target, 0, row.zeros);
    for (uint64_t at = 0; at < row.count; at += kChunk) pieces.push_back({&row, at, std::min(at + kChunk, row.count)});
  }
  const bool stream = total >= kStreamFrom;
  parallel_for(static_cast<int64_t>(pieces.size()), static_cast<int64_t>(std::min<uint64_t>(threads, total / kPerThread)), [&](int64_t i) {
    const Piece& piece = pieces[i];
    const Sizes sizes = element_sizes(piece.row->conversion);
    copy_piece(piece.row->source + piece.begin * sizes.source, piece.row->target + piece.begin * sizes.target, piece.end - piece.begin,
               piece.row->conversion, stream);
#ifdef AREAL_X86
    if (stream) _mm_sfence();  // streaming stores are not ordered with the stores that announce them
#endif
  });
}

}  // namespace areal
