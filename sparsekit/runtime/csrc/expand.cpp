// Between a dense matrix and its mask and values.
#include "mask.h"

namespace sk {
namespace {

template <class T>
void expand_row(const sk_bitmask& s, int64_t r, const uint8_t* value, uint8_t* dense) {
  uint8_t* row = dense + r * s.cols * int64_t(sizeof(T));
  if (s.cols) memset(row, 0, size_t(s.cols) * sizeof(T));
  each_bit(s.mask + r * ceil_div(s.cols, 8), s.cols, [&](int64_t column) {
    memcpy(row + column * int64_t(sizeof(T)), value, sizeof(T));
    value += sizeof(T);
  });
}

template <class T>
void compact_row(const sk_bitmask& s, int64_t r, const uint8_t* dense, uint8_t* value) {
  const uint8_t* row = dense + r * s.cols * int64_t(sizeof(T));
  each_bit(s.mask + r * ceil_div(s.cols, 8), s.cols, [&](int64_t column) {
    memcpy(value, row + column * int64_t(sizeof(T)), sizeof(T));
    value += sizeof(T);
  });
}

template <class T>
int64_t mask_row(const uint8_t* row, int64_t cols, uint8_t* mask) {
  int64_t kept = 0;
  for (int64_t at = 0; at < cols; at += 8) {
    unsigned bits = 0;
    const int n = int(cols - at < 8 ? cols - at : 8);
    for (int i = 0; i < n; ++i) bits |= unsigned(load<T>(row + (at + i) * int64_t(sizeof(T))) != 0) << i;
    mask[at / 8] = uint8_t(bits);
    kept += __builtin_popcount(bits);
  }
  return kept;
}

template <class F>
int each_row(const sk_bitmask* s, const void* from, const void* to, int threads, F f) {
  if (!s || s->rows < 0 || s->cols < 0 || s->dtype < SK_BF16 || s->dtype > SK_F32) return SK_BAD_ARGUMENT;
  if (s->rows && s->cols && (!s->mask || (s->nnz && (!from || !to)))) return SK_BAD_ARGUMENT;
  try {
    std::vector<int64_t> start;
    if (!row_starts(s->mask, s->rows, s->cols, start, threads) || start.back() != s->nnz) return SK_BAD_MASK;
    auto work = [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) f(r, start[size_t(r)] * element_size(s->dtype));
    };
    for_each(threads, s->rows, 16, work);
  } catch (...) {
    return SK_NO_MEMORY;
  }
  return SK_OK;
}

}  // namespace
}  // namespace sk

extern "C" {
int sk_expand(const sk_bitmask* source, void* dense, int threads) {
  if (source && source->rows && source->cols && !dense) return SK_BAD_ARGUMENT;  // written even if nothing is kept
  return sk::each_row(source, source ? source->values : nullptr, dense, threads, [&](int64_t r, int64_t at) {
    const uint8_t* values = static_cast<const uint8_t*>(source->values) + at;
    if (source->dtype == SK_F32)
      sk::expand_row<uint32_t>(*source, r, values, static_cast<uint8_t*>(dense));
    else
      sk::expand_row<uint16_t>(*source, r, values, static_cast<uint8_t*>(dense));
  });
}

int64_t sk_dense_mask(const void* dense, int64_t rows, int64_t cols, int64_t size, void* mask, int threads) {
  if (rows < 0 || cols < 0 || (size != 2 && size != 4) || (rows && cols && (!dense || !mask))) return -1;
  const int64_t stride = sk::ceil_div(cols, 8);
  std::atomic<int64_t> kept{0};
  auto work = [&](int64_t begin, int64_t end, int) {
    int64_t found = 0;
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* row = static_cast<const uint8_t*>(dense) + r * cols * size;
      uint8_t* bits = static_cast<uint8_t*>(mask) + r * stride;
      found += size == 4 ? sk::mask_row<uint32_t>(row, cols, bits) : sk::mask_row<uint16_t>(row, cols, bits);
    }
    kept += found;
  };
  sk::for_each(threads, rows, 16, work);
  return kept;
}

int sk_compact(const void* dense, const sk_bitmask* shape, void* values, int threads) {
  return sk::each_row(shape, dense, values, threads, [&](int64_t r, int64_t at) {
    uint8_t* out = static_cast<uint8_t*>(values) + at;
    if (shape->dtype == SK_F32)
      sk::compact_row<uint32_t>(*shape, r, static_cast<const uint8_t*>(dense), out);
    else
      sk::compact_row<uint16_t>(*shape, r, static_cast<const uint8_t*>(dense), out);
  });
}
}
