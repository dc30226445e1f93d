// int8 and int4 with AVX2.
//
// vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits and saturates. So it gets |weight| <= 127
// and the activation with the sign of the weight, -127..127: at most 2 * 127 * 127 = 32258 < 32768.
#include <immintrin.h>

#include "quantised.h"

namespace sk {
namespace {

constexpr int kAhead = 2048;
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// For each mask of eight bytes: the byte shuffle that moves packed values to their places, 0x80 and more for holes;
// `from` is where in the vector the values begin.
struct alignas(64) Shuffles {
  uint8_t bytes[256][8];
  constexpr explicit Shuffles(int from) : bytes() {
    for (int mask = 0; mask < 256; ++mask)
      for (int place = 0, next = from; place < 8; ++place) {
        const bool set = mask >> place & 1;
        bytes[mask][place] = uint8_t(set ? next : 0x80);
        next += set;
      }
  }
};
constexpr Shuffles lower(0), upper(8);

inline __m128i eight(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline unsigned count8(unsigned mask) { return unsigned(__builtin_popcount(mask & 0xff)); }

// Sixteen places of a tile.
inline __m128i expand16(const uint8_t*& at, unsigned mask) {
  const unsigned low = mask & 0xff, high = mask >> 8 & 0xff;
  const __m128i values = _mm_unpacklo_epi64(eight(at), eight(at + count8(low)));
  at += __builtin_popcount(mask & 0xffff);
  return _mm_shuffle_epi8(values, _mm_unpacklo_epi64(eight(lower.bytes[low]), eight(upper.bytes[high])));
}

struct Tile {
  __m256i half[2];  // rows 0..7, rows 8..15; four columns each
};
inline Tile expand(const uint8_t* at, uint64_t mask) {
  Tile tile;
  for (int h = 0; h < 2; ++h) {
    const __m128i first = expand16(at, unsigned(mask >> (32 * h))), second = expand16(at, unsigned(mask >> (32 * h + 16)));
    tile.half[h] = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
  }
  return tile;
}

inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Reads the tiles of a panel, a group at a time. Whole: there are no masks.
template <int Layout, bool Whole>
struct Group {
  alignas(64) uint8_t bytes[kGroupTiles * 64 + 64];  // int4: the integers of the group
  const uint8_t* at;                                 // of the next tile
  const uint64_t* masks;
  __m256i table;

  Group() {
    alignas(32) int8_t integers[32];
    for (int i = 0; i < 32; ++i) integers[i] = int8_t(Whole ? i % 16 - 8 : int4_integer(unsigned(i % 16)));
    table = _mm256_load_si256(reinterpret_cast<const __m256i*>(integers));
  }

  // Begins with `tiles` tiles whose values lie at `from`; returns where the next group begins.
  const uint8_t* open(const uint8_t* from, const uint64_t* group_masks, int tiles) {
    masks = group_masks;
    uint64_t size = Whole ? uint64_t(tiles) * code_bytes(64, Layout == SK_INT8 ? 8 : 4) : 0;
    for (int i = 0; !Whole && i < tiles; ++i) {
      const uint64_t n = uint64_t(__builtin_popcountll(masks[i]));
      size += Layout == SK_INT8 ? n : (n + 1) / 2;
    }
    at = Layout == SK_INT8 ? from : bytes;
    // A load that overlaps a store still on its way waits for it: so all are stored before the first is read.
    for (uint64_t i = 0; Layout == SK_INT4 && i < size; i += 16) sixteen(from + i, bytes + 2 * i);
    return from + size;
  }

  void sixteen(const uint8_t* codes, uint8_t* integers) const {
    __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
    _mm256_store_si256(reinterpret_cast<__m256i*>(integers), _mm256_shuffle_epi8(table, v));
  }

  inline Tile tile(int i) {
    if (Whole) {
      at += 64;
      return {{load32(at - 64), load32(at - 32)}};
    }
    const uint64_t n = uint64_t(__builtin_popcountll(masks[i]));
    const Tile found = expand(at, masks[i]);
    at += Layout == SK_INT8 ? n : (n + 1) / 2 * 2;  // tiles begin at a byte, so with an even number of codes
    return found;
  }
};

inline const uint64_t* masks_of(const View& w, int64_t p, int64_t tile) {
  return w.masks64 ? w.masks64 + p * w.groups * kGroupTiles + tile : nullptr;
}
inline __m256 scales_of(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int Layout, bool Whole, int T>
void fused_panel(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld) {
  const uint16_t* scales = w.scales + p * w.groups * kPanelRows;
  const uint8_t* at = w.values + w.offsets[p];
  const uint8_t* bytes = x.bytes;
  const __m256i flip = _mm256_set1_epi8(char(128)), ones = _mm256_set1_epi16(1);
  Group<Layout, Whole> group;
  __m256 sums[T][2];
  for (auto& s : sums) s[0] = s[1] = _mm256_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g, scales += kPanelRows) {
    const uint64_t* masks = masks_of(w, p, g * kGroupTiles);
    for (int i = 0; i < (Layout == SK_INT8 ? 10 : 5); ++i) prefetch(at + kAhead + 64 * i);
    for (int i = 0; !Whole && i < 2; ++i) prefetch(masks + kAhead / 16 + 8 * i);
    at = group.open(at, masks, kGroupTiles);
    __m256i dots[T][2];
    for (auto& d : dots) d[0] = d[1] = _mm256_setzero_si256();
    for (int i = 0; i < kGroupTiles; ++i, bytes += 4 * T) {
      const Tile tile = group.tile(i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m256i v = _mm256_xor_si256(_mm256_set1_epi32(load<int32_t>(bytes + 4 * t)), flip);
        for (int h = 0; h < 2; ++h) {
          const __m256i words = _mm256_maddubs_epi16(_mm256_abs_epi8(tile.half[h]), _mm256_sign_epi8(v, tile.half[h]));
          dots[t][h] = _mm256_add_epi32(dots[t][h], _mm256_madd_epi16(words, ones));
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int h = 0; h < 2; ++h) {
        const __m256 scale = _mm256_mul_ps(scales_of(scales + 8 * h), _mm256_set1_ps(x.scales[g * T + t]));
        sums[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][h]), scale, sums[t][h]);
      }
  }
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out + t * ld + 8 * h, sums[t][h]);
}

template <int Layout, int T>
void fused_tokens(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld) {
  return (w.masks64 ? fused_panel<Layout, false, T> : fused_panel<Layout, true, T>)(w, x, p, out, ld);
}

void fused(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld) {
  switch (2 * x.tokens + (w.layout == SK_INT4)) {
#define SK_CASE(n)                                               \
  case 2 * n: return fused_tokens<SK_INT8, n>(w, x, p, out, ld); \
  case 2 * n + 1: return fused_tokens<SK_INT4, n>(w, x, p, out, ld);
    SK_CASE(1) SK_CASE(2) SK_CASE(3) SK_CASE(4)
#undef SK_CASE
  }
}

// --- weights for many tokens: exactly those of sk_unpack ---------------------------------------------------------
inline __m256 round_to_dtype(__m256 v, int32_t dtype) {  // finite values only
  if (dtype == SK_F32) return v;
  if (dtype == SK_F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  const __m256i u = _mm256_castps_si256(v), low = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(low, _mm256_set1_epi32(0x7fff)));
  return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(int(0xffff0000))));
}

