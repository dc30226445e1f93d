// Products that pass over inputs, for any processor: the reference of the others.
#include "columns_packed.h"

namespace sk {
namespace {

struct V {
  using Floats = float;
  static constexpr int kLanes = 1;
  static Floats broadcast(float f) { return f; }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats get(const float* p) { return *p; }
  static void put(float* p, Floats v) { *p = v; }
  static float sum(Floats v) { return v; }
  template <int32_t Dtype>
  static Floats load(const void* p) {
    return to_float(p, Dtype, 0);
  }
  template <int32_t Dtype>
  static Floats part(const void* p, int) {
    return to_float(p, Dtype, 0);
  }
};

}  // namespace

extern const ColumnKernels kColumnsPortable;
const ColumnKernels kColumnsPortable = {generic_select, multiply<V>, generic_packed, generic_unpack, rows<V>};
}  // namespace sk
