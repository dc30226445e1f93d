// The layout chunk in plain C++: products select, decoding scatters.
#pragma once
#include "internal.h"

namespace sk {
namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

template <int N>
void chunk_token(const View& w, const float* x, int64_t p, float* out) {
  const int64_t entries = w.cols / kChunk * kPanelRows * N;
  const uint8_t* value = w.values + 2 * p * entries;
  const uint8_t* column = w.codes + p * entries;
  float sums[kPanelRows] = {};
  for (int64_t c = 0; c < w.cols; c += kChunk)
    for (int64_t r = 0; r < kPanelRows; ++r, value += 2 * N, column += N) {
      float sum = 0;
      for (int k = 0; k < N; ++k) sum += bf16_to_float(load<uint16_t>(value + 2 * k)) * x[c + column[k]];
      sums[r] += sum;
    }
  memcpy(out, sums, sizeof sums);
}

// One panel, x.floats [tokens][column].
void generic_chunk(const View& w, const Input& x, int64_t p, float* out, int64_t ld) {
  const auto run = w.kept == 4 ? chunk_token<4> : w.kept == 8 ? chunk_token<8> : chunk_token<16>;
  for (int64_t t = 0; t < x.tokens; ++t) run(w, x.floats + t * w.cols, p, out + t * ld);
}

// Columns [begin, end) of a panel, whole chunks, into a zeroed panel of the scratch.
void generic_decode_chunk(const View& w, int64_t p, int64_t begin, int64_t end, bool pairs, void* panel) {
  const int64_t n = kPanelRows * w.kept;
  for (int64_t c = begin; c < end; c += kChunk) {
    const int64_t first = (p * (w.cols / kChunk) + c / kChunk) * n;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = i / w.kept, column = c - begin + w.codes[first + i];
      const uint16_t value = load<uint16_t>(w.values + 2 * (first + i));
      // A row that does not exist has its zeros all in the first column.
      if (pairs)
        static_cast<uint16_t*>(panel)[column / 2 * 32 + row * 2 + (column & 1)] = value;
      else
        static_cast<float*>(panel)[column * 16 + row] = bf16_to_float(value);
    }
  }
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
