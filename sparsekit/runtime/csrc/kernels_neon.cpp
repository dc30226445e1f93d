// NEON, which every 64-bit ARM processor has. bf16 becomes fp32 by shifts; no bf16 arithmetic is asked for.
#include <arm_neon.h>

#include "generic.h"
#include "shuffles.h"

namespace sk {
namespace {

constexpr int64_t kAhead = 2048;
inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline float32x4_t even(uint16x8_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(pairs), 16)); }
inline float32x4_t odd(uint16x8_t pairs) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(pairs), vdupq_n_u32(0xffff0000)));
}

// Eight places from the packed 16-bit values at `from`.
inline uint16x8_t expand(const uint8_t* from, unsigned mask) {
  return vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(from), vld1q_u8(shuffles.bytes[mask & 0xff])));
}

// Byte k: the bits set in bytes 0..k of a mask. A count goes through a vector register on this architecture, so it is
// made once for 64 bits and not in the chain from one load's address to the next.
inline uint64_t running_counts(uint64_t mask) {
  const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0);
  return counts * 0x0101010101010101;
}
inline uint64_t before(uint64_t counts, int k) { return k ? counts >> (8 * (k - 1)) & 0xff : 0; }

// --- bitmap, bf16 --------------------------------------------------------------------------------------------
// Visits (column pair, k, eight places): rows 4k .. 4k + 3 of the block, both columns.
template <class Visit>
inline void bitmap_tiles(const View& w, int64_t b, uint64_t& position, int64_t begin, int64_t end, Visit visit) {
  const uint32_t* masks = w.masks32 + (b * w.tiles + begin) * 4;
  const uint8_t* values = w.values + 2 * (w.offsets[b] + position);
  const uint8_t* const first = values;
  for (int64_t c = begin; c < end; ++c, masks += 4) {
    prefetch(values + kAhead);
    prefetch(values + kAhead + 64);
    if ((c & 3) == 0) prefetch(reinterpret_cast<const uint8_t*>(masks) + kAhead / 2);
    for (int half = 0; half < 2; ++half) {
      const uint64_t mask = load<uint64_t>(masks + 2 * half), counts = running_counts(mask);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) visit(c, 8 * half + k, expand(values + 2 * before(counts, k), unsigned(mask >> (8 * k))));
      values += 2 * (counts >> 56);
    }
  }
  position += uint64_t(values - first) / 2;
}

void bitmap(const View& w, const Input& x, int64_t b, float* out) {
  float32x4_t sums[16];
  for (auto& s : sums) s = vdupq_n_f32(0);
  uint64_t position = 0;
  bitmap_tiles(w, b, position, 0, w.tiles, [&](int64_t c, int k, uint16x8_t tile) {
    sums[k] = vfmaq_n_f32(sums[k], even(tile), x.floats[2 * c]);
    sums[k] = vfmaq_n_f32(sums[k], odd(tile), x.floats[2 * c + 1]);
  });
  for (int k = 0; k < 16; ++k) vst1q_f32(out + 4 * k, sums[k]);
}

// --- split: packed values are put together as bf16 first, and then expanded as in bitmap ------------------------
template <int Width>
struct Codes {
  uint8x16_t take;   // the two bytes each of eight codes lies in
  int16x8_t shifts;  // to the right
  uint8x16_t table;
  explicit Codes(const uint8_t* dictionary) {
    uint8_t bytes[16];
    int16_t amounts[8];
    for (int k = 0; k < 8; ++k) {
      bytes[2 * k] = uint8_t(Width * k / 8);
      bytes[2 * k + 1] = uint8_t(Width * k / 8 + 1);
      amounts[k] = int16_t(-(Width * k % 8));
    }
    take = vld1q_u8(bytes);
    shifts = vld1q_s16(amounts);
    table = vld1q_u8(dictionary);
  }
  // High bytes of sixteen values.
  inline uint8x16_t high(const uint8_t* code) const {
    const uint8x16_t all = vld1q_u8(code);
    if (Width == 8) return all;
    const uint8x16_t rest = vextq_u8(all, all, Width);
    const uint16x8_t a = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(all, take)), shifts);
    const uint16x8_t b = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(rest, take)), shifts);
    const uint8x16_t codes = vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
    return vqtbl1q_u8(table, vandq_u8(codes, vdupq_n_u8((1 << Width) - 1)));
  }
};

