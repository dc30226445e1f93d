// What the ways to multiply share.
#pragma once
#include <stdlib.h>

#include "parallel.h"

namespace sk {

// Few tokens with int8 or int4: multiplies integers while it decodes.
int linear_quantised(const Kernels& k, const sk_call& call, const View& w);

struct Prepared {  // activations as the kernels read them
  Input input;
  int64_t steps, tile;
  bool pairs;
};

// Tokens [first, first + tokens) of a call, in tiles of at most `tile`, in memory of this thread that the next call takes
// again. Steps are column pairs or columns, padded with zeros to whole groups of four columns. False: no memory.
bool prepare(const sk_call& call, int64_t cols, int64_t first, int64_t tokens, int64_t tile, bool pairs, Prepared& out);

namespace {

// Memory that a thread keeps between calls.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  void* need(int64_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = round_up(bytes, 4096);
      data_ = aligned_alloc(64, size_t(size_));
      if (!data_) size_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

inline bool known(int32_t dtype) { return dtype >= SK_BF16 && dtype <= SK_F32; }

// Whether a call fits a weight [rows, cols].
inline bool sound(const sk_call& call, int64_t rows, int64_t cols) {
  if (call.tokens < 0 || call.threads < 1 || !known(call.x_dtype) || !known(call.y_dtype)) return false;
  if (call.tokens > 1 && (call.x_stride < cols || call.y_stride < rows)) return false;
  return call.tokens == 0 || ((call.x || cols == 0) && (call.y || rows == 0));
}

inline void store(const Kernels& k, const sk_call& call, int64_t token, int64_t row, int64_t count, const float* sums) {
  const int64_t size = element_size(call.y_dtype);
  const char* bias = call.bias ? static_cast<const char*>(call.bias) + row * size : nullptr;
  k.store(sums, bias, count, call.y_dtype, static_cast<char*>(call.y) + (token * call.y_stride + row) * size);
}

}  // namespace
}  // namespace sk
