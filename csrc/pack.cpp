#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace areal {
namespace {

template <class T>
void fill_bits(uint8_t* target, int64_t count, int64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));  // little endian: the low bytes
  std::fill_n(reinterpret_cast<T*>(target), count, value);
}

void fill(uint8_t* target, int64_t count, int64_t bytes, int64_t bits) {
  if (count <= 0) return;
  if (bits == 0) {
    std::memset(target, 0, count * bytes);
    return;
  }
  switch (bytes) {
    case 1:
      return fill_bits<uint8_t>(target, count, bits);
    case 2:
      return fill_bits<uint16_t>(target, count, bits);
    case 4:
      return fill_bits<uint32_t>(target, count, bits);
    default:
      return fill_bits<uint64_t>(target, count, bits);
  }
}

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

void copy(uint8_t* target, const uint8_t* source, int64_t bytes) {
  if (bytes > 0) std::memcpy(target, source, bytes);
}

// Tokens [begin, end) of the packed columns, which sequence i holds from token `first` on, or none (i = -1).
void derive(const PackDerived& derived, int64_t i, int64_t first, int64_t begin, int64_t end, bool is_last) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  if (auto* position = pointer<int64_t>(derived.position_ids); position != nullptr)
    for (int64_t t = begin; t < end; ++t) position[t] = i < 0 ? 0 : t - first;
  if (derived.sequence_ids != 0) std::fill_n(pointer<int32_t>(derived.sequence_ids) + begin, count, static_cast<int32_t>(i));
  if (auto* has_next = pointer<uint8_t>(derived.has_next); has_next != nullptr) {
    std::memset(has_next + begin, i >= 0, count);
    if (is_last) has_next[end - 1] = 0;
  }
}

template <class T>
int64_t count_non_zero(const T* row, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += row[i] != 0;
  return sum;
}

// False if the entries are not side by side.
template <class T>
bool find_run(const T* row, int64_t width, int64_t& start, int64_t& length) {
  length = count_non_zero(row, width);
  start = 0;
  if (length == 0) return true;
  constexpr int64_t kStep = 64;
  while (start + kStep <= width && count_non_zero(row + start, kStep) == 0) start += kStep;
  while (row[start] == 0) ++start;
  return start + length <= width && count_non_zero(row + start, length) == length;
}

// So short that all columns of a piece stay in the cache where one is read for several, so long that a memcpy is worth its call.
constexpr int64_t kPiece = 16384;

// Calls work(sequence, begin, end) for pieces of the packed tokens, of sequence -1 those behind the last one.
template <class Work>
void for_pieces(const SequenceLayout& layout, int64_t threads, const Work& work) {
  const auto* cu_seqlens = pointer<const int32_t>(layout.cu_seqlens);
  parallel_for((layout.total + kPiece - 1) / kPiece, threads, [&](int64_t piece) {
    int64_t begin = piece * kPiece;
    const int64_t end = std::min(begin + kPiece, layout.total);
    int64_t i = std::upper_bound(cu_seqlens, cu_seqlens + layout.n + 1, begin) - cu_seqlens - 1;
    for (; begin < end && i < layout.n; ++i) {
      const int64_t until = std::min<int64_t>(end, cu_seqlens[i + 1]);
      if (begin < until) work(i, begin, until);
      begin = std::max(begin, until);
    }
    if (begin < end) work(int64_t{-1}, begin, end);
  });
}

}  // namespace

void pack(const std::vector<PackColumn>& columns, const SequenceLayout& layout, const PackDerived& derived, int64_t threads) {
  const auto* cu_seqlens = pointer<const int32_t>(layout.cu_seqlens);
  const auto* starts = pointer<const int64_t>(layout.starts);
  for_pieces(layout, threads, [&](int64_t i, int64_t begin, int64_t end) {
    const bool is_last = i >= 0 && end == cu_seqlens[i + 1];  // the piece has the sequence's last token
    derive(derived, i, i < 0 ? 0 : cu_seqlens[i], begin, end, is_last);
    for (const PackColumn& column : columns) {
      auto* target = pointer<uint8_t>(column.target) + begin * column.bytes;
      if (i < 0) {
        fill(target, end - begin, column.bytes, column.fill);
        continue;
      }
      const uint8_t* row;
      if (layout.rows != 0)
        row = pointer<const uint8_t>(pointer<const uint64_t>(layout.rows)[column.source + i]);
      else
        row = pointer<const uint8_t>(column.source) + (i * layout.width + (starts == nullptr ? 0 : starts[i])) * column.bytes;
      const int64_t count = end - begin - (column.shift != 0 && is_last);
      copy(target, row + (begin - cu_seqlens[i] + column.shift) * column.bytes, count * column.bytes);
      if (count < end - begin) fill(target + count * column.bytes, 1, column.bytes, column.fill);
    }
  });
}

void unpack(const std::vector<PackColumn>& columns, const SequenceLayout& layout, int64_t threads) {
  const auto* cu_seqlens = pointer<const int32_t>(layout.cu_seqlens);
  const auto* starts = pointer<const int64_t>(layout.starts);
  parallel_for(layout.n, threads, [&](int64_t i) {
    const int64_t start = starts == nullptr ? 0 : starts[i], length = cu_seqlens[i + 1] - cu_seqlens[i];
    for (const PackColumn& column : columns) {
      auto* row = pointer<uint8_t>(column.target) + i * layout.width * column.bytes;
      fill(row, start, column.bytes, column.fill);
      copy(row + start * column.bytes, pointer<const uint8_t>(column.source) + cu_seqlens[i] * column.bytes, length * column.bytes);
      fill(row + (start + length) * column.bytes, layout.width - start - length, column.bytes, column.fill);
    }
  });
}

int64_t find_runs(uint64_t mask, int64_t bytes, int64_t n, int64_t width, int64_t* starts, int64_t* lengths, int64_t threads) {
  std::atomic<int64_t> bad{-1};
  parallel_for(n, threads, [&](int64_t i) {
    const auto find = [&](auto element) {
      return find_run(pointer<const decltype(element)>(mask) + i * width, width, starts[i], lengths[i]);
    };
    const bool good = bytes == 1 ? find(uint8_t{}) : bytes == 2 ? find(uint16_t{}) : bytes == 4 ? find(uint32_t{}) : find(uint64_t{});
    if (!good) bad = i;
  });
  return bad;
}

}  // namespace areal
