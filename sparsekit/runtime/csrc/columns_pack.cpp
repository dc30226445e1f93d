// Packed columns: made from a dense weight, parsed, unpacked.
#include "columns_packed.h"

#include <algorithm>
#include <new>
#include <vector>

#include "parallel.h"

struct sk_columns_plan {
  const uint16_t* dense;  // [cols][rows]
  int64_t rows, cols, nnz, bytes;
  int32_t width;
  std::vector<sk::RecordHeader> headers;  // [panels * cols]
  std::vector<uint32_t> starts;           // [panels * cols + 1], in lines
};

namespace sk {
namespace {

constexpr int64_t kPatchCost = 16;   // what a patch takes at run time, in bytes that are read
constexpr int64_t kSampled = 8;      // one column of so many tells the width of all codes
constexpr int16_t kNoCode = -1;

int64_t panels_of(int64_t rows) { return ceil_div(rows, kMostOutputs); }

int64_t records_at(int64_t panels, int64_t cols) {
  return round_up(int64_t(sizeof(ColumnsHeader)) + 4 * (panels * cols + 1), kRecordLine);
}

bool known_shape(const void* dense, int64_t rows, int64_t cols) {
  return rows >= 0 && cols >= 0 && rows <= INT32_MAX && cols <= INT32_MAX && (dense || rows == 0 || cols == 0);
}

struct Bytes256 {  // how often each high byte occurs among the values of a column
  int64_t count[256], values;

  Bytes256(const uint16_t* from, int64_t outputs) : count{}, values(0) {
    int64_t part[4][256] = {};  // the same byte twice in a row must not wait for the first store
    for (int64_t j = 0; j < outputs; ++j) ++part[j & 3][from[j] >> 8];
    for (int b = 0; b < 256; ++b) count[b] = part[0][b] + part[1][b] + part[2][b] + part[3][b];
    for (int64_t j = 0; j < outputs; ++j) count[0] -= from[j] == 0;
    for (int64_t c : count) values += c;
  }

