// A bf16 weight, column by column, in fewer bytes and without its zeros: zero weights and small inputs are both passed
// over. The high byte of a value, its sign and seven bits of its exponent, takes few values in a column: a code of
// three or four bits stands for it. No bit is lost.
//
// Outputs are divided in panels of kMostOutputs. In a panel each column is a record that begins on a cache line: its
// header; patches; then, of every 64 outputs, a mask, the low bytes of their values and their codes, from bit 0 up, which
// end at a byte. Bit 16 L + 8 h + 2 q + e of a mask stands for output 32 h + 16 e + 4 L + q of its 64: low and high bytes
// put in their places, interleaved and widened are outputs in order.
#pragma once
#include "columns.h"

namespace sk {

constexpr int64_t kRecordLine = 64;
constexpr int32_t kWideCode = 8;  // bits of a code that is the high byte itself

struct ColumnsHeader {  // at the start of the buffer, which is 8-byte aligned at least; starts and records follow
  char magic[8];
  int64_t rows, cols, nnz, bytes;
  int32_t width, reserved32;
  int64_t reserved[2];
};
static_assert(sizeof(ColumnsHeader) == 64, "header");

struct RecordHeader {
  uint8_t dictionary[16];  // high bytes by code
  uint16_t width;          // bits of a code: the buffer's, or kWideCode
  uint16_t patches;
  uint32_t reserved;
};
static_assert(sizeof(RecordHeader) == 24, "record");

struct ColumnPatch {  // a value whose high byte is not in the dictionary; its mask bit is clear
  uint16_t output;    // in the panel
  uint16_t value;
};

struct PackedColumns {  // such a buffer, parsed
  int64_t rows, cols, nnz;
  int32_t width;           // 3 or 4
  int64_t stride;          // bytes of a record for 64 outputs, on the average
  const uint32_t* starts;  // [panels * cols + 1], in lines from the first record on; ends the last one too
  const uint8_t* records;
};

int parse_columns(const void* packed, int64_t bytes, PackedColumns* columns);

namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

inline int64_t mask_words(int64_t outputs) { return ceil_div(outputs, 64); }
inline int64_t outputs_of(const PackedColumns& w, int64_t panel) {
  const int64_t left = w.rows - panel * kMostOutputs;
  return left < kMostOutputs ? left : kMostOutputs;
}
inline int64_t code_bytes(int64_t values, int64_t width) { return (values * width + 7) >> 3; }
// The output, of 64, of a bit.
inline int output_of(int bit) { return 32 * (bit >> 3 & 1) + 16 * (bit & 1) + 4 * (bit >> 4) + (bit >> 1 & 3); }

struct Record {  // one, parsed
  const uint8_t* dictionary;
  int64_t width, patches;
  const uint8_t* patch;   // [patches]
  const uint8_t* groups;  // mask, low bytes and codes of each 64 outputs
};

inline Record record(const PackedColumns& w, int64_t panel, int64_t column) {
  const uint8_t* at = w.records + int64_t(w.starts[panel * w.cols + column]) * kRecordLine;
  const RecordHeader h = load<RecordHeader>(at);
  const uint8_t* patch = at + sizeof h;
  return {at, h.width, h.patches, patch, patch + int64_t(sizeof(ColumnPatch)) * h.patches};
}

// Visits the values of a record of `words` masks: visit(output in the panel, value).
template <class Visit>
inline void visit_record(const Record& r, int64_t words, Visit visit) {
  for (int64_t i = 0; i < r.patches; ++i) {
    const ColumnPatch patch = load<ColumnPatch>(r.patch + i * int64_t(sizeof(ColumnPatch)));
    visit(patch.output, patch.value);
  }
  const uint8_t* at = r.groups;
  for (int64_t i = 0; i < words; ++i) {
    const uint64_t mask = load<uint64_t>(at);
    const uint8_t* low = at + 8;
    const int64_t count = __builtin_popcountll(mask);
    const uint8_t* code = low + count;
    int64_t bit = 0;
    for (uint64_t rest = mask; rest; rest &= rest - 1, ++low, bit += r.width) {
      uint32_t number = code[bit >> 3];
      if ((bit & 7) + r.width > 8) number |= uint32_t(code[(bit >> 3) + 1]) << 8;
      number = number >> (bit & 7) & ((1u << r.width) - 1);
      const uint32_t high = r.width == kWideCode ? number : r.dictionary[number];
      visit(64 * i + output_of(__builtin_ctzll(rest)), uint16_t(high << 8 | *low));
    }
    at = code + code_bytes(count, r.width);
  }
}

void generic_packed(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  const int64_t words = mask_words(outputs_of(w, panel));
  for (int64_t t = 0; t < kept.tokens; ++t) memset(sums + t * ld, 0, size_t(words * 64) * 4);
  for (int64_t k = 0; k < kept.count; ++k)
    visit_record(record(w, panel, kept.columns[k]), words, [&](int64_t output, uint16_t value) {
      for (int64_t t = 0; t < kept.tokens; ++t)
        sums[t * ld + output] += bf16_to_float(value) * kept.values[t * kept.ld + k];
    });
}

void generic_unpack(const PackedColumns& w, int64_t panel, int64_t column, uint16_t* to) {
  const int64_t outputs = outputs_of(w, panel);
  memset(to, 0, size_t(outputs) * 2);
  visit_record(record(w, panel, column), mask_words(outputs),
               [&](int64_t output, uint16_t value) { to[output] = value; });
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
