// AVX2 with FMA, BMI2 and F16C.
#include <immintrin.h>

#include "generic.h"
#include "shuffles.h"

namespace sk {
namespace {

inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
constexpr int kAhead = 2048;

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

// --- split: the values of a tile are put together as bf16 first, packed, and then expanded as in bitmap -----------
// Sixteen codes become sixteen words: each lane takes the bytes its code lies in, a multiplication moves the code to
// the top of the lane, a shift to the bottom.
template <int Width>
struct Codes {
  static constexpr int kBytes = 2 * Width;  // of sixteen codes
  __m256i take, factor, table;
  explicit Codes(const uint8_t* dictionary) {
    alignas(32) uint8_t bytes[32];
    alignas(32) uint16_t factors[16];
    for (int k = 0; k < 16; ++k) {
      const int bit = Width * k;
      bytes[2 * k] = uint8_t(bit / 8);
      bytes[2 * k + 1] = Width == 3 ? uint8_t(bit / 8 + 1) : 0x80;
      factors[k] = uint16_t(1u << (16 - Width - bit % 8));
    }
    take = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
    factor = _mm256_load_si256(reinterpret_cast<const __m256i*>(factors));
    table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(dictionary)));
  }
  // Sixteen high bytes in the upper halves of words.
  inline __m256i high(const uint8_t* code) const {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
    if (Width == 8) return _mm256_slli_epi16(_mm256_cvtepu8_epi16(sixteen), 8);
    __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), take);
    v = _mm256_srli_epi16(_mm256_mullo_epi16(v, factor), 16 - Width);
    return _mm256_slli_epi16(_mm256_shuffle_epi8(table, v), 8);
  }
};

// Visits (tile, L, sixteen places): rows 4L..4L+3 with columns 4c, 4c+1 in the low half, 4c+2, 4c+3 in the high.
template <int Width, class Visit>
inline void split_tiles(const View& w, const Panel& panel, const uint64_t* masks, uint64_t& low_at, uint64_t& code_at,
                        int64_t begin, int64_t end, Visit visit) {
  const Codes<Width> codes(panel.dictionary);
  const uint8_t* low = w.values + panel.low + low_at;
  const uint8_t* code = w.codes + panel.code + code_at;
  // A load that overlaps two stores still on their way waits for both, so eight tiles are written before the first
  // is read.
  constexpr int64_t kTiles = 8;
  alignas(64) uint8_t words[kTiles * 128 + 32];
  memset(words, 0, sizeof words);
  for (int64_t first = begin; first < end; first += kTiles) {
    const int64_t last = first + kTiles < end ? first + kTiles : end;
    for (int64_t t = first; t < last; ++t) {
      prefetch(low + kAhead);
      if (t & 1) prefetch(code + kAhead / 2);
      const int n = __builtin_popcountll(masks[t]);
      uint8_t* to = words + 128 * (t - first);
      auto sixteen = [&](int g) {
        const __m256i lows = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + 16 * g)));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32 * g),
                           _mm256_or_si256(lows, codes.high(code + Codes<Width>::kBytes * g)));
      };
      sixteen(0);
      sixteen(1);
      sixteen(2);  // needed in half of the tiles at 50 %: cheaper always than a wrong guess
      if (__builtin_expect(n > 48, 0)) sixteen(3);
      low += n;
      code += code_bytes(uint64_t(n), Width);
    }
    for (int64_t t = first; t < last; ++t) {
      uint64_t at = 0;
#pragma GCC unroll 4
      for (int L = 0; L < 4; ++L)
        visit(t, L, expand16(words + 128 * (t - first), at, uint32_t(masks[t] >> (16 * L))));
    }
  }
  low_at = uint64_t(low - w.values) - panel.low;
  code_at = uint64_t(code - w.codes) - panel.code;
}

