// y = x weight^T + bias without the inputs that count for nothing: chooses them once, shares the outputs out.
#include "columns.h"

#include "linear.h"

namespace sk {
namespace {

constexpr int64_t kPanelOutputs = 2048;  // their sums stay in the first-level cache while the columns pass

thread_local Scratch selected;

// Kept inputs of all tokens of a call; false if memory runs out.
bool select(const Kernels& k, const sk_call& call, int64_t cols, const float* thresholds, int64_t count, Kept& kept) {
  const int64_t room = round_up(cols + kSelectTail, 16);
  char* memory = static_cast<char*>(selected.need(room * 4 * (1 + call.tokens)));
  if (!memory) return false;
  kept = {reinterpret_cast<int32_t*>(memory), reinterpret_cast<float*>(memory) + room, 0, room, call.tokens};
  const Inputs in = {static_cast<const char*>(call.x), call.x_stride, call.tokens, cols, call.x_dtype, thresholds,
                     count == 1 ? 0 : 1};
  k.columns->select(in, kept);
  return true;
}

}  // namespace
}  // namespace sk

extern "C" {
int sk_columns(const sk_call* call, const void* weight, int64_t rows, int64_t cols, int32_t w_dtype,
               const float* thresholds, int64_t count) {
  if (!call || !sk::known(w_dtype) || (!weight && rows > 0 && cols > 0)) return SK_BAD_ARGUMENT;
  if (rows < 0 || cols < 0 || cols > INT32_MAX || !sk::sound(*call, rows, cols)) return SK_BAD_ARGUMENT;
  if (call->tokens > SK_COLUMN_TOKENS || (!thresholds && count > 0) || (count != 1 && count != cols)) return SK_BAD_ARGUMENT;
  if (call->tokens == 0 || rows == 0) return SK_OK;
  const sk::Kernels& k = sk::kernels();
  sk::Kept kept;
  if (!sk::select(k, *call, cols, thresholds, count, kept)) return SK_NO_MEMORY;
  auto work = [&](int64_t begin, int64_t end, int) {
    alignas(64) float sums[SK_COLUMN_TOKENS][sk::kPanelOutputs];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t from = p * sk::kPanelOutputs;
      const int64_t to = from + sk::kPanelOutputs < rows ? from + sk::kPanelOutputs : rows;
      k.columns->multiply(weight, w_dtype, rows, kept, from, to, sums[0], sk::kPanelOutputs);
      for (int64_t t = 0; t < call->tokens; ++t) sk::store(k, *call, t, from, to - from, sums[t]);
    }
  };
  sk::for_each(call->threads, sk::ceil_div(rows, sk::kPanelOutputs), 1, work);
  return SK_OK;
}
}
