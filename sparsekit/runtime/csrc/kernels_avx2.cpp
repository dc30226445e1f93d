// AVX2 with FMA, BMI2 and F16C.
#include <immintrin.h>

#include "generic.h"

namespace sk {
namespace {

inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
constexpr int kAhead = 2048;

// For each mask of eight 16-bit places: the byte shuffle that moves packed values to them, 0x80 for holes.
struct alignas(64) Shuffles {
  uint8_t bytes[256][16];
  constexpr Shuffles() : bytes() {  // constexpr: nothing here may run before the processor has been asked
    for (int mask = 0; mask < 256; ++mask)
      for (int place = 0, from = 0; place < 8; ++place) {
        const bool set = mask >> place & 1;
        bytes[mask][2 * place] = uint8_t(set ? 2 * from : 0x80);
        bytes[mask][2 * place + 1] = uint8_t(set ? 2 * from + 1 : 0x80);
        from += set;
      }
  }
};
constexpr Shuffles shuffles;

// 16 places (8 rows x 2 columns of bf16 or fp16) from the packed values at base + 2 at.
inline __m256i expand16(const uint8_t* base, uint64_t& at, uint32_t mask) {
  const uint32_t low = mask & 0xff, high = mask >> 8 & 0xff;
  const uint64_t middle = at + uint64_t(__builtin_popcount(low));
  const __m256i values = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(base + 2 * at))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(base + 2 * middle)), 1);
  const __m256i moves = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(shuffles.bytes[low]))),
      _mm_load_si128(reinterpret_cast<const __m128i*>(shuffles.bytes[high])), 1);
  at += uint64_t(__builtin_popcount(mask & 0xffff));
  return _mm256_shuffle_epi8(values, moves);
}

void bitmap_bf16(const View& w, const Input& x, int64_t b, float* out) {
  const uint32_t* masks = w.masks32 + b * w.tiles * 4;
  const uint8_t* base = w.values + w.offsets[b] * 2;
  uint64_t at = 0;
  __m256 sums[8];
  for (auto& s : sums) s = _mm256_setzero_ps();
  for (int64_t c = 0; c < w.tiles; ++c, masks += 4) {
    prefetch(base + 2 * at + kAhead);
    prefetch(base + 2 * at + kAhead + 64);
    if ((c & 3) == 0) prefetch(reinterpret_cast<const uint8_t*>(masks) + kAhead / 2);
    const __m256 x0 = _mm256_broadcast_ss(x.floats + 2 * c), x1 = _mm256_broadcast_ss(x.floats + 2 * c + 1);
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      const __m256i tile = expand16(base, at, masks[q / 2] >> (16 * (q & 1)));
      asm("" : "+r"(at));
      sums[q] = _mm256_fmadd_ps(even(tile), x0, sums[q]);
      sums[q] = _mm256_fmadd_ps(odd(tile), x1, sums[q]);
    }
  }
  for (int q = 0; q < 8; ++q) _mm256_storeu_ps(out + 8 * q, sums[q]);
}

// --- split: eight places at a time, with pdep as the expansion ---------------------------------------------------
struct Dictionary {
  __m256i table;
  explicit Dictionary(const uint8_t* bytes)
      : table(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))) {}
};

template <int Width>
inline void eight(uint64_t mask, const uint8_t*& low, const uint8_t* code, uint64_t& bit, uint64_t& l, uint64_t& h) {
  const uint64_t places = _pdep_u64(mask & 0xff, 0x0101010101010101ull);
  const uint64_t full = places * 0xff;
  l = _pdep_u64(load<uint64_t>(low), full);
  const int n = __builtin_popcountll(mask & 0xff);
  low += n;
  if (Width == 8) {
    h = _pdep_u64(load<uint64_t>(code + bit / 8), full);
  } else {
    h = _pdep_u64(load<uint64_t>(code + bit / 8) >> (bit & 7), places * ((1u << Width) - 1));
  }
  bit += uint64_t(n) * Width;
}

