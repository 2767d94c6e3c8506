// The kernels of one instruction set against plain loops in double: test_kernels portable|avx2|avx512.
#include "checks.h"

namespace dtme::test {
namespace {

int run(const std::string& name) {
  for (const Kernels& each : INSTRUCTION_SETS)
    if (name == each.name) kernels = &each;
  if (!kernels) return printf("test_kernels portable|avx2|avx512\n"), 2;
  if (!kernels->runs_here()) return printf("skipped: this machine has no %s\n", name.c_str()), 77;
  test_covariance();
  test_conflicts();
  test_modulation();
  test_attention();
  printf("%s: %lld checks, %lld failed; the largest error was %.2f of what is tolerated\n", name.c_str(),
         static_cast<long long>(checks), static_cast<long long>(failures), worst);
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace dtme::test

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  return dtme::test::run(argc == 2 ? argv[1] : "");
}
