// AVX-512: products that pass over inputs; compiled a second time with SK_WITH_BF16 for processors with vdpbf16ps.
#include "columns_packed.h"
#include "expand_avx512.h"

namespace sk {
namespace {

inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

struct V {
  using Floats = __m512;
  static constexpr int kLanes = 16;
  static Floats broadcast(float f) { return _mm512_set1_ps(f); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats get(const float* p) { return _mm512_loadu_ps(p); }
  static void put(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
  template <int32_t Dtype>
  static Floats widen(__m256i half) {
    return Dtype == SK_F16 ? _mm512_cvtph_ps(half)
                           : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  template <int32_t Dtype>
  static Floats load(const void* p) {
    if (Dtype == SK_F32) return _mm512_loadu_ps(p);
    return widen<Dtype>(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  template <int32_t Dtype>
  static Floats part(const void* p, int n) {
    if (Dtype == SK_F32) return _mm512_maskz_loadu_ps(first(n), p);
    return widen<Dtype>(_mm256_maskz_loadu_epi16(first(n), p));
  }
};

template <int32_t Dtype>
void select_vectors(const Inputs& in, Kept& kept) {
  const int64_t size = element_size(Dtype);
  __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t n = 0;
  for (int64_t j = 0; j < in.cols; j += 16, places = _mm512_add_epi32(places, _mm512_set1_epi32(16))) {
    const int here = int(in.cols - j < 16 ? in.cols - j : 16);
    const __m512 threshold = in.step ? V::part<SK_F32>(in.thresholds + j, here) : V::broadcast(*in.thresholds);
    __m512 x[SK_COLUMN_TOKENS];
    __mmask16 any = 0;
    for (int64_t t = 0; t < in.tokens; ++t) {
      const __m512 v = V::part<Dtype>(in.x + (t * in.stride + j) * size, here);
      const __mmask16 keep = _mm512_mask_cmp_ps_mask(first(here), _mm512_abs_ps(v), threshold, _CMP_NLE_UQ);
      x[t] = _mm512_maskz_mov_ps(keep, v);
      any |= keep;
    }
    // Into a register and whole to memory: compressing into memory is slow on some processors.
    _mm512_storeu_si512(kept.columns + n, _mm512_maskz_compress_epi32(any, places));
    for (int64_t t = 0; t < in.tokens; ++t)
      _mm512_storeu_ps(kept.values + t * kept.ld + n, _mm512_maskz_compress_ps(any, x[t]));
    n += __builtin_popcount(any);
  }
  kept.count = n;
}

void select(const Inputs& in, Kept& kept) {
  if (in.dtype == SK_BF16) return select_vectors<SK_BF16>(in, kept);
  if (in.dtype == SK_F16) return select_vectors<SK_F16>(in, kept);
  select_vectors<SK_F32>(in, kept);
}

// --- packed columns --------------------------------------------------------------------------------------------
constexpr int64_t kRecordsAhead = 16384;  // bytes, of all records together

// How codes of kWidth bits become bytes: to each eight bytes come those that hold eight codes, and are shifted.
template <int kWidth>
struct CodeTables {
  alignas(64) uint8_t place[64], shift[64];
  constexpr CodeTables() : place(), shift() {
    for (int i = 0; i < 64; ++i) {
      place[i] = uint8_t(kWidth * (i / 8) + (i % 8 < kWidth ? i % 8 : 0));
      shift[i] = uint8_t(kWidth * (i % 8));
    }
  }
};
template <int kWidth>
struct Codes {
  static constexpr CodeTables<kWidth> kTables{};
  __m512i places = _mm512_load_si512(kTables.place), shifts = _mm512_load_si512(kTables.shift);
  __m512i bits = _mm512_set1_epi8((1 << kWidth) - 1);
  __m512i numbers(const uint8_t* at) const {
    const __m512i held = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(places, held)), bits);
  }
};
template <>
struct Codes<kWideCode> {};

// The values of 64 outputs, whose mask is at `at`, which moves behind them: as pairs, `low` has outputs 0..15 and 16..31
// of the 64, `high` the others.
template <int kWidth>
inline void expand64(const Codes<kWidth>& codes, __m512i dictionary, const uint8_t*& at, __m512i& low, __m512i& high) {
  const uint64_t mask = load<uint64_t>(at);
  const int64_t count = __builtin_popcountll(mask);
  const uint8_t* behind = at + 8 + count;
  const __m512i lows = expand8(_mm512_loadu_si512(at + 8), mask);
  __m512i highs;
  if constexpr (kWidth == kWideCode) highs = _mm512_loadu_si512(behind);
  else highs = _mm512_shuffle_epi8(dictionary, codes.numbers(behind));
  highs = expand8(highs, mask);
  at = behind + code_bytes(count, kWidth);
  low = _mm512_unpacklo_epi8(lows, highs);
  high = _mm512_unpackhi_epi8(lows, highs);
}

inline __m512i dictionary_of(const Record& r) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(r.dictionary)));
}

// Sums of 64 outputs, four vectors of them. kPairs: vdpbf16ps adds two columns at once, and half f of the pairs in the
// half h of the outputs goes to vector 2 h + f; position 4 L + q there is output 32 h + 16 (q & 1) + 4 L + 2 f + q / 2.
// Without, the vectors are outputs in order.
template <bool kPairs>
inline int64_t position_of(int64_t output) {
  if (!kPairs) return output;
  const int64_t q = output & 3, f = q >> 1;
  return (output & ~31) + 16 * f + (output & 12) + 2 * (q & 1) + (output >> 4 & 1);
}

// The outputs of sums that pairs were added to, in order.
inline void order_sums(float* sums, int64_t words) {
  const __m512i first = _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
  const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(1));
  for (float* at = sums; at < sums + 64 * words; at += 32) {
    const __m512 a = V::get(at), b = V::get(at + 16);
    V::put(at, _mm512_permutex2var_ps(a, first, b));
    V::put(at + 16, _mm512_permutex2var_ps(a, second, b));
  }
}

#if defined(SK_WITH_BF16)
// Products of two columns, of one with `second` = 0.
inline void add_pairs(__m512* a, __m512i low, __m512i high, __m512i low2, __m512i high2, float first, float second) {
  const __m512i x = _mm512_set1_epi32(int(float_to_bits(first) >> 16 | (float_to_bits(second) & 0xffff0000u)));
  a[0] = _mm512_dpbf16_ps(a[0], __m512bh(_mm512_unpacklo_epi16(low, low2)), __m512bh(x));
  a[1] = _mm512_dpbf16_ps(a[1], __m512bh(_mm512_unpackhi_epi16(low, low2)), __m512bh(x));
  a[2] = _mm512_dpbf16_ps(a[2], __m512bh(_mm512_unpacklo_epi16(high, high2)), __m512bh(x));
  a[3] = _mm512_dpbf16_ps(a[3], __m512bh(_mm512_unpackhi_epi16(high, high2)), __m512bh(x));
}
#endif

inline void add_column(__m512* a, __m512i low, __m512i high, float x) {
  const __m512 input = V::broadcast(x);
  a[0] = V::multiply_add(even(low), input, a[0]);
  a[1] = V::multiply_add(odd(low), input, a[1]);
  a[2] = V::multiply_add(even(high), input, a[2]);
  a[3] = V::multiply_add(odd(high), input, a[3]);
}

// N records of `words` masks each. With every mask `stride` bytes of the next ones are asked for.
template <bool kPairs, int T, int N, int kWidth>
inline void add_records(const Record* records, const uint8_t* const* next, int64_t stride, int64_t words,
                        const float* x, int64_t x_ld, float* sums, int64_t ld) {
  const Codes<kWidth> codes;
  const uint8_t* at[N];
  __m512i dictionary[N];
  for (int n = 0; n < N; ++n) {
    at[n] = records[n].groups;
    dictionary[n] = dictionary_of(records[n]);
  }
  float* sum = sums;
  for (int64_t i = 0; i < words; ++i, sum += 64) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) __builtin_prefetch(next[n] + i * stride);
    if (stride > kRecordLine) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) __builtin_prefetch(next[n] + i * stride + kRecordLine);
    }
    __m512 a[T][4];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) a[t][q] = V::get(sum + t * ld + 16 * q);
    __m512i low, high;
