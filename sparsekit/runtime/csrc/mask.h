// Row-major bitmasks, as they lie on disk: bit i of byte j is column 8 j + i.
#pragma once
#include <vector>

#include "parallel.h"

namespace sk {
namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

// start[r] = set bits in all rows before r, [rows + 1]; false if a bit behind the last column is set.
inline bool row_starts(const uint8_t* mask, int64_t rows, int64_t cols, std::vector<int64_t>& start, int threads) {
  const int64_t stride = ceil_div(cols, 8);
  const unsigned padding = cols % 8 ? 0xffu << (cols % 8) & 0xff : 0;
  start.assign(size_t(rows) + 1, 0);
  std::atomic<bool> clean{true};
  auto count = [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* p = mask + r * stride;
      int64_t n = 0, j = 0;
      for (; j + 8 <= stride; j += 8) n += __builtin_popcountll(load<uint64_t>(p + j));
      for (; j < stride; ++j) n += __builtin_popcount(p[j]);
      start[size_t(r) + 1] = n;
      if (stride && (p[stride - 1] & padding)) clean = false;
    }
  };
  for_each(threads, rows, 64, count);
  for (int64_t r = 0; r < rows; ++r) start[size_t(r) + 1] += start[size_t(r)];
  return clean;
}

// Calls f(column) for every set bit of a row, ascending.
template <class F>
inline void each_bit(const uint8_t* row, int64_t cols, F f) {
  const int64_t stride = ceil_div(cols, 8);
  for (int64_t at = 0; at < stride; at += 8) {
    uint64_t bits = 0;
    memcpy(&bits, row + at, size_t(stride - at < 8 ? stride - at : 8));
    for (; bits; bits &= bits - 1) f(8 * at + __builtin_ctzll(bits));
  }
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
