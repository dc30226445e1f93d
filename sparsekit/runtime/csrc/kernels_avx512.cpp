// AVX-512 with VBMI2; compiled a second time with SK_WITH_BF16 for processors that have vdpbf16ps.
//
// Two facts of these processors shape the code: values are expanded in registers (expand_avx512.h), and one core does
// not keep enough cache misses in flight by itself: so every stream is prefetched some kilobytes ahead, as many lines
// per step as the block's density consumes, no more.
#include "expand_avx512.h"
#include "generic.h"

namespace sk {
namespace {

#if defined(SK_WITH_BF16)
constexpr bool kHasPairs = true;
inline __m512 dot(__m512 sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
#else
constexpr bool kHasPairs = false;
inline __m512 dot(__m512 sum, __m512i, __m512i) { return sum; }
#endif

// Sums live in registers only if the compiler inlines what adds to them and knows which of them it is.
#define SK_INLINE __attribute__((always_inline))
template <int N>
struct Slot {
  static constexpr int value = N;
};

template <int Lines>
inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 8
  for (int i = 0; i < Lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(p) + 64 * i, _MM_HINT_T0);
}
#ifndef SK_AHEAD
#define SK_AHEAD 4096
#endif
constexpr int kAhead = SK_AHEAD;  // bytes; masks and codes, which are consumed more slowly, half of it

}  // namespace
}  // namespace sk

#include "chunk_avx512.h"  // needs what is above

namespace sk {
namespace {

// --- bitmap, 16-bit values ---------------------------------------------------------------------------------
// Multiplies one 16 x 2 tile for T tokens. Float: fp32 arithmetic, x [column][T]; otherwise bf16 pairs.
template <int T, bool Float>
inline void tile_product(__m512* sums, __m512i w, const Input& x, int64_t pair) {
  if (Float) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      sums[t] = _mm512_fmadd_ps(even(w), _mm512_set1_ps(x.floats[2 * pair * T + t]), sums[t]);
      sums[t] = _mm512_fmadd_ps(odd(w), _mm512_set1_ps(x.floats[(2 * pair + 1) * T + t]), sums[t]);
    }
  } else {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[t] = dot(sums[t], w, _mm512_set1_epi32(int(x.pairs[pair * T + t])));
  }
}

template <int T, bool Float, int Lines>
void bitmap16(const View& w, const Input& x, int64_t b, float* out, int64_t ld) {
  constexpr int kSets = T <= 2 ? 2 : 1;  // independent sums hide the latency of the product
  const uint32_t* masks = w.masks32 + b * w.tiles * 4;
  const uint8_t* base = w.values + w.offsets[b] * 2;
  uint64_t at = 0;
  __m512 sums[kSets][4][T];
  for (auto& set : sums)
    for (auto& q : set)
      for (auto& s : q) s = _mm512_setzero_ps();
  for (int64_t c = 0; c < w.tiles; c += 2, masks += 8) {
    prefetch<Lines>(base + 2 * at + kAhead);
    if ((c & 2) == 0) prefetch<1>(reinterpret_cast<const uint8_t*>(masks) + kAhead / 2);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const uint32_t mask = masks[4 * h + q];
        const __m512i tile = expand16(base + 2 * at, mask);
        at += uint64_t(__builtin_popcount(mask));
        asm("" : "+r"(at));  // keeps the position in one 64-bit register
        tile_product<T, Float>(sums[h % kSets][q], tile, x, c + h);
      }
  }
  for (int t = 0; t < T; ++t)
    for (int q = 0; q < 4; ++q) {
      __m512 s = sums[0][q][t];
      if (kSets == 2) s = _mm512_add_ps(s, sums[kSets - 1][q][t]);
      _mm512_storeu_ps(out + t * ld + 16 * q, s);
    }
}

template <int T, bool Float>
void bitmap16_by_density(const View& w, const Input& x, int64_t b, float* out, int64_t ld) {
  // Bytes consumed per step of two column pairs, on the average of this block.
  const int64_t step = w.tiles ? int64_t(w.offsets[b + 1] - w.offsets[b]) * 2 / (w.tiles / 2) : 0;
  if (step <= 64) return bitmap16<T, Float, 1>(w, x, b, out, ld);
  if (step <= 128) return bitmap16<T, Float, 2>(w, x, b, out, ld);
  if (step <= 192) return bitmap16<T, Float, 3>(w, x, b, out, ld);
  if (step <= 256) return bitmap16<T, Float, 4>(w, x, b, out, ld);
  return bitmap16<T, Float, 6>(w, x, b, out, ld);
}

