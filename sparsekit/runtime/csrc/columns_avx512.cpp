// AVX-512: products that pass over inputs.
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

// N records of `words` masks each. With every mask `stride` bytes of the next ones are asked for.
template <int T, int N, int kWidth>
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
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      __m512i low, high;
      expand64<kWidth>(codes, dictionary[n], at[n], low, high);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512 input = V::broadcast(x[t * x_ld + n]);
        a[t][0] = V::multiply_add(even(low), input, a[t][0]);
        a[t][1] = V::multiply_add(odd(low), input, a[t][1]);
        a[t][2] = V::multiply_add(even(high), input, a[t][2]);
        a[t][3] = V::multiply_add(odd(high), input, a[t][3]);
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
      for (int t = 0; t < T; ++t) sums[t * ld + patch.output] += bf16_to_float(patch.value) * x[t * x_ld + n];
    }
}

template <int T, int kWidth>
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
      add_records<T, 1, kWideCode>(records + n, next + n, w.stride, words, x, kept.ld, sums, ld);
    else
      add_records<T, 1, kWidth>(records + n, next + n, w.stride, words, x, kept.ld, sums, ld);
  };
  for (; k + kTogether <= kept.count; k += kTogether) {
    if (take(kTogether)) {
      for (int n = 0; n < kTogether; ++n) one(n);
    } else {
      add_records<T, kTogether, kWidth>(records, next, w.stride, words, kept.values + k, kept.ld, sums, ld);
    }
  }
  for (; k < kept.count; ++k) {
    take(1);
    one(0);
  }
}

template <int kWidth>
void packed_tokens(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  switch (kept.tokens) {
    case 1: return packed_columns<1, kWidth>(w, kept, panel, sums, ld);
    case 2: return packed_columns<2, kWidth>(w, kept, panel, sums, ld);
    case 3: return packed_columns<3, kWidth>(w, kept, panel, sums, ld);
    case 4: return packed_columns<4, kWidth>(w, kept, panel, sums, ld);
  }
}

void packed(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  return w.width == 3 ? packed_tokens<3>(w, kept, panel, sums, ld) : packed_tokens<4>(w, kept, panel, sums, ld);
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

extern const ColumnKernels kColumnsAvx512;
const ColumnKernels kColumnsAvx512 = {select, multiply<V>, packed, unpack, rows<V>};
}  // namespace sk
