// The kernels of one instruction set against plain loops in double: test_kernels portable|avx2|avx512.
#include "checks.h"

namespace dtme::test {
namespace {

#define DTME_OF_PORTABLE(function) portable::function,
#define DTME_OF_AVX2(function) avx2::function,
#define DTME_OF_AVX512(function) avx512::function,
const Kernels ALL[] = {
    {"portable", [] { return true; }, DTME_EACH(DTME_OF_PORTABLE)},
#if defined(__x86_64__)
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, DTME_EACH(DTME_OF_AVX2)},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     DTME_EACH(DTME_OF_AVX512)},
#endif
};

int run(const char* name) {
  for (const Kernels& each : ALL)
    if (each.name == name) kernels = &each;
  if (!kernels) return printf("test_kernels portable|avx2|avx512\n"), 2;
  if (!kernels->runs_here()) return printf("skipped: this machine has no %s\n", name), 77;
  test_covariance();
  test_conflicts();
  test_modulation();
  test_attention();
  printf("%s: %lld checks, %lld failed; the largest error was %.2f of what is tolerated\n", name,
         static_cast<long long>(checks), static_cast<long long>(failures), worst);
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace dtme::test

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  return dtme::test::run(argc == 2 ? argv[1] : "");
}
