// Sixteen rows of a split tensor, from the order of rows on disk to the order of tiles in memory, with AVX-512 VBMI2.
//
// Strip by strip of 64 columns every row is expanded to 64 bytes: low bytes, codes, and a byte that says "kept". Seen
// as 16 x 16 words of four columns, transposing them gives the tiles, whose kept bytes are then compressed again.
#include <immintrin.h>

#include "internal.h"

namespace sk {
namespace {

struct Square {
  __m512i row[16];
};

// Words of 32 bits: row i, word j to row j, word i.
inline void transpose(Square& s) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(s.row[i], s.row[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(s.row[i], s.row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = _mm512_unpacklo_epi64(a[i + h], a[i + 2 + h]);
      b[i + 2 * h + 1] = _mm512_unpackhi_epi64(a[i + h], a[i + 2 + h]);
    }
  // b[4 g + w] holds, in 128-bit lane l, word 4 l + w of rows 4 g .. 4 g + 3.
  for (int w = 0; w < 4; ++w) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[w], b[4 + w], 0x44), high01 = _mm512_shuffle_i32x4(b[w], b[4 + w], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + w], b[12 + w], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(b[8 + w], b[12 + w], 0xee);
    s.row[w] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    s.row[4 + w] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    s.row[8 + w] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    s.row[12 + w] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

inline __mmask64 first_bytes(uint64_t n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }

// Reads and writes codes of one width.
struct Codes {
  uint32_t width;
  __m512i spread, shifts, gather;

  explicit Codes(uint32_t w) : width(w), spread(), shifts(), gather() {
    alignas(64) uint8_t index[64], shift[64], back[64] = {};
    for (uint32_t q = 0; q < 8; ++q)
      for (uint32_t b = 0; b < 8; ++b) {
        index[8 * q + b] = uint8_t(q * w + b);
        shift[8 * q + b] = uint8_t(b * w);
        if (b < w && w < 8) back[q * w + b] = uint8_t(8 * q + b);
      }
    spread = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    gather = _mm512_load_si512(back);
  }
  // n <= 64 codes, a byte each, from bit `bit` of `code` on; nothing behind their last byte is read.
  inline __m512i read(const uint8_t* code, uint64_t bit, uint64_t n) const {
    const uint64_t begin = bit >> 3, end = (bit + n * width + 7) >> 3;
    const __m512i raw = _mm512_maskz_loadu_epi8(first_bytes(end - begin), code + begin);
    if (width == 8) return raw;
    const __m512i from = _mm512_add_epi8(shifts, _mm512_set1_epi8(char(bit & 7)));
    const __m512i each = _mm512_set1_epi8(char((1u << width) - 1));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(from, _mm512_permutexvar_epi8(spread, raw)), each);
  }
  // n codes, packed from the low bit up; returns the bytes they take. What `codes` holds behind them is zero.
  inline uint64_t write(__m512i codes, uint64_t n, uint8_t* out) const {
    const uint64_t bytes = code_bytes(n, width);
    __m512i packed = codes;
    if (width < 8) {
      const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(short(256 << width | 1)));
      const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(int(1u << (16 + 2 * width) | 1)));
      const __m512i upper = _mm512_srli_epi64(fours, 32 - 4 * width);
      const __m512i kept = _mm512_set1_epi64((1ll << (4 * width)) - 1);
      packed = _mm512_or_si512(_mm512_and_si512(fours, kept), _mm512_andnot_si512(kept, upper));
      packed = _mm512_permutexvar_epi8(gather, packed);
    }
    _mm512_mask_storeu_epi8(out, first_bytes(bytes), packed);
    return bytes;
  }
};

inline uint64_t strip_of(const uint8_t* row, int64_t bytes, int64_t strip) {
  if (!row) return 0;
  uint64_t bits = 0;
  const int64_t left = bytes - 8 * strip;
  memcpy(&bits, row + 8 * strip, size_t(left < 8 ? left : 8));
  return bits;
}

}  // namespace

void repack_avx512(const PanelSource& s, uint64_t* masks, uint8_t* low_out, uint8_t* code_out) {
  const Codes codes(s.width);
  alignas(64) uint8_t order[64];  // byte of a tile's words -> bit of its mask
  for (int j = 0; j < 64; ++j) order[j] = uint8_t(4 * split_row(j) + split_column(j));
  const __m512i places = _mm512_load_si512(order), one = _mm512_set1_epi8(1);
  const int64_t bytes = ceil_div(s.cols, 8), tiles = ceil_div(s.cols, 4);
  uint64_t value[16] = {};  // how many values of each row are done
  for (int64_t strip = 0; strip * 16 < tiles; ++strip) {
    Square low, code, kept;
    for (int i = 0; i < 16; ++i) {
      const uint64_t mask = strip_of(s.mask[i], bytes, strip), n = uint64_t(__builtin_popcountll(mask));
      const __m512i from = _mm512_maskz_loadu_epi8(first_bytes(n), s.low[i] + value[i]);
      low.row[i] = _mm512_maskz_expand_epi8(mask, from);
      code.row[i] = _mm512_maskz_expand_epi8(mask, codes.read(s.code[i], value[i] * s.width, n));
      kept.row[i] = _mm512_maskz_mov_epi8(mask, one);
      value[i] += n;
    }
    for (int64_t k = 0; k < s.patch_count; ++k) {  // few; in memory they are added on their own
      const int64_t column = int64_t(s.patches[k].column) - 64 * strip;
      if (column >= 0 && column < 64)
        kept.row[s.patches[k].row] = _mm512_mask_mov_epi8(kept.row[s.patches[k].row], __mmask64(1) << column, _mm512_setzero_si512());
    }
    transpose(low);
    transpose(code);
    transpose(kept);
    for (int t = 0; t < 16 && strip * 16 + t < tiles; ++t) {
      const uint64_t mask = _mm512_test_epi8_mask(_mm512_permutexvar_epi8(places, kept.row[t]), one);
      const uint64_t n = uint64_t(__builtin_popcountll(mask));
      const __m512i lows = _mm512_maskz_compress_epi8(mask, _mm512_permutexvar_epi8(places, low.row[t]));
      _mm512_mask_storeu_epi8(low_out, first_bytes(n), lows);
      low_out += n;
      code_out += codes.write(_mm512_maskz_compress_epi8(mask, _mm512_permutexvar_epi8(places, code.row[t])), n, code_out);
      *masks++ = mask;
    }
  }
}

}  // namespace sk
