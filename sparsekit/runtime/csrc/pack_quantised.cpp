// int8, int4: panels of 16 rows and tiles of four columns; integers in the order of the mask bits, scales by group.
//
// int4 has sixteen codes and none for zero, as the mask already says where nothing is: a zero loses its mask bit.
#include <algorithm>

#include "parallel.h"
#include "plan.h"
#include "quantised.h"

namespace sk {
namespace {

// Visits the tiles of panel p, empty ones behind the last column included: visit(mask, integers [16][4]).
template <class Visit>
void visit_tiles(const sk_plan& plan, int64_t p, Visit visit) {
  const sk_bitmask& s = plan.source;
  const int64_t first = p * kPanelRows;
  const int rows = int(std::min(kPanelRows, s.rows - first));
  const int8_t* next[kPanelRows] = {};
  for (int i = 0; i < rows; ++i) next[i] = static_cast<const int8_t*>(s.values) + plan.row_start[size_t(first + i)];
  for (int64_t strip = 0; strip < ceil_div(s.cols, 64); ++strip) {
    uint64_t bits[kPanelRows] = {};
    for (int i = 0; i < rows; ++i) bits[i] = mask_strip(s, first + i, strip);
    for (int t = 0; t < kGroupTiles; ++t) {
      uint64_t mask = 0;
      int8_t integers[64] = {};
      for (int i = 0; i < rows; ++i) mask |= (bits[i] >> (4 * t) & 15) << (4 * i);
      for (uint64_t rest = mask; rest; rest &= rest - 1) {
        const int j = __builtin_ctzll(rest);
        integers[j] = *next[j / 4]++;
        if (plan.header.layout == SK_INT4 && integers[j] == 0) mask &= ~(uint64_t(1) << j);
      }
      visit(mask, integers);
    }
  }
}

// Writes one tile and returns where the next begins.
uint8_t* put_tile(const Header& h, uint64_t mask, const int8_t* integers, uint8_t* to) {
  const bool whole = h.masks_at == 0;
  unsigned n = 0;
  for (uint64_t rest = whole ? ~uint64_t(0) : mask; rest; rest &= rest - 1, ++n) {
    const int8_t integer = integers[__builtin_ctzll(rest)];
    if (h.layout == SK_INT8) {
      *to++ = uint8_t(integer);
      continue;
    }
    const unsigned code = whole ? unsigned(integer + 8) : int4_code(integer);
    if (n % 2 == 0)
      *to = uint8_t(code);
    else
      *to++ |= uint8_t(code << 4);
  }
  return to + (h.layout == SK_INT4 && n % 2);
}

// Without holes masks would be a waste; an int4 of 8 needs them, as it is not among the codes that hold a zero.
bool is_whole(const sk_bitmask& s, int layout) {
  const int8_t* values = static_cast<const int8_t*>(s.values);
  return s.nnz == s.rows * s.cols && (layout == SK_INT8 || std::find(values, values + s.nnz, 8) == values + s.nnz);
}

bool codes_in_range(const sk_plan& plan, int64_t begin, int64_t end) {
  const int8_t* values = static_cast<const int8_t*>(plan.source.values);
  const int low = plan.header.layout == SK_INT8 ? -127 : -8, high = plan.header.layout == SK_INT8 ? 127 : 8;
  bool good = true;
  for (int64_t i = begin; i < end; ++i) good &= values[i] >= low && values[i] <= high;
  return good;
}

// Finite and not negative, so that a hole is +0 whatever the scale. The source may lie at any address.
bool scales_in_range(const sk_bitmask& s, int64_t begin, int64_t end) {
  bool good = true;
  for (int64_t i = begin; i < end; ++i) good &= load<uint16_t>(s.scales + i) < 0x7c00;
  return good;
}

void layout_quantised(sk_plan& plan) {
  Header& h = plan.header;
  const int64_t panels = ceil_div(h.rows, kPanelRows), groups = ceil_div(h.cols, 64);
  h.blocks_at = sizeof(Header);
  h.codes_at = round_up(h.blocks_at + 8 * (panels + 1), 64);
  if (!is_whole(plan.source, h.layout)) {
    h.masks_at = h.codes_at;
    h.codes_at += round_up(panels * groups * kGroupTiles * 8, 64);
  }
  h.values_at = h.patches_at = round_up(h.codes_at + panels * groups * kPanelRows * 2, 64);
  h.bytes = round_up(h.values_at + int64_t(plan.block_start.back()) + SK_TAIL, 64);
}

}  // namespace

bool plan_quantised(sk_plan& plan, int threads) {
  const sk_bitmask& s = plan.source;
  const int64_t panels = ceil_div(s.rows, kPanelRows), groups = ceil_div(s.cols, 64);
  const bool whole = is_whole(s, plan.header.layout);
  plan.block_start.assign(size_t(panels) + 1, 0);
  const uint32_t width = plan.header.layout == SK_INT8 ? 8 : 4;
  std::atomic<bool> good{true};
  auto measure = [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * kPanelRows, last = std::min(row + kPanelRows, s.rows);
      const int64_t from = plan.row_start[size_t(row)], to = plan.row_start[size_t(last)];
      if (!codes_in_range(plan, from, to) || !scales_in_range(s, row * groups, last * groups)) good = false;
      uint64_t& bytes = plan.block_start[size_t(p) + 1];
      if (whole)
        bytes = uint64_t(groups * kGroupTiles) * code_bytes(64, width);
      else if (plan.header.layout == SK_INT8)
        bytes = uint64_t(to - from);
      else
        visit_tiles(plan, p, [&](uint64_t mask, const int8_t*) {
          bytes += code_bytes(uint64_t(__builtin_popcountll(mask)), width);
        });
    }
  };
  for_each(threads, panels, 4, measure);
  for (int64_t p = 0; p < panels; ++p) plan.block_start[size_t(p) + 1] += plan.block_start[size_t(p)];
  layout_quantised(plan);
  return good;
}