// Visits (tile, quarter L, bf16 pairs of rows 4L..4L+3: columns 4c, 4c+1 in the low half, 4c+2, 4c+3 in the high).
template <int Width, class Visit>
inline void split_tiles(const View& w, const Panel& panel, const uint64_t* masks, uint64_t& low_at, uint64_t& code_at,
                        int64_t begin, int64_t end, Visit visit) {
  const Dictionary dictionary(panel.dictionary);
  const uint8_t* low = w.values + panel.low + low_at;
  const uint8_t* code = w.codes + panel.code + code_at;
  for (int64_t t = begin; t < end; ++t) {
    prefetch(low + kAhead);
    if (t & 1) prefetch(code + kAhead / 2);
    const uint64_t mask = masks[t];
    uint64_t bit = 0;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      uint64_t l[4], h[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) eight<Width>(mask >> (32 * half + 8 * k), low, code, bit, l[k], h[k]);
      const __m256i lows = _mm256_set_epi64x(int64_t(l[3]), int64_t(l[2]), int64_t(l[1]), int64_t(l[0]));
      __m256i highs = _mm256_set_epi64x(int64_t(h[3]), int64_t(h[2]), int64_t(h[1]), int64_t(h[0]));
      if (Width < 8) {
        // A hole has code 0, which means a real byte: blank it where the mask is clear.
        const uint64_t m = mask >> (32 * half);
        highs = _mm256_shuffle_epi8(dictionary.table, highs);
        const __m256i bits = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
        const __m256i spread = _mm256_shuffle_epi8(
            _mm256_set1_epi32(int(uint32_t(m))),
            _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3,
                             3));
        highs = _mm256_and_si256(highs, _mm256_cmpeq_epi8(_mm256_and_si256(spread, bits), bits));
      }
      // 128-bit lanes hold L = 2 half and 2 half + 1.
      visit(t, half, _mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs));
    }
    code += code_bytes(uint64_t(__builtin_popcountll(mask)), Width);
  }
  low_at = uint64_t(low - w.values) - panel.low;
  code_at = uint64_t(code - w.codes) - panel.code;
}

template <int Width>
void split(const View& w, const Input& x, int64_t p, float* out) {
  __m256 sums[2][2];
  for (auto& half : sums)
    for (auto& s : half) s = _mm256_setzero_ps();
  uint64_t low = 0, code = 0;
  split_tiles<Width>(w, w.panels[p], w.masks64 + p * w.tiles, low, code, 0, w.tiles,
                     [&](int64_t t, int half, __m256i first, __m256i second) {
                       const float* v = x.floats + 4 * t;
                       sums[half][0] = _mm256_fmadd_ps(even(first), _mm256_broadcast_ss(v), sums[half][0]);
                       sums[half][0] = _mm256_fmadd_ps(odd(first), _mm256_broadcast_ss(v + 1), sums[half][0]);
                       sums[half][1] = _mm256_fmadd_ps(even(second), _mm256_broadcast_ss(v + 2), sums[half][1]);
                       sums[half][1] = _mm256_fmadd_ps(odd(second), _mm256_broadcast_ss(v + 3), sums[half][1]);
                     });
  for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + 8 * half, _mm256_add_ps(sums[half][0], sums[half][1]));
}

int fusable(const View& w, bool) { return w.dtype == SK_BF16 ? 1 : 0; }

void fused(const View& w, const Input& x, int64_t b, bool, float* out, int64_t) {
  if (w.layout == SK_BITMAP) return bitmap_bf16(w, x, b, out);
  const uint32_t width = w.panels[b].width;
  return width == 3 ? split<3>(w, x, b, out) : width == 4 ? split<4>(w, x, b, out) : split<8>(w, x, b, out);
}

template <int Width>
void decode_panel(const View& w, int64_t p, uint64_t& low, uint64_t& code, int64_t begin, int64_t end, float* out) {
  split_tiles<Width>(w, w.panels[p], w.masks64 + p * w.tiles, low, code, begin, end,
                     [&](int64_t t, int half, __m256i first, __m256i second) {
                       float* at = out + 64 * (t - begin) + 8 * half;
                       _mm256_store_ps(at, even(first));
                       _mm256_store_ps(at + 16, odd(first));
                       _mm256_store_ps(at + 32, even(second));
                       _mm256_store_ps(at + 48, odd(second));
                     });
}

