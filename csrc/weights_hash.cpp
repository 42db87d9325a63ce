#include "weights_hash.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "hash_mix.h"
#include "instruction_sets.h"
#include "parallel.h"

#ifdef AREAL_X86
#include <immintrin.h>
#endif

namespace areal {

using HashWords = uint64_t(const uint8_t* source, uint8_t* target, uint64_t words, uint64_t first, uint64_t key, bool stream);

namespace baseline {
#define VECTOR_BYTES 8
#define STREAM_STORE(address, value) __builtin_memcpy(address, &(value), VECTOR_BYTES)
#include "hash_loop.h"
}  // namespace baseline

AREAL_VARIANTS(HashWords, hash_words)

namespace {

constexpr uint64_t kWord = 8;
constexpr uint64_t kMaxVector = 64;
constexpr uint64_t kChunk = 1024 * 1024;       // what a thread takes at a time; a multiple of kMaxVector
constexpr uint64_t kPerThread = 2 * kChunk;    // less than this is not worth starting a thread for
constexpr uint64_t kStreamFrom = 16 * kChunk;  // copies larger than this would only flush the caches

struct Piece {
  const Segment* segment;
  uint64_t begin;  // a multiple of kMaxVector
  uint64_t end;
};

uint64_t process(const Piece& piece, HashWords* hash_words, bool stream) {
  const uint64_t key = piece.segment->key;
  const uint8_t* source = piece.segment->source + piece.begin;
  uint8_t* target = piece.segment->target == nullptr ? nullptr : piece.segment->target + piece.begin;
  const uint64_t bytes = piece.end - piece.begin;
  const uint64_t bulk = bytes / kMaxVector * kMaxVector;
  uint64_t position = piece.begin / kWord;
  uint64_t sum = hash_words(source, target, bulk / kWord, position, key, stream);
  position += bulk / kWord;
  for (uint64_t at = bulk; at < bytes; at += kWord) {
    const uint64_t size = std::min(kWord, bytes - at);
    uint64_t word = 0;
    std::memcpy(&word, source + at, size);
    if (target != nullptr) std::memcpy(target + at, &word, size);
    sum += mix_word(word, position++, key);
  }
#ifdef AREAL_X86
  if (stream) _mm_sfence();  // streaming stores are not ordered with the stores that announce them
#endif
  return sum;
}

}  // namespace

uint64_t copy_and_hash(const std::vector<Segment>& segments, unsigned threads, const std::string& instruction_set) {
  HashWords* const hash_words = select_hash_words(instruction_set);
  uint64_t total = 0, sum = 0;
  std::vector<Piece> pieces;
  for (const Segment& segment : segments) {
    sum += mix64(segment.key);
    total += segment.bytes;
    for (uint64_t at = 0; at < segment.bytes; at += kChunk) pieces.push_back({&segment, at, std::min(at + kChunk, segment.bytes)});
  }
  const bool stream = total >= kStreamFrom;
  std::atomic<uint64_t> shared{sum};
  parallel_for(static_cast<int64_t>(pieces.size()), std::min<int64_t>(threads, total / kPerThread),
               [&](int64_t i) { shared.fetch_add(process(pieces[i], hash_words, stream)); });
  return shared.load();
}

}  // namespace areal
