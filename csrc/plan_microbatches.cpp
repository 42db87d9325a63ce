#include "plan_microbatches.h"

#include <algorithm>
#include <numeric>

namespace areal {
namespace {

struct Bin {
  int64_t tokens = 0;
  std::vector<int64_t> members;
};

// Algorithm 1 of arXiv 2505.24298: into the fitting bin with the fewest sequences, a new one while there are fewer than k_min.
std::vector<Bin> fill_bins(const int64_t* lengths, const std::vector<int64_t>& order, int64_t capacity, int64_t k_min) {
  std::vector<Bin> bins;
  for (const int64_t i : order) {
    int64_t best = -1;
    if (static_cast<int64_t>(bins.size()) >= k_min) {
      size_t fewest = SIZE_MAX;
      for (size_t b = 0; b < bins.size(); ++b) {
        if (bins[b].members.size() < fewest && bins[b].tokens + lengths[i] <= capacity) {
          fewest = bins[b].members.size();
          best = static_cast<int64_t>(b);
        }
      }
    }
    if (best < 0) {
      best = static_cast<int64_t>(bins.size());
      bins.emplace_back();
    }
    bins[best].tokens += lengths[i];
    bins[best].members.push_back(i);
  }
  return bins;
}

}  // namespace

MicrobatchPlan plan_microbatches_ffd(const int64_t* lengths, int64_t n, int64_t capacity, int64_t world_size, int64_t k_min) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  // A rank's turns run in lockstep with the other ranks', so a count that is no multiple of world_size wastes a turn.
  std::vector<Bin> bins = fill_bins(lengths, order, capacity, k_min);
  while (bins.size() % world_size != 0) {
    const int64_t rounded = (static_cast<int64_t>(bins.size()) / world_size + 1) * world_size;
    if (rounded > n) break;
    bins = fill_bins(lengths, order, capacity, rounded);
  }

  // Turns of like sizes, because a turn lasts as long as its longest micro-batch; in a turn the largest goes to the rank with least.
  bins.resize((bins.size() + world_size - 1) / world_size * world_size);
  std::stable_sort(bins.begin(), bins.end(), [](const Bin& a, const Bin& b) { return a.tokens > b.tokens; });
  MicrobatchPlan plan(world_size);
  std::vector<int64_t> load(world_size, 0), ranks(world_size);
  for (size_t turn = 0; turn < bins.size(); turn += world_size) {
    std::iota(ranks.begin(), ranks.end(), 0);
    std::stable_sort(ranks.begin(), ranks.end(), [&](int64_t a, int64_t b) { return load[a] < load[b]; });
    for (int64_t j = 0; j < world_size; ++j) {
      load[ranks[j]] += bins[turn + j].tokens;
      plan[ranks[j]].push_back(std::move(bins[turn + j].members));
    }
  }
  return plan;
}

}  // namespace areal