// Visits (tile, k, eight places): rows 4 (k / 2) .. + 3, columns 4c + 2 (k % 2) and the next.
template <int Width, class Visit>
inline void split_tiles(const View& w, const Panel& panel, const uint64_t* masks, uint64_t& low_at, uint64_t& code_at,
                        int64_t begin, int64_t end, Visit visit) {
  const Codes<Width> codes(panel.dictionary);
  const uint8_t* low = w.values + panel.low + low_at;
  const uint8_t* code = w.codes + panel.code + code_at;
  constexpr int64_t kTiles = 8;  // written before the first is read: a load must not wait for stores on their way
  alignas(64) uint8_t words[kTiles * 128 + 16];
  memset(words, 0, sizeof words);
  for (int64_t first = begin; first < end; first += kTiles) {
    const int64_t last = first + kTiles < end ? first + kTiles : end;
    uint64_t counts[kTiles];
    for (int64_t t = first; t < last; ++t) {
      prefetch(low + kAhead);
      if (t & 1) prefetch(code + kAhead / 2);
      const uint64_t n = (counts[t - first] = running_counts(masks[t])) >> 56;
      uint8_t* to = words + 128 * (t - first);
      for (uint64_t g = 0; 16 * g < n; ++g) {
        const uint8x16_t lows = vld1q_u8(low + 16 * g), highs = codes.high(code + 2 * Width * g);
        vst1q_u8(to + 32 * g, vzip1q_u8(lows, highs));
        vst1q_u8(to + 32 * g + 16, vzip2q_u8(lows, highs));
      }
      low += n;
      code += code_bytes(n, Width);
    }
    for (int64_t t = first; t < last; ++t)
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k)
        visit(t, k, expand(words + 128 * (t - first) + 2 * before(counts[t - first], k), unsigned(masks[t] >> (8 * k))));
  }
  low_at = uint64_t(low - w.values) - panel.low;
  code_at = uint64_t(code - w.codes) - panel.code;
}

template <int Width>
void split(const View& w, const Input& x, int64_t p, float* out) {
  float32x4_t sums[8];
  for (auto& s : sums) s = vdupq_n_f32(0);
  uint64_t low = 0, code = 0;
  split_tiles<Width>(w, w.panels[p], w.masks64 + p * w.tiles, low, code, 0, w.tiles,
                     [&](int64_t t, int k, uint16x8_t tile) {
                       const float* v = x.floats + 4 * t + 2 * (k & 1);
                       sums[k] = vfmaq_n_f32(sums[k], even(tile), v[0]);
                       sums[k] = vfmaq_n_f32(sums[k], odd(tile), v[1]);
                     });
  for (int L = 0; L < 4; ++L) vst1q_f32(out + 4 * L, vaddq_f32(sums[2 * L], sums[2 * L + 1]));
}

// --- the table's entries ---------------------------------------------------------------------------------------
int64_t fusable(const View& w, bool) {
  if (w.layout == SK_BLOCK) return kAnyTokens;
  if (w.layout == SK_CHUNK) return 4;
  return w.dtype == SK_BF16 ? 1 : 0;
}

void fused(const View& w, const Input& x, int64_t b, bool, float* out, int64_t ld) {
  if (w.layout == SK_BLOCK) return generic_block(w, x, b, out, ld);
  if (w.layout == SK_CHUNK) return generic_chunk(w, x, b, out, ld);
  if (w.layout == SK_BITMAP) return bitmap(w, x, b, out);
  const uint32_t width = w.panels[b].width;
  return width == 3 ? split<3>(w, x, b, out) : width == 4 ? split<4>(w, x, b, out) : split<8>(w, x, b, out);
}

