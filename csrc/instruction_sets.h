// Which instruction sets this CPU has. A hot loop is compiled once per set, in files of its own (<op>_avx2.cpp, <op>_avx512.cpp) that
// include <op>_loop.h inside a namespace; nothing else may be included there, since an inline function compiled for AVX-512 could
// replace its portable twin at link time.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace areal {

enum class InstructionSet { baseline, avx2, avx512 };  // avx2 includes FMA; avx512 is F, DQ, VL and BW

struct NamedSet {
  InstructionSet set;
  const char* name;
};

// What this CPU can run, best first.
inline std::vector<NamedSet> supported_instruction_sets() {
  std::vector<NamedSet> sets;
#ifdef AREAL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
      sets.push_back({InstructionSet::avx512, "avx512"});
    sets.push_back({InstructionSet::avx2, "avx2"});
  }
#endif
  sets.push_back({InstructionSet::baseline, "baseline"});
  return sets;
}

// The set of that name, the best one for an empty name; std::invalid_argument for one that this CPU lacks.
inline InstructionSet find_instruction_set(const std::string& name) {
  static const std::vector<NamedSet> sets = supported_instruction_sets();
  for (const NamedSet& candidate : sets)
    if (name.empty() || name == candidate.name) return candidate.set;
  throw std::invalid_argument("this CPU has no instruction set '" + name + "'");
}

// Declares Function in one namespace per instruction set, and `select_<name>` that picks one: AREAL_VARIANTS(Function, name).
// The baseline variant must be defined before this, in namespace areal::baseline.
#ifdef AREAL_X86
#define AREAL_VARIANTS(Function, name)                                              \
  namespace avx2 {                                                                  \
  Function name;                                                                    \
  }                                                                                 \
  namespace avx512 {                                                                \
  Function name;                                                                    \
  }                                                                                 \
  static Function* select_##name(const std::string& instruction_set) {              \
    static Function* const variants[] = {baseline::name, avx2::name, avx512::name}; \
    return variants[static_cast<int>(find_instruction_set(instruction_set))];       \
  }
#else
#define AREAL_VARIANTS(Function, name)                                 \
  static Function* select_##name(const std::string& instruction_set) { \
    find_instruction_set(instruction_set);                             \
    return baseline::name;                                             \
  }
#endif

}  // namespace areal
