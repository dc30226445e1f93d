// int8 and int4 in plain C++: activations to bytes, tiles to integers, products. Internal linkage, as in generic.h:
// every file that includes this compiles it for its own target.
#pragma once
#include <math.h>

#include "internal.h"

namespace sk {
namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

// Four bits for the integers -8..-1, 1..8, in this order, as on disk.
inline uint8_t int4_code(int8_t integer) { return uint8_t(integer < 0 ? integer + 8 : integer + 7); }
// (Without masks a zero needs a code: then they mean -8..7.)
inline int8_t int4_integer(unsigned code) { return int8_t(code < 8 ? int(code) - 8 : int(code) - 7); }

inline float round_to(float f, int32_t dtype) {
  if (dtype == SK_F32) return f;
  return dtype == SK_BF16 ? bf16_to_float(float_to_bf16(f)) : f16_to_float(float_to_f16(f));
}

// --- activations ---------------------------------------------------------------------------------------------
// 64 values to bytes around 128; returns their scale. |x - (byte - 128) scale| <= scale / 2 = largest |x| / 254, up to
// fp32 rounding. NaN makes the whole group NaN. Beside an infinity finite values count as zero, so that the product is
// infinite or NaN as with exact arithmetic. A group below 2^-100, where 127 / largest could overflow, is zero.
inline float quantise_group(const float* x, uint8_t* bytes) {
  uint32_t most = 0;
  for (int i = 0; i < 64; ++i) {
    const uint32_t size = float_to_bits(x[i]) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const float largest = bits_to_float(most);
  if (most >= 0x7f800000) {
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(128 + (x[i] == largest) - (x[i] == -largest));
    return largest;
  }
  if (largest < 0x1p-100f) {
    memset(bytes, 128, 64);
    return 0.0f;
  }
  const float inverse = 127.0f / largest;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the lowest bits.
  for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(float_to_bits(x[i] * inverse + 12582912.0f) + 128);
  return largest / 127.0f;
}

template <class Get>
inline void quantise_token(int64_t cols, int64_t token, int64_t tokens, uint8_t* bytes, float* scales, Get get) {
  for (int64_t g = 0; g * 64 < cols; ++g) {
    const int n = int(cols - g * 64 < 64 ? cols - g * 64 : 64);
    float x[64] = {};
    uint8_t group[64];
    if (n == 64)
      for (int i = 0; i < 64; ++i) x[i] = get(g * 64 + i);
    else
      for (int i = 0; i < n; ++i) x[i] = get(g * 64 + i);
    scales[g * tokens + token] = quantise_group(x, group);
    uint8_t* to = bytes + (g * kGroupTiles * tokens + token) * 4;
    if (tokens == 1)
      memcpy(to, group, 64);
    else
      for (int t = 0; t < kGroupTiles; ++t) memcpy(to + t * tokens * 4, group + 4 * t, 4);
  }
}

void generic_quantise(const void* x, int32_t dtype, int64_t cols, int64_t token, int64_t tokens, uint8_t* bytes,
                      float* scales) {
  const char* p = static_cast<const char*>(x);
  if (dtype == SK_BF16)
    quantise_token(cols, token, tokens, bytes, scales, [=](int64_t i) { return bf16_to_float(load<uint16_t>(p + 2 * i)); });
  else if (dtype == SK_F16)
    quantise_token(cols, token, tokens, bytes, scales, [=](int64_t i) { return f16_to_float(load<uint16_t>(p + 2 * i)); });
  else
    quantise_token(cols, token, tokens, bytes, scales, [=](int64_t i) { return load<float>(p + 4 * i); });
}

// --- weights -------------------------------------------------------------------------------------------------
// The integers of tile t of panel p, [16 rows][4 columns], zero in the holes; `at` moves behind its values.
inline void integers_of_tile(const View& w, int64_t p, int64_t t, const uint8_t*& at, int8_t* tile) {
  const uint64_t mask = w.masks64 ? w.masks64[p * w.groups * kGroupTiles + t] : ~uint64_t(0);
  memset(tile, 0, 64);
  unsigned n = 0;
  for (uint64_t rest = mask; rest; rest &= rest - 1, ++n) {
    int8_t& integer = tile[__builtin_ctzll(rest)];
    const unsigned code = w.layout == SK_INT4 ? unsigned(at[n / 2]) >> (4 * (n & 1)) & 15 : 0;
    integer = w.layout == SK_INT8 ? int8_t(at[n]) : w.masks64 ? int4_integer(code) : int8_t(int(code) - 8);
  }
  at += w.layout == SK_INT8 ? n : (n + 1) / 2;
}

void generic_fused_quantised(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld) {
  const uint16_t* scales = w.scales + p * w.groups * kPanelRows;
  const uint8_t* at = w.values + w.offsets[p];
  const uint8_t* bytes = x.bytes;
  for (int64_t t = 0; t < x.tokens; ++t) memset(out + t * ld, 0, size_t(kPanelRows) * 4);
  for (int64_t g = 0; g < w.groups; ++g, scales += kPanelRows) {
    int32_t sums[kMaxFused][kPanelRows] = {};
    for (int i = 0; i < kGroupTiles; ++i) {
      int8_t tile[64];
      integers_of_tile(w, p, g * kGroupTiles + i, at, tile);
      for (int64_t t = 0; t < x.tokens; ++t, bytes += 4)
        for (int r = 0; r < kPanelRows; ++r)
          for (int k = 0; k < 4; ++k) sums[t][r] += tile[4 * r + k] * (bytes[k] - 128);
    }
    for (int64_t t = 0; t < x.tokens; ++t)
      for (int r = 0; r < kPanelRows; ++r)
        out[t * ld + r] += float(sums[t][r]) * (f16_to_float(scales[r]) * x.scales[g * x.tokens + t]);
  }
}

void generic_decode_quantised(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs,
                              void* panels, int64_t stride) {
  for (int q = 0; q < 4; ++q) {
    const int64_t p = 4 * g + q;
    char* panel = static_cast<char*>(panels) + q * stride;
    memset(panel, 0, size_t((end - begin) * 4 * (pairs ? 32 : 64)));
    if (p >= ceil_div(w.rows, kPanelRows)) continue;
    const uint8_t* from = w.values + w.offsets[p] + at.value[q];
    for (int64_t t = begin; t < end; ++t) {
      const uint16_t* scales = w.scales + (p * w.groups + t / kGroupTiles) * kPanelRows;
      int8_t tile[64];
      integers_of_tile(w, p, t, from, tile);
      for (int j = 0; j < 64; ++j) {
        const int64_t row = j / 4, column = 4 * (t - begin) + j % 4;
        const float weight = float(tile[j]) * f16_to_float(scales[row]);
        if (pairs)
          reinterpret_cast<uint16_t*>(panel)[column / 2 * 32 + row * 2 + (column & 1)] = float_to_bf16(weight);
        else
          reinterpret_cast<float*>(panel)[column * 16 + row] = round_to(weight, w.dtype);
      }
    }
    at.value[q] = uint64_t(from - w.values) - w.offsets[p];
  }
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
