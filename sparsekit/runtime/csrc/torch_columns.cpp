// Products that pass over inputs or outputs as torch operators: sparsekit::linear_columns, linear_columns_packed,
// linear_rows.
#include "columns_packed.h"
#include "torch_shim.h"

namespace sk {
namespace {

std::string list(const int64_t* numbers, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

void check_tokens(const Activations& a) {
  if (a.tokens > SK_COLUMN_TOKENS)
    fail("x has " + std::to_string(a.tokens) + " tokens, needed " + std::to_string(SK_COLUMN_TOKENS) + " at most");
}

// One number for all inputs or one for each.
void check_threshold(const Argument& threshold, int64_t cols) {
  if (threshold.dtype != SK_F32 || threshold.dim != 1 || !threshold.contiguous() ||
      (threshold.sizes[0] != 1 && threshold.sizes[0] != cols))
    fail("threshold must be contiguous fp32 [1] or [" + std::to_string(cols) + "], got " +
         (threshold.dtype == SK_F32 ? "" : "another dtype and ") + list(threshold.sizes, threshold.dim));
}

// linear_columns(Tensor x, Tensor weight, Tensor? bias, Tensor threshold) -> Tensor
void linear_columns(uint64_t* stack, uint64_t inputs, uint64_t outputs) {
  if (inputs != 4 || outputs != 1) fail("linear_columns has another schema");
  const Argument x(reinterpret_cast<Handle>(stack[0])), weight(reinterpret_cast<Handle>(stack[1]));
  const Argument bias(optional_tensor(stack[2])), threshold(reinterpret_cast<Handle>(stack[3]));
  if (weight.dim != 2 || weight.dtype < 0 || weight.dtype != x.dtype)
    fail("weight must be a matrix of the dtype of x, bf16, fp16 or fp32");
  const int64_t rows = weight.sizes[0], cols = weight.sizes[1];
  if ((rows > 1 && weight.strides[0] != 1) || (cols > 1 && weight.strides[1] != rows))
    fail("weight must be column-major, strides " + list(weight.strides, 2) + ", needed [1, " + std::to_string(rows) +
         "]");
  const Activations input(x, cols);
  check_tokens(input);
  check_bias(bias, x, rows);
  check_threshold(threshold, cols);
  Output y(x, rows);
  const sk_call call = product(input, bias, y, rows, cols);
  done(sk_columns(&call, weight.data, rows, cols, weight.dtype, reinterpret_cast<const float*>(threshold.data),
                  threshold.count()));
  stack[0] = y.take();
}

// linear_columns_packed(Tensor x, Tensor packed, Tensor? bias, Tensor threshold, int rows) -> Tensor
void linear_columns_packed(uint64_t* stack, uint64_t inputs, uint64_t outputs) {
  if (inputs != 5 || outputs != 1) fail("linear_columns_packed has another schema");
  const Argument x(reinterpret_cast<Handle>(stack[0])), packed(reinterpret_cast<Handle>(stack[1]));
  const Argument bias(optional_tensor(stack[2])), threshold(reinterpret_cast<Handle>(stack[3]));
  const int64_t rows = int64_t(stack[4]);
  PackedColumns w;
  if (!packed.bytes || !packed.contiguous() || parse_columns(packed.data, packed.count(), &w) != SK_OK)
    fail("not a weight of packed columns");
  if (w.rows != rows) fail("the packed weight has " + std::to_string(w.rows) + " rows, not " + std::to_string(rows));
  const Activations input(x, w.cols);
  check_tokens(input);
  check_bias(bias, x, rows);
  check_threshold(threshold, w.cols);
  Output y(x, rows);
  sk_call call = product(input, bias, y, rows, w.cols);
  call.packed = packed.data;
  call.packed_bytes = packed.count();
  done(sk_columns_packed(&call, reinterpret_cast<const float*>(threshold.data), threshold.count()));
  stack[0] = y.take();
}

// linear_rows(Tensor x, Tensor weight, Tensor? bias, Tensor keep) -> Tensor
void linear_rows(uint64_t* stack, uint64_t inputs, uint64_t outputs) {
  if (inputs != 4 || outputs != 1) fail("linear_rows has another schema");
  const Argument x(reinterpret_cast<Handle>(stack[0])), weight(reinterpret_cast<Handle>(stack[1]));
  const Argument bias(optional_tensor(stack[2])), keep(reinterpret_cast<Handle>(stack[3]));
  if (weight.dim != 2 || weight.dtype < 0 || weight.dtype != x.dtype || !weight.contiguous())
    fail("weight must be a contiguous matrix of the dtype of x, bf16, fp16 or fp32");
  const int64_t rows = weight.sizes[0], cols = weight.sizes[1];
  const Activations input(x, cols);
  check_tokens(input);
  check_bias(bias, x, rows);
  bool fits = keep.bytes && keep.dim == x.dim && keep.contiguous() && keep.sizes[keep.dim - 1] == rows;
  for (int64_t d = 0; fits && d < x.dim - 1; ++d) fits = keep.sizes[d] == x.sizes[d];
  if (!fits)
    fail("keep must be contiguous bool or u8, " + std::to_string(rows) + " for each token of x " + list(x.sizes, x.dim)
         + ", got " + (keep.bytes ? "" : "another dtype and ") + list(keep.sizes, keep.dim));
  Output y(x, rows);
  const sk_call call = product(input, bias, y, rows, cols);
  done(sk_rows(&call, weight.data, rows, cols, weight.dtype, reinterpret_cast<const uint8_t*>(keep.data), rows));
  stack[0] = y.take();
}

}  // namespace
}  // namespace sk

extern "C" {
int sk_torch_register_columns(uint64_t torch_version) {
  if (!sk::torch.implement) return SK_BAD_ARGUMENT;
  void* library = nullptr;  // lives as long as the process, as the registration does
  if (sk::torch.init_impl("sparsekit", "CPU", __FILE__, __LINE__, &library)) return SK_UNSUPPORTED;
  const bool failed = sk::torch.implement(library, "linear_columns", sk::linear_columns, torch_version) ||
                      sk::torch.implement(library, "linear_columns_packed", sk::linear_columns_packed, torch_version) ||
                      sk::torch.implement(library, "linear_rows", sk::linear_rows, torch_version);
  return failed ? SK_UNSUPPORTED : SK_OK;
}
}