#if defined(SK_WITH_BF16)
    if constexpr (kPairs) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n += 2) {
        __m512i low2 = _mm512_setzero_si512(), high2 = low2;
        expand64<kWidth>(codes, dictionary[n], at[n], low, high);
        if (n + 1 < N) expand64<kWidth>(codes, dictionary[n + 1], at[n + 1], low2, high2);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const float* input = x + t * x_ld + n;
          add_pairs(a[t], low, high, low2, high2, input[0], n + 1 < N ? input[1] : 0.0f);
        }
      }
    }
#endif
    if constexpr (!kPairs) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        expand64<kWidth>(codes, dictionary[n], at[n], low, high);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) add_column(a[t], low, high, x[t * x_ld + n]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) V::put(sum + t * ld + 16 * q, a[t][q]);
  }
  for (int n = 0; n < N; ++n)
    for (int64_t i = 0; i < records[n].patches; ++i) {
      const ColumnPatch patch = load<ColumnPatch>(records[n].patch + i * int64_t(sizeof(ColumnPatch)));
      const int64_t place = position_of<kPairs>(patch.output);
      for (int t = 0; t < T; ++t) sums[t * ld + place] += bf16_to_float(patch.value) * x[t * x_ld + n];
    }
}

template <bool kPairs, int T, int kWidth>
void packed_columns(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  const int64_t words = mask_words(outputs_of(w, panel)), last = kept.count - 1;
  for (int t = 0; t < T; ++t) memset(sums + t * ld, 0, size_t(words * 64) * 4);
  Record records[kTogether];
  const uint8_t* next[kTogether];
  const int64_t ahead = columns_ahead(words * w.stride, kRecordsAhead);
  const uint32_t* starts = w.starts + panel * w.cols;
  int64_t k = 0;
  auto take = [&](int count) {
    bool wide = false;
    for (int n = 0; n < count; ++n) {
      const int64_t later = k + ahead + n < last ? k + ahead + n : last;
      next[n] = w.records + int64_t(starts[kept.columns[later]]) * kRecordLine;
      records[n] = record(w, panel, kept.columns[k + n]);
      wide |= records[n].width == kWideCode;
    }
    return wide;
  };
  auto one = [&](int n) {
    const float* x = kept.values + k + n;
    if (records[n].width == kWideCode)
      add_records<kPairs, T, 1, kWideCode>(records + n, next + n, w.stride, words, x, kept.ld, sums, ld);
    else
      add_records<kPairs, T, 1, kWidth>(records + n, next + n, w.stride, words, x, kept.ld, sums, ld);
  };
  for (; k + kTogether <= kept.count; k += kTogether) {
    if (take(kTogether)) {
      for (int n = 0; n < kTogether; ++n) one(n);
    } else {
      add_records<kPairs, T, kTogether, kWidth>(records, next, w.stride, words, kept.values + k, kept.ld, sums, ld);
    }
  }
  for (; k < kept.count; ++k) {
    take(1);
    one(0);
  }
  if constexpr (kPairs)
    for (int t = 0; t < T; ++t) order_sums(sums + t * ld, words);
}

