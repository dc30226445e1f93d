// Values of a tensor on disk: the encodings split, int8 and int4.
#include "disk.h"

namespace sk {
namespace {

constexpr int64_t kDictionaryRows = 16;
constexpr int64_t kGroup = 64;  // columns that share a scale

unsigned width_of(const sk_disk& d, int64_t row) { return bytes_of(d.width)[row / kDictionaryRows]; }

// Widths exist, and no dictionary has an entry that no code of its width reaches.
bool check_dictionaries(const sk_disk& d) {
  const int64_t blocks = ceil_div(d.rows, kDictionaryRows);
  if (!has(d.width, blocks) || !has(d.dictionary, blocks * 16)) return false;
  for (int64_t b = 0; b < blocks; ++b) {
    const unsigned width = bytes_of(d.width)[b];
    if (width != 3 && width != 4 && width != 8) return false;
    for (unsigned i = width == 8 ? 0 : 1u << width; i < 16; ++i)
      if (bytes_of(d.dictionary)[16 * b + i]) return false;
  }
  return true;
}

// High bytes of `count` codes of 3 or 4 bits; reads exactly the bytes they take.
void decode_row(const uint8_t* code, int64_t count, unsigned width, const uint8_t* dictionary, uint8_t* high) {
  const uint32_t each = (1u << width) - 1;
  const int64_t whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8, code += width) {
    uint32_t word = 0;
    memcpy(&word, code, width);
    for (int k = 0; k < 8; ++k) high[i + k] = dictionary[word >> (unsigned(k) * width) & each];
  }
  uint32_t word = 0;
  const int64_t rest = count - whole;
  memcpy(&word, code, size_t(code_bytes(uint64_t(rest), width)));
  for (int64_t i = whole; i < count; ++i, word >>= width) high[i] = dictionary[word & each];
}

void decode_rows(const sk_disk& d, const Starts& start, const Starts& codes, uint8_t* values, int threads) {
  auto work = [&](int64_t begin, int64_t end, int) {
    uint8_t high[2048];
    for (int64_t r = begin; r < end; ++r) {
      const unsigned width = width_of(d, r);
      const uint8_t* code = bytes_of(d.code) + codes[size_t(r)];
      const uint8_t* dictionary = bytes_of(d.dictionary) + r / kDictionaryRows * 16;
      for (int64_t at = start[size_t(r)]; at < start[size_t(r) + 1]; at += int64_t(sizeof high)) {
        const int64_t left = start[size_t(r) + 1] - at, n = left < int64_t(sizeof high) ? left : int64_t(sizeof high);
        const uint8_t* highs = width == 8 ? code : high;
        if (width != 8) decode_row(code, n, width, dictionary, high);
        code += code_bytes(uint64_t(n), width);
        const uint8_t* low = bytes_of(d.low) + at;
        uint8_t* out = values + 2 * at;
        for (int64_t i = 0; i < n; ++i) {
          const uint16_t value = uint16_t(highs[i] << 8 | low[i]);
          memcpy(out + 2 * i, &value, 2);
        }
      }
    }
  };
  for_each(threads, d.rows, 16, work);
}

// No bit behind the last code of a row is set.
bool check_padding(const sk_disk& d, const Starts& start, const Starts& codes) {
  for (int64_t r = 0; r < d.rows; ++r) {
    const int64_t bits = (start[size_t(r) + 1] - start[size_t(r)]) * width_of(d, r);
    if (bits % 8 && bytes_of(d.code)[codes[size_t(r)] + bits / 8] >> (bits % 8)) return false;
  }
  return true;
}

// Where patches stand in the value stream. They ascend, so the mask is walked once.
class Ranks {
 public:
  Ranks(const sk_disk& d, const Starts& start) : d_(d), start_(start), stride_(ceil_div(d.cols, 8)) {}

  // Place of the weight in its row, -1 if it is not kept.
  int64_t of(int64_t row, int64_t col) {
    if (d_.layout == SK_DISK_DENSE) return col;
    const uint8_t* mask = bytes_of(d_.mask) + row * stride_;
    if (row != row_) {
      row_ = row;
      byte_ = before_ = 0;
    }
    for (; byte_ < col / 8; ++byte_) before_ += __builtin_popcount(mask[byte_]);
    if (!(mask[byte_] >> (col % 8) & 1)) return -1;
    return before_ + __builtin_popcount(mask[byte_] & ((1u << (col % 8)) - 1));
  }

 private:
  const sk_disk& d_;
  const Starts& start_;
  const int64_t stride_;
  int64_t row_ = -1, byte_ = 0, before_ = 0;
};

// In range, ascending, on kept weights of rows with a dictionary, whose code is 0 and whose low byte agrees.
bool check_patches(const sk_disk& d, const Starts& start, const Starts& codes) {
  const int64_t count = patch_count(d);
  if (!count || !has(d.patch_row, 4 * count) || !has(d.patch_col, 4 * count) || !has(d.patch_value, 2 * count))
    return false;
  Ranks ranks(d, start);
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = load<uint32_t>(bytes_of(d.patch_row) + 4 * i), col = load<uint32_t>(bytes_of(d.patch_col) + 4 * i);
    if (row >= d.rows || col >= d.cols || row * d.cols + col <= last) return false;
    last = row * d.cols + col;
    const unsigned width = width_of(d, row);
    const int64_t rank = ranks.of(row, col), place = start[size_t(row)] + rank;
    if (rank < 0 || width == 8) return false;
    const uint8_t* value = bytes_of(d.patch_value) + 2 * i;
    const uint8_t* code = bytes_of(d.code) + codes[size_t(row)];
    for (int64_t bit = rank * width; bit < (rank + 1) * width; ++bit)
      if (code[bit / 8] >> (bit % 8) & 1) return false;
    if (bytes_of(d.low)[place] != value[0]) return false;
  }
  return true;
}

