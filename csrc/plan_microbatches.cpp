#include "plan_microbatches.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <numeric>
#include <queue>
#include <set>
#include <stdexcept>
#include <utility>

namespace areal {
namespace {

constexpr int kSplitRounds = 4;

using Bins = std::vector<std::vector<int64_t>>;
template <class T>
using MinHeap = std::priority_queue<T, std::vector<T>, std::greater<T>>;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Bins being filled: the state of one attempt.
class Packing {
 public:
  explicit Packing(const MicrobatchProblem& problem) : problem_(problem), bin_of_(problem.n) {}

  void reset(int64_t n_bins) {
    room_.assign(n_bins, problem_.capacity);
    load_.assign(n_bins, 0.0);
    std::copy_n(head_starts_.begin(), std::min(head_starts_.size(), load_.size()), load_.begin());
  }

  // order[begin, n): each into the bin with the smallest load that has room, the first of equals; false if that takes more than
  // most_bins. loads: of each sequence, or null for 1.
  bool least_loaded(int64_t begin, const double* loads, int64_t most_bins) {
    std::vector<std::pair<double, int64_t>> all(size());
    for (int64_t b = 0; b < size(); ++b) all[b] = {load_[b], b};
    MinHeap<std::pair<double, int64_t>> ready({}, std::move(all));
    std::priority_queue<std::pair<int64_t, int64_t>> parked;  // (room, -bin): found too full, until lengths have come down to their room
    for (int64_t at = begin; at < problem_.n; ++at) {
      const int64_t i = problem_.order[at], length = problem_.lengths[i];
      for (; !parked.empty() && parked.top().first >= length; parked.pop()) ready.push({load_[-parked.top().second], -parked.top().second});
      for (; !ready.empty() && room_[ready.top().second] < length; ready.pop())
        parked.push({room_[ready.top().second], -ready.top().second});
      int64_t bin;
      if (!ready.empty()) {
        bin = ready.top().second;
        ready.pop();
      } else if (size() < most_bins) {
        bin = open();
      } else {
        return false;
      }
      put(i, bin, loads == nullptr ? 1.0 : loads[i]);
      ready.push({load_[bin], bin});
    }
    return true;
  }

  // order[0, end): each into the first bin that has room, which opens new ones as they are needed. Starts without bins.
  void first_fit(int64_t end) {
    reset(0);
    int64_t size = 1;
    while (size < end) size *= 2;
    std::vector<int64_t> room(2 * size, problem_.capacity);  // a tree: entry i is the most room below it, entry size + b that of bin b
    for (int64_t k = 0; k < end; ++k) {
      const int64_t i = problem_.order[k], length = problem_.lengths[i];
      int64_t at = 1;
      while (at < size) at = 2 * at + (room[2 * at] < length);
      if (at - size == this->size()) open();
      put(i, at - size, problem_.costs[i]);
      room[at] -= length;
      for (at /= 2; at > 0; at /= 2) {
        const int64_t most = std::max(room[2 * at], room[2 * at + 1]);
        if (room[at] == most) break;
        room[at] = most;
      }
    }
  }

  // The n_tight longest by first fit, the others by cost into what these leave of count bins.
  bool split_fill(int64_t n_tight, int64_t count) {
    first_fit(n_tight);
    if (size() > count) return false;
    while (size() < count) open();
    return least_loaded(n_tight, problem_.costs, count);
  }

  // Loads that the first bins have while they are empty; 0 for others.
  void set_head_starts(std::vector<double> head_starts) { head_starts_ = std::move(head_starts); }

  int64_t size() const { return static_cast<int64_t>(room_.size()); }

  // Once every sequence is in a bin; longest first in each.
  Bins bins() const {
    std::vector<int64_t> sizes(size(), 0);
    for (const int64_t bin : bin_of_) ++sizes[bin];
    Bins bins(size());
    for (int64_t b = 0; b < size(); ++b) bins[b].reserve(sizes[b]);
    for (int64_t at = 0; at < problem_.n; ++at) bins[bin_of_[problem_.order[at]]].push_back(problem_.order[at]);
    return bins;
  }

 private:
  int64_t open() {
    load_.push_back(load_.size() < head_starts_.size() ? head_starts_[load_.size()] : 0.0);
    room_.push_back(problem_.capacity);
    return size() - 1;
  }

  void put(int64_t i, int64_t bin, double load) {
    room_[bin] -= problem_.lengths[i];
    load_[bin] += load;
    bin_of_[i] = bin;
  }

