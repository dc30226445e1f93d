// y = x weight^T + bias without the inputs that count for nothing: chooses them once, shares the outputs out.
#include <atomic>
#include <new>

#include "columns_packed.h"
#include "linear.h"

namespace sk {
namespace {

constexpr int64_t kParts = 4;  // sets that the kept columns are divided in, whatever the number of threads

thread_local Scratch selected, partial;

bool sound_columns(const sk_call& call, int64_t rows, int64_t cols, const float* thresholds, int64_t count) {
  if (rows < 0 || cols < 0 || cols > INT32_MAX || !sound(call, rows, cols)) return false;
  return call.tokens <= SK_COLUMN_TOKENS && (thresholds || count == 0) && (count == 1 || count == cols);
}

// Kept inputs of all tokens of a call; false if memory runs out.
bool select(const Kernels& k, const sk_call& call, int64_t cols, const float* thresholds, int64_t count, Kept& kept) {
  const int64_t room = round_up(cols + kSelectTail, 16);
  char* memory = static_cast<char*>(selected.need(room * 4 * (1 + call.tokens)));
  if (!memory) return false;
  kept = {reinterpret_cast<int32_t*>(memory), reinterpret_cast<float*>(memory) + room, 0, room, call.tokens,
          call.x_dtype == SK_BF16};
  const Inputs in = {static_cast<const char*>(call.x), call.x_stride, call.tokens, cols, call.x_dtype, thresholds,
                     count == 1 ? 0 : 1};
  k.columns->select(in, kept);
  return true;
}

// One set of columns, as if they were all.
Kept part(const Kept& kept, int64_t index) {
  auto bound = [&](int64_t i) { return i == kParts ? kept.count : kept.count * i / kParts / kTogether * kTogether; };
  const int64_t begin = bound(index);
  return {kept.columns + begin, kept.values + begin, bound(index + 1) - begin, kept.ld, kept.tokens, kept.bf16};
}

// What threads share are the columns of a panel, in kParts sets, rather than its outputs: the pieces that are read of a
// column stay whole pages. Who ends the last set of a panel adds the sets up, in their order, and stores the result.
// multiply(panel, from, to, columns, sums [tokens][kMostOutputs]); false if memory runs out.
template <class Multiply>
bool share(const Kernels& k, const sk_call& call, int64_t rows, const Kept& kept, Multiply multiply) {
  const int64_t panels = ceil_div(rows, kMostOutputs), size = call.tokens * kMostOutputs;
  float* memory = static_cast<float*>(partial.need(panels * (kParts * size * 4 + 64)));
  if (!memory) return false;
  auto* ended = reinterpret_cast<std::atomic<int>*>(memory + panels * kParts * size);
  for (int64_t p = 0; p < panels; ++p) new (ended + p) std::atomic<int>(0);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / kParts, from = p * kMostOutputs;
      const int64_t to = from + kMostOutputs < rows ? from + kMostOutputs : rows;
      float* sums = memory + p * kParts * size;
      multiply(p, from, to, part(kept, i % kParts), sums + i % kParts * size);
      if (ended[p].fetch_add(1, std::memory_order_acq_rel) + 1 < kParts) continue;
      for (int64_t t = 0; t < call.tokens; ++t) {
        float* all = sums + t * kMostOutputs;
        for (int64_t s = 1; s < kParts; ++s)
          for (int64_t j = 0; j < to - from; ++j) all[j] += all[s * size + j];
        store(k, call, t, from, to - from, all);
      }
    }
  };
  for_each(call.threads, panels * kParts, 1, work);
  return true;
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
  auto multiply = [&](int64_t, int64_t from, int64_t to, const sk::Kept& part, float* sums) {
    k.columns->multiply(weight, w_dtype, rows, part, from, to, sums, sk::kMostOutputs);
  };
  return sk::share(k, *call, rows, kept, multiply) ? SK_OK : SK_NO_MEMORY;
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
  auto multiply = [&](int64_t p, int64_t, int64_t, const sk::Kept& part, float* sums) {
    k.columns->packed(w, part, p, sums, sk::kMostOutputs);
  };
  return sk::share(k, *call, w.rows, kept, multiply) ? SK_OK : SK_NO_MEMORY;
}
}