void apply_patches(const sk_disk& d, const Starts& start, uint8_t* values) {
  Ranks ranks(d, start);
  for (int64_t i = 0; i < patch_count(d); ++i) {
    const int64_t row = load<uint32_t>(bytes_of(d.patch_row) + 4 * i), col = load<uint32_t>(bytes_of(d.patch_col) + 4 * i);
    memcpy(values + 2 * (start[size_t(row)] + ranks.of(row, col)), bytes_of(d.patch_value) + 2 * i, 2);
  }
}

bool check_scales(const sk_disk& d) {
  const int64_t count = d.rows * ceil_div(d.cols, kGroup);
  if (!has(d.scales, 2 * count)) return false;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t scale = load<uint16_t>(bytes_of(d.scales) + 2 * i);
    if ((scale & 0x7c00) == 0x7c00 || scale >= 0x8000) return false;  // not finite, or with a sign
  }
  return true;
}

bool read_int8(const sk_disk& d, int8_t* values, int threads) {
  if (!has(d.values, d.nnz)) return false;
  std::atomic<bool> sound{true};
  auto work = [&](int64_t begin, int64_t end, int) {
    const int8_t* from = static_cast<const int8_t*>(d.values.data);
    unsigned smallest = 0;
    for (int64_t i = begin; i < end; ++i) smallest |= unsigned(from[i] == -128);
    if (smallest) sound = false;
    memcpy(values + begin, from + begin, size_t(end - begin));
  };
  for_each(threads, d.nnz, 1 << 16, work);
  return sound;
}

// Two codes a byte, low nibble first; beside a mask q means q - 8 below 8 and q - 7 from 8 on, without one q - 8.
bool read_int4(const sk_disk& d, const Starts& start, int8_t* values, int threads) {
  Starts at(size_t(d.rows) + 1, 0);
  for (size_t r = 0; r < size_t(d.rows); ++r) at[r + 1] = at[r] + (start[r + 1] - start[r] + 1) / 2;
  if (!has(d.values, at.back())) return false;
  const int above = d.layout == SK_DISK_DENSE ? 0 : 1;
  std::atomic<bool> sound{true};
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* from = bytes_of(d.values) + at[size_t(r)];
      int8_t* out = values + start[size_t(r)];
      const int64_t count = start[size_t(r) + 1] - start[size_t(r)];
      for (int64_t i = 0; i < count; ++i) {
        const int code = from[i / 2] >> (4 * (i & 1)) & 15;
        out[i] = int8_t(code - 8 + (code >= 8 ? above : 0));
      }
      if (count % 2 && from[count / 2] >> 4) sound = false;
    }
  };
  for_each(threads, d.rows, 16, work);
  return sound;
}

}  // namespace

bool prove_split(const sk_disk& d, const Starts& start, Starts& codes) {
  if (!has(d.low, d.nnz) || !check_dictionaries(d)) return false;
  codes.assign(size_t(d.rows) + 1, 0);
  for (int64_t r = 0; r < d.rows; ++r)
    codes[size_t(r) + 1] = codes[size_t(r)] + int64_t(code_bytes(uint64_t(start[size_t(r) + 1] - start[size_t(r)]), width_of(d, r)));
  if (!has(d.code, codes.back()) || !check_padding(d, start, codes)) return false;
  return d.patch_row.bytes < 0 || check_patches(d, start, codes);
}

bool read_split(const sk_disk& d, const Starts& start, uint8_t* values, int threads) {
  Starts codes;
  if (!prove_split(d, start, codes)) return false;
  decode_rows(d, start, codes, values, threads);
  apply_patches(d, start, values);
  return true;
}

bool read_codes(const sk_disk& d, const Starts& start, int8_t* values, int threads) {
  if (!check_scales(d)) return false;
  return d.encoding == SK_ENCODING_INT8 ? read_int8(d, values, threads) : read_int4(d, start, values, threads);
}

}  // namespace sk

extern "C" int sk_dequantize(const sk_bitmask* codes, const void* scales, void* values, int threads) {
  if (!codes || codes->rows < 0 || codes->cols < 0 || codes->nnz < 0) return SK_BAD_ARGUMENT;
  if (codes->nnz && (!codes->values || !scales || !values)) return SK_BAD_ARGUMENT;
  const sk_bitmask& s = *codes;
  try {
    sk::Starts start;
    if (s.mask && (!sk::row_starts(s.mask, s.rows, s.cols, start, threads) || start.back() != s.nnz))
      return SK_BAD_MASK;
    if (!s.mask && s.nnz != s.rows * s.cols) return SK_BAD_MASK;
    const int64_t stride = sk::ceil_div(s.cols, 8), groups = sk::ceil_div(s.cols, sk::kGroup);
    auto work = [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const uint8_t* scale = static_cast<const uint8_t*>(scales) + 2 * r * groups;
        int64_t at = s.mask ? start[size_t(r)] : r * s.cols;
        auto put = [&](int64_t column) {
          const float each = sk::f16_to_float(sk::load<uint16_t>(scale + 2 * (column / sk::kGroup)));
          sk::from_float(float(static_cast<const int8_t*>(s.values)[at]) * each, values, s.dtype, at);
          ++at;
        };
        if (s.mask)
          sk::each_bit(s.mask + r * stride, s.cols, put);
        else
          for (int64_t c = 0; c < s.cols; ++c) put(c);
      }
    };
    sk::for_each(threads, s.rows, 16, work);
  } catch (...) {
    return SK_NO_MEMORY;
  }
  return SK_OK;
}
