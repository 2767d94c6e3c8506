// Modulation, its layer norm and their gradients against plain loops; every number of 16 bits.
#include "checks.h"

namespace dtme::test {
namespace {

// All 65,536 numbers of 16 bits, times some that leave no rounding to float32.
void check_numbers() {
  for (Dtype dtype : {float16, bfloat16})
    for (double factor : {1.0, 0.400390625, 1.0009765625, 0x1p-6}) {
      name_of_case = (dtype == float16 ? "float16" : "bfloat16") + (" times " + to_string(factor));
      Tensor x(dtype, {1, 1024, 64}), out(dtype, {1, 1024, 64});
      Tensor weight = filled(Tensor(float32, {1, 64}), [&](int64_t) { return factor; });
      Tensor bias = filled(Tensor(float32, {1, 64}), [&](int64_t) { return 0; });
      for (int64_t i = 0; i < x.count; i++) *static_cast<uint16_t*>(x.at(i)) = uint16_t(i);
      kernels->modulate(PARALLELS[0], x.view, weight.view, bias.view, {}, {}, 0, out.view, {});
      for (int64_t i = 0; i < x.count; i++) {
        double rounded = decode(encode(float(x.get(i) * factor), fraction_bits(dtype)), fraction_bits(dtype));
        bool nan = std::isnan(rounded) && std::isnan(out.get(i));
        expect(nan || rounded == out.get(i), "product", rounded, out.get(i));
      }
    }
}

struct Modulation {
  Tensor tokens, weight, bias, gain, shift, up_y, up_z;
  double eps = 1e-6;
};
struct Modulated {
  Numbers y, z, dx, dw, db, d_gain, d_shift;
};

// y = w x + b, s = (y - mean) / std, z = gain s + shift; dy = up_y + (ds - mean ds - s mean(ds s)) / std
Modulated modulated(const Modulation& in, bool with_norm) {
  int64_t p = in.weight.view.size[1], streams = in.weight.view.size[0], rows = in.up_y.count / p / streams;
  Doubles x = in.tokens.values(), w = in.weight.values(), b = in.bias.values(), gain = in.gain.values();
  Doubles shift = in.shift.values(), up_y = in.up_y.values(), up_z = in.up_z.values();
  Numbers params(streams * p), row(p), all(in.up_y.count);
  Modulated out{all, all, Numbers(x.size()), params, params, row, row};
  for (int64_t i = 0; i < streams * rows; i++) {
    int64_t at = i * p, of_x = (in.tokens.view.size[0] > 1 ? i : i % rows) * p, of_w = i / rows * p;
    Number* y = &out.y[at];
    for (int64_t c = 0; c < p; c++) y[c] = Number(w[of_w + c]) * x[of_x + c] + b[of_w + c];
    Number per = inverse(double(p)), mean = sum(p, [&](int64_t c) { return y[c]; }) * per;
    Number variance = sum(p, [&](int64_t c) { return (y[c] - mean) * (y[c] - mean); }) * per;
    Number inverse_std = inverse(square_root(variance + in.eps));
    auto s = [&](int64_t c) { return (y[c] - mean) * inverse_std; };
    auto ds = [&](int64_t c) { return Number(up_z[at + c]) * gain[c]; };
    Number mean_ds = sum(p, ds) * per, mean_product = sum(p, [&](int64_t c) { return ds(c) * s(c); }) * per;
    for (int64_t c = 0; c < p; c++) {
      Number dy = up_y[at + c];
      if (with_norm) dy += (ds(c) - mean_ds - s(c) * mean_product) * inverse_std;
      out.z[at + c] = s(c) * gain[c] + shift[c];
      out.dx[of_x + c] += dy * w[of_w + c];
      out.dw[of_w + c] += dy * x[of_x + c];
      out.db[of_w + c] += dy;
      out.d_gain[c] += Number(up_z[at + c]) * s(c);
      out.d_shift[c] += up_z[at + c];
    }
  }
  return out;
}

void check_modulation(Dtype dtype, Dtype params, Sizes size, int64_t streams, Layout from, Layout to) {
  int64_t p = size.back();
  Sizes full = size, one{1, p}, table{streams, p};
  full[0] = streams;
  Modulation in{random(dtype, size, from), random(params, table, to), random(params, table), random(params, one, from),
                random(params, one),       random(dtype, full, from), random(dtype, full, to)};
  for (bool with_norm : {false, true}) {
    Modulated expected = modulated(in, with_norm);
    Tensor y(dtype, full, to), z(dtype, full, to), dx(dtype, size, to), dw(params, table, to), db(params, table);
    Tensor d_gain(params, one, to), d_shift(params, one);
    std::vector<Output> outputs{{"modulated", y, expected.y}}, grads{{"d_tokens", dx, expected.dx}};
    grads.push_back({"d_weight", dw, expected.dw});
    grads.push_back({"d_bias", db, expected.db});
    if (with_norm) {
      outputs.push_back({"normalized", z, expected.z});
      grads.push_back({"d_norm_weight", d_gain, expected.d_gain});
      grads.push_back({"d_norm_bias", d_shift, expected.d_shift});
    }
    auto norm = [&](const Tensor& x) { return with_norm ? x.view : View{}; };
    check(wide(dtype), outputs, [&](const Parallel& on) {
      kernels->modulate(on, in.tokens.view, in.weight.view, in.bias.view, norm(in.gain), norm(in.shift), in.eps, y.view,
                        norm(z));
    });
    check(wide(dtype), grads, [&](const Parallel& on) {
      kernels->modulate_backward(on, in.up_y.view, norm(in.up_z), in.tokens.view, in.weight.view, norm(in.bias),
                                 norm(in.gain), in.eps, dx.view, dw.view, db.view, norm(d_gain), norm(d_shift));
    });
  }
}

}  // namespace

void test_modulation() {
  check_numbers();
  int64_t i = 0;
  for (int64_t p : {1, 5, 33, 70, 130})
    for (Dtype dtype : {float32, float64, float16, bfloat16})
      for (int64_t streams : {1, 3}) {
        name_of_case = "p = " + to_string(p) + ", T = " + to_string(streams) + ", case " + to_string(++i);
        int64_t own = i % 3 == 0 ? 1 : streams;
        Sizes size = i / 4 % 2 ? Sizes{own, 7, 9, p} : Sizes{own, Sizes{0, 1, 23}[i % 3], p};
        check_modulation(dtype, i % 3 ? wide(dtype) : dtype, size, streams, Layout(i % FAR), Layout(i / 2 % EXPANDED));
      }
  name_of_case = "several parts";
  check_modulation(float32, float32, {1, 500, 70}, 4, SPACED, DENSE);
  check_modulation(float16, float32, {2, 3, 250, 70}, 2, DENSE, TRANSPOSED);
  name_of_case = "past the caches";  // results of more than 8 MiB, aligned or not, with the norm or without
  check_modulation(float32, float32, {1, 7301, 96}, 3, DENSE, DENSE);
  check_modulation(float64, float64, {2, 4127, 128}, 2, DENSE, DENSE);
  check_modulation(float32, float32, {1, 3701, 96}, 3, DENSE, OFFSET);
  name_of_case = "no tokens in two dimensions";
  check_modulation(float32, float32, {1, 2, 0, 16}, 2, DENSE, DENSE);
  far([] { check_modulation(float32, float32, {1, 3, 70}, 1, FAR, FAR); });
}

}  // namespace dtme::test
