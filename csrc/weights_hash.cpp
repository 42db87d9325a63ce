#include "weights_hash.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "hash_mix.h"

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

#ifdef AREAL_X86
namespace avx2 {
HashWords hash_words;
}
namespace avx512 {
HashWords hash_words;
}
#endif

namespace {

constexpr uint64_t kWord = 8;
constexpr uint64_t kMaxVector = 64;
constexpr uint64_t kChunk = 1024 * 1024;       // what a thread takes at a time; a multiple of kMaxVector
constexpr uint64_t kPerThread = 2 * kChunk;    // less than this is not worth starting a thread for
constexpr uint64_t kStreamFrom = 16 * kChunk;  // copies larger than this would only flush the caches

struct Variant {
  HashWords* hash_words;
  const char* name;
};

std::vector<Variant> supported() {
  std::vector<Variant> variants;
#ifdef AREAL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) variants.push_back({avx512::hash_words, "avx512"});
  if (__builtin_cpu_supports("avx2")) variants.push_back({avx2::hash_words, "avx2"});
#endif
  variants.push_back({baseline::hash_words, "baseline"});
  return variants;
}

const std::vector<Variant> kVariants = supported();

HashWords* find_variant(const std::string& name) {
  for (const Variant& variant : kVariants)
    if (name.empty() || name == variant.name) return variant.hash_words;
  throw std::invalid_argument("this CPU has no instruction set '" + name + "'");
}

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

std::vector<std::string> hash_instruction_sets() {
  std::vector<std::string> names;
  for (const Variant& variant : kVariants) names.emplace_back(variant.name);
  return names;
}

uint64_t copy_and_hash(const std::vector<Segment>& segments, unsigned threads, const std::string& instruction_set) {
  HashWords* const hash_words = find_variant(instruction_set);
  uint64_t total = 0, sum = 0;
  std::vector<Piece> pieces;
  for (const Segment& segment : segments) {
    sum += mix64(segment.key);
    total += segment.bytes;
    for (uint64_t at = 0; at < segment.bytes; at += kChunk) pieces.push_back({&segment, at, std::min(at + kChunk, segment.bytes)});
  }
  const bool stream = total >= kStreamFrom;
  std::atomic<size_t> next{0};
  std::atomic<uint64_t> shared{sum};
  const auto work = [&] {
    uint64_t mine = 0;
    for (size_t i = next.fetch_add(1); i < pieces.size(); i = next.fetch_add(1)) mine += process(pieces[i], hash_words, stream);
    shared.fetch_add(mine);
  };
  std::vector<std::thread> helpers;
  const uint64_t wanted = std::min<uint64_t>(threads, total / kPerThread);
  try {
    while (helpers.size() + 1 < wanted) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, and this one, do it all.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  return shared.load();
}

}  // namespace areal