// --- bitmap, fp16 and fp32 values: 8 rows x 2 columns per vector ---------------------------------------------
template <bool Half>
inline __m512 expand_eight_rows(const uint8_t* base, uint64_t& at, uint32_t mask) {
  const uint32_t n = uint32_t(__builtin_popcount(mask));
  __m512 v;
  if (Half) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + 2 * at));
    __mmask16 k = __mmask16(mask);
    asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(h) : "Yk"(k));
    v = _mm512_cvtph_ps(h);
  } else {
    v = expand32(base + 4 * at, mask);
  }
  at += n;
  return v;
}

template <bool Half>
void bitmap_wide(const View& w, const Input& x, int64_t b, float* out) {
  const uint32_t* masks = w.masks32 + b * w.tiles * 4;
  const uint8_t* base = w.values + w.offsets[b] * (Half ? 2 : 4);
  uint64_t at = 0;
  __m512 sums[8];
  for (auto& s : sums) s = _mm512_setzero_ps();
  for (int64_t c = 0; c < w.tiles; ++c, masks += 4) {
    prefetch<2>(base + (Half ? 2 : 4) * at + kAhead);
    if (!Half) prefetch<2>(base + 4 * at + kAhead + 128);
    if ((c & 3) == 0) prefetch<1>(reinterpret_cast<const uint8_t*>(masks) + kAhead / 2);
    const __m512 pair = _mm512_castpd_ps(_mm512_set1_pd(load<double>(x.floats + 2 * c)));
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q)
      sums[q] = _mm512_fmadd_ps(expand_eight_rows<Half>(base, at, masks[q / 2] >> (16 * (q & 1)) & 0xffff), pair, sums[q]);
  }
  alignas(64) float both[16];
  for (int q = 0; q < 8; ++q) {
    _mm512_store_ps(both, sums[q]);
    for (int r = 0; r < 8; ++r) out[8 * q + r] = both[2 * r] + both[2 * r + 1];
  }
}

// --- split ---------------------------------------------------------------------------------------------------
// Spreads the codes of one tile over the bytes of a vector and looks their high bytes up.
template <int Width>
struct Codes {
  __m512i spread, shifts, table;
  explicit Codes(const uint8_t* dictionary) {
    if (Width == 8) return;
    alignas(64) uint8_t index[64], shift[64];
    for (int q = 0; q < 8; ++q)
      for (int b = 0; b < 8; ++b) {
        index[8 * q + b] = uint8_t(b < Width ? q * Width + b : 0);
        shift[8 * q + b] = uint8_t(b * Width);
      }
    spread = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    // vpermb reads six bits of its index: with the dictionary repeated, the bits above the code do not matter.
    table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(dictionary)));
  }
  inline __m512i high(const uint8_t* code) const {
    if (Width == 8) return _mm512_loadu_si512(code);
    __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)));
    v = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, v));
    return _mm512_permutexvar_epi8(v, table);
  }
};

// Decodes tiles [begin, end) of a panel and hands each to visit(tile, columns 4c and 4c+1, columns 4c+2 and 4c+3).
template <int Width, int LowLines, int CodeLines, class Visit>
inline void split_tiles(const View& w, const Panel& panel, const uint64_t* masks, uint64_t& low_at, uint64_t& code_at,
                        int64_t begin, int64_t end, Visit visit) {
  const Codes<Width> codes(panel.dictionary);
  const uint8_t* low_base = w.values + panel.low;
  const uint8_t* code_base = w.codes + panel.code;
  uint64_t low = low_at, code = code_at;
  auto tile = [&](int64_t t, auto slot) SK_INLINE {
    const uint64_t mask = masks[t], n = uint64_t(__builtin_popcountll(mask));
    const __m512i l = expand8(_mm512_loadu_si512(low_base + low), mask);
    const __m512i h = expand8(codes.high(code_base + code), mask);
    low += n;
    code += code_bytes(n, Width);
    asm("" : "+r"(low), "+r"(code));
    visit(t, slot, _mm512_unpacklo_epi8(l, h), _mm512_unpackhi_epi8(l, h));
  };
  int64_t t = begin;
  for (; t + 4 <= end; t += 4) {
    prefetch<LowLines>(low_base + low + kAhead);
    prefetch<CodeLines>(code_base + code + kAhead / 2);
    if ((t & 4) == 0) prefetch<1>(reinterpret_cast<const uint8_t*>(masks + t) + kAhead / 2);
    tile(t, Slot<0>());
    tile(t + 1, Slot<1>());
    tile(t + 2, Slot<0>());
    tile(t + 3, Slot<1>());
  }
  for (; t < end; ++t) tile(t, Slot<0>());
  low_at = low;
  code_at = code;
}

