// y = x weight^T + bias for the outputs that are kept, 0 for the others, whose rows are not read.
#include "columns.h"
#include "linear.h"

namespace sk {
namespace {

constexpr int64_t kBlock = 256;  // rows that are looked at together

struct KeptRows {  // which rows of a weight each token keeps
  const uint8_t* keep;
  int64_t stride;
};

// Rows [begin, end), at most kBlock; w lists none yet.
void multiply_block(const Kernels& k, const sk_call& call, RowList w, const KeptRows& kept, const Prepared& x,
                    int64_t begin, int64_t end) {
  int32_t rows[kBlock];
  alignas(64) float products[SK_COLUMN_TOKENS][kBlock], sums[SK_COLUMN_TOKENS][kBlock] = {};
  w.rows = rows;
  for (int64_t r = begin; r < end; ++r) {
    bool any = false;
    for (int64_t t = 0; t < call.tokens; ++t) any |= kept.keep[t * kept.stride + r] != 0;
    rows[w.count] = int32_t(r);
    w.count += any;
  }
  k.columns->rows(w, x.input.floats, x.steps, call.tokens, products[0], kBlock);
  for (int64_t t = 0; t < call.tokens; ++t) {
    for (int64_t i = 0; i < w.count; ++i) sums[t][rows[i] - begin] = products[t][i];
    store(k, call, t, begin, end - begin, sums[t]);
    for (int64_t r = begin; r < end; ++r)
      if (!kept.keep[t * kept.stride + r]) from_float(0.0f, call.y, call.y_dtype, t * call.y_stride + r);
  }
}

}  // namespace
}  // namespace sk

extern "C" int sk_rows(const sk_call* call, const void* weight, int64_t rows, int64_t cols, int32_t w_dtype,
                       const uint8_t* keep, int64_t keep_stride) {
  if (!call || rows < 0 || cols < 0 || !sk::known(w_dtype) || (!weight && rows > 0 && cols > 0)) return SK_BAD_ARGUMENT;
  if (rows > INT32_MAX || !sk::sound(*call, rows, cols) || call->tokens > SK_COLUMN_TOKENS) return SK_BAD_ARGUMENT;
  if (call->tokens == 0 || rows == 0) return SK_OK;
  if (!keep || (call->tokens > 1 && keep_stride < rows)) return SK_BAD_ARGUMENT;
  const sk::Kernels& k = sk::kernels();
  sk::Prepared x;
  if (!sk::prepare(*call, cols, 0, call->tokens, 1, false, x)) return SK_NO_MEMORY;
  const sk::RowList w = {weight, w_dtype, cols, nullptr, 0};
  const int64_t share = sk::round_up(sk::ceil_div(rows, int64_t(call->threads) * 4), 16);
  const int64_t block = share < sk::kBlock ? share : sk::kBlock;
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b)
      sk::multiply_block(k, *call, w, {keep, keep_stride}, x, b * block,
                         (b + 1) * block < rows ? (b + 1) * block : rows);
  };
  sk::for_each(call->threads, sk::ceil_div(rows, block), 1, work);
  return SK_OK;
}
