// int8 and int4 with AVX-512, VBMI2 and VNNI. As in kernels_avx512.cpp values are loaded, then expanded in place, and
// every stream is prefetched.
//
// vpdpbusd multiplies unsigned by signed bytes: activation + 128 by weight. A second one, of 128 by the weight, shared
// by all tokens, gives what has to be taken off again.
#include <immintrin.h>

#include "quantised.h"

namespace sk {
namespace {

constexpr int kAhead = 4096;  // bytes; masks and scales, which are consumed more slowly, less

template <int Lines>
inline void prefetch(const void* p) {
#pragma GCC unroll 8
  for (int i = 0; i < Lines; ++i) _mm_prefetch(static_cast<const char*>(p) + 64 * i, _MM_HINT_T0);
}

inline __m512i expand8(__m512i v, uint64_t mask) {
  __mmask64 k = mask;
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(k));
  return v;
}

// Reads tile after tile. Whole: there are no masks.
template <int Layout, bool Whole>
struct Values {
  __m512i shifts, table;
  Values() {
    if (Layout == SK_INT8) return;
    alignas(64) uint8_t shift[64], integer[64];
    for (int i = 0; i < 64; ++i) {
      shift[i] = uint8_t(16 * (i / 2 % 4) + 4 * (i & 1));
      integer[i] = uint8_t(Whole ? (i & 15) - 8 : int4_integer(i & 15));  // vpermb reads six bits of its index: those above a code vary
    }
    shifts = _mm512_load_si512(shift);
    table = _mm512_load_si512(integer);
  }
  // The integers of a tile from `at` on, which moves behind them.
  inline __m512i tile(const uint8_t* base, uint64_t& at, const uint64_t* masks, int64_t t) const {
    const uint64_t mask = Whole ? 0 : masks[t], n = Whole ? 64 : uint64_t(__builtin_popcountll(mask));
    __m512i v;
    if (Layout == SK_INT8) {
      v = _mm512_loadu_si512(base + at);
      at += n;
    } else {
      v = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + at)));
      v = _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(shifts, v), table);
      at += (n + 1) / 2;
    }
    asm("" : "+r"(at));  // keeps the position in one 64-bit register
    return Whole ? v : expand8(v, mask);
  }
};

inline const uint64_t* masks_of(const View& w, int64_t p) {
  return w.masks64 ? w.masks64 + p * w.groups * kGroupTiles : nullptr;
}

inline __m512 scales_of(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int Layout, bool Whole, int T, int Lines>
void fused_lines(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld) {
  constexpr int kSets = T == 1 ? 4 : T <= 4 ? 2 : 1;  // independent sums hide the latency of the product
  const uint64_t* masks = masks_of(w, p);
  const uint16_t* scales = w.scales + p * w.groups * kPanelRows;
  const uint8_t* base = w.values + w.offsets[p];
  const uint8_t* bytes = x.bytes;
  const Values<Layout, Whole> values;
  const __m512i zero_point = _mm512_set1_epi8(char(128));
  uint64_t at = 0;
  __m512 sums[T];
  for (auto& s : sums) s = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g, scales += kPanelRows) {
    __m512i dots[kSets][T], offsets[4];
    for (auto& set : dots)
      for (auto& d : set) d = _mm512_setzero_si512();
    for (auto& o : offsets) o = _mm512_setzero_si512();
    if (!Whole) prefetch<2>(reinterpret_cast<const uint8_t*>(masks) + g * kGroupTiles * 8 + kAhead / 2);
    if (g & 1) prefetch<1>(reinterpret_cast<const uint8_t*>(scales) + kAhead / 4);
#pragma GCC unroll 16
    for (int i = 0; i < kGroupTiles; ++i, bytes += 4 * T) {
      if (i % 4 == 0) prefetch<Lines>(base + at + kAhead);
      const __m512i tile = values.tile(base, at, masks, g * kGroupTiles + i);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
        dots[i % kSets][t] =
            _mm512_dpbusd_epi32(dots[i % kSets][t], _mm512_set1_epi32(load<int32_t>(bytes + 4 * t)), tile);
      offsets[i % 4] = _mm512_dpbusd_epi32(offsets[i % 4], zero_point, tile);
    }
    const __m512i offset = _mm512_add_epi32(_mm512_add_epi32(offsets[0], offsets[1]),
                                            _mm512_add_epi32(offsets[2], offsets[3]));
    const __m512 scale = scales_of(scales);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      __m512i dot = dots[0][t];
      if (kSets == 2) dot = _mm512_add_epi32(dot, dots[1 % kSets][t]);
      if (kSets == 4) {
        dot = _mm512_add_epi32(_mm512_add_epi32(dot, dots[1 % kSets][t]),
                               _mm512_add_epi32(dots[2 % kSets][t], dots[3 % kSets][t]));
      }
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, offset));
      sums[t] = _mm512_fmadd_ps(whole, _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[g * T + t])), sums[t]);
    }
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + t * ld, sums[t]);
}

