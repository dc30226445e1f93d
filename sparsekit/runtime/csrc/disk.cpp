// Positions of a tensor on disk, and the way from its parts to bitmask and row-major values.
#include "disk.h"

namespace sk {
namespace {

bool check_offsets(const sk_disk& d, const Starts& start) {
  if (!has(d.offsets, int64_t(start.size() - 1) * 8)) return false;
  for (size_t r = 0; r + 1 < start.size(); ++r)
    if (load<int64_t>(bytes_of(d.offsets) + 8 * r) != start[r]) return false;
  return true;
}

bool read_bitmask(const sk_disk& d, int64_t rows, int64_t cols, Starts& start, int threads) {
  return has(d.mask, rows * ceil_div(cols, 8)) && row_starts(bytes_of(d.mask), rows, cols, start, threads) &&
         check_offsets(d, start);
}

void even_starts(int64_t rows, int64_t each, Starts& start) {
  start.resize(size_t(rows) + 1);
  for (int64_t r = 0; r <= rows; ++r) start[size_t(r)] = r * each;
}

int64_t kept_of_row(const sk_disk& d) { return d.cols / d.unit[1] * d.unit[0]; }

// One row of indices to mask bits: in range, strictly ascending in a group, zero bits behind the last.
bool read_indices(const sk_disk& d, const uint8_t* index, int bits, uint8_t* mask) {
  const int64_t kept = kept_of_row(d);
  int64_t at = 0;
  for (int64_t group = 0; group < d.cols; group += d.unit[1]) {
    int last = -1;
    for (int i = 0; i < d.unit[0]; ++i, at += bits) {
      const int inside = index[at / 8] >> (at % 8) & ((1 << bits) - 1);
      if (inside <= last || inside >= d.unit[1]) return false;
      last = inside;
      mask[(group + inside) / 8] = uint8_t(mask[(group + inside) / 8] | 1 << (group + inside) % 8);
    }
  }
  return kept * bits % 8 == 0 || index[kept * bits / 8] >> (kept * bits % 8) == 0;
}

bool read_nm(const sk_disk& d, Starts& start, uint8_t* mask, int threads) {
  if (d.unit[0] < 1 || d.unit[1] < d.unit[0] || d.unit[1] > 256 || d.cols % d.unit[1]) return false;
  const int bits = d.unit[1] <= 4 ? 2 : d.unit[1] <= 16 ? 4 : 8;
  const int64_t bytes = ceil_div(kept_of_row(d) * bits, 8), stride = ceil_div(d.cols, 8);
  if (!has(d.index, d.rows * bytes)) return false;
  even_starts(d.rows, kept_of_row(d), start);
  if (!bytes) return true;
  std::atomic<bool> sound{true};
  auto work = [&](int64_t begin, int64_t end, int) {
    memset(mask + begin * stride, 0, size_t((end - begin) * stride));
    for (int64_t r = begin; r < end; ++r)
      if (!read_indices(d, bytes_of(d.index) + r * bytes, bits, mask + r * stride)) sound = false;
  };
  for_each(threads, d.rows, 16, work);
  return sound;
}

bool read_grid(const sk_disk& d, Starts& start, int threads) {
  if (d.unit[0] < 1 || d.unit[1] < 1 || d.rows % d.unit[0] || d.cols % d.unit[1]) return false;
  if (!read_bitmask(d, d.rows / d.unit[0], d.cols / d.unit[1], start, threads)) return false;
  for (int64_t& blocks : start) blocks *= int64_t(d.unit[0]) * d.unit[1];
  return true;
}

}  // namespace

bool sound(const sk_disk& d) {
  constexpr int64_t most = int64_t(1) << 31;
  if (d.rows < 0 || d.cols < 0 || d.nnz < 0 || d.rows >= most || d.cols >= most) return false;
  if (d.rows && d.cols > (int64_t(1) << 40) / d.rows) return false;
  return d.dtype >= SK_BF16 && d.dtype <= SK_F32 && d.layout >= SK_DISK_DENSE && d.layout <= SK_DISK_BLOCK &&
         d.encoding >= SK_ENCODING_RAW && d.encoding <= SK_ENCODING_INT4;
}

bool read_positions(const sk_disk& d, Starts& start, uint8_t* mask, int threads) {
  bool good = true;
  switch (d.layout) {
    case SK_DISK_DENSE: even_starts(d.rows, d.cols, start); break;
    case SK_DISK_BITMASK: good = read_bitmask(d, d.rows, d.cols, start, threads); break;
    case SK_DISK_NM: good = read_nm(d, start, mask, threads); break;
    default: good = read_grid(d, start, threads);
  }
  return good && start.back() == d.nnz;
}

namespace {

// Blocks [n, r, c] to the mask of all weights and their values row by row.
void read_blocks(const sk_disk& d, const Starts& start, uint8_t* mask, uint8_t* values, int threads) {
  const int64_t high = d.unit[0], wide = d.unit[1], grid = d.cols / wide, line = ceil_div(grid, 8);
  const int64_t size = element_size(d.dtype), stride = ceil_div(d.cols, 8);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      memset(mask + b * high * stride, 0, size_t(high * stride));
      uint8_t* out = values + start[size_t(b)] * size;
      for (int64_t i = 0; i < high; ++i) {
        const uint8_t* from = bytes_of(d.values) + (start[size_t(b)] + i * wide) * size;
        uint8_t* row = mask + (b * high + i) * stride;
        each_bit(bytes_of(d.mask) + b * line, grid, [&](int64_t block) {
          for (int64_t c = block * wide; c < (block + 1) * wide; ++c) row[c / 8] = uint8_t(row[c / 8] | 1 << c % 8);
          memcpy(out, from, size_t(wide * size));
          out += wide * size;
          from += high * wide * size;
        });
      }
    }
  };
  for_each(threads, d.rows / high, 1, work);
}

int read(const sk_disk& d, uint8_t* mask, uint8_t* values, int threads) {
  const bool blocks = d.layout == SK_DISK_BLOCK, stored = d.encoding == SK_ENCODING_RAW && !blocks;
  if (blocks && d.encoding != SK_ENCODING_RAW) return SK_UNSUPPORTED;
  if (d.encoding == SK_ENCODING_SPLIT && (d.layout == SK_DISK_NM || d.dtype != SK_BF16)) return SK_UNSUPPORTED;
  if ((blocks || d.layout == SK_DISK_NM) && !mask && d.rows && d.cols) return SK_BAD_ARGUMENT;
  if (!stored && !values && d.nnz) return SK_BAD_ARGUMENT;
  Starts start;
  if (!read_positions(d, start, mask, threads)) return SK_BAD_MASK;
  bool good = true;
  if (d.encoding == SK_ENCODING_RAW)
    good = has(d.values, d.nnz * element_size(d.dtype));
  else if (d.encoding == SK_ENCODING_SPLIT)
    good = read_split(d, start, values, threads);
  else
    good = read_codes(d, start, reinterpret_cast<int8_t*>(values), threads);
  if (good && mask && blocks) read_blocks(d, start, mask, values, threads);
  return good ? SK_OK : SK_BAD_MASK;
}

}  // namespace
}  // namespace sk

extern "C" int sk_disk_read(const sk_disk* disk, void* mask, void* values, int threads) {
  if (!disk || !sk::sound(*disk)) return SK_BAD_ARGUMENT;
  try {
    return sk::read(*disk, static_cast<uint8_t*>(mask), static_cast<uint8_t*>(values), threads);
  } catch (...) {
    return SK_NO_MEMORY;
  }
}
