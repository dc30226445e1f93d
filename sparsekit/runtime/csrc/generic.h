// Kernels in plain C++, shared by every instruction set for what it has no special code for. Internal linkage on
// purpose: each file that includes this compiles it for its own target and lets the compiler vectorise.
#pragma once
#include "block.h"
#include "chunk.h"

namespace sk {
namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

// Stores one decoded weight into a panel: bf16 [pair][16][2] or float [column][16].
inline void put_weight(void* panel, bool pairs, int64_t row, int64_t column, const uint8_t* value, int32_t dtype) {
  if (pairs)
    memcpy(static_cast<uint16_t*>(panel) + column / 2 * 32 + row * 2 + (column & 1), value, 2);
  else
    static_cast<float*>(panel)[column * 16 + row] = to_float(value, dtype, 0);
}

void generic_decode_bitmap(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, char* panels,
                           int64_t stride) {
  const int64_t size = element_size(w.dtype);
  const uint8_t* value = w.values + (int64_t(w.offsets[g]) + int64_t(at.value[0])) * size;
  const uint8_t* start = value;
  const uint32_t* masks = w.masks32 + g * w.tiles * 4;
  for (int64_t c = begin; c < end; ++c)
    for (int q = 0; q < 4; ++q)
      for (uint32_t rest = masks[4 * c + q]; rest; rest &= rest - 1, value += size) {
        const int j = __builtin_ctz(rest);
        put_weight(panels + q * stride, pairs, j / 2, 2 * (c - begin) + (j & 1), value, w.dtype);
      }
  at.value[0] += uint64_t(value - start) / uint64_t(size);
}

void generic_decode_split(const View& w, int64_t p, int q, Cursor& at, int64_t begin, int64_t end, bool pairs,
                          char* panel_out) {
  const Panel& panel = w.panels[p];
  const uint8_t* low = w.values + panel.low + at.value[q];
  const uint8_t* code = w.codes + panel.code + at.code[q];
  for (int64_t t = begin; t < end; ++t) {
    const uint64_t mask = w.masks64[p * w.tiles + t];
    unsigned bit = 0;
    for (uint64_t rest = mask; rest; rest &= rest - 1, bit += panel.width) {
      const int j = __builtin_ctzll(rest);
      const unsigned window = unsigned(code[bit / 8]) | unsigned(code[bit / 8 + 1]) << 8;
      const unsigned index = window >> (bit % 8) & ((1u << panel.width) - 1);
      const uint8_t value[2] = {*low++, panel.width == 8 ? uint8_t(index) : panel.dictionary[index]};
      put_weight(panel_out, pairs, split_row(j), 4 * (t - begin) + split_column(j), value, SK_BF16);
    }
    code += code_bytes(uint64_t(__builtin_popcountll(mask)), panel.width);
  }
  at.value[q] = uint64_t(low - w.values) - panel.low;
  at.code[q] = uint64_t(code - w.codes) - panel.code;
}

void generic_decode(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, void* panels,
                    int64_t stride) {
  char* out = static_cast<char*>(panels);
  const int64_t columns = (end - begin) * (w.layout == SK_BITMAP ? 2 : 4);
  for (int q = 0; q < 4; ++q) memset(out + q * stride, 0, size_t(columns * (pairs ? 32 : 64)));
  if (w.layout == SK_BITMAP) return generic_decode_bitmap(w, g, at, begin, end, pairs, out, stride);
  for (int q = 0; q < 4 && 4 * g + q < ceil_div(w.rows, kPanelRows); ++q)
    if (w.layout == SK_CHUNK)
      generic_decode_chunk(w, 4 * g + q, 4 * begin, 4 * end, pairs, out + q * stride);
    else
      generic_decode_split(w, 4 * g + q, q, at, begin, end, pairs, out + q * stride);
}

template <int T>
void generic_micro_tokens(const float* a, const float* b, const float* x, int64_t steps, bool first, float* acc,
                          int64_t ld) {
  float sums[T][32];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < 32; ++r) sums[t][r] = first ? 0.0f : acc[t * ld + r];
  for (int64_t k = 0; k < steps; ++k)
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < 16; ++r) {
        sums[t][r] += a[k * 16 + r] * x[k * T + t];
        sums[t][r + 16] += b[k * 16 + r] * x[k * T + t];
      }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < 32; ++r) acc[t * ld + r] = sums[t][r];
}

void generic_micro(const void* a, const void* b, const void* x, int64_t steps, int tokens, bool, bool first,
                   float* acc, int64_t ld) {
  const float *p = static_cast<const float*>(a), *q = static_cast<const float*>(b), *v = static_cast<const float*>(x);
  switch (tokens) {
#define SK_CASE(n) case n: return generic_micro_tokens<n>(p, q, v, steps, first, acc, ld);
    SK_CASE(1) SK_CASE(2) SK_CASE(3) SK_CASE(4) SK_CASE(5) SK_CASE(6)
    SK_CASE(7) SK_CASE(8) SK_CASE(9) SK_CASE(10) SK_CASE(11) SK_CASE(12)
#undef SK_CASE
  }
}

void generic_dense(const void* weight, int32_t dtype, int64_t cols, int64_t begin, int64_t end, const Input& x,
                   int64_t x_stride, float* out, int64_t ld) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t t = 0; t < x.tokens; ++t) {
      const float* v = x.floats + t * x_stride;
      float sums[8] = {};
      for (int64_t k = 0; k < cols; ++k) sums[k % 8] += to_float(weight, dtype, r * cols + k) * v[k];
      out[t * ld + r - begin] =
          ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
}

void generic_store(const float* sums, const void* bias, int64_t count, int32_t dtype, void* y) {
  if (dtype == SK_BF16 && !bias) {
    uint8_t* out = static_cast<uint8_t*>(y);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t u = float_to_bits(sums[i]);
      const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = u >> 16 | 0x40;
      const uint16_t v = uint16_t((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
      memcpy(out + 2 * i, &v, 2);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    from_float(bias ? sums[i] + to_float(bias, dtype, i) : sums[i], y, dtype, i);
}

uint64_t generic_read(const uint8_t* data, int64_t bytes) {
  uint64_t sums[8] = {};
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64)
    for (int k = 0; k < 8; ++k) sums[k] += load<uint64_t>(data + i + 8 * k);
  uint64_t sum = 0;
  for (; i < bytes; ++i) sum += data[i];
  for (uint64_t s : sums) sum += s;
  return sum;
}


#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
