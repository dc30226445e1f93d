// Few tokens with int8 or int4 weights: the activations become bytes too, in groups of 64 columns with a scale each, and
// only the sums of a group are multiplied in fp32.
#include "linear.h"

namespace sk {
namespace {

thread_local Scratch quantised;

bool quantise(const Kernels& k, const sk_call& call, const View& w, Bytes& x) {
  const int64_t bytes = w.groups * 64 * call.tokens;
  uint8_t* memory = static_cast<uint8_t*>(quantised.need(bytes + w.groups * call.tokens * 4 + 64));
  if (!memory) return false;
  float* scales = reinterpret_cast<float*>(memory + bytes);
  const char* from = static_cast<const char*>(call.x);
  for (int64_t t = 0; t < call.tokens; ++t)
    k.quantised->quantise(from + t * call.x_stride * element_size(call.x_dtype), call.x_dtype, w.cols, t, call.tokens,
                          memory, scales);
  x = {memory, scales, call.tokens};
  return true;
}

}  // namespace

int linear_quantised(const Kernels& k, const sk_call& call, const View& w) {
  Bytes x;
  if (!quantise(k, call, w, x)) return SK_NO_MEMORY;
  const int64_t panels = ceil_div(w.rows, kPanelRows), grain = panels / (int64_t(call.threads) * 8);
  auto work = [&](int64_t begin, int64_t end, int) {
    alignas(64) float sums[kMaxFused * kPanelRows];
    for (int64_t p = begin; p < end; ++p) {
      k.quantised->fused(w, x, p, sums, kPanelRows);
      const int64_t row = p * kPanelRows, count = w.rows - row < kPanelRows ? w.rows - row : kPanelRows;
      for (int64_t t = 0; t < call.tokens; ++t) store(k, call, t, row, count, sums + t * kPanelRows);
    }
  };
  for_each(call.threads, panels, grain > 4 ? 4 : grain, work);
  return SK_OK;
}

}  // namespace sk