  // The 2^width most frequent; `missing` gets the number of values they leave out.
  RecordHeader choose(int width, int64_t& missing) const {
    int order[256], found = 0;
    for (int b = 0; b < 256; ++b)
      if (count[b]) order[found++] = b;
    std::stable_sort(order, order + found, [&](int a, int b) { return count[a] > count[b]; });
    RecordHeader header = {};
    header.width = uint16_t(width);
    missing = values;
    for (int i = 0; i < found && i < 1 << width; ++i) {
      header.dictionary[i] = uint8_t(order[i]);
      missing -= count[order[i]];
    }
    for (int i = found; i < 1 << width; ++i) header.dictionary[i] = header.dictionary[0];
    // Every lookup in 16 bytes then takes the low bits of a code alone.
    if (width == 3) memcpy(header.dictionary + 8, header.dictionary, 8);
    return header;
  }
};

int64_t cost(int64_t values, int64_t missing, int64_t width) {
  return code_bytes(values - missing, width) + kPatchCost * missing;
}

// Dictionary and number of patches of one column.
RecordHeader choose_record(const Bytes256& bytes, int width) {
  int64_t missing;
  RecordHeader header = bytes.choose(width, missing);
  if (cost(bytes.values, missing, width) > bytes.values) {
    header = {};
    header.width = kWideCode;
    missing = 0;
  }
  header.patches = uint16_t(missing);
  return header;
}

// The code of every high byte.
void codes_of(const RecordHeader& header, int16_t* code) {
  for (int b = 0; b < 256; ++b) code[b] = header.width == kWideCode ? int16_t(b) : kNoCode;
  if (header.width == kWideCode) return;
  for (int i = (1 << header.width) - 1; i >= 0; --i) code[header.dictionary[i]] = int16_t(i);
}

// Visits a column in the order of its masks: value(group of 64, bit, value, code) or patch(output, value).
template <class Value, class Patch>
void visit_column(const RecordHeader& header, const uint16_t* from, int64_t outputs, Value value, Patch patch) {
  int16_t code[256];
  codes_of(header, code);
  for (int64_t i = 0; i < mask_words(outputs); ++i)
    for (int bit = 0; bit < 64; ++bit) {
      const int64_t output = 64 * i + output_of(bit);
      if (output >= outputs || from[output] == 0) continue;
      const int number = code[from[output] >> 8];
      if (number == kNoCode) patch(output, from[output]);
      else value(i, bit, from[output], number);
    }
}

// Bytes of a record.
int64_t measure_record(const RecordHeader& header, const uint16_t* from, int64_t outputs) {
  int16_t code[256];
  codes_of(header, code);
  int64_t bytes = int64_t(sizeof header) + int64_t(sizeof(ColumnPatch)) * header.patches;
  for (int64_t i = 0; i < outputs; i += 64) {
    int64_t count = 0;
    for (int64_t j = i; j < i + 64 && j < outputs; ++j) count += from[j] != 0 && code[from[j] >> 8] != kNoCode;
    bytes += 8 + count + code_bytes(count, header.width);
  }
  return bytes;
}

void write_record(const RecordHeader& header, const uint16_t* from, int64_t outputs, uint8_t* to) {
  memcpy(to, &header, sizeof header);
  uint8_t* patch_at = to + sizeof header;
  uint8_t* at = patch_at + int64_t(sizeof(ColumnPatch)) * header.patches;
  uint64_t mask = 0;
  uint8_t lows[64], numbers[64];
  int64_t group = 0, count = 0;
  auto close = [&] {  // one group; all before it are written
    memcpy(at, &mask, 8);
    memcpy(at + 8, lows, size_t(count));
    uint8_t* code = at + 8 + count;
    for (int64_t n = 0, bit = 0; n < count; ++n, bit += header.width) {
      const uint32_t shifted = uint32_t(numbers[n]) << (bit & 7);
      code[bit >> 3] |= uint8_t(shifted);
      if (shifted >> 8) code[(bit >> 3) + 1] |= uint8_t(shifted >> 8);
    }
    at = code + code_bytes(count, header.width);
    mask = 0;
    count = 0;
    ++group;
  };
  auto value = [&](int64_t i, int bit, uint16_t v, int number) {
    while (group < i) close();
    mask |= uint64_t(1) << bit;
    lows[count] = uint8_t(v);
    numbers[count++] = uint8_t(number);
  };
  auto patch = [&](int64_t output, uint16_t v) {
    const ColumnPatch each = {uint16_t(output), v};
    memcpy(patch_at, &each, sizeof each);
    patch_at += sizeof each;
  };
  visit_column(header, from, outputs, value, patch);
  while (group < mask_words(outputs)) close();
}

const uint16_t* column_of(const sk_columns_plan& plan, int64_t record, int64_t& outputs) {
  const int64_t row = record / plan.cols * kMostOutputs;
  outputs = plan.rows - row < kMostOutputs ? plan.rows - row : kMostOutputs;
  return plan.dense + record % plan.cols * plan.rows + row;
}

// Three bits or four for the codes of all: what a sample of the records takes least with.
int choose_width(const sk_columns_plan& plan, int64_t records, int threads) {
  std::atomic<int64_t> three{0}, four{0};
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t outputs, missing;
      const uint16_t* from = column_of(plan, i * kSampled, outputs);
      const Bytes256 bytes(from, outputs);
      bytes.choose(3, missing);
      three += std::min(bytes.values, cost(bytes.values, missing, 3));
      bytes.choose(4, missing);
      four += std::min(bytes.values, cost(bytes.values, missing, 4));
    }
  };
  for_each(threads, ceil_div(records, kSampled), 16, work);
  return three <= four ? 3 : 4;
}

