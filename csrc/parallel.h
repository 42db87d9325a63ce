// Work over several threads of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace areal {

// Calls work(i) for every i in [0, n), each once, on up to `threads` threads, this one included; they take turns at the next i. Which
// thread runs which i is not fixed: write results by i, so that they do not depend on the number of threads. `work` must not throw.
template <typename Work>
void parallel_for(int64_t n, int64_t threads, const Work& work) {
  threads = std::min(threads, n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto take_turns = [&] {
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) work(i);
  };
  std::vector<std::thread> others;
  try {
    while (static_cast<int64_t>(others.size()) + 1 < threads) others.emplace_back(take_turns);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, and this one, do it all.
  }
  take_turns();
  for (std::thread& other : others) other.join();
}

}  // namespace areal