template <int Layout, bool Whole>
void decode_panel(const View& w, int64_t p, uint64_t& position, int64_t begin, int64_t end, float* out) {
  const uint8_t* at = w.values + w.offsets[p] + position;
  Group<Layout, Whole> group;
  for (int64_t first = begin; first < end; first += kGroupTiles) {
    const uint16_t* scales = w.scales + (p * w.groups + first / kGroupTiles) * kPanelRows;
    const int tiles = int(end - first < kGroupTiles ? end - first : kGroupTiles);
    prefetch(at + kAhead);
    at = group.open(at, masks_of(w, p, first), tiles);
    for (int i = 0; i < tiles; ++i, out += 64) {
      const Tile tile = group.tile(i);
      for (int k = 0; k < 4; ++k)
        for (int h = 0; h < 2; ++h) {
          const __m256i column = _mm256_srai_epi32(_mm256_slli_epi32(tile.half[h], 24 - 8 * k), 24);
          const __m256 weight = _mm256_mul_ps(_mm256_cvtepi32_ps(column), scales_of(scales + 8 * h));
          _mm256_store_ps(out + 16 * k + 8 * h, round_to_dtype(weight, w.dtype));
        }
    }
  }
  position = uint64_t(at - w.values) - w.offsets[p];
}

void decode(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool, void* panels, int64_t stride) {
  const auto panel = w.layout == SK_INT8 ? w.masks64 ? decode_panel<SK_INT8, false> : decode_panel<SK_INT8, true>
                     : w.masks64         ? decode_panel<SK_INT4, false>
                                         : decode_panel<SK_INT4, true>;
  for (int q = 0; q < 4; ++q) {
    const int64_t p = 4 * g + q;
    float* out = reinterpret_cast<float*>(static_cast<char*>(panels) + q * stride);
    if (p >= ceil_div(w.rows, kPanelRows))
      memset(out, 0, size_t((end - begin) * 256));
    else
      panel(w, p, at.value[q], begin, end, out);
  }
}

}  // namespace

extern const QuantisedKernels kQuantisedAvx2;
const QuantisedKernels kQuantisedAvx2 = {4, generic_quantise, fused, decode};
}  // namespace sk