template <int Width, int T, bool Float, int LowLines, int CodeLines>
void split(const View& w, const Input& x, int64_t p, float* out, int64_t ld) {
  constexpr int kSets = T <= 2 ? 4 : T <= 4 ? 2 : 1;
  const Panel& panel = w.panels[p];
  __m512 sums[kSets][T];
  for (auto& set : sums)
    for (auto& s : set) s = _mm512_setzero_ps();
  uint64_t low = 0, code = 0;
  split_tiles<Width, LowLines, CodeLines>(w, panel, w.masks64 + p * w.tiles, low, code, 0, w.tiles,
                                          [&](int64_t t, auto slot, __m512i first, __m512i second) SK_INLINE {
                                            constexpr int set = 2 * decltype(slot)::value % kSets;
                                            tile_product<T, Float>(sums[set], first, x, 2 * t);
                                            tile_product<T, Float>(sums[(set + 1) % kSets], second, x, 2 * t + 1);
                                          });
  for (int t = 0; t < T; ++t) {
    __m512 s = sums[0][t];
    for (int k = 1; k < kSets; ++k) s = _mm512_add_ps(s, sums[k][t]);
    _mm512_storeu_ps(out + t * ld, s);
  }
}

template <int T, bool Float>
void split_by_width(const View& w, const Input& x, int64_t p, float* out, int64_t ld) {
  const Panel& panel = w.panels[p];
  if (panel.width == 4) return split<4, T, Float, 2, 1>(w, x, p, out, ld);
  if (panel.width == 8) return split<8, T, Float, 3, 4>(w, x, p, out, ld);
  // Low bytes consumed per step of four tiles, on the average of this panel.
  const int64_t step = w.tiles ? int64_t(w.panels[p + 1].low - panel.low) * 4 / w.tiles : 0;
  if (step <= 64) return split<3, T, Float, 1, 1>(w, x, p, out, ld);
  if (step <= 128) return split<3, T, Float, 2, 1>(w, x, p, out, ld);
  return split<3, T, Float, 4, 2>(w, x, p, out, ld);
}

// --- block, bf16 pairs ---------------------------------------------------------------------------------------
template <int T>
void block16(const View& w, const Input& x, int64_t p, float* out, int64_t ld) {
  constexpr int kSets = T <= 4 ? 2 : 1;
  const uint64_t begin = w.offsets[p], end = w.offsets[p + 1];
  const uint8_t* tile = w.values + 128 * begin;
  __m512 sums[kSets][T];
  for (auto& set : sums)
    for (auto& s : set) s = _mm512_setzero_ps();
  for (uint64_t i = begin; i < end; ++i, tile += 128) {
    prefetch<2>(tile + kAhead);
    const int64_t pair = w.columns[i] / 2;
    tile_product<T, false>(sums[0], _mm512_loadu_si512(tile), x, pair);
    tile_product<T, false>(sums[kSets - 1], _mm512_loadu_si512(tile + 64), x, pair + 1);
  }
  for (int t = 0; t < T; ++t) {
    __m512 s = sums[0][t];
    if (kSets == 2) s = _mm512_add_ps(s, sums[kSets - 1][t]);
    _mm512_storeu_ps(out + t * ld, s);
  }
}

// --- the table's entries ---------------------------------------------------------------------------------------
int64_t fusable(const View& w, bool pairs) {
  if (w.layout == SK_BLOCK || (w.layout == SK_CHUNK && pairs)) return kAnyTokens;
  if (!pairs) return w.layout == SK_CHUNK ? 4 : 1;
  return w.layout == SK_BITMAP ? 6 : 16;
}

