// Tensors of torch as views for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace dtme {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// --- views -----------------------------------------------------------------------------------------------------------

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Bool: return Dtype::boolean;
    default: STD_TORCH_CHECK(false, "dtme: tensors must be floating point, or bool as a mask"); std::abort();
  }
}

// what numbers of this dtype are computed in
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void append(View& view, int64_t size, int64_t stride) {
  view.size[view.dim] = size;
  view.stride[view.dim++] = stride;
}

// Without dimensions yet; at index i of dimension `at`.
inline View start(const Tensor& x, int64_t at = 0, int64_t i = 0, bool is_mask = false) {
  View view;
  view.dtype = dtype_of(x);
  STD_TORCH_CHECK(is_mask || view.dtype != Dtype::boolean, "dtme: only a mask may be bool");
  auto data = static_cast<const char*>(x.const_data_ptr());
  view.data = const_cast<char*>(i ? data + i * x.stride(at) * bytes(view.dtype) : data);
  return view;
}

// All dimensions; `lead` of size 1 in front.
inline View view_of(const Tensor& x, int lead = 0) {
  STD_TORCH_CHECK(x.dim() + lead <= MAX_DIM, "dtme: a tensor of ", x.dim(), " dimensions");
  View view = start(x);
  while (lead--) append(view, 1, 0);
  for (int64_t i = 0; i < x.dim(); i++) append(view, x.size(i), x.stride(i));
  return view;
}

// (kept..., rows..., p): the rows merged into as few dimensions as their strides allow, at least one. `owner` keeps the
// copy of a tensor that has too many.
inline View rows_of(Tensor& owner, int keep = 0) {
  View view = start(owner);
  int64_t last = owner.dim() - 1;
  for (int64_t i = 0; i < keep; i++) append(view, owner.size(i), owner.stride(i));
  for (int64_t i = keep; i < last; i++) {
    int64_t size = owner.size(i), stride = owner.stride(i);
    int before = view.dim - 1;
    if (size == 1 && view.dim > keep) continue;
    if (view.dim > keep && (view.size[before] == 1 || view.stride[before] == size * stride)) {
      view.size[before] *= size;
      view.stride[before] = stride;
    } else if (view.dim < MAX_DIM - 1) {
      append(view, size, stride);
    } else {
      owner = torch::stable::contiguous(owner);
      return rows_of(owner, keep);
    }
  }
  if (view.dim == keep) append(view, 1, 0);
  append(view, owner.size(last), owner.stride(last));
  return view;
}

inline Tensor empty(const Tensor& like, Sizes size, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, size, dtype);
}
inline Sizes sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }
inline Tensor empty_as(const Tensor& x) { return empty(x, sizes_of(x)); }

}  // namespace dtme
