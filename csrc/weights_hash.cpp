#include "weights_hash.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>

#include "hash_mix.h"

namespace areal {
namespace {

constexpr uint64_t kWord = 8;
constexpr uint64_t kBlock = 16 * 1024;        // copied, then hashed while it is in the first-level cache
constexpr uint64_t kChunk = 1024 * 1024;      // what a thread takes at a time; a multiple of kBlock
constexpr uint64_t kPerThread = 2 * kChunk;  // less than this is not worth starting a thread for

AREAL_INLINE uint64_t hash_words_loop(const uint8_t* data, uint64_t words, uint64_t first, uint64_t key) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, data + i * kWord, kWord);
    sum += mix_word(word, first + i, key);
  }
  return sum;
}

using HashWords = uint64_t (*)(const uint8_t*, uint64_t, uint64_t, uint64_t);

uint64_t hash_words_baseline(const uint8_t* data, uint64_t words, uint64_t first, uint64_t key) {
  return hash_words_loop(data, words, first, key);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same loop, vectorised by the compiler for wider registers (vpmullq is what makes 512 bits worth it).
__attribute__((target("avx2"))) uint64_t hash_words_avx2(const uint8_t* data, uint64_t words, uint64_t first, uint64_t key) {
  return hash_words_loop(data, words, first, key);
}

__attribute__((target("avx512f,avx512dq,avx512vl,prefer-vector-width=512"))) uint64_t hash_words_avx512(const uint8_t* data, uint64_t words,
                                                                                                        uint64_t first, uint64_t key) {
  return hash_words_loop(data, words, first, key);
}

struct Choice {
  HashWords function;
  const char* name;
};

Choice choose() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {hash_words_avx512, "avx512"};
  if (__builtin_cpu_supports("avx2")) return {hash_words_avx2, "avx2"};
  return {hash_words_baseline, "baseline"};
}
#else
struct Choice {
  HashWords function;
  const char* name;
};

Choice choose() { return {hash_words_baseline, "baseline"}; }
#endif

const Choice kChoice = choose();

// One piece of a segment; `begin` is a multiple of the word size.
uint64_t process(const Segment& segment, uint64_t begin, uint64_t end) {
  uint64_t sum = 0;
  for (uint64_t at = begin; at < end; at += kBlock) {
    const uint64_t bytes = std::min(kBlock, end - at);
    const uint64_t words = bytes / kWord;
    const uint8_t* data = segment.source + at;
    if (segment.target != nullptr) {
      // The hash is that of the copy: what the caller will use, whatever happens to the source meanwhile.
      std::memcpy(segment.target + at, data, bytes);
      data = segment.target + at;
    }
    sum += kChoice.function(data, words, at / kWord, segment.key);
    if (bytes % kWord != 0) {  // only at the end of a segment
      uint64_t word = 0;
      std::memcpy(&word, data + words * kWord, bytes % kWord);
      sum += mix_word(word, at / kWord + words, segment.key);
    }
  }
  return sum;
}

struct Piece {
  const Segment* segment;
  uint64_t begin;
  uint64_t end;
};

}  // namespace

const char* hash_instruction_set() { return kChoice.name; }

uint64_t copy_and_hash(const std::vector<Segment>& segments, unsigned threads) {
  uint64_t total = 0, sum = 0;
  for (const Segment& segment : segments) {
    sum += mix64(segment.key);
    total += segment.bytes;
  }
  threads = static_cast<unsigned>(std::min<uint64_t>(threads, total / kPerThread));
  if (threads <= 1) {
    for (const Segment& segment : segments) sum += process(segment, 0, segment.bytes);
    return sum;
  }

  std::vector<Piece> pieces;
  for (const Segment& segment : segments)
    for (uint64_t at = 0; at < segment.bytes; at += kChunk) pieces.push_back({&segment, at, std::min(at + kChunk, segment.bytes)});
  std::atomic<size_t> next{0};
  std::atomic<uint64_t> shared{0};
  const auto work = [&] {
    uint64_t mine = 0;
    for (size_t i = next.fetch_add(1); i < pieces.size(); i = next.fetch_add(1))
      mine += process(*pieces[i].segment, pieces[i].begin, pieces[i].end);
    shared.fetch_add(mine);
  };
  std::vector<std::thread> helpers;
  try {
    while (helpers.size() + 1 < threads) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, and this one, do it all.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  return sum + shared.load();
}

}  // namespace areal
