#include <algorithm>

#include "launch.cuh"
#include "pack.cuh"

namespace areal {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // loads in flight per thread and column
constexpr int kTile = kThreads * kPerThread;
constexpr int kMaxColumns = 16;

// By value into the kernel: no table to upload.
struct Columns {
  PackColumn column[kMaxColumns];
  int count;
};

template <class T>
__device__ __forceinline__ T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// The last i in [low, high] with cu_seqlens[i] <= t: the sequence that holds token t, past empty ones.
__device__ __forceinline__ int64_t find_sequence(const int32_t* cu_seqlens, int64_t low, int64_t high, int64_t t) {
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] <= t)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// What a thread knows of each of its packed tokens.
struct Tokens {
  int64_t at[kPerThread];        // element of a padded source, or position in the row of a ragged one
  int64_t sequence[kPerThread];  // -1: none, behind the last sequence
  bool has_next[kPerThread];
};

template <class T>
__device__ __forceinline__ void pack_column(const PackColumn& column, const SequenceLayout& layout, const Tokens& tokens, int64_t first) {
  T value[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    value[k] = static_cast<T>(column.fill);
    if (tokens.sequence[k] < 0 || (column.shift != 0 && !tokens.has_next[k])) continue;
    const T* source =
        pointer<const T>(layout.rows == 0 ? column.source : pointer<const uint64_t>(layout.rows)[column.source + tokens.sequence[k]]);
    value[k] = source[tokens.at[k] + column.shift];
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t t = first + k * kThreads;
    if (t < layout.total) pointer<T>(column.target)[t] = value[k];
  }
}

// A block writes kTile packed tokens of all columns, whatever the lengths: the work is even. Neighbouring threads have neighbouring tokens.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ Columns columns, const __grid_constant__ SequenceLayout layout,
                const __grid_constant__ PackDerived derived) {
  __shared__ int64_t bounds[2];  // sequences of the tile's first and last token
  const auto* cu_seqlens = pointer<const int32_t>(layout.cu_seqlens);
  const int64_t n_tokens = cu_seqlens[layout.n];
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile;
  if (threadIdx.x < 2) {
    const int64_t t = threadIdx.x == 0 ? tile : tile + kTile - 1;
    bounds[threadIdx.x] = find_sequence(cu_seqlens, 0, layout.n - 1, t < n_tokens ? t : n_tokens - 1);
  }
  __syncthreads();
  const int64_t first = tile + threadIdx.x;
  Tokens tokens;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t t = first + k * kThreads;
    tokens.sequence[k] = -1;
    tokens.at[k] = 0;
    int64_t position = 0;
    bool has_next = false;
    if (t < n_tokens && t < layout.total) {
      const int64_t i = find_sequence(cu_seqlens, bounds[0], bounds[1], t);
      position = t - cu_seqlens[i];
      has_next = t + 1 < cu_seqlens[i + 1];
      tokens.sequence[k] = i;
      tokens.at[k] =
          layout.rows != 0 ? position : i * layout.width + (layout.starts == 0 ? 0 : pointer<const int64_t>(layout.starts)[i]) + position;
    }
    tokens.has_next[k] = has_next;
    if (t < layout.total) {
      if (derived.position_ids != 0) pointer<int64_t>(derived.position_ids)[t] = position;
      if (derived.sequence_ids != 0) pointer<int32_t>(derived.sequence_ids)[t] = static_cast<int32_t>(tokens.sequence[k]);
      if (derived.has_next != 0) pointer<uint8_t>(derived.has_next)[t] = has_next;
    }
  }
  for (int c = 0; c < columns.count; ++c) {
    const PackColumn& column = columns.column[c];
    switch (column.bytes) {
      case 1:
        pack_column<uint8_t>(column, layout, tokens, first);
        break;
      case 2:
        pack_column<uint16_t>(column, layout, tokens, first);
        break;
      case 4:
        pack_column<uint32_t>(column, layout, tokens, first);
        break;
      default:
        pack_column<uint64_t>(column, layout, tokens, first);
        break;
    }
  }
}

template <class T>
__device__ __forceinline__ void unpack_column(const PackColumn& column, int64_t source, int64_t begin, int64_t end, int64_t width,
                                              int64_t first, int64_t row) {
  T value[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t p = first + k * kThreads;
    value[k] = static_cast<T>(column.fill);
    if (p >= begin && p < end) value[k] = pointer<const T>(column.source)[source + p - begin];
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t p = first + k * kThreads;
    if (p < width) pointer<T>(column.target)[row * width + p] = value[k];
  }
}

// A block writes up to kTile columns of one row of [n, width], `tiles` blocks a row.
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const __grid_constant__ Columns columns, const __grid_constant__ SequenceLayout layout, unsigned tiles) {
  const auto* cu_seqlens = pointer<const int32_t>(layout.cu_seqlens);
  const int64_t row = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x % tiles) * kTile + threadIdx.x;
  const int64_t source = cu_seqlens[row];
  const int64_t begin = layout.starts == 0 ? 0 : pointer<const int64_t>(layout.starts)[row];
  const int64_t end = begin + cu_seqlens[row + 1] - source;
  for (int c = 0; c < columns.count; ++c) {
    const PackColumn& column = columns.column[c];
    switch (column.bytes) {
      case 1:
        unpack_column<uint8_t>(column, source, begin, end, layout.width, first, row);
        break;
      case 2:
        unpack_column<uint16_t>(column, source, begin, end, layout.width, first, row);
        break;
      case 4:
        unpack_column<uint32_t>(column, source, begin, end, layout.width, first, row);
        break;
      default:
        unpack_column<uint64_t>(column, source, begin, end, layout.width, first, row);
        break;
    }
  }
}

Columns take(const std::vector<PackColumn>& columns, size_t from) {
  Columns some{};
  some.count = static_cast<int>(std::min<size_t>(columns.size() - from, kMaxColumns));
  std::copy_n(columns.begin() + from, some.count, some.column);
  return some;
}

}  // namespace

const char* pack_cuda(const std::vector<PackColumn>& columns, const SequenceLayout& layout, const PackDerived& derived, uintptr_t stream) {
  const auto blocks = static_cast<unsigned>((layout.total + kTile - 1) / kTile);  // total < 2^31: cu_seqlens is int32
  if (blocks == 0) return nullptr;
  PackDerived wanted = derived;
  size_t from = 0;
  do {
    const Columns some = take(columns, from);
    AREAL_LAUNCH(pack_kernel, blocks, kThreads, 0, stream, some, layout, wanted);
    wanted = {};
    from += kMaxColumns;
  } while (from < columns.size());
  return launch_error();
}

const char* unpack_cuda(const std::vector<PackColumn>& columns, const SequenceLayout& layout, uintptr_t stream) {
  const int64_t tiles = (layout.width + kTile - 1) / kTile;
  if (tiles * layout.n == 0) return nullptr;
  if (tiles * layout.n > INT32_MAX) return "more than 2^31 blocks";
  for (size_t from = 0; from < columns.size(); from += kMaxColumns) {
    const Columns some = take(columns, from);
    AREAL_LAUNCH(unpack_kernel, static_cast<unsigned>(tiles * layout.n), kThreads, 0, stream, some, layout, static_cast<unsigned>(tiles));
  }
  return launch_error();
}

}  // namespace areal
