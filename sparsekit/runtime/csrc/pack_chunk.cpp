// chunk: every row keeps the same n of each 64 columns. Panels of 16 rows; for each 64 columns of a panel 16 x n
// columns (a byte each, 0..63) and, apart from them, 16 x n values, row by row. Nothing is variable, so nothing has
// to be found by counting bits: a kernel reads two streams and selects.
#include "parallel.h"
#include "plan.h"

namespace sk {
namespace {

int64_t entries(const Header& h) { return round_up(h.rows, kPanelRows) * (h.cols / kChunk) * h.kept; }

}  // namespace

int plan_chunk(sk_plan& plan, int threads) {
  const sk_bitmask& s = plan.source;
  Header& h = plan.header;
  if (s.cols % kChunk) return SK_BAD_MASK;
  const int64_t chunks = s.cols / kChunk, groups = s.rows * chunks;
  h.kept = groups ? s.nnz / groups : 4;  // without weights any n will do
  if (h.kept != 4 && h.kept != 8 && h.kept != 16) return SK_BAD_MASK;
  std::atomic<bool> balanced{true};
  auto check = [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < chunks; ++c)
        if (__builtin_popcountll(mask_strip(s, r, c)) != h.kept) balanced = false;
  };
  for_each(threads, s.rows, 64, check);
  if (!balanced) return SK_BAD_MASK;
  h.blocks_at = h.masks_at = h.values_at = sizeof(Header);
  h.codes_at = round_up(h.values_at + entries(h) * 2 + SK_TAIL, 64);
  h.patches_at = round_up(h.codes_at + entries(h) + SK_TAIL, 64);
  h.bytes = h.patches_at;
  return SK_OK;
}

void pack_chunk(const sk_plan& plan, uint8_t* out, int threads) {
  const sk_bitmask& s = plan.source;
  const Header& h = plan.header;
  const int64_t chunks = s.cols / kChunk, panels = ceil_div(s.rows, kPanelRows), n = h.kept;
  uint8_t* values = out + h.values_at;
  uint8_t* columns = out + h.codes_at;
  memset(values + entries(h) * 2, 0, size_t(h.codes_at - h.values_at - entries(h) * 2));
  memset(columns + entries(h), 0, size_t(h.bytes - h.codes_at - entries(h)));
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t i = 0; i < kPanelRows; ++i) {
          const int64_t row = p * kPanelRows + i, at = ((p * chunks + c) * kPanelRows + i) * n;
          if (row >= s.rows) {  // rows that do not exist weigh nothing
            memset(values + 2 * at, 0, size_t(2 * n));
            memset(columns + at, 0, size_t(n));
            continue;
          }
          memcpy(values + 2 * at, static_cast<const char*>(s.values) + (row * chunks + c) * n * 2, size_t(2 * n));
          uint8_t* column = columns + at;
          for (uint64_t rest = mask_strip(s, row, c); rest; rest &= rest - 1) *column++ = uint8_t(__builtin_ctzll(rest));
        }
  };
  for_each(threads, panels, 1, work);
}

void unpack_chunk(const View& w, int64_t p, uint8_t* dense) {
  const int64_t chunks = w.cols / kChunk;
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < kPanelRows && p * kPanelRows + i < w.rows; ++i)
      for (int64_t k = 0; k < w.kept; ++k) {
        const int64_t at = ((p * chunks + c) * kPanelRows + i) * w.kept + k;
        const int64_t column = c * kChunk + w.codes[at];
        memcpy(dense + 2 * ((p * kPanelRows + i) * w.cols + column), w.values + 2 * at, 2);
      }
}

}  // namespace sk
