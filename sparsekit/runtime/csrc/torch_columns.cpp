// sparsekit::linear_columns as a torch operator.
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

}  // namespace
}  // namespace sk

extern "C" {
int sk_torch_register_columns(uint64_t torch_version) {
  if (!sk::torch.implement) return SK_BAD_ARGUMENT;
  void* library = nullptr;  // lives as long as the process, as the registration does
  if (sk::torch.init_impl("sparsekit", "CPU", __FILE__, __LINE__, &library)) return SK_UNSUPPORTED;
  if (sk::torch.implement(library, "linear_columns", sk::linear_columns, torch_version)) return SK_UNSUPPORTED;
  return SK_OK;
}
}