int make_columns(sk_columns_plan& plan, int threads) {
  const int64_t records = panels_of(plan.rows) * plan.cols;
  plan.headers.resize(size_t(records));
  plan.starts.assign(size_t(records + 1), 0);
  plan.width = choose_width(plan, records, threads);
  std::vector<int64_t> lines(static_cast<size_t>(records));
  std::atomic<int64_t> nnz{0};
  auto work = [&](int64_t begin, int64_t end, int) {
    int64_t here = 0;
    for (int64_t i = begin; i < end; ++i) {
      int64_t outputs;
      const uint16_t* from = column_of(plan, i, outputs);
      const Bytes256 bytes(from, outputs);
      const RecordHeader header = plan.headers[size_t(i)] = choose_record(bytes, plan.width);
      lines[size_t(i)] = ceil_div(measure_record(header, from, outputs), kRecordLine);
      here += bytes.values;
    }
    nnz += here;
  };
  for_each(threads, records, 16, work);
  int64_t line = 0;
  for (int64_t i = 0; i < records; ++i) {
    line += lines[size_t(i)];
    if (line > INT64_C(0xffffffff)) return SK_UNSUPPORTED;
    plan.starts[size_t(i + 1)] = uint32_t(line);
  }
  plan.nnz = nnz;
  plan.bytes = records_at(panels_of(plan.rows), plan.cols) + line * kRecordLine + SK_TAIL;
  return SK_OK;
}

// Whether record i ends where the next begins and holds as many values as its masks say, for outputs that exist, each
// once; adds them to `count`. `seen` has room for one panel and is clear.
bool proven_record(const PackedColumns& w, int64_t i, int64_t& count, std::vector<bool>& seen) {
  const int64_t panel = i / w.cols, outputs = outputs_of(w, panel), words = mask_words(outputs);
  const int64_t last = w.starts[panels_of(w.rows) * w.cols];
  if (w.starts[i + 1] > last || w.starts[i + 1] < w.starts[i]) return false;
  const int64_t room = (int64_t(w.starts[i + 1]) - int64_t(w.starts[i])) * kRecordLine;
  if (room < int64_t(sizeof(RecordHeader)) + 8 * words) return false;
  const Record r = record(w, panel, i % w.cols);
  if (r.width != w.width && r.width != kWideCode) return false;
  int64_t size = r.groups - r.dictionary, here = r.patches;
  for (int64_t j = 0; j < words; ++j) {
    if (size + 8 > room) return false;
    const int64_t values = __builtin_popcountll(load<uint64_t>(r.dictionary + size));
    size += 8 + values + code_bytes(values, r.width);
    here += values;
  }
  if (room != round_up(size, kRecordLine)) return false;
  bool good = true;
  visit_record(r, words, [&](int64_t output, uint16_t value) {
    good &= output < outputs && value != 0 && !seen[size_t(output)];
    if (output < outputs) seen[size_t(output)] = true;
  });
  count += here;
  std::fill(seen.begin(), seen.end(), false);
  return good;
}

bool proven(const PackedColumns& w, int threads) {
  std::atomic<int64_t> count{0};
  std::atomic<bool> good{w.starts[0] == 0};
  auto work = [&](int64_t begin, int64_t end, int) {
    int64_t here = 0;
    std::vector<bool> seen(static_cast<size_t>(kMostOutputs));
    for (int64_t i = begin; i < end && good; ++i)
      if (!proven_record(w, i, here, seen)) good = false;
    count += here;
  };
  for_each(threads, panels_of(w.rows) * w.cols, 256, work);
  return good && count == w.nnz;
}

}  // namespace

int parse_columns(const void* packed, int64_t bytes, PackedColumns* columns) {
  if (!packed || reinterpret_cast<uintptr_t>(packed) % 8) return SK_BAD_PACKED;
  if (bytes < int64_t(sizeof(ColumnsHeader))) return SK_BAD_PACKED;
  const ColumnsHeader& h = *static_cast<const ColumnsHeader*>(packed);
  if (memcmp(h.magic, "SKCOLS02", 8) != 0 || h.bytes != bytes || !known_shape(packed, h.rows, h.cols) ||
      (h.width != 3 && h.width != 4))
    return SK_BAD_PACKED;
  const int64_t panels = panels_of(h.rows), first = records_at(panels, h.cols);
  if (first + SK_TAIL > bytes) return SK_BAD_PACKED;
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const uint32_t* starts = reinterpret_cast<const uint32_t*>(base + sizeof h);
  const int64_t last = starts[panels * h.cols], groups = mask_words(h.rows) * h.cols;
  if (first + last * kRecordLine + SK_TAIL != bytes) return SK_BAD_PACKED;
  *columns = {h.rows, h.cols, h.nnz, h.width, groups ? ceil_div(last * kRecordLine, groups) : 0, starts, base + first};
  return SK_OK;
}

}  // namespace sk