template <bool kPairs, int kWidth>
void packed_tokens(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  switch (kept.tokens) {
    case 1: return packed_columns<kPairs, 1, kWidth>(w, kept, panel, sums, ld);
    case 2: return packed_columns<kPairs, 2, kWidth>(w, kept, panel, sums, ld);
    case 3: return packed_columns<kPairs, 3, kWidth>(w, kept, panel, sums, ld);
    case 4: return packed_columns<kPairs, 4, kWidth>(w, kept, panel, sums, ld);
  }
}

template <bool kPairs>
void packed_width(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  return w.width == 3 ? packed_tokens<kPairs, 3>(w, kept, panel, sums, ld)
                      : packed_tokens<kPairs, 4>(w, kept, panel, sums, ld);
}

void packed(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
#if defined(SK_WITH_BF16)
  if (kept.bf16) return packed_width<true>(w, kept, panel, sums, ld);
#endif
  packed_width<false>(w, kept, panel, sums, ld);
}

template <int kWidth>
void unpack_column(const PackedColumns& w, int64_t panel, const Record& r, uint16_t* to) {
  const Codes<kWidth> codes;
  const __m512i dictionary = dictionary_of(r);
  alignas(64) static const uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                 1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i order = _mm512_load_si512(kEven);
  const int64_t outputs = outputs_of(w, panel);
  const uint8_t* at = r.groups;
  for (int64_t i = 0; i < outputs; i += 64) {
    __m512i half[2];
    expand64<kWidth>(codes, dictionary, at, half[0], half[1]);
    for (int64_t h = 0; h < 2 && i + 32 * h < outputs; ++h) {
      const int64_t here = outputs - i - 32 * h;
      const __mmask32 room = here < 32 ? (1u << here) - 1 : ~0u;
      _mm512_mask_storeu_epi16(to + i + 32 * h, room, _mm512_permutexvar_epi16(order, half[h]));
    }
  }
  for (int64_t i = 0; i < r.patches; ++i) {
    const ColumnPatch patch = load<ColumnPatch>(r.patch + i * int64_t(sizeof(ColumnPatch)));
    to[patch.output] = patch.value;
  }
}

void unpack(const PackedColumns& w, int64_t panel, int64_t column, uint16_t* to) {
  const Record r = record(w, panel, column);
  if (r.width == kWideCode) return unpack_column<kWideCode>(w, panel, r, to);
  return w.width == 3 ? unpack_column<3>(w, panel, r, to) : unpack_column<4>(w, panel, r, to);
}

}  // namespace

#if defined(SK_WITH_BF16)
extern const ColumnKernels kColumnsAvx512Bf16;
const ColumnKernels kColumnsAvx512Bf16 = {select, multiply<V>, packed, unpack, rows<V>};
#else
extern const ColumnKernels kColumnsAvx512;
const ColumnKernels kColumnsAvx512 = {select, multiply<V>, packed, unpack, rows<V>};
#endif
}  // namespace sk