void pack_quantised(const sk_plan& plan, uint8_t* out, int threads) {
  const Header& h = plan.header;
  const sk_bitmask& s = plan.source;
  const int64_t panels = ceil_div(h.rows, kPanelRows), groups = ceil_div(h.cols, 64);
  const int64_t offsets_end = h.blocks_at + 8 * (panels + 1), values_end = h.values_at + int64_t(plan.block_start.back());
  auto clear = [&](int64_t from, int64_t to) { memset(out + from, 0, size_t(to - from)); };
  memcpy(out + h.blocks_at, plan.block_start.data(), size_t(8 * (panels + 1)));
  clear(offsets_end, h.masks_at ? h.masks_at : h.codes_at);
  if (h.masks_at) clear(h.masks_at + panels * groups * kGroupTiles * 8, h.codes_at);
  clear(h.codes_at, h.values_at);  // the scales of rows that do not exist
  clear(values_end, h.bytes);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      uint64_t* masks = reinterpret_cast<uint64_t*>(out + h.masks_at) + p * groups * kGroupTiles;
      uint8_t* to = out + h.values_at + plan.block_start[size_t(p)];
      visit_tiles(plan, p, [&](uint64_t mask, const int8_t* integers) {
        if (h.masks_at) *masks++ = mask;
        to = put_tile(h, mask, integers, to);
      });
      uint16_t* scales = reinterpret_cast<uint16_t*>(out + h.codes_at) + p * groups * kPanelRows;
      for (int64_t i = 0; i < kPanelRows && p * kPanelRows + i < h.rows; ++i)
        for (int64_t g = 0; g < groups; ++g)
          scales[g * kPanelRows + i] = load<uint16_t>(s.scales + (p * kPanelRows + i) * groups + g);
    }
  };
  for_each(threads, panels, 4, work);
}

}  // namespace sk