  const MicrobatchProblem& problem_;
  std::vector<int64_t> room_;
  std::vector<double> load_, head_starts_;
  std::vector<int64_t> bin_of_;  // of every sequence put so far
};

// One of the partitions that differencing joins: its sums above 0 with a member that names the bin, ascending.
using Sums = std::set<std::pair<int64_t, int64_t>>;

// Bins under construction as linked lists, named by their first member: joining two takes no copy.
struct Chains {
  explicit Chains(int64_t n) : next(n, -1), last(n) { std::iota(last.begin(), last.end(), 0); }
  int64_t join(int64_t i, int64_t j) {
    if (i > j) std::swap(i, j);
    next[last[i]] = j;
    last[i] = last[j];
    return i;
  }
  std::vector<int64_t> next, last;
};

// large becomes the two joined, its smallest sums with the largest of small; count sums each, those of 0 implicit.
void join(Sums& large, Sums& small, int64_t count, Chains& chains) {
  if (large.size() < small.size()) std::swap(large, small);
  int64_t free = count - static_cast<int64_t>(large.size());
  std::vector<Sums::node_type> joined;
  joined.reserve(small.size());
  while (!small.empty()) {
    joined.push_back(small.extract(std::prev(small.end())));
    if (free-- > 0) continue;
    const auto smallest = large.begin();
    auto& [sum, member] = joined.back().value();
    sum += smallest->first;
    member = chains.join(member, smallest->second);
    large.erase(smallest);
  }
  for (auto& node : joined) large.insert(std::move(node));
}

// Karmarkar and Karp's largest differencing into count bins; false where a bin would exceed the capacity.
bool differencing(const MicrobatchProblem& problem, int64_t count, Bins& bins) {
  Chains chains(problem.n);
  std::vector<Sums> partitions(problem.n);
  std::vector<std::pair<int64_t, int64_t>> differences(problem.n);  // (-difference, partition)
  for (int64_t i = 0; i < problem.n; ++i) {
    partitions[i].insert({problem.lengths[i], i});
    differences[i] = {count > 1 ? -problem.lengths[i] : 0, i};
  }
  MinHeap<std::pair<int64_t, int64_t>> heap({}, std::move(differences));
  while (heap.size() > 1) {
    const int64_t first = heap.top().second;
    heap.pop();
    const int64_t second = heap.top().second;
    heap.pop();
    const int64_t key = std::min(first, second);
    Sums& sums = partitions[key];
    join(sums, partitions[std::max(first, second)], count, chains);
    const int64_t lowest = static_cast<int64_t>(sums.size()) == count ? sums.begin()->first : 0;
    heap.push({lowest - sums.rbegin()->first, key});
  }
  bins.assign(count, {});
  if (heap.empty()) return true;
  const Sums& sums = partitions[heap.top().second];
  if (sums.rbegin()->first > problem.capacity) return false;
  int64_t bin = 0;
  for (const auto& entry : sums) {
    for (int64_t i = entry.second; i >= 0; i = chains.next[i]) bins[bin].push_back(i);
    ++bin;
  }
  return true;
}

// Empty bins get the last sequence of the bin that has the most.
Bins without_empty(Bins bins) {
  std::vector<std::pair<int64_t, int64_t>> sizes(bins.size());
  for (size_t b = 0; b < bins.size(); ++b) sizes[b] = {-static_cast<int64_t>(bins[b].size()), static_cast<int64_t>(b)};
  MinHeap<std::pair<int64_t, int64_t>> crowded({}, std::move(sizes));
  for (auto& bin : bins) {
    if (!bin.empty() || -crowded.top().first <= 1) continue;
    const auto [size, most] = crowded.top();
    crowded.pop();
    bin.push_back(bins[most].back());
    bins[most].pop_back();
    crowded.push({size + 1, most});
  }
  return bins;
}

// Bins by cost after as short a tight part as the capacity allows; count must do for first fit.
Bins split_search(const MicrobatchProblem& problem, Packing& packing, int64_t count) {
  int64_t fails = 0, suffices = problem.n;
  bool packed = false;
  for (int round = 0; round < kSplitRounds; ++round) {
    const int64_t middle = (fails + suffices) / 2;
    packed = packing.split_fill(middle, count);
    (packed ? suffices : fails) = middle;
  }
  if (!packed && !packing.split_fill(suffices, count))
    throw std::logic_error("plan_microbatches: what first fit packed does not pack again");
  return without_empty(packing.bins());
}

// Each bin's; its members are put in ascending order.
std::vector<double> work_of(Bins& bins, const MicrobatchProblem& problem) {
  std::vector<double> work(bins.size(), 0.0);
  for (size_t b = 0; b < bins.size(); ++b) {
    std::sort(bins[b].begin(), bins[b].end());
    for (const int64_t i : bins[b]) work[b] += problem.costs[i];
  }
  return work;
}

// What all turns take together.
double lockstep(Bins& bins, const MicrobatchProblem& problem) {
  std::vector<double> work = work_of(bins, problem);
  std::sort(work.begin(), work.end(), std::greater<double>());
  double total = 0;
  for (size_t turn = 0; turn < work.size(); turn += problem.world_size) total += work[turn];
  return total;
}

// Negative loads for the first bins, against turns that single sequences make long; empty where there are none. A sequence that costs more
// than the mean bin sets the length of its turn, so the turn's other bins may as well cost as much, and those of later turns less: the
// level that is left for these is what all cost together, less the long turns.
std::vector<double> head_starts(const MicrobatchProblem& problem, int64_t count) {
  const int64_t world_size = problem.world_size;
  double left = 0;
  for (int64_t k = 0; k < problem.n; ++k) left += problem.costs[problem.order[k]];
  std::vector<double> longest;  // the costliest sequences of the turns above the level
  double level = count > 0 ? left / static_cast<double>(count) : 0.0;
  for (int64_t at = 0; at < std::min(count, problem.n); at += world_size) {
    const double costliest = problem.costs[problem.order[at]];
    if (costliest <= level) break;
    longest.push_back(costliest);
    const volatile double of_turn = costliest * static_cast<double>(world_size);  // rounded, not fused into the difference
    left -= of_turn;
    level = std::max(0.0, left / static_cast<double>(std::max(world_size, count - at - world_size)));
  }
  std::vector<double> starts;
  for (const double cost : longest) starts.insert(starts.end(), world_size, level - cost);
  return starts;
}

Bins lpt(const MicrobatchProblem& problem) {
  int64_t count = round_up(problem.least, problem.world_size);
  Packing packing(problem);
  if (!packing.split_fill(0, count)) {
    packing.first_fit(problem.n);
    const int64_t tight = round_up(std::max(packing.size(), problem.least), problem.world_size);
    Bins bins;
    if (tight > count && differencing(problem, count, bins)) return bins;  // finds even packings that greedy rules miss
    if (tight == count || !packing.split_fill(0, tight)) return split_search(problem, packing, tight);
    count = tight;
  }
  Bins plain = packing.bins();
  const std::vector<double> starts = head_starts(problem, count);
  packing.set_head_starts(starts);
  if (!starts.empty() && packing.split_fill(0, count)) {
    Bins ahead = without_empty(packing.bins());
    if (lockstep(ahead, problem) < lockstep(plain, problem)) return ahead;
  }
  return plain;
}

Bins kk(const MicrobatchProblem& problem) {
  const int64_t world_size = problem.world_size;
  int64_t fails = round_up(problem.least, world_size);
  Bins bins;
  if (differencing(problem, fails, bins)) return bins;
  Packing packing(problem);
  packing.first_fit(problem.n);
  int64_t suffices = round_up(std::max(packing.size(), problem.least), world_size);
  while (suffices - fails > world_size) {
    const int64_t middle = round_up((fails + suffices) / 2, world_size);
    (differencing(problem, middle, bins) ? suffices : fails) = middle;
  }
  return differencing(problem, suffices, bins) ? bins : split_search(problem, packing, suffices);
}

// Opening k_min bins first is what starting from as many empty ones does: an empty one has the fewest sequences, and room.
Bins ffd(const MicrobatchProblem& problem) {
  Packing packing(problem);
  for (int64_t count = problem.k_min;;) {
    packing.reset(count);
    packing.least_loaded(0, nullptr, problem.n);
    count = round_up(packing.size(), problem.world_size);
    if (count == packing.size() || count > problem.n) return packing.bins();
  }
}

// Turns of like cost; in a turn the costliest goes to the rank with the least so far.
MicrobatchPlan deal(Bins bins, const MicrobatchProblem& problem) {
  const int64_t world_size = problem.world_size;
  bins.resize(round_up(bins.size(), world_size));
  const std::vector<double> work = work_of(bins, problem);
  std::vector<int64_t> by_work(bins.size()), ranks(world_size);
  std::iota(by_work.begin(), by_work.end(), 0);
  std::stable_sort(by_work.begin(), by_work.end(), [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  MicrobatchPlan plan(world_size);
  std::vector<double> load(world_size, 0.0);
  for (size_t turn = 0; turn < bins.size(); turn += world_size) {
    std::iota(ranks.begin(), ranks.end(), 0);
    std::stable_sort(ranks.begin(), ranks.end(), [&](int64_t a, int64_t b) { return load[a] < load[b]; });
    for (int64_t j = 0; j < world_size; ++j) {
      const int64_t b = by_work[turn + j];
      load[ranks[j]] += work[b];
      plan[ranks[j]].push_back(std::move(bins[b]));
    }
  }
  return plan;
}

}  // namespace

MicrobatchPlan plan_microbatches(const std::string& algorithm, const MicrobatchProblem& problem) {
  if (algorithm == "lpt") return deal(lpt(problem), problem);
  if (algorithm == "kk") return deal(kk(problem), problem);
  if (algorithm == "ffd") return deal(ffd(problem), problem);
  throw std::invalid_argument("plan_microbatches: no algorithm " + algorithm);
}

}  // namespace areal
