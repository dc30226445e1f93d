// Packed columns: made from a dense weight, parsed, unpacked.
#include "columns_packed.h"

#include <vector>

#include "parallel.h"

namespace sk {
namespace {

int64_t records_at(int64_t panels, int64_t cols) {
  return round_up(int64_t(sizeof(ColumnsHeader)) + 4 * (panels * cols + 1), kRecordLine);
}

bool known_shape(const void* dense, int64_t rows, int64_t cols) {
  return rows >= 0 && cols >= 0 && rows <= INT32_MAX && cols <= INT32_MAX && (dense || rows == 0 || cols == 0);
}

// Where the records of dense [cols][rows] begin, in lines, and how many values there are; false if that is too far.
bool measure(const uint16_t* dense, int64_t rows, int64_t cols, int threads, std::vector<uint32_t>& starts,
             int64_t& nnz) {
  const int64_t panel = kMostOutputs, panels = ceil_div(rows, panel);
  starts.assign(size_t(panels * cols + 1), 0);
  std::vector<int64_t> counts(size_t(panels * cols));
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t r = 0; r < rows; ++r) counts[size_t(r / panel * cols + c)] += dense[c * rows + r] != 0;
  };
  for_each(threads, cols, 16, work);
  int64_t line = 0;
  nnz = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t outputs = rows - p * panel < panel ? rows - p * panel : panel;
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t count = counts[size_t(p * cols + c)];
      nnz += count;
      line += ceil_div(4 * mask_words(outputs) + 2 * count, kRecordLine);
      if (line > INT64_C(0xffffffff)) return false;
      starts[size_t(p * cols + c + 1)] = uint32_t(line);
    }
  }
  return true;
}

int64_t size_of(const std::vector<uint32_t>& starts, int64_t panels, int64_t cols) {
  return records_at(panels, cols) + int64_t(starts.back()) * kRecordLine + SK_TAIL;
}

void write_record(const uint16_t* from, int64_t outputs, uint8_t* to) {
  const int64_t words = mask_words(outputs);
  uint8_t* value = to + 4 * words;
  for (int64_t i = 0; i < words; ++i) {
    uint32_t mask = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const int64_t output = 32 * i + output_of(bit);
      if (output >= outputs || from[output] == 0) continue;
      mask |= uint32_t(1) << bit;
      memcpy(value, from + output, 2);
      value += 2;
    }
    memcpy(to + 4 * i, &mask, 4);
  }
}

// Whether record i ends where the next begins and holds as many values as its mask says, for outputs that exist; adds
// them to `count`.
bool proven_record(const PackedColumns& w, int64_t i, int64_t& count) {
  const int64_t outputs = outputs_of(w, i / w.cols), words = mask_words(outputs);
  const int64_t room = (int64_t(w.starts[i + 1]) - int64_t(w.starts[i])) * kRecordLine;
  if (room < 4 * words || w.starts[i + 1] > w.starts[ceil_div(w.rows, kMostOutputs) * w.cols]) return false;
  const uint8_t* record = w.records + int64_t(w.starts[i]) * kRecordLine;
  int64_t here = 0;
  for (int64_t j = 0; j < words; ++j) here += __builtin_popcount(load<uint32_t>(record + 4 * j));
  if (room != round_up(4 * words + 2 * here, kRecordLine)) return false;
  bool good = true;
  visit_record(record, words, [&](int64_t output, uint16_t value) { good &= output < outputs && value != 0; });
  count += here;
  return good;
}

bool proven(const PackedColumns& w, int threads) {
  std::atomic<int64_t> count{0};
  std::atomic<bool> good{w.starts[0] == 0};
  auto work = [&](int64_t begin, int64_t end, int) {
    int64_t here = 0;
    for (int64_t i = begin; i < end && good; ++i)
      if (!proven_record(w, i, here)) good = false;
    count += here;
  };
  for_each(threads, ceil_div(w.rows, kMostOutputs) * w.cols, 256, work);
  return good && count == w.nnz;
}

}  // namespace

