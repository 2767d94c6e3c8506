// The kernels of one instruction set against plain loops in double: test_kernels portable|avx2|avx512.
#include "checks.h"

namespace dtme::test {
namespace {

// On a thread of its own, an exception that nobody catches would end the process.
void test_loop_that_throws() {
  name_of_case = "no memory in one part of a loop";
  for (const Parallel& parallel : PARALLELS) {
    bool caught = false;
    try {
      parallel(100, 1, [](int64_t begin, int64_t end) {
        if (begin <= 70 && 70 < end) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    expect(caught, "exception reaches the caller", 1, caught);
  }
}

int run(const std::string& name) {
  for (const Kernels& each : INSTRUCTION_SETS)
    if (name == each.name) kernels = &each;
  if (!kernels) return printf("test_kernels portable|avx2|avx512\n"), 2;
  if (!kernels->runs_here()) return printf("skipped: this machine has no %s\n", name.c_str()), 77;
  test_loop_that_throws();
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