template <bool Float, int T>
void fused_tokens(const View& w, const Input& x, int64_t b, float* out, int64_t ld) {
  if (w.layout == SK_BLOCK) return block16<T>(w, x, b, out, ld);
  if (w.layout == SK_SPLIT) return split_by_width<T, Float>(w, x, b, out, ld);
  if constexpr (T <= 6) bitmap16_by_density<T, Float>(w, x, b, out, ld);
}

void fused(const View& w, const Input& x, int64_t b, bool pairs, float* out, int64_t ld) {
  if (w.layout == SK_CHUNK) return chunk_product(w, x, b, pairs, out, ld);
  if (w.layout == SK_BLOCK && !pairs) return generic_block(w, x, b, out, ld);
  if (!pairs) {
    if (w.dtype == SK_F16) return bitmap_wide<true>(w, x, b, out);
    if (w.dtype == SK_F32) return bitmap_wide<false>(w, x, b, out);
    return fused_tokens<true, 1>(w, x, b, out, ld);
  }
  if constexpr (kHasPairs) {
    switch (x.tokens) {
#define SK_CASE(n) case n: return fused_tokens<false, n>(w, x, b, out, ld);
      SK_CASE(1) SK_CASE(2) SK_CASE(3) SK_CASE(4) SK_CASE(5) SK_CASE(6) SK_CASE(7) SK_CASE(8)
      SK_CASE(9) SK_CASE(10) SK_CASE(11) SK_CASE(12) SK_CASE(13) SK_CASE(14) SK_CASE(15) SK_CASE(16)
#undef SK_CASE
    }
  }
}

inline void put_tile(void* panel, bool pairs, int64_t pair, __m512i tile) {
  if (pairs) {
    _mm512_store_si512(static_cast<uint16_t*>(panel) + pair * 32, tile);
  } else {
    _mm512_store_ps(static_cast<float*>(panel) + pair * 32, even(tile));
    _mm512_store_ps(static_cast<float*>(panel) + pair * 32 + 16, odd(tile));
  }
}

template <int Width>
void decode_panel(const View& w, int64_t p, uint64_t& low, uint64_t& code, int64_t begin, int64_t end, bool pairs,
                  void* out) {
  split_tiles<Width, 2, 1>(w, w.panels[p], w.masks64 + p * w.tiles, low, code, begin, end,
                           [&](int64_t t, auto, __m512i first, __m512i second) SK_INLINE {
                             put_tile(out, pairs, 2 * (t - begin), first);
                             put_tile(out, pairs, 2 * (t - begin) + 1, second);
                           });
}

template <bool Half>
void decode_wide(const uint32_t* masks, const uint8_t* base, uint64_t& at, int64_t count, char* out,
                 int64_t stride) {
  alignas(64) int32_t evens[16], odds[16];
  for (int i = 0; i < 16; ++i) {
    evens[i] = 2 * i;
    odds[i] = 2 * i + 1;
  }
  const __m512i first = _mm512_load_si512(evens), second = _mm512_load_si512(odds);
  for (int64_t c = 0; c < count; ++c)
    for (int q = 0; q < 4; ++q) {
      const uint32_t mask = masks[4 * c + q];
      const __m512 a = expand_eight_rows<Half>(base, at, mask & 0xffff);
      const __m512 b = expand_eight_rows<Half>(base, at, mask >> 16);
      float* panel = reinterpret_cast<float*>(out + q * stride) + 32 * c;
      _mm512_store_ps(panel, _mm512_permutex2var_ps(a, first, b));
      _mm512_store_ps(panel + 16, _mm512_permutex2var_ps(a, second, b));
    }
}