void decode(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, void* panels,
            int64_t stride) {
  char* out = static_cast<char*>(panels);
  if (w.layout == SK_SPLIT) {
    for (int q = 0; q < 4; ++q) {
      const int64_t p = 4 * g + q;
      float* panel = reinterpret_cast<float*>(out + q * stride);
      if (p >= ceil_div(w.rows, kPanelRows)) {
        memset(panel, 0, size_t((end - begin) * 256));
        continue;
      }
      auto run = w.panels[p].width == 3 ? decode_panel<3> : w.panels[p].width == 4 ? decode_panel<4> : decode_panel<8>;
      run(w, p, at.value[q], at.code[q], begin, end, panel);
    }
    return;
  }
  if (w.dtype != SK_BF16) return generic_decode(w, g, at, begin, end, pairs, panels, stride);
  const uint32_t* masks = w.masks32 + (g * w.tiles + begin) * 4;
  const uint8_t* base = w.values + w.offsets[g] * 2;
  for (int64_t c = 0; c < end - begin; ++c, masks += 4)
    for (int q = 0; q < 8; ++q) {
      const __m256i tile = expand16(base, at.value[0], masks[q / 2] >> (16 * (q & 1)));
      float* panel = reinterpret_cast<float*>(out + q / 2 * stride) + 32 * c + 8 * (q & 1);
      _mm256_store_ps(panel, even(tile));
      _mm256_store_ps(panel + 16, odd(tile));
    }
}

// 16 rows x T tokens, T <= 6: twelve sums and the registers to feed them.
template <int T>
void micro_tokens(const float* a, const float* x, int64_t steps, int64_t x_stride, bool first, float* acc, int64_t ld) {
  __m256 p[T], q[T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    p[t] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + t * ld);
    q[t] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + t * ld + 8);
  }
  for (int64_t k = 0; k < steps; ++k, a += 16, x += x_stride) {
    const __m256 top = _mm256_load_ps(a), bottom = _mm256_load_ps(a + 8);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m256 v = _mm256_broadcast_ss(x + t);
      p[t] = _mm256_fmadd_ps(top, v, p[t]);
      q[t] = _mm256_fmadd_ps(bottom, v, q[t]);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    _mm256_storeu_ps(acc + t * ld, p[t]);
    _mm256_storeu_ps(acc + t * ld + 8, q[t]);
  }
}

void micro(const void* a, const void* b, const void* x, int64_t steps, int tokens, bool, bool first, float* acc,
           int64_t ld) {
  using Run = void (*)(const float*, const float*, int64_t, int64_t, bool, float*, int64_t);
  static const Run runs[] = {nullptr,         micro_tokens<1>, micro_tokens<2>, micro_tokens<3>,
                             micro_tokens<4>, micro_tokens<5>, micro_tokens<6>};
  for (int t = 0; t < tokens; t += 6) {
    const Run run = runs[tokens - t < 6 ? tokens - t : 6];
    const float* v = static_cast<const float*>(x) + t;
    run(static_cast<const float*>(a), v, steps, tokens, first, acc + t * ld, ld);
    run(static_cast<const float*>(b), v, steps, tokens, first, acc + t * ld + 16, ld);
  }
}

inline __m256 widen(const uint8_t* p, int32_t dtype) {
  if (dtype == SK_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return dtype == SK_F16 ? _mm256_cvtph_ps(half)
                         : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

void dense(const void* weight, int32_t dtype, int64_t cols, int64_t begin, int64_t end, const Input& x, float* out) {
  const int64_t size = element_size(dtype);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* row = static_cast<const uint8_t*>(weight) + r * cols * size;
    __m256 sums[4];
    for (auto& s : sums) s = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= cols; k += 32) {
      prefetch(row + size * k + kAhead);
      if (size == 4) prefetch(row + size * k + kAhead + 64);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sums[i] = _mm256_fmadd_ps(widen(row + size * (k + 8 * i), dtype), _mm256_loadu_ps(x.floats + k + 8 * i), sums[i]);
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    float sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    for (; k < cols; ++k) sum += to_float(row, dtype, k) * x.floats[k];
    out[r - begin] = sum;
  }
}

uint64_t read(const uint8_t* data, int64_t bytes) {
  __m256i sums[4] = {};
  int64_t i = 0;
  for (; i + 128 <= bytes; i += 128) {
    prefetch(data + i + kAhead);
    prefetch(data + i + kAhead + 64);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      sums[k] = _mm256_add_epi64(sums[k], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32 * k)));
  }
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes),
                     _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3])));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + generic_read(data + i, bytes - i);
}

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", false, fusable, fused, decode, micro, dense, generic_store, read};
}  // namespace sk
