// sparsekit::linear_packed and linear_dense as torch operators, through libtorch's stable C interface.
//
// No torch header is needed: the functions below are C functions that libtorch promises to keep, and Python passes
// their addresses. So one library serves every torch that has them; for an older one Python registers the operator.
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "internal.h"

namespace sk {
namespace {

using Handle = void*;
using Error = int32_t;

struct Torch {  // in the order of sk_torch_symbol
  Error (*get_dim)(Handle, int64_t*);
  Error (*get_sizes)(Handle, int64_t**);
  Error (*get_strides)(Handle, int64_t**);
  Error (*get_dtype)(Handle, int32_t*);
  Error (*get_data_ptr)(Handle, void**);
  Error (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
  Error (*delete_tensor)(Handle);
  Error (*get_threads)(uint32_t*);
  Error (*delete_value)(uint64_t*);
  Error (*init_impl)(const char*, const char*, const char*, uint32_t, void**);
  Error (*implement)(void*, const char*, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t);
} torch;

const char* const kSymbols[] = {
    "aoti_torch_get_dim",       "aoti_torch_get_sizes",           "aoti_torch_get_strides",
    "aoti_torch_get_dtype",     "aoti_torch_get_data_ptr",        "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object", "torch_get_num_threads",   "torch_delete_stable_ivalue",
    "aoti_torch_library_init_impl",    "torch_library_impl",
};
constexpr int kSymbolCount = int(sizeof kSymbols / sizeof kSymbols[0]);
static_assert(sizeof(Torch) == kSymbolCount * sizeof(void*), "one address for each symbol");
int32_t dtypes[3];  // torch's numbers of SK_BF16, SK_F16, SK_F32

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("sparsekit: " + what); }
void ok(Error error) {
  if (error) fail("libtorch call failed");
}

// A tensor argument, released at the end of the call whatever happens.
struct Argument {
  Handle handle = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = -1;
  char* data = nullptr;

  explicit Argument(Handle h) : handle(h) {
    if (!h) return;
    int32_t number;
    void* p;
    ok(torch.get_dim(h, &dim));
    ok(torch.get_sizes(h, &sizes));
    ok(torch.get_strides(h, &strides));
    ok(torch.get_dtype(h, &number));
    ok(torch.get_data_ptr(h, &p));
    data = static_cast<char*>(p);
    for (int i = 0; i < 3; ++i)
      if (dtypes[i] == number) dtype = i;
  }
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  ~Argument() {
    if (handle) torch.delete_tensor(handle);
  }
  int64_t count() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim; ++d) n *= sizes[d];
    return n;
  }
  bool contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != step) return false;
      step *= sizes[d];
    }
    return true;
  }
  // Elements in order of their indices, for the rare caller that passes a transposed or sliced tensor.
  std::vector<char> gathered() const {
    const int64_t size = element_size(dtype), total = count();
    std::vector<char> out(size_t(total * size));
    std::vector<int64_t> index(size_t(dim), 0);
    for (int64_t i = 0; i < total; ++i) {
      int64_t at = 0;
      for (int64_t d = 0; d < dim; ++d) at += index[size_t(d)] * strides[d];
      memcpy(out.data() + i * size, data + at * size, size_t(size));
      for (int64_t d = dim - 1; d >= 0 && ++index[size_t(d)] == sizes[d]; --d) index[size_t(d)] = 0;
    }
    return out;
  }
};

Handle optional_tensor(uint64_t value) {
  if (!value) return nullptr;
  uint64_t* box = reinterpret_cast<uint64_t*>(value);
  Handle handle = reinterpret_cast<Handle>(*box);
  ok(torch.delete_value(box));
  return handle;
}

// An input in order of its indices, and how many tokens it has.
struct Activations {
  const Argument& x;
  std::vector<char> copy;
  int64_t tokens = 1;

  Activations(const Argument& input, int64_t cols) : x(input) {
    if (x.dtype < 0 || x.dim < 1 || x.sizes[x.dim - 1] != cols)
      fail("x must be bf16, fp16 or fp32 with a last dimension of " + std::to_string(cols));
    if (!x.contiguous()) copy = x.gathered();
    for (int64_t d = 0; d < x.dim - 1; ++d) tokens *= x.sizes[d];
  }
  const char* data() const { return copy.empty() ? x.data : copy.data(); }
};

void check_bias(const Argument& bias, const Argument& x, int64_t rows) {
  if (bias.handle && (bias.dtype != x.dtype || bias.count() != rows || !bias.contiguous()))
    fail("bias must have the dtype of x and " + std::to_string(rows) + " elements");
}

// The result [..., rows]; deleted unless it is taken.
struct Output {
  Handle handle = nullptr;
  void* data = nullptr;

  Output(const Argument& x, int64_t rows) {
    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim), strides(size_t(x.dim), 1);
    sizes.back() = rows;
    for (int64_t d = x.dim - 2; d >= 0; --d)
      strides[size_t(d)] = strides[size_t(d) + 1] * (sizes[size_t(d) + 1] > 1 ? sizes[size_t(d) + 1] : 1);
    ok(torch.empty_strided(x.dim, sizes.data(), strides.data(), dtypes[x.dtype], 0, 0, &handle));
    if (torch.get_data_ptr(handle, &data)) {
      torch.delete_tensor(handle);
      fail("libtorch call failed");
    }
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    if (handle) torch.delete_tensor(handle);
  }
  uint64_t take() {
    const uint64_t value = reinterpret_cast<uint64_t>(handle);
    handle = nullptr;
    return value;
  }
};

sk_call product(const Activations& a, const Argument& bias, const Output& y, int64_t rows, int64_t cols) {
  uint32_t threads = 1;
  ok(torch.get_threads(&threads));
  return {nullptr, 0, a.data(), bias.data, y.data, a.tokens, cols, rows, a.x.dtype, a.x.dtype, int32_t(threads)};
}

void done(int status) {
  if (status != SK_OK) fail("the kernels refused the call with status " + std::to_string(status));
}

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