void decode(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, void* panels,
            int64_t stride) {
  char* out = static_cast<char*>(panels);
  if (w.layout == SK_CHUNK) return generic_decode(w, g, at, begin, end, pairs, panels, stride);
  if (w.layout == SK_SPLIT) {
    for (int q = 0; q < 4; ++q) {
      const int64_t p = 4 * g + q;
      if (p >= ceil_div(w.rows, kPanelRows)) {
        memset(out + q * stride, 0, size_t((end - begin) * 4 * (pairs ? 32 : 64)));
        continue;
      }
      auto panel = w.panels[p].width == 3 ? decode_panel<3> : w.panels[p].width == 4 ? decode_panel<4> : decode_panel<8>;
      panel(w, p, at.value[q], at.code[q], begin, end, pairs, out + q * stride);
    }
    return;
  }
  const uint32_t* masks = w.masks32 + (g * w.tiles + begin) * 4;
  const uint8_t* base = w.values + int64_t(w.offsets[g]) * element_size(w.dtype);
  if (w.dtype == SK_F16) return decode_wide<true>(masks, base, at.value[0], end - begin, out, stride);
  if (w.dtype == SK_F32) return decode_wide<false>(masks, base, at.value[0], end - begin, out, stride);
  uint64_t position = at.value[0];
  for (int64_t c = 0; c < end - begin; ++c, masks += 4) {
    prefetch<2>(base + 2 * position + kAhead);
    if ((c & 3) == 0) prefetch<1>(reinterpret_cast<const uint8_t*>(masks) + kAhead / 2);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512i tile = expand16(base + 2 * position, masks[q]);
      position += uint64_t(__builtin_popcount(masks[q]));
      put_tile(out + q * stride, pairs, c, tile);
    }
  }
  at.value[0] = position;
}

template <int T, bool Pairs>
void micro_tokens(const void* a, const void* b, const void* x, int64_t steps, bool first, float* acc, int64_t ld) {
  __m512 p[T], q[T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    p[t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + t * ld);
    q[t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + t * ld + 16);
  }
  const char *wa = static_cast<const char*>(a), *wb = static_cast<const char*>(b), *v = static_cast<const char*>(x);
  for (int64_t k = 0; k < steps; ++k, wa += 64, wb += 64, v += 4 * T) {
    const __m512i ta = _mm512_load_si512(wa), tb = _mm512_load_si512(wb);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512i xt = _mm512_set1_epi32(load<int32_t>(v + 4 * t));
      if (Pairs) {
        p[t] = dot(p[t], ta, xt);
        q[t] = dot(q[t], tb, xt);
      } else {
        p[t] = _mm512_fmadd_ps(_mm512_castsi512_ps(ta), _mm512_castsi512_ps(xt), p[t]);
        q[t] = _mm512_fmadd_ps(_mm512_castsi512_ps(tb), _mm512_castsi512_ps(xt), q[t]);
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    _mm512_storeu_ps(acc + t * ld, p[t]);
    _mm512_storeu_ps(acc + t * ld + 16, q[t]);
  }
}

void micro(const void* a, const void* b, const void* x, int64_t steps, int tokens, bool pairs, bool first, float* acc,
           int64_t ld) {
  switch (tokens * 2 + (pairs && kHasPairs)) {
#define SK_CASE(n)                                                              \
  case 2 * n: return micro_tokens<n, false>(a, b, x, steps, first, acc, ld); \
  case 2 * n + 1: return micro_tokens<n, kHasPairs>(a, b, x, steps, first, acc, ld);
    SK_CASE(1) SK_CASE(2) SK_CASE(3) SK_CASE(4) SK_CASE(5) SK_CASE(6)
    SK_CASE(7) SK_CASE(8) SK_CASE(9) SK_CASE(10) SK_CASE(11) SK_CASE(12)
#undef SK_CASE
  }
}

// --- dense: one row at a time, so that the weight is one sequential stream -------------------------------------
// Rows are multiplied with T tokens each time they are read. One token needs several sums to hide the latency of the
// multiplication; four tokens are as many chains by themselves.
constexpr int chains(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }

template <int T>
inline void reduce(__m512 (&sums)[T][chains(T)], float* out, int64_t ld) {
  for (int t = 0; t < T; ++t) {
    __m512 sum = sums[t][0];
    for (int i = 1; i < chains(T); ++i) sum = _mm512_add_ps(sum, sums[t][i]);
    out[t * ld] = _mm512_reduce_add_ps(sum);
  }
}

template <int T>
inline void row_pairs(const uint8_t* row, const uint32_t* x, int64_t stride, int64_t cols, float* out, int64_t ld) {
  __m512 sums[T][chains(T)] = {};
  int64_t k = 0;
  for (; k + 128 <= cols; k += 128) {
    prefetch<4>(row + 2 * k + kAhead / 2);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i w = _mm512_loadu_si512(row + 2 * k + 64 * i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        __m512& sum = sums[t][i % chains(T)];
        sum = dot(sum, w, _mm512_loadu_si512(x + t * stride + k / 2 + 16 * i));
      }
    }
  }
  for (; k < cols; k += 32) {
    const __mmask32 mask = cols - k >= 32 ? ~__mmask32(0) : (__mmask32(1) << (cols - k)) - 1;
    const __m512i w = _mm512_maskz_loadu_epi16(mask, row + 2 * k);
    for (int t = 0; t < T; ++t)
      sums[t][0] = dot(sums[t][0], w, _mm512_maskz_loadu_epi16(mask, x + t * stride + k / 2));
  }
  reduce<T>(sums, out, ld);
}

