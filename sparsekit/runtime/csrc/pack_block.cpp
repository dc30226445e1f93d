// block: whole tiles of 16 rows x 4 columns. A panel of 16 rows is a list of kept tiles: the first column of each, and
// its 64 values in the order in which the kernels multiply them. Larger blocks are several tiles.
#include "parallel.h"
#include "plan.h"

namespace sk {
namespace {

constexpr int64_t kTile = kPanelRows * kTileColumns;  // values
constexpr uint64_t kFirstColumns = 0x1111111111111111;

// Place of row r, column c in a tile.
inline int64_t place(int32_t dtype, int64_t r, int64_t c) {
  return dtype == SK_BF16 ? c / 2 * 32 + r * 2 + (c & 1) : c * 16 + r;
}

// The kept tiles of 64 columns of a panel, a bit at the first column of each; false if one is kept in part.
bool strip_tiles(const sk_bitmask& s, int64_t p, int64_t strip, uint64_t& firsts) {
  const uint64_t bits = mask_strip(s, p * kPanelRows, strip);
  firsts = bits & kFirstColumns;
  bool whole = bits == firsts * 15;
  for (int64_t i = 1; i < kPanelRows; ++i) whole &= mask_strip(s, p * kPanelRows + i, strip) == bits;
  return whole;
}

template <class T>
void pack_panel(const sk_plan& plan, int64_t p, uint32_t* columns, T* values) {
  const sk_bitmask& s = plan.source;
  const char* next[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r)
    next[r] = static_cast<const char*>(s.values) + plan.row_start[size_t(p * kPanelRows + r)] * int64_t(sizeof(T));
  for (int64_t strip = 0; strip * 64 < s.cols; ++strip) {
    uint64_t firsts;
    strip_tiles(s, p, strip, firsts);
    for (; firsts; firsts &= firsts - 1, values += kTile) {
      *columns++ = uint32_t(strip * 64 + __builtin_ctzll(firsts));
      for (int64_t r = 0; r < kPanelRows; ++r)
        for (int64_t c = 0; c < kTileColumns; ++c, next[r] += sizeof(T)) values[place(s.dtype, r, c)] = load<T>(next[r]);
    }
  }
}

template <class T>
void unpack_panel(const View& w, int64_t p, uint8_t* dense) {
  for (uint64_t i = w.offsets[p]; i < w.offsets[p + 1]; ++i)
    for (int64_t r = 0; r < kPanelRows; ++r)
      for (int64_t c = 0; c < kTileColumns; ++c)
        memcpy(dense + ((p * kPanelRows + r) * w.cols + w.columns[i] + c) * int64_t(sizeof(T)),
               w.values + (int64_t(i) * kTile + place(w.dtype, r, c)) * int64_t(sizeof(T)), sizeof(T));
}

}  // namespace

int plan_tiles(sk_plan& plan, int threads) {
  const sk_bitmask& s = plan.source;
  Header& h = plan.header;
  if (s.rows % kPanelRows || s.cols % kTileColumns) return SK_BAD_MASK;
  const int64_t panels = s.rows / kPanelRows;
  plan.block_start.assign(size_t(panels) + 1, 0);
  std::atomic<bool> sound{true};
  auto measure = [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t strip = 0; strip * 64 < s.cols; ++strip) {
        uint64_t firsts;
        if (!strip_tiles(s, p, strip, firsts)) sound = false;
        plan.block_start[size_t(p) + 1] += uint64_t(__builtin_popcountll(firsts));
      }
  };
  for_each(threads, panels, 4, measure);
  if (!sound) return SK_BAD_MASK;
  for (size_t p = 0; p < size_t(panels); ++p) plan.block_start[p + 1] += plan.block_start[p];
  h.blocks_at = sizeof(Header);
  h.masks_at = round_up(h.blocks_at + 8 * (panels + 1), 64);
  h.values_at = round_up(h.masks_at + s.nnz / kTile * 4 + SK_TAIL, 64);
  h.codes_at = h.patches_at = round_up(h.values_at + s.nnz * element_size(s.dtype) + SK_TAIL, 64);
  h.bytes = h.codes_at;
  return SK_OK;
}

void pack_tiles(const sk_plan& plan, uint8_t* out, int threads) {
  const Header& h = plan.header;
  const int64_t panels = h.rows / kPanelRows;
  auto clear = [&](int64_t from, int64_t to) { memset(out + from, 0, size_t(to - from)); };
  memcpy(out + h.blocks_at, plan.block_start.data(), size_t(8 * (panels + 1)));
  clear(h.blocks_at + 8 * (panels + 1), h.masks_at);
  clear(h.masks_at + h.nnz / kTile * 4, h.values_at);
  clear(h.values_at + h.nnz * element_size(h.dtype), h.bytes);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = int64_t(plan.block_start[size_t(p)]);
      uint32_t* columns = reinterpret_cast<uint32_t*>(out + h.masks_at) + first;
      uint8_t* values = out + h.values_at + first * kTile * element_size(h.dtype);
      if (h.dtype == SK_F32)
        pack_panel(plan, p, columns, reinterpret_cast<uint32_t*>(values));
      else
        pack_panel(plan, p, columns, reinterpret_cast<uint16_t*>(values));
    }
  };
  for_each(threads, panels, 1, work);
}

void unpack_tiles(const View& w, int64_t p, uint8_t* dense) {
  if (w.dtype == SK_F32)
    unpack_panel<uint32_t>(w, p, dense);
  else
    unpack_panel<uint16_t>(w, p, dense);
}

}  // namespace sk
