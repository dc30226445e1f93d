// The layout chunk with AVX-512: the columns of a vector of values pick their activations out of registers
// (vpermi2w, vpermi2ps), and nothing is ever expanded. Included by kernels_avx512.cpp.
#pragma once
#include "internal.h"

namespace sk {
namespace {

// Sums lie [row][lanes of the row]; one vector of 16 rows remains.
template <int Vectors>
inline void fold_rows(__m512* sums, float* out) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  for (int n = Vectors / 2; n >= 1; n /= 2)
    for (int i = 0; i < n; ++i)
      sums[i] = _mm512_add_ps(_mm512_permutex2var_ps(sums[2 * i], evens, sums[2 * i + 1]),
                              _mm512_permutex2var_ps(sums[2 * i], odds, sums[2 * i + 1]));
  _mm512_storeu_ps(out, sums[0]);
}

// T tokens, bf16 pairs: a vector has 32 values, its 64 activations lie in two registers.
template <int N, int T>
void chunk_pairs(const View& w, const uint32_t* x, int64_t p, float* out, int64_t ld) {
  constexpr int kVectors = N / 2;
  const int64_t entries = w.cols / kChunk * kPanelRows * N;
  const uint8_t* value = w.values + 2 * p * entries;
  const uint8_t* column = w.codes + p * entries;
  __m512 sums[T][kVectors];
  for (auto& token : sums)
    for (auto& s : token) s = _mm512_setzero_ps();
  for (int64_t c = 0; c < w.cols; c += kChunk, value += 64 * kVectors, column += 32 * kVectors) {
    prefetch<kVectors>(value + kAhead);
    prefetch<(kVectors + 1) / 2>(column + kAhead / 2);
    __m512i low[T], high[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      low[t] = _mm512_loadu_si512(x + (t * w.cols + c) / 2);
      high[t] = _mm512_loadu_si512(x + (t * w.cols + c) / 2 + 16);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(column + 32 * v)));
      const __m512i values = _mm512_loadu_si512(value + 64 * v);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        sums[t][v] = dot(sums[t][v], values, _mm512_permutex2var_epi16(low[t], at, high[t]));
    }
  }
  for (int t = 0; t < T; ++t) fold_rows<kVectors>(sums[t], out + t * ld);
}

template <int N>
void chunk_floats(const View& w, const float* x, int64_t p, float* out) {
  const int64_t entries = w.cols / kChunk * kPanelRows * N;
  const uint8_t* value = w.values + 2 * p * entries;
  const uint8_t* column = w.codes + p * entries;
  __m512 sums[N];
  for (auto& s : sums) s = _mm512_setzero_ps();
  for (int64_t c = 0; c < w.cols; c += kChunk, value += 32 * N, column += 16 * N) {
    prefetch<N / 2>(value + kAhead);
    prefetch<(N + 3) / 4>(column + kAhead / 2);
    __m512 quarter[4];
    for (int q = 0; q < 4; ++q) quarter[q] = _mm512_loadu_ps(x + c + 16 * q);
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(column + 16 * v)));
      const __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + 32 * v)));
      const __m512 selected = _mm512_mask_blend_ps(_mm512_test_epi32_mask(at, _mm512_set1_epi32(32)),
                                                   _mm512_permutex2var_ps(quarter[0], at, quarter[1]),
                                                   _mm512_permutex2var_ps(quarter[2], at, quarter[3]));
      sums[v] = _mm512_fmadd_ps(even(half), selected, sums[v]);
    }
  }
  fold_rows<N>(sums, out);
}

template <int N, int T>  // T: as many tokens as the registers hold
void chunk_tokens(const View& w, const Input& x, int64_t p, bool pairs, float* out, int64_t ld) {
  int64_t t = 0;
  if (pairs) {
    if constexpr (kHasPairs) {
      for (; t + T <= x.tokens; t += T) chunk_pairs<N, T>(w, x.pairs + t * w.cols / 2, p, out + t * ld, ld);
      for (; t < x.tokens; ++t) chunk_pairs<N, 1>(w, x.pairs + t * w.cols / 2, p, out + t * ld, ld);
    }
    return;
  }
  for (; t < x.tokens; ++t) chunk_floats<N>(w, x.floats + t * w.cols, p, out + t * ld);
}

// One panel; x [tokens][column].
void chunk_product(const View& w, const Input& x, int64_t p, bool pairs, float* out, int64_t ld) {
  if (w.kept == 4) return chunk_tokens<4, 4>(w, x, p, pairs, out, ld);
  if (w.kept == 8) return chunk_tokens<8, 4>(w, x, p, pairs, out, ld);
  return chunk_tokens<16, 2>(w, x, p, pairs, out, ld);
}

}  // namespace
}  // namespace sk
