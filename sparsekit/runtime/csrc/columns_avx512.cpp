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

// N records of `words` mask words each. With every word `stride` bytes of the next ones are asked for, 64 at most.
template <int T, int N>
inline void add_records(const uint8_t* const* records, const uint8_t* const* next, int64_t stride, int64_t words,
                        const float* x, int64_t x_ld, float* sums, int64_t ld) {
  const uint8_t* values[N];
  for (int n = 0; n < N; ++n) values[n] = records[n] + 4 * words;
  for (int64_t i = 0; i < words; ++i, sums += 32) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) __builtin_prefetch(next[n] + i * stride);
    __m512 low[T], high[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      low[t] = V::get(sums + t * ld);
      high[t] = V::get(sums + t * ld + 16);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const uint32_t mask = load<uint32_t>(records[n] + 4 * i);
      const __m512i pairs = expand16(values[n], mask);
      values[n] += 2 * __builtin_popcount(mask);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512 input = V::broadcast(x[t * x_ld + n]);
        low[t] = V::multiply_add(even(pairs), input, low[t]);
        high[t] = V::multiply_add(odd(pairs), input, high[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      V::put(sums + t * ld, low[t]);
      V::put(sums + t * ld + 16, high[t]);
    }
  }
}

template <int T>
void packed_columns(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  // Of the values of 32 outputs, on the average of the weight, and their mask word; records are a little longer or
  // shorter.
  const int64_t stride = w.nnz ? 6 + 64 * w.nnz / (w.rows * w.cols) : 0;
  const int64_t words = mask_words(outputs_of(w, panel)), last = kept.count - 1;
  for (int t = 0; t < T; ++t) memset(sums + t * ld, 0, size_t(words * 32) * 4);
  auto at = [&](int64_t k) { return record(w, panel, last < 0 ? 0 : kept.columns[k < last ? k : last]); };
  const uint8_t* records[kTogether];
  const uint8_t* next[kTogether];
  const int64_t ahead = columns_ahead(words * stride, kRecordsAhead);
  int64_t k = 0;
  for (; k + kTogether <= kept.count; k += kTogether) {
    for (int n = 0; n < kTogether; ++n) {
      records[n] = at(k + n);
      next[n] = at(k + ahead + n);
    }
    add_records<T, kTogether>(records, next, stride, words, kept.values + k, kept.ld, sums, ld);
  }
  for (; k < kept.count; ++k) {
    records[0] = at(k);
    next[0] = at(k + ahead);
    add_records<T, 1>(records, next, stride, words, kept.values + k, kept.ld, sums, ld);
  }
}

void packed(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  switch (kept.tokens) {
    case 1: return packed_columns<1>(w, kept, panel, sums, ld);
    case 2: return packed_columns<2>(w, kept, panel, sums, ld);
    case 3: return packed_columns<3>(w, kept, panel, sums, ld);
    case 4: return packed_columns<4>(w, kept, panel, sums, ld);
  }
}

}  // namespace

extern const ColumnKernels kColumnsAvx512;
const ColumnKernels kColumnsAvx512 = {select, multiply<V>, packed, rows<V>};
}  // namespace sk
