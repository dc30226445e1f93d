// The layout block in fp32 arithmetic: dense tiles of 16 rows x 4 columns times some tokens. Written once with the
// compiler's vectors, which are as wide as the instruction set this is compiled for.
#pragma once
#include "internal.h"

namespace sk {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kBlockTokens = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8, kBlockTokens = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kBlockTokens = 6;
#else
constexpr int kLanes = 4, kBlockTokens = 2;
#endif
constexpr int kParts = int(kPanelRows) / kLanes;  // vectors of a column
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

inline Floats half_to_floats(Halves h) {  // as f16_to_float
  const Words u = __builtin_convertvector(h, Words), sign = (u & 0x8000) << 16, rest = (u & 0x7fff) << 13;
  const Words special = (Words)((u & 0x7c00) == 0x7c00);
  const Words finite = (Words)((Floats)rest * bits_to_float(0x77800000));
  return (Floats)(sign | (special & (rest | 0x7f800000)) | (~special & finite));
}

// Rows of part `q` in columns 2 h and 2 h + 1 of a tile.
template <int32_t DType>
inline void two_columns(const uint8_t* tile, int h, int q, Floats& first, Floats& second) {
  if (DType == SK_BF16) {
    const Words pairs = load<Words>(tile + 64 * h + 4 * kLanes * q);
    first = (Floats)(pairs << 16);
    second = (Floats)(pairs & 0xffff0000);
  } else if (DType == SK_F16) {
    first = half_to_floats(load<Halves>(tile + 64 * h + 2 * kLanes * q));
    second = half_to_floats(load<Halves>(tile + 64 * h + 32 + 2 * kLanes * q));
  } else {
    first = load<Floats>(tile + 128 * h + 4 * kLanes * q);
    second = load<Floats>(tile + 128 * h + 64 + 4 * kLanes * q);
  }
}

template <int32_t DType, int T>
void block_tokens(const View& w, const float* x, int64_t stride, int64_t p, float* out, int64_t ld) {
  constexpr int64_t kTileBytes = kPanelRows * kTileColumns * (DType == SK_F32 ? 4 : 2);
  const uint64_t begin = w.offsets[p], end = w.offsets[p + 1];
  const uint8_t* tile = w.values + int64_t(begin) * kTileBytes;
  Floats sums[T][kParts] = {};
  for (uint64_t i = begin; i < end; ++i, tile += kTileBytes) {
    for (int64_t line = 0; line < kTileBytes; line += 64) __builtin_prefetch(tile + 4096 + line);
    const float* at = x + w.columns[i] * stride;
    for (int h = 0; h < 2; ++h, at += 2 * stride)
      for (int q = 0; q < kParts; ++q) {
        Floats first, second;
        two_columns<DType>(tile, h, q, first, second);
        for (int t = 0; t < T; ++t) {
          sums[t][q] += first * at[t];
          sums[t][q] += second * at[stride + t];
        }
      }
  }
  for (int t = 0; t < T; ++t) memcpy(out + t * ld, sums[t], sizeof sums[t]);
}

template <int32_t DType, int T = kBlockTokens>
void block_some(const View& w, const float* x, int64_t stride, int64_t tokens, int64_t p, float* out, int64_t ld) {
  if (tokens == T) return block_tokens<DType, T>(w, x, stride, p, out, ld);
  if constexpr (T > 1) block_some<DType, T - 1>(w, x, stride, tokens, p, out, ld);
}

// One panel, x.floats [column][tokens]; as many tokens at a time as the registers hold.
void generic_block(const View& w, const Input& x, int64_t p, float* out, int64_t ld) {
  for (int64_t t = 0; t < x.tokens; t += kBlockTokens) {
    const int64_t n = x.tokens - t < kBlockTokens ? x.tokens - t : kBlockTokens;
    auto run = w.dtype == SK_BF16 ? block_some<SK_BF16> : w.dtype == SK_F16 ? block_some<SK_F16> : block_some<SK_F32>;
    run(w, x.floats + t, x.tokens, n, p, out + t * ld, ld);
  }
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