template <int Width>
void decode_panel(const View& w, int64_t p, uint64_t& low, uint64_t& code, int64_t begin, int64_t end, float* out) {
  split_tiles<Width>(w, w.panels[p], w.masks64 + p * w.tiles, low, code, begin, end,
                     [&](int64_t t, int k, uint16x8_t tile) {
                       float* at = out + 64 * (t - begin) + 32 * (k & 1) + 4 * (k / 2);
                       vst1q_f32(at, even(tile));
                       vst1q_f32(at + 16, odd(tile));
                     });
}

void decode(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, void* panels,
            int64_t stride) {
  char* out = static_cast<char*>(panels);
  if (w.dtype != SK_BF16 || w.layout == SK_CHUNK) return generic_decode(w, g, at, begin, end, pairs, panels, stride);
  if (w.layout == SK_BITMAP) {
    bitmap_tiles(w, g, at.value[0], begin, end, [&](int64_t c, int k, uint16x8_t tile) {
      float* panel = reinterpret_cast<float*>(out + k / 4 * stride) + 32 * (c - begin) + 4 * (k % 4);
      vst1q_f32(panel, even(tile));
      vst1q_f32(panel + 16, odd(tile));
    });
    return;
  }
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
}

// 16 rows x T tokens, T <= 6: 24 sums, four vectors of weights.
template <int T>
void micro_tokens(const float* a, const float* x, int64_t steps, int64_t x_stride, bool first, float* acc, int64_t ld) {
  float32x4_t sums[T][4];
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 4; ++i) sums[t][i] = first ? vdupq_n_f32(0) : vld1q_f32(acc + t * ld + 4 * i);
  for (int64_t k = 0; k < steps; ++k, a += 16, x += x_stride)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float32x4_t rows = vld1q_f32(a + 4 * i);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sums[t][i] = vfmaq_n_f32(sums[t][i], rows, x[t]);
    }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 4; ++i) vst1q_f32(acc + t * ld + 4 * i, sums[t][i]);
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

inline float32x4_t widen(const uint8_t* p, int32_t dtype) {
  if (dtype == SK_F32) return vreinterpretq_f32_u8(vld1q_u8(p));
  const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(p));
  return dtype == SK_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(half)) : vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

float row_product(const uint8_t* row, int32_t dtype, int64_t cols, const float* x) {
  const int64_t size = element_size(dtype);
  float32x4_t sums[8];
  for (auto& s : sums) s = vdupq_n_f32(0);
  int64_t k = 0;
  for (; k + 32 <= cols; k += 32) {
    prefetch(row + size * k + kAhead);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      sums[i] = vfmaq_f32(sums[i], widen(row + size * (k + 4 * i), dtype), vld1q_f32(x + k + 4 * i));
  }
  for (int n = 4; n; n /= 2)
    for (int i = 0; i < n; ++i) sums[i] = vaddq_f32(sums[i], sums[i + n]);
  float sum = vaddvq_f32(sums[0]);
  for (; k < cols; ++k) sum += to_float(row, dtype, k) * x[k];
  return sum;
}

// A row stays in the cache from one token to the next.
void dense(const void* weight, int32_t dtype, int64_t cols, int64_t begin, int64_t end, const Input& x,
           int64_t x_stride, float* out, int64_t ld) {
  const uint8_t* row = static_cast<const uint8_t*>(weight) + begin * cols * element_size(dtype);
  for (int64_t r = begin; r < end; ++r, row += cols * element_size(dtype))
    for (int64_t t = 0; t < x.tokens; ++t)
      out[t * ld + r - begin] = row_product(row, dtype, cols, x.floats + t * x_stride);
}

}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = {"neon", false, fusable,       fused,        decode,
                       micro,  dense, generic_store, generic_read, &kQuantisedPortable, &kColumnsNeon, nullptr, nullptr};
}  // namespace sk
