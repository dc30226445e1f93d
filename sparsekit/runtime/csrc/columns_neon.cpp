// NEON: products that pass over inputs.
#include <arm_neon.h>

#include "columns_packed.h"

namespace sk {
namespace {

struct V {
  using Floats = float32x4_t;
  static constexpr int kLanes = 4;
  static Floats broadcast(float f) { return vdupq_n_f32(f); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats get(const float* p) { return vld1q_f32(p); }
  static void put(float* p, Floats v) { vst1q_f32(p, v); }
  static float sum(Floats v) { return vaddvq_f32(v); }
  template <int32_t Dtype>
  static Floats load(const uint8_t* p) {
    if (Dtype == SK_F32) return vreinterpretq_f32_u8(vld1q_u8(p));
    const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(p));
    return Dtype == SK_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(half)) : vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
  template <int32_t Dtype>
  static Floats part(const uint8_t* p, int n) {
    uint8_t whole[16] = {};
    memcpy(whole, p, size_t(n * element_size(Dtype)));
    return load<Dtype>(whole);
  }
};

}  // namespace

extern const ColumnKernels kColumnsNeon;
const ColumnKernels kColumnsNeon = {generic_select, multiply<V>, generic_packed, generic_unpack, rows<V>};
}  // namespace sk