template <int Width>
void split(const View& w, const Input& x, int64_t p, float* out) {
  __m256 sums[4];
  for (auto& s : sums) s = _mm256_setzero_ps();
  const __m256i evens = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2), odds = _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3);
  uint64_t low = 0, code = 0;
  split_tiles<Width>(w, w.panels[p], w.masks64 + p * w.tiles, low, code, 0, w.tiles,
                     [&](int64_t t, int L, __m256i tile) {
                       const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(x.floats + 4 * t));
                       sums[L] = _mm256_fmadd_ps(even(tile), _mm256_permutevar8x32_ps(v, evens), sums[L]);
                       sums[L] = _mm256_fmadd_ps(odd(tile), _mm256_permutevar8x32_ps(v, odds), sums[L]);
                     });
  for (int L = 0; L < 4; ++L)
    _mm_storeu_ps(out + 4 * L, _mm_add_ps(_mm256_castps256_ps128(sums[L]), _mm256_extractf128_ps(sums[L], 1)));
}

int64_t fusable(const View& w, bool) {
  if (w.layout == SK_BLOCK) return kAnyTokens;
  if (w.layout == SK_CHUNK) return 2;
  return w.dtype == SK_BF16 ? 1 : 0;
}

void fused(const View& w, const Input& x, int64_t b, bool, float* out, int64_t ld) {
  if (w.layout == SK_BLOCK) return generic_block(w, x, b, out, ld);
  if (w.layout == SK_CHUNK) return generic_chunk(w, x, b, out, ld);
  if (w.layout == SK_BITMAP) return bitmap_bf16(w, x, b, out);
  const uint32_t width = w.panels[b].width;
  return width == 3 ? split<3>(w, x, b, out) : width == 4 ? split<4>(w, x, b, out) : split<8>(w, x, b, out);
}

template <int Width>
void decode_panel(const View& w, int64_t p, uint64_t& low, uint64_t& code, int64_t begin, int64_t end, float* out) {
  split_tiles<Width>(w, w.panels[p], w.masks64 + p * w.tiles, low, code, begin, end,
                     [&](int64_t t, int L, __m256i tile) {
                       float* at = out + 64 * (t - begin) + 4 * L;
                       const __m256 e = even(tile), o = odd(tile);
                       _mm_store_ps(at, _mm256_castps256_ps128(e));
                       _mm_store_ps(at + 16, _mm256_castps256_ps128(o));
                       _mm_store_ps(at + 32, _mm256_extractf128_ps(e, 1));
                       _mm_store_ps(at + 48, _mm256_extractf128_ps(o, 1));
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
  if (w.dtype != SK_BF16 || w.layout == SK_CHUNK) return generic_decode(w, g, at, begin, end, pairs, panels, stride);
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

template <int T>
void dense_tokens(const void* weight, int32_t dtype, int64_t cols, int64_t begin, int64_t end, const Input& x,
                  int64_t x_stride, float* out, int64_t ld) {
  constexpr int chains = T == 1 ? 4 : 2;  // sums for each token, to hide the latency of the multiplication
  const int64_t size = element_size(dtype);
  for (int64_t r = begin; r < end; ++r, ++out) {
    const uint8_t* row = static_cast<const uint8_t*>(weight) + r * cols * size;
    __m256 sums[T][chains] = {};
    int64_t k = 0;
    for (; k + 32 <= cols; k += 32) {
      prefetch(row + size * k + kAhead);
      if (size == 4) prefetch(row + size * k + kAhead + 64);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 w = widen(row + size * (k + 8 * i), dtype);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          __m256& sum = sums[t][i % chains];
          sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.floats + t * x_stride + k + 8 * i), sum);
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      __m256 all = sums[t][0];
      for (int i = 1; i < chains; ++i) all = _mm256_add_ps(all, sums[t][i]);
      alignas(32) float lanes[8];
      _mm256_store_ps(lanes, all);
      float sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
      for (int64_t j = k; j < cols; ++j) sum += to_float(row, dtype, j) * x.floats[t * x_stride + j];
      out[t * ld] = sum;
    }
  }
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
const Kernels kAvx2 = {"avx2", false, fusable, fused, decode, micro, dense, generic_store, read,
                       &kQuantisedAvx2, &kColumnsAvx2, nullptr, nullptr};
}  // namespace sk
