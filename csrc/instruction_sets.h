// The kernels of every instruction set that this binary holds, the best first, and whether this machine runs them: for
// whoever chooses among them. No kernel includes it.
#pragma once

#include "kernels.h"

namespace dtme {

#define DTME_EACH_KERNEL(f)                                                                        \
  f(accumulate_covariance) f(covariance_backward) f(count_conflicts) f(projected_dots)             \
      f(projected_dots_backward) f(modulate) f(modulate_backward) f(attend) f(attend_backward)
#define DTME_MEMBER(function) decltype(&portable::function) function;
#define DTME_OF_PORTABLE(function) portable::function,
#define DTME_OF_AVX2(function) avx2::function,
#define DTME_OF_AVX512(function) avx512::function,

struct Kernels {
  const char* name;
  bool (*runs_here)();
  DTME_EACH_KERNEL(DTME_MEMBER)
};

inline const Kernels INSTRUCTION_SETS[] = {
#ifdef DTME_HAS_avx512
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     DTME_EACH_KERNEL(DTME_OF_AVX512)},
#endif
#ifdef DTME_HAS_avx2
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     DTME_EACH_KERNEL(DTME_OF_AVX2)},
#endif
#ifdef DTME_HAS_portable
    {"portable", [] { return true; }, DTME_EACH_KERNEL(DTME_OF_PORTABLE)},
#endif
};

}  // namespace dtme
