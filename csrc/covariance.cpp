// Second moments of tokens (Eq. 1): the lower triangle, in tiles of one panel of channels by another.
//
// 2 M p^2 operations become M p (p + PANEL): 0.54 of them at p = 768. Tokens are read once, into panels that serve as
// either operand.

#include <memory>
#include <vector>

#include "gemm.h"

namespace dtme::DTME_ISA {
namespace {

constexpr int64_t CHUNK = 256;               // tokens in one packed piece, and products in one plain sum
constexpr int64_t PACKED_BYTES = 8 << 20;    // at a time
constexpr int64_t ROWS_OF_A_TASK = 32;

template <class S>
struct Chunk {
  int64_t layer, first;
  Panels<S> panels;
  Chunk(int64_t layer, int64_t first, int64_t count, int64_t p) : layer(layer), first(first), panels(count, p) {}
};
template <class S>
using Chunks = std::vector<std::unique_ptr<Chunk<S>>>;

template <class S>
void pack(const Parallel& parallel, const std::vector<Rows>& tokens, const Chunks<S>& chunks) {
  constexpr int64_t PARTS = CHUNK / ROWS_OF_A_TASK;
  parallel(chunks.size() * PARTS, 1, [&](int64_t begin, int64_t end) {
    Buffer<S> scratch(tokens[0].width);
    for (int64_t part = begin; part < end; part++) {
      Chunk<S>& chunk = *chunks[part / PARTS];
      int64_t k = part % PARTS * ROWS_OF_A_TASK, last = std::min(k + ROWS_OF_A_TASK, chunk.panels.depth);
      for (; k < last; k++) {
        const Rows& rows = tokens[chunk.layer];
        chunk.panels.put_row(k, rows.get<S>(scratch, chunk.first + k), 0, rows.width);
      }
    }
  });
}

// sum[first_row + i, first_column + j] and its mirror image += tile[i, j]
template <class S>
void add_tile(const View& sum, const S* tile, int64_t first_row, int64_t first_column) {
  with_wide_type(sum.dtype, [&](auto type) {
    auto to = static_cast<decltype(type)*>(sum.data);
    int64_t p = sum.size[0], down = sum.stride[0], right = sum.stride[1];
    for (int64_t i = first_row; i < std::min(first_row + PANEL<S>, p); i++) {
      for (int64_t j = first_column; j <= std::min(first_column + PANEL<S> - 1, i); j++) {
        S x = tile[(i - first_row) * PANEL<S> + j - first_column];
        to[i * down + j * right] += x;
        if (i != j) to[j * down + i * right] += x;
      }
    }
  });
}

// All chunks of one layer are summed by one owner of each tile, in order: any number of threads gives the same bits.
template <class S>
void multiply_chunks(const Parallel& parallel, const Chunks<S>& chunks, const View* sums) {
  std::vector<int64_t> starts;  // of each layer's chunks
  for (size_t i = 0; i < chunks.size(); i++)
    if (i == 0 || chunks[i]->layer != chunks[i - 1]->layer) starts.push_back(i);
  int64_t num_layers = starts.size(), p = chunks[0]->panels.n;
  starts.push_back(chunks.size());
  int64_t side = (p + PANEL<S> - 1) / PANEL<S>, tiles = side * (side + 1) / 2;
  parallel(num_layers * tiles, 1, [&](int64_t begin, int64_t end) {
    Buffer<S> tile(PANEL<S> * PANEL<S>);
    for (int64_t task = begin; task < end; task++) {
      int64_t layer = task / tiles, row = 0, column = task % tiles;
      while (column > row) column -= ++row;
      std::fill_n(static_cast<S*>(tile), PANEL<S> * PANEL<S>, S(0));
      for (int64_t i = starts[layer]; i < starts[layer + 1]; i++) {
        Panels<S>& x = chunks[i]->panels;
        int64_t rows = std::min(PANEL<S>, p - row * PANEL<S>), columns = std::min(PANEL<S>, p - column * PANEL<S>);
        Left<S> left{x.at(0, row * PANEL<S>), 1, PANEL<S>};
        Right<S> right{x.at(0, column * PANEL<S>), 0, PANEL<S>};
        multiply<true, S>(rows, columns, x.depth, left, right, tile, PANEL<S>);
      }
      add_tile<S>(sums[chunks[starts[layer]]->layer], tile, row * PANEL<S>, column * PANEL<S>);
    }
  });
}

template <class S>
void accumulate(const Parallel& parallel, int64_t layers, const View* sums, const View* tokens) {
  std::vector<Rows> rows(tokens, tokens + layers);
  Chunks<S> chunks;
  int64_t held = 0;
  auto flush = [&] {
    if (chunks.empty()) return;
    pack<S>(parallel, rows, chunks);
    multiply_chunks<S>(parallel, chunks, sums);
    chunks.clear();
    held = 0;
  };
  for (int64_t layer = 0; layer < layers; layer++) {
    bool wide = tokens[layer].dtype == Dtype::float64;
    if (wide != (sizeof(S) == 8)) continue;
    for (int64_t first = 0; first < rows[layer].count; first += CHUNK) {
      int64_t count = std::min(CHUNK, rows[layer].count - first), p = rows[layer].width;
      if (held && held + count * p * int64_t(sizeof(S)) > PACKED_BYTES) flush();
      chunks.push_back(std::make_unique<Chunk<S>>(layer, first, count, p));
      held += count * p * sizeof(S);
    }
  }
  flush();
}

}  // namespace

void accumulate_covariance(const Parallel& parallel, int64_t layers, const View* sums, const View* tokens) {
  accumulate<float>(parallel, layers, sums, tokens);
  accumulate<double>(parallel, layers, sums, tokens);
}

void covariance_backward(const Parallel& parallel, const View& grad, const View& tokens, const View& d_tokens) {
  with_wide_type(grad.dtype, [&](auto type) {  // dx = (G + G^T) x
    using S = decltype(type);
    Rows x(tokens), dx(d_tokens);
    int64_t p = x.width, padded = round_up(p, LANES<S>), blocks = (x.count + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK;
    Panels<S> twice(p, p);
    parallel(p, 64, [&](int64_t begin, int64_t end) {
      Buffer<S> row(p);
      auto g = static_cast<const S*>(grad.data);
      for (int64_t i = begin; i < end; i++) {
        for (int64_t j = 0; j < p; j++)
          row[j] = g[i * grad.stride[0] + j * grad.stride[1]] + g[j * grad.stride[0] + i * grad.stride[1]];
        twice.put_row(i, row, 0, p);
      }
    });
    parallel(blocks, 1, [&](int64_t begin, int64_t end) {
      Buffer<S> in(ROWS_OF_A_TASK * p), out(ROWS_OF_A_TASK * padded);
      for (int64_t block = begin; block < end; block++) {
        int64_t first = block * ROWS_OF_A_TASK, count = std::min(ROWS_OF_A_TASK, x.count - first);
        for (int64_t i = 0; i < count; i++) x.copy<S>(in + i * p, first + i);
        multiply<false, S>(count, p, p, {in, p, 1}, twice, out, padded);
        for (int64_t i = 0; i < count; i++) dx.put<S>(out + i * padded, first + i);
      }
    });
  });
}

}  // namespace dtme::DTME_ISA