int parse_columns(const void* packed, int64_t bytes, PackedColumns* columns) {
  if (!packed || reinterpret_cast<uintptr_t>(packed) % 8) return SK_BAD_PACKED;
  if (bytes < int64_t(sizeof(ColumnsHeader))) return SK_BAD_PACKED;
  const ColumnsHeader& h = *static_cast<const ColumnsHeader*>(packed);
  if (memcmp(h.magic, "SKCOLS01", 8) != 0 || h.bytes != bytes || !known_shape(packed, h.rows, h.cols))
    return SK_BAD_PACKED;
  const int64_t panels = ceil_div(h.rows, kMostOutputs), first = records_at(panels, h.cols);
  if (first + SK_TAIL > bytes) return SK_BAD_PACKED;
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  *columns = {h.rows, h.cols, h.nnz, reinterpret_cast<const uint32_t*>(base + sizeof h), base + first};
  const int64_t last = columns->starts[panels * h.cols];
  return first + last * kRecordLine + SK_TAIL == bytes ? SK_OK : SK_BAD_PACKED;
}

}  // namespace sk

extern "C" {
int64_t sk_columns_bytes(const void* dense, int64_t rows, int64_t cols, int threads) {
  if (!sk::known_shape(dense, rows, cols) || threads < 1) return -1;
  try {
    std::vector<uint32_t> starts;
    int64_t nnz;
    if (!sk::measure(static_cast<const uint16_t*>(dense), rows, cols, threads, starts, nnz)) return -1;
    return sk::size_of(starts, sk::ceil_div(rows, sk::kMostOutputs), cols);
  } catch (...) {
    return -1;
  }
}

int sk_columns_pack(const void* dense, int64_t rows, int64_t cols, void* out, int64_t out_bytes, int threads) {
  if (!sk::known_shape(dense, rows, cols) || !out || threads < 1) return SK_BAD_ARGUMENT;
  try {
    std::vector<uint32_t> starts;
    int64_t nnz;
    const uint16_t* from = static_cast<const uint16_t*>(dense);
    if (!sk::measure(from, rows, cols, threads, starts, nnz)) return SK_UNSUPPORTED;
    const int64_t panel = sk::kMostOutputs, panels = sk::ceil_div(rows, panel);
    if (out_bytes != sk::size_of(starts, panels, cols)) return SK_BAD_ARGUMENT;
    uint8_t* to = static_cast<uint8_t*>(out);
    memset(to, 0, size_t(out_bytes));
    const sk::ColumnsHeader header = {{'S', 'K', 'C', 'O', 'L', 'S', '0', '1'}, rows, cols, nnz, out_bytes, {}};
    memcpy(to, &header, sizeof header);
    memcpy(to + sizeof header, starts.data(), 4 * starts.size());
    uint8_t* records = to + sk::records_at(panels, cols);
    auto work = [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p = i / cols, c = i % cols, row = p * panel;
        sk::write_record(from + c * rows + row, rows - row < panel ? rows - row : panel,
                         records + int64_t(starts[size_t(i)]) * sk::kRecordLine);
      }
    };
    sk::for_each(threads, panels * cols, 64, work);
    return SK_OK;
  } catch (...) {
    return SK_NO_MEMORY;
  }
}

int sk_columns_info(const void* packed, int64_t bytes, int64_t* info) {
  sk::PackedColumns w;
  const int status = sk::parse_columns(packed, bytes, &w);
  if (status != SK_OK) return status;
  info[0] = w.rows;
  info[1] = w.cols;
  info[2] = w.nnz;
  return SK_OK;
}

int sk_columns_unpack(const void* packed, int64_t bytes, void* dense, int threads) {
  sk::PackedColumns w;
  const int status = sk::parse_columns(packed, bytes, &w);
  if (status != SK_OK) return status;
  if (threads < 1) return SK_BAD_ARGUMENT;
  if (w.rows == 0 || w.cols == 0) return SK_OK;
  if (!dense) return SK_BAD_ARGUMENT;
  if (!sk::proven(w, threads)) return SK_BAD_PACKED;
  uint16_t* to = static_cast<uint16_t*>(dense);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) {
      memset(to + c * w.rows, 0, size_t(2 * w.rows));
      for (int64_t p = 0; p * sk::kMostOutputs < w.rows; ++p)
        sk::visit_record(sk::record(w, p, c), sk::mask_words(sk::outputs_of(w, p)),
                         [&](int64_t output, uint16_t value) {
                           to[c * w.rows + p * sk::kMostOutputs + output] = value;
                         });
    }
  };
  sk::for_each(threads, w.cols, 16, work);
  return SK_OK;
}
}
