// Included by kernels.h, once an instruction set. Tensors are what the operator of the same name takes and returns
// (dtme_kernels/*/op.py), outputs last; leading dimensions are merged where strides allow it.

// sums[l] (p, p) += sum of x x^T over tokens[l] (..., p)
void accumulate_covariance(const Parallel&, int64_t layers, const View* sums, const View* tokens);
void covariance_backward(const Parallel&, const View& grad, const View& tokens, const View& d_tokens);

// ranks increase; range and null are (R, K, K), valid (K, K), nonfinite one number, all zero on entry
void count_conflicts(const Parallel&, const View& grads, const View& basis, int64_t num_ranks, const int64_t* ranks,
                     bool count_zero_gradients, int64_t* range, int64_t* null, int64_t* valid, int64_t* nonfinite);
// range and null, and their gradients, (P, tokens), contiguous, in the dtype computed in
void projected_dots(const Parallel&, const View& grads, const View& basis, int64_t rank, const View& range,
                    const View& null);
void projected_dots_backward(const Parallel&, const View& grad_range, const View& grad_null, const View& grads,
                             const View& basis, int64_t rank, const View& d_grads, const View& d_basis);

// tokens (T or 1, ..., p), weight and bias (T, p), outputs (T, ..., p); normalized without data: modulation alone
void modulate(const Parallel&, const View& tokens, const View& weight, const View& bias, const View& norm_weight,
              const View& norm_bias, double eps, const View& modulated, const View& normalized);
// likewise; without d_norm_weight
void modulate_backward(const Parallel&, const View& grad_modulated, const View& grad_normalized, const View& tokens,
                       const View& weight, const View& bias, const View& norm_weight, double eps, const View& d_tokens,
                       const View& d_weight, const View& d_bias, const View& d_norm_weight, const View& d_norm_bias);

void attend(const Parallel&, const Attention&, const View& output);
// d_scores (T, B, H, N, S) or without data
void attend_backward(const Parallel&, const Attention&, const View& grad, const View& d_query, const View& d_key,
                     const View& d_value, const View& d_task_key, const View& d_task_value, const View& d_scores);