inline __m512 widen(const uint8_t* p, int32_t dtype, __mmask16 mask) {
  if (dtype == SK_F32) return _mm512_maskz_loadu_ps(mask, p);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  return dtype == SK_F16 ? _mm512_cvtph_ps(half)
                         : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int T>
inline void row_floats(const uint8_t* row, int32_t dtype, const float* x, int64_t stride, int64_t cols, float* out,
                       int64_t ld) {
  const int64_t size = element_size(dtype);
  __m512 sums[T][chains(T)] = {};
  int64_t k = 0;
  for (; k + 64 <= cols; k += 64) {
    prefetch<2>(row + size * k + kAhead / 2);
    if (size == 4) prefetch<2>(row + size * k + kAhead / 2 + 128);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 w = widen(row + size * (k + 16 * i), dtype, 0xffff);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        __m512& sum = sums[t][i % chains(T)];
        sum = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + t * stride + k + 16 * i), sum);
      }
    }
  }
  for (; k < cols; k += 16) {
    const __mmask16 mask = cols - k >= 16 ? __mmask16(0xffff) : __mmask16((1 << (cols - k)) - 1);
    const __m512 w = widen(row + size * k, dtype, mask);
    for (int t = 0; t < T; ++t)
      sums[t][0] = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(mask, x + t * stride + k), sums[t][0]);
  }
  reduce<T>(sums, out, ld);
}

template <int T>
void dense_tokens(const void* weight, int32_t dtype, int64_t cols, int64_t begin, int64_t end, const Input& x,
                  int64_t x_stride, float* out, int64_t ld) {
  const int64_t row_bytes = cols * element_size(dtype);
  const uint8_t* row = static_cast<const uint8_t*>(weight) + begin * row_bytes;
  for (int64_t r = begin; r < end; ++r, row += row_bytes, ++out)
    if (x.pairs)
      row_pairs<T>(row, x.pairs, x_stride, cols, out, ld);
    else
      row_floats<T>(row, dtype, x.floats, x_stride, cols, out, ld);
}

void dense(const void* weight, int32_t dtype, int64_t cols, int64_t begin, int64_t end, const Input& x,
           int64_t x_stride, float* out, int64_t ld) {
  switch (x.tokens) {
    case 1: return dense_tokens<1>(weight, dtype, cols, begin, end, x, x_stride, out, ld);
    case 2: return dense_tokens<2>(weight, dtype, cols, begin, end, x, x_stride, out, ld);
    case 3: return dense_tokens<3>(weight, dtype, cols, begin, end, x, x_stride, out, ld);
    case 4: return dense_tokens<4>(weight, dtype, cols, begin, end, x, x_stride, out, ld);
  }
}

uint64_t read(const uint8_t* data, int64_t bytes) {
  __m512i sums[4] = {};
  int64_t i = 0;
  for (; i + 256 <= bytes; i += 256) {
    prefetch<4>(data + i + kAhead / 2);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = _mm512_add_epi64(sums[k], _mm512_loadu_si512(data + i + 64 * k));
  }
  const __m512i sum = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, sum);
  uint64_t total = generic_read(data + i, bytes - i);
  for (uint64_t lane : lanes) total += lane;
  return total;
}

}  // namespace

#if defined(SK_WITH_BF16)
extern const Kernels kAvx512Bf16;
const Kernels kAvx512Bf16 = {"avx512bf16", true, fusable, fused, decode, micro, dense, generic_store, read,
                            &kQuantisedAvx512, &kColumnsAvx512Bf16, repack_avx512, gram_avx512bf16};
#else
extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", false, fusable, fused, decode, micro, dense, generic_store, read,
                        &kQuantisedAvx512, &kColumnsAvx512, repack_avx512, nullptr};
#endif
}  // namespace sk
