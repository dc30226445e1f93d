// sparsekit::linear_packed and linear_dense as torch operators.
#include "torch_shim.h"

#include <optional>

namespace sk {

Torch torch;
int32_t dtypes[5];

namespace {

const char* const kSymbols[] = {
    "aoti_torch_get_dim",       "aoti_torch_get_sizes",           "aoti_torch_get_strides",
    "aoti_torch_get_dtype",     "aoti_torch_get_data_ptr",        "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object", "torch_get_num_threads",   "torch_delete_stable_ivalue",
    "aoti_torch_library_init_impl",    "torch_library_impl",
};
constexpr int kSymbolCount = int(sizeof kSymbols / sizeof kSymbols[0]);
static_assert(sizeof(Torch) == kSymbolCount * sizeof(void*), "one address for each symbol");

// The weight of one product of linear_packed*: packed, bias, rows.
struct Member {
  const Argument packed, bias;
  int64_t rows;
  View w;

  explicit Member(const uint64_t* stack)
      : packed(reinterpret_cast<Handle>(stack[0])), bias(optional_tensor(stack[1])), rows(int64_t(stack[2])) {
    if (!packed.contiguous() || parse(packed.data, packed.count(), &w) != SK_OK) fail("not a packed weight");
    if (w.rows != rows) fail("the packed weight has " + std::to_string(w.rows) + " rows, not " + std::to_string(rows));
  }
};

// linear_packed(Tensor x, Tensor packed, Tensor? bias, int rows) -> Tensor, and with up to SK_GROUP weights
void linear_packed(uint64_t* stack, uint64_t inputs, uint64_t outputs) {
  if (outputs < 1 || outputs > SK_GROUP || inputs != 1 + 3 * outputs) fail("linear_packed has another schema");
  const Argument x(reinterpret_cast<Handle>(stack[0]));
  std::optional<Member> members[SK_GROUP];
  for (uint64_t i = 0; i < outputs; ++i) members[i].emplace(stack + 1 + 3 * i);
  const Activations input(x, members[0]->w.cols);
  std::optional<Output> results[SK_GROUP];
  sk_call calls[SK_GROUP];
  for (uint64_t i = 0; i < outputs; ++i) {
    const Member& m = *members[i];
    if (m.w.cols != members[0]->w.cols) fail("the packed weights differ in columns");
    check_bias(m.bias, x, m.rows);
    results[i].emplace(x, m.rows);
    calls[i] = product(input, m.bias, *results[i], m.rows, m.w.cols);
    calls[i].packed = m.packed.data;
    calls[i].packed_bytes = m.packed.count();
  }
  done(outputs == 1 ? sk_linear(calls) : sk_linear_group(calls, int(outputs)));
  for (uint64_t i = 0; i < outputs; ++i) stack[i] = results[i]->take();
}

// linear_dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor
void linear_dense(uint64_t* stack, uint64_t inputs, uint64_t outputs) {
  if (inputs != 3 || outputs != 1) fail("linear_dense has another schema");
  const Argument x(reinterpret_cast<Handle>(stack[0])), weight(reinterpret_cast<Handle>(stack[1]));
  const Argument bias(optional_tensor(stack[2]));
  if (weight.dim != 2 || weight.dtype < 0 || weight.dtype != x.dtype || !weight.contiguous())
    fail("weight must be a contiguous matrix of the dtype of x");
  const int64_t rows = weight.sizes[0], cols = weight.sizes[1];
  const Activations input(x, cols);
  check_bias(bias, x, rows);
  Output y(x, rows);
  const sk_call call = product(input, bias, y, rows, cols);
  done(sk_dense(&call, weight.data, rows, cols, weight.dtype));
  stack[0] = y.take();
}

}  // namespace
}  // namespace sk

extern "C" {
const char* sk_torch_symbol(int index) {
  return index >= 0 && index < sk::kSymbolCount ? sk::kSymbols[index] : nullptr;
}

int sk_torch_register(void* const* addresses, int count, const int32_t* dtypes, uint64_t torch_version) {
  if (!addresses || !dtypes || count != sk::kSymbolCount) return SK_BAD_ARGUMENT;
  for (int i = 0; i < count; ++i)
    if (!addresses[i]) return SK_UNSUPPORTED;
  memcpy(&sk::torch, addresses, sizeof sk::torch);
  memcpy(sk::dtypes, dtypes, sizeof sk::dtypes);
  void* library = nullptr;  // lives as long as the process, as the registration does
  if (sk::torch.init_impl("sparsekit", "CPU", __FILE__, __LINE__, &library)) return SK_UNSUPPORTED;
  for (const char* name : {"linear_packed", "linear_packed_2", "linear_packed_3"})
    if (sk::torch.implement(library, name, sk::linear_packed, torch_version)) return SK_UNSUPPORTED;
  if (sk::torch.implement(library, "linear_dense", sk::linear_dense, torch_version)) return SK_UNSUPPORTED;
  return SK_OK;
}
}
