// Tensors, results and errors of torch operators, through libtorch's stable C interface.
//
// No torch header is needed: the functions below are C functions that libtorch promises to keep, and Python passes
// their addresses. So one library serves every torch that has them; for an older one Python registers the operator.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "internal.h"

namespace sk {

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
};
extern Torch torch;
extern int32_t dtypes[5];  // torch's numbers of SK_BF16, SK_F16, SK_F32, u8 and bool

namespace {

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("sparsekit: " + what); }
void ok(Error error) {
  if (error) fail("libtorch call failed");
}

// A tensor argument, released at the end of the call whatever happens.
struct Argument {
  Handle handle = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = -1;
  bool bytes = false;  // u8 or bool
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
    bytes = number == dtypes[3] || number == dtypes[4];
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

}  // namespace
}  // namespace sk
