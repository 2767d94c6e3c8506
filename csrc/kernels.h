// What library.cpp and the kernels know of each other: plain views, no torch. The unit tests are built on this alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace dtme {

enum class Dtype { float32, float64, float16, bfloat16, boolean };

// static, as objects of every instruction set hold one: a linker must not choose among them
static inline int64_t bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::boolean ? 1 : 2;
}

constexpr int MAX_DIM = 8;

// A strided tensor that somebody else owns. Strides count elements. Without data: an argument that is absent.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int dim = 0;
  int64_t size[MAX_DIM] = {}, stride[MAX_DIM] = {};
};

// Runs f(begin, end) on parts of [0, n), on several threads where n is more than `grain`. What f throws, as where there
// is no memory, must not leave a thread that is not the caller's: the first of it is thrown again at the end.
struct Parallel {
  using Function = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t n, int64_t grain, Function, void* context);
  int64_t threads;

  template <class F>
  void operator()(int64_t n, int64_t grain, const F& f) const {
    struct Call {
      const F& f;
      std::atomic<bool> failed = false;
      std::exception_ptr error = nullptr;
    } call{f};
    auto part = [](int64_t begin, int64_t end, void* context) {
      Call& call = *static_cast<Call*>(context);
      try {
        call.f(begin, end);
      } catch (...) {
        if (!call.failed.exchange(true)) call.error = std::current_exception();
      }
    };
    run(n, grain, part, &call);
    if (call.error) std::rethrow_exception(call.error);
  }
};

// softmax(scale * q [k ; k_task]^T + mask) [v ; v_task]: query (T, B, H, N, d), key and value (T, B, H', S, d),
// task_key and task_value (T, H', t, d), mask (T, B, H, N, S) with strides of 0, or without data.
struct Attention {
  View query, key, value, task_key, task_value, mask;
  bool causal;
  double scale;
};

// The kernels exist once an instruction set. Which one runs is decided by the machine, in library.cpp.
namespace portable {
#include "signatures.h"
}
#if defined(__x86_64__)
namespace avx2 {
#include "signatures.h"
}
namespace avx512 {
#include "signatures.h"
}
#endif

}  // namespace dtme
