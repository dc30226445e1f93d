// y = x weight^T + bias without the inputs that count for nothing: chooses them once, shares the outputs out.
#include "columns_packed.h"
#include "linear.h"

namespace sk {
namespace {

constexpr int64_t kMostOutputs = 2048;  // of a panel: its sums stay in the first-level cache while the columns pass

thread_local Scratch selected;

bool sound_columns(const sk_call& call, int64_t rows, int64_t cols, const float* thresholds, int64_t count) {
  if (rows < 0 || cols < 0 || cols > INT32_MAX || !sound(call, rows, cols)) return false;
  return call.tokens <= SK_COLUMN_TOKENS && (thresholds || count == 0) && (count == 1 || count == cols);
}

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

// Panels of `panel` outputs: multiply(p, from, to, sums [tokens][kMostOutputs]) and the result.
template <class Multiply>
void share(const Kernels& k, const sk_call& call, int64_t rows, int64_t panel, Multiply multiply) {
  auto work = [&](int64_t begin, int64_t end, int) {
    alignas(64) float sums[SK_COLUMN_TOKENS][kMostOutputs];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t from = p * panel, to = from + panel < rows ? from + panel : rows;
      multiply(p, from, to, sums[0]);
      for (int64_t t = 0; t < call.tokens; ++t) store(k, call, t, from, to - from, sums[t]);
    }
  };
  for_each(call.threads, ceil_div(rows, panel), 1, work);
}

}  // namespace
}  // namespace sk

extern "C" {
int sk_columns(const sk_call* call, const void* weight, int64_t rows, int64_t cols, int32_t w_dtype,
               const float* thresholds, int64_t count) {
  if (!call || !sk::known(w_dtype) || (!weight && rows > 0 && cols > 0)) return SK_BAD_ARGUMENT;
  if (!sk::sound_columns(*call, rows, cols, thresholds, count)) return SK_BAD_ARGUMENT;
  if (call->tokens == 0 || rows == 0) return SK_OK;
  const sk::Kernels& k = sk::kernels();
  sk::Kept kept;
  if (!sk::select(k, *call, cols, thresholds, count, kept)) return SK_NO_MEMORY;
  // As many panels for each thread, as wide as they can be: the longer the pieces of a column, the faster their read.
  const int64_t panels = sk::round_up(sk::ceil_div(rows, sk::kMostOutputs), call->threads);
  const int64_t panel = sk::round_up(sk::ceil_div(rows, panels), 64);
  sk::share(k, *call, rows, panel, [&](int64_t, int64_t from, int64_t to, float* sums) {
    k.columns->multiply(weight, w_dtype, rows, kept, from, to, sums, sk::kMostOutputs);
  });
  return SK_OK;
}

int sk_columns_packed(const sk_call* call, const float* thresholds, int64_t count) {
  if (!call) return SK_BAD_ARGUMENT;
  sk::PackedColumns w;
  const int status = sk::parse_columns(call->packed, call->packed_bytes, &w);
  if (status != SK_OK) return status;
  if (!sk::sound_columns(*call, w.rows, w.cols, thresholds, count)) return SK_BAD_ARGUMENT;
  if (call->tokens == 0 || w.rows == 0) return SK_OK;
  const sk::Kernels& k = sk::kernels();
  sk::Kept kept;
  if (!sk::select(k, *call, w.cols, thresholds, count, kept)) return SK_NO_MEMORY;
  sk::share(k, *call, w.rows, w.panel, [&](int64_t p, int64_t, int64_t, float* sums) {
    k.columns->packed(w, kept, p, sums, sk::kMostOutputs);
  });
  return SK_OK;
}
}
