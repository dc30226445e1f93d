// AVX-512: products that pass over inputs.
#include <immintrin.h>

#include "columns.h"

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

}  // namespace

extern const ColumnKernels kColumnsAvx512;
const ColumnKernels kColumnsAvx512 = {select, multiply<V>};
}  // namespace sk
