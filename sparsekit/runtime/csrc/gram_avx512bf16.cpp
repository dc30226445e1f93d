// X^T X of bf16 inputs with vdpbf16ps: exact products, sums in float32 over a chunk of tokens, then in float64.
//
// Two tokens of a column make one 32-bit pair. Pairs lie in panels of 48 columns, [pair][48]; the sums of 8 x 48 columns
// stay in registers while a chunk runs through them, so each pair of a panel is loaded once for eight columns.
#include <immintrin.h>

#include "linear.h"
#include "parallel.h"

namespace sk {
namespace {

constexpr int64_t kPairs = 256;    // of tokens in a chunk: one panel of them is 48 KiB, in the second-level cache
constexpr int64_t kColumns = 48;   // of a panel, three registers
constexpr int64_t kRows = 8;       // columns on the other side of a product; divides kColumns
constexpr int64_t kPanel = kPairs * kColumns;

thread_local Scratch packed;

inline __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

inline __m512i load16(const uint16_t* p, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
}

// One panel: columns [column, column + 48) of tokens [0, tokens); what is missing is zero.
void pack(const uint16_t* x, int64_t tokens, int64_t stride, int64_t cols, int64_t column, uint32_t* panel) {
  for (int64_t t = 0; t < tokens; t += 2, panel += kColumns)
    for (int64_t c = 0; c < kColumns; c += 16) {
      const __mmask16 mask = first(cols - column - c);
      if (!mask) {
        _mm512_storeu_si512(panel + c, _mm512_setzero_si512());
        continue;
      }
      const uint16_t* at = x + t * stride + column + c;
      const __m512i low = load16(at, mask);
      const __m512i high = t + 1 < tokens ? load16(at + stride, mask) : _mm512_setzero_si512();
      _mm512_storeu_si512(panel + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// sums[r][0..47] += products of 8 columns `a` (stride 48 pairs) and 48 columns `b`.
void micro(const uint32_t* a, const uint32_t* b, int64_t pairs, double* sums, int64_t stride, int64_t rows,
           int64_t columns) {
  __m512 acc[kRows][3];
  for (auto& row : acc)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += kColumns, b += kColumns) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
    const __m512bh b2 = (__m512bh)_mm512_loadu_si512(b + 32);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(int(a[r]));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], one, b0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], one, b1);
      acc[r][2] = _mm512_dpbf16_ps(acc[r][2], one, b2);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 8) {
      const __mmask8 mask = __mmask8(first(columns - c < 8 ? columns - c : 8));
      const __m512 whole = acc[r][c / 16];
      const __m256 half = c % 16 ? _mm512_extractf32x8_ps(whole, 1) : _mm512_castps512_ps256(whole);
      double* at = sums + r * stride + c;
      const __m512d sum = _mm512_add_pd(_mm512_maskz_loadu_pd(mask, at), _mm512_cvtps_pd(half));
      _mm512_mask_storeu_pd(at, mask, sum);
    }
}

}  // namespace

bool gram_avx512bf16(const uint16_t* x, int64_t tokens, int64_t stride, int64_t cols, double* sums, int threads) {
  const int64_t panels = ceil_div(cols, kColumns);
  auto* memory = static_cast<uint32_t*>(packed.need(panels * kPanel * int64_t(sizeof(uint32_t))));
  if (!memory) return false;
  for (int64_t done = 0; done < tokens; done += 2 * kPairs) {
    const int64_t chunk = tokens - done < 2 * kPairs ? tokens - done : 2 * kPairs;
    auto fill = [&](int64_t begin, int64_t end, int) {
      for (int64_t p = begin; p < end; ++p)
        pack(x + done * stride, chunk, stride, cols, p * kColumns, memory + p * kPanel);
    };
    for_each(threads, panels, 4, fill);
    auto work = [&](int64_t begin, int64_t end, int) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t p = panels - 1 - n, column = p * kColumns;  // the longest first
        const int64_t width = cols - column < kColumns ? cols - column : kColumns;
        for (int64_t row = 0; row < column + width; row += kRows) {
          const int64_t rows = cols - row < kRows ? cols - row : kRows;
          const uint32_t* a = memory + row / kColumns * kPanel + row % kColumns;
          micro(a, memory + p * kPanel, ceil_div(chunk, 2), sums + row * cols + column, cols, rows, width);
        }
      }
    };
    for_each(threads, panels, 1, work);
  }
  return true;
}

}  // namespace sk
