// A bf16 weight with holes, column by column: zero weights and small inputs are both passed over.
//
// Outputs are divided in panels of kMostOutputs. In a panel each column is a record that begins on a cache line:
// mask words of 32 outputs, an even number of them, then the column's values. Bit 2 i + h of a word stands for output
// 16 h + i of its 32, so that values put in their places, taken as pairs, are outputs 0..15 and 16..31 in order.
#pragma once
#include "columns.h"

namespace sk {

constexpr int64_t kRecordLine = 64;

struct ColumnsHeader {  // at the start of the buffer, which is 8-byte aligned at least; starts and records follow
  char magic[8];
  int64_t rows, cols, nnz, bytes;
  int64_t reserved[3];
};
static_assert(sizeof(ColumnsHeader) == 64, "header");

struct PackedColumns {  // such a buffer, parsed
  int64_t rows, cols, nnz;
  const uint32_t* starts;  // [panels * cols + 1], in lines from the first record on; ends the last one too
  const uint8_t* records;
};

int parse_columns(const void* packed, int64_t bytes, PackedColumns* columns);

namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

inline int64_t mask_words(int64_t outputs) { return ceil_div(outputs, 64) * 2; }
inline int64_t outputs_of(const PackedColumns& w, int64_t panel) {
  const int64_t left = w.rows - panel * kMostOutputs;
  return left < kMostOutputs ? left : kMostOutputs;
}
inline const uint8_t* record(const PackedColumns& w, int64_t panel, int64_t column) {
  return w.records + int64_t(w.starts[panel * w.cols + column]) * kRecordLine;
}
// The output, of 32, of a bit.
inline int output_of(int bit) { return 16 * (bit & 1) + bit / 2; }

// Visits the values of a record of `words` mask words: visit(output in the panel, value).
template <class Visit>
inline void visit_record(const uint8_t* record, int64_t words, Visit visit) {
  const uint8_t* value = record + 4 * words;
  for (int64_t i = 0; i < words; ++i)
    for (uint32_t rest = load<uint32_t>(record + 4 * i); rest; rest &= rest - 1, value += 2)
      visit(32 * i + output_of(__builtin_ctz(rest)), load<uint16_t>(value));
}

void generic_packed(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld) {
  const int64_t words = mask_words(outputs_of(w, panel));
  for (int64_t t = 0; t < kept.tokens; ++t) memset(sums + t * ld, 0, size_t(words * 32) * 4);
  for (int64_t k = 0; k < kept.count; ++k)
    visit_record(record(w, panel, kept.columns[k]), words, [&](int64_t output, uint16_t value) {
      for (int64_t t = 0; t < kept.tokens; ++t)
        sums[t * ld + output] += bf16_to_float(value) * kept.values[t * kept.ld + k];
    });
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
