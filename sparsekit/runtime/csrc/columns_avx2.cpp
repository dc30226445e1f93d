// AVX2 with FMA and F16C: products that pass over inputs.
#include <immintrin.h>

#include "columns_packed.h"

namespace sk {
namespace {

struct V {
  using Floats = __m256;
  static constexpr int kLanes = 8;
  static Floats broadcast(float f) { return _mm256_set1_ps(f); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats get(const float* p) { return _mm256_loadu_ps(p); }
  static void put(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static float sum(Floats v) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }
  template <int32_t Dtype>
  static Floats load(const void* p) {
    if (Dtype == SK_F32) return _mm256_loadu_ps(static_cast<const float*>(p));
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return Dtype == SK_F16 ? _mm256_cvtph_ps(half)
                           : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <int32_t Dtype>
  static Floats part(const void* p, int n) {
    alignas(32) char whole[32] = {};
    memcpy(whole, p, size_t(n * element_size(Dtype)));
    return load<Dtype>(whole);
  }
};

}  // namespace

extern const ColumnKernels kColumnsAvx2;
const ColumnKernels kColumnsAvx2 = {generic_select, multiply<V>, generic_packed, generic_unpack, rows<V>};
}  // namespace sk