extern "C" {
int sk_columns_plan_create(const void* dense, int64_t rows, int64_t cols, int threads, sk_columns_plan** plan) {
  if (!sk::known_shape(dense, rows, cols) || threads < 1 || !plan) return SK_BAD_ARGUMENT;
  *plan = nullptr;
  try {
    auto* made = new sk_columns_plan{static_cast<const uint16_t*>(dense), rows, cols, 0, 0, 0, {}, {}};
    const int status = sk::make_columns(*made, threads);
    if (status != SK_OK) delete made;
    else *plan = made;
    return status;
  } catch (...) {
    return SK_NO_MEMORY;
  }
}

int64_t sk_columns_plan_bytes(const sk_columns_plan* plan) { return plan ? plan->bytes : 0; }

int sk_columns_plan_pack(const sk_columns_plan* plan, void* out, int64_t out_bytes, int threads) {
  if (!plan || !out || out_bytes != plan->bytes || reinterpret_cast<uintptr_t>(out) % 8 || threads < 1)
    return SK_BAD_ARGUMENT;
  uint8_t* to = static_cast<uint8_t*>(out);
  memset(to, 0, size_t(out_bytes));
  const sk::ColumnsHeader header = {
      {'S', 'K', 'C', 'O', 'L', 'S', '0', '2'}, plan->rows, plan->cols, plan->nnz, out_bytes, plan->width, 0, {}};
  memcpy(to, &header, sizeof header);
  memcpy(to + sizeof header, plan->starts.data(), 4 * plan->starts.size());
  uint8_t* records = to + sk::records_at(sk::panels_of(plan->rows), plan->cols);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t outputs;
      const uint16_t* from = sk::column_of(*plan, i, outputs);
      sk::write_record(plan->headers[size_t(i)], from, outputs,
                       records + int64_t(plan->starts[size_t(i)]) * sk::kRecordLine);
    }
  };
  sk::for_each(threads, int64_t(plan->headers.size()), 64, work);
  return SK_OK;
}

void sk_columns_plan_free(sk_columns_plan* plan) { delete plan; }

int sk_columns_info(const void* packed, int64_t bytes, int64_t* info) {
  sk::PackedColumns w;
  const int status = sk::parse_columns(packed, bytes, &w);
  if (status != SK_OK) return status;
  info[0] = w.rows;
  info[1] = w.cols;
  info[2] = w.nnz;
  return SK_OK;
}

int sk_columns_prove(const void* packed, int64_t bytes, int threads) {
  sk::PackedColumns w;
  const int status = sk::parse_columns(packed, bytes, &w);
  if (status != SK_OK) return status;
  if (threads < 1) return SK_BAD_ARGUMENT;
  try {
    return sk::proven(w, threads) ? SK_OK : SK_BAD_PACKED;
  } catch (...) {
    return SK_NO_MEMORY;
  }
}

int sk_columns_unpack(const void* packed, int64_t bytes, void* dense, int threads) {
  sk::PackedColumns w;
  const int status = sk::parse_columns(packed, bytes, &w);
  if (status != SK_OK) return status;
  if (threads < 1) return SK_BAD_ARGUMENT;
  if (w.rows == 0 || w.cols == 0) return SK_OK;
  if (!dense) return SK_BAD_ARGUMENT;
  const sk::Kernels& k = sk::kernels();
  uint16_t* to = static_cast<uint16_t*>(dense);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t p = 0; p < sk::panels_of(w.rows); ++p)
        k.columns->unpack(w, p, c, to + c * w.rows + p * sk::kMostOutputs);
  };
  sk::for_each(threads, w.cols, 16, work);
  return SK_OK;
}
}