template <int Layout, int T>
void fused_tokens(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld) {
  if (!w.masks64) return fused_lines<Layout, true, T, Layout == SK_INT8 ? 4 : 2>(w, x, p, out, ld);
  // Bytes consumed per step of four tiles, on the average of this panel.
  const int64_t step = w.groups ? int64_t(w.offsets[p + 1] - w.offsets[p]) / (4 * w.groups) : 0;
  if (step <= 72) return fused_lines<Layout, false, T, 1>(w, x, p, out, ld);
  if (step <= 136) return fused_lines<Layout, false, T, 2>(w, x, p, out, ld);
  return fused_lines<Layout, false, T, 4>(w, x, p, out, ld);
}

void fused(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld) {
  switch (2 * x.tokens + (w.layout == SK_INT4)) {
#define SK_CASE(n)                                               \
  case 2 * n: return fused_tokens<SK_INT8, n>(w, x, p, out, ld); \
  case 2 * n + 1: return fused_tokens<SK_INT4, n>(w, x, p, out, ld);
    SK_CASE(1) SK_CASE(2) SK_CASE(3) SK_CASE(4) SK_CASE(5) SK_CASE(6) SK_CASE(7) SK_CASE(8)
    SK_CASE(9) SK_CASE(10) SK_CASE(11) SK_CASE(12) SK_CASE(13) SK_CASE(14) SK_CASE(15) SK_CASE(16)
#undef SK_CASE
  }
}

// --- weights for many tokens: exactly those of sk_unpack ---------------------------------------------------------
// fp32 to bf16 in the upper halves, nearest even, by integers: vcvtneps2bf16 would lose denormals. Finite values only.
inline __m512i round_bf16(__m512 v) {
  const __m512i u = _mm512_castps_si512(v), low = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(low, _mm512_set1_epi32(0x7fff)));
  return _mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000)));
}

inline __m512 round_to_dtype(__m512 v, int32_t dtype) {
  if (dtype == SK_F32) return v;
  if (dtype == SK_BF16) return _mm512_castsi512_ps(round_bf16(v));
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// Column Column of a tile as sixteen floats, before the scales.
template <int Column>
inline __m512 column_of(__m512i tile) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(tile, 24 - 8 * Column), 24));
}

template <int Layout, bool Whole>
void decode_panel(const View& w, int64_t p, uint64_t& at, int64_t begin, int64_t end, bool pairs, char* out) {
  const Values<Layout, Whole> values;
  const uint64_t* masks = masks_of(w, p);
  const uint8_t* base = w.values + w.offsets[p];
  uint64_t position = at;
  for (int64_t t = begin; t < end; ++t, out += pairs ? 128 : 256) {
    prefetch<1>(base + position + kAhead);
    const __m512 scale = scales_of(w.scales + (p * w.groups + t / kGroupTiles) * kPanelRows);
    const __m512i tile = values.tile(base, position, masks, t);
    const __m512 columns[4] = {
        _mm512_mul_ps(column_of<0>(tile), scale), _mm512_mul_ps(column_of<1>(tile), scale),
        _mm512_mul_ps(column_of<2>(tile), scale), _mm512_mul_ps(column_of<3>(tile), scale)};
    if (pairs) {
      for (int k = 0; k < 4; k += 2) {
        const __m512i first = _mm512_srli_epi32(round_bf16(columns[k]), 16), second = round_bf16(columns[k + 1]);
        _mm512_store_si512(out + 32 * k, _mm512_or_si512(first, second));
      }
    } else {
      for (int k = 0; k < 4; ++k) _mm512_store_ps(out + 64 * k, round_to_dtype(columns[k], w.dtype));
    }
  }
  at = position;
}

void decode(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, void* panels,
            int64_t stride) {
  const auto panel = w.layout == SK_INT8 ? w.masks64 ? decode_panel<SK_INT8, false> : decode_panel<SK_INT8, true>
                     : w.masks64         ? decode_panel<SK_INT4, false>
                                         : decode_panel<SK_INT4, true>;
  for (int q = 0; q < 4; ++q) {
    const int64_t p = 4 * g + q;
    char* out = static_cast<char*>(panels) + q * stride;
    if (p >= ceil_div(w.rows, kPanelRows))
      memset(out, 0, size_t((end - begin) * 4 * (pairs ? 32 : 64)));
    else
      panel(w, p, at.value[q], begin, end, pairs, out);
  }
}

}  // namespace

extern const QuantisedKernels kQuantisedAvx512;
const QuantisedKernels kQuantisedAvx512 = {16, generic_quantise, fused, decode};
}  // namespace sk
