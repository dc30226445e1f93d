// split: panels of 16 rows; low bytes raw, high bytes as 3- or 4-bit codes into the panel's dictionary.
//
// A value whose high byte is not in the dictionary loses its mask bit and becomes a patch, so nothing is
// approximated. A panel with too many of them takes 4-bit codes, and then whole high bytes.
#include <algorithm>

#include "parallel.h"
#include "plan.h"

namespace sk {
namespace {

constexpr int kPatchBits = 8 * int(sizeof(Patch));

uint16_t value_at(const sk_bitmask& s, int64_t i) { return load<uint16_t>(static_cast<const char*>(s.values) + 2 * i); }

// Picks width and dictionary by size; `inverse` gets the code of every high byte, 255 for none.
void choose_codes(const sk_plan& plan, int64_t begin, int64_t end, Panel& panel, uint8_t* inverse) {
  int64_t count[4][256] = {};  // four tables: the same byte twice in a row must not wait for the first store
  for (int64_t i = begin; i < end; ++i) ++count[i & 3][value_at(plan.source, i) >> 8];
  int order[256];
  for (int b = 0; b < 256; ++b) {
    count[0][b] += count[1][b] + count[2][b] + count[3][b];
    order[b] = b;
  }
  std::stable_sort(order, order + 256, [&](int a, int b) { return count[0][a] > count[0][b]; });
  const int64_t total = end - begin;
  int64_t best = 8 * total;
  panel.width = 8;
  int64_t missing = total;
  for (int i = 0; i < 16; ++i) {
    missing -= count[0][order[i]];
    const int width = i == 7 ? 3 : i == 15 ? 4 : 0;
    if (width && width * total + kPatchBits * missing < best) {
      best = width * total + kPatchBits * missing;
      panel.width = uint32_t(width);
    }
  }
  if (total == 0) panel.width = 3;
  memset(inverse, panel.width == 8 ? 0 : 255, 256);
  if (panel.width == 8) return;
  for (int i = 0; i < 1 << panel.width; ++i) {
    panel.dictionary[i] = uint8_t(order[i]);
    inverse[order[i]] = uint8_t(i);
  }
  // vpshufb and a 64-entry vpermb both look the 3-bit code up in a repeated table.
  if (panel.width == 3) memcpy(panel.dictionary + 8, panel.dictionary, 8);
}

// Column of value number `index` of row r.
int64_t column_of(const sk_bitmask& s, int64_t r, int64_t index) {
  for (int64_t strip = 0;; ++strip) {
    uint64_t bits = mask_strip(s, r, strip);
    const int n = __builtin_popcountll(bits);
    if (index >= n) {
      index -= n;
      continue;
    }
    while (index--) bits &= bits - 1;
    return strip * 64 + __builtin_ctzll(bits);
  }
}

void find_patches(const sk_plan& plan, int64_t p, const uint8_t* inverse, std::vector<Patch>& patches) {
  const int64_t first = p * kPanelRows, last = std::min(first + kPanelRows, plan.source.rows);
  for (int64_t r = first; r < last; ++r) {
    const int64_t begin = plan.row_start[size_t(r)], end = plan.row_start[size_t(r) + 1];
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t value = value_at(plan.source, i);
      if (inverse[value >> 8] == 255)
        patches.push_back({uint32_t(column_of(plan.source, r, i - begin)), uint16_t(r - first), value});
    }
  }
}

// The four mask bits of row i for tile t of a strip, moved to the places they have in the tile's mask.
inline uint64_t place(uint64_t strip, int t, int i) {
  const uint64_t nibble = strip >> (4 * t) & 15;
  return (nibble & 3) << (16 * (i / 4) + 2 * (i % 4)) | (nibble >> 2) << (16 * (i / 4) + 8 + 2 * (i % 4));
}

void pack_panel(const sk_plan& plan, int64_t p, uint64_t* masks, uint8_t* low, uint8_t* code) {
  const sk_bitmask& s = plan.source;
  const Panel& panel = plan.panels[size_t(p)];
  uint8_t inverse[256];
  memset(inverse, panel.width == 8 ? 0 : 255, 256);
  for (int i = 0; panel.width < 8 && i < 1 << panel.width; ++i) inverse[panel.dictionary[i]] = uint8_t(i);
  const int64_t tiles = ceil_div(s.cols, 4), first = p * kPanelRows;
  const int rows = int(std::min(kPanelRows, s.rows - first));
  int64_t next[kPanelRows] = {};
  for (int i = 0; i < rows; ++i) next[i] = plan.row_start[size_t(first + i)];
  for (int64_t strip = 0; strip * 16 < tiles; ++strip) {
    uint64_t bits[kPanelRows] = {};
    for (int i = 0; i < rows; ++i) bits[i] = mask_strip(s, first + i, strip);
    for (int t = 0; t < 16 && strip * 16 + t < tiles; ++t) {
      uint64_t mask = 0, pending = 0;
      for (int i = 0; i < 16; ++i) mask |= place(bits[i], t, i);
      unsigned held = 0;
      for (uint64_t rest = mask; rest; rest &= rest - 1) {
        const int j = __builtin_ctzll(rest);
        const uint16_t value = value_at(s, next[split_row(j)]++);
        uint8_t index = panel.width == 8 ? uint8_t(value >> 8) : inverse[value >> 8];
        if (panel.width < 8 && index == 255) {
          mask &= ~(uint64_t(1) << j);
          continue;
        }
        *low++ = uint8_t(value);
        pending |= uint64_t(index) << held;
        for (held += panel.width; held >= 8; held -= 8, pending >>= 8) *code++ = uint8_t(pending);
      }
      if (held) *code++ = uint8_t(pending);
      *masks++ = mask;
    }
  }
}

}  // namespace

// Kept weights of every tile are counted four columns of a row at a time: nibbles of a strip of the mask.
uint64_t panel_code_bytes(const sk_plan& plan, int64_t p, const Panel& panel, const std::vector<Patch>& patches) {
  const sk_bitmask& s = plan.source;
  const int64_t tiles = ceil_div(s.cols, 4), first = p * kPanelRows;
  const int rows = int(std::min(kPanelRows, s.rows - first));
  std::vector<uint8_t> gone(patches.empty() ? 0 : size_t(tiles), 0);
  for (const Patch& patch : patches) ++gone[patch.column / 4];
  constexpr uint64_t kOnes = 0x1111111111111111, kLow = 0x0f0f0f0f0f0f0f0f;
  uint64_t total = 0;
  for (int64_t strip = 0; strip * 16 < tiles; ++strip) {
    uint64_t even = 0, odd = 0;  // a byte for each second tile
    for (int i = 0; i < rows; ++i) {
      const uint64_t bits = mask_strip(s, first + i, strip);
      const uint64_t counts = (bits & kOnes) + (bits >> 1 & kOnes) + (bits >> 2 & kOnes) + (bits >> 3 & kOnes);
      even += counts & kLow;
      odd += counts >> 4 & kLow;
    }
    for (int t = 0; t < 16 && strip * 16 + t < tiles; ++t) {
      uint64_t n = (t & 1 ? odd : even) >> (t / 2 * 8) & 0xff;
      if (!gone.empty()) n -= gone[size_t(strip * 16 + t)];
      total += code_bytes(n, panel.width);
    }
  }
  return total;
}

void place_panels(sk_plan& plan) {
  uint64_t low = 0, code = 0, patch = 0;
  for (Panel& panel : plan.panels) {
    std::swap(panel.low, low);
    std::swap(panel.code, code);
    std::swap(panel.patch, patch);
    low += panel.low;
    code += panel.code;
    patch += panel.patch;
  }
}

void plan_split(sk_plan& plan, int threads) {
  const sk_bitmask& s = plan.source;
  const int64_t panels = ceil_div(s.rows, kPanelRows);
  plan.panels.assign(size_t(panels) + 1, Panel{});
  plan.patches.resize(size_t(panels));
  std::atomic<bool> failed{false};
  auto measure = [&](int64_t begin, int64_t end, int) {
    try {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t last = std::min((p + 1) * kPanelRows, s.rows);
        const int64_t from = plan.row_start[size_t(p * kPanelRows)], to = plan.row_start[size_t(last)];
        Panel& panel = plan.panels[size_t(p)];
        std::vector<Patch>& patches = plan.patches[size_t(p)];
        uint8_t inverse[256];
        choose_codes(plan, from, to, panel, inverse);
        find_patches(plan, p, inverse, patches);
        panel.low = uint64_t(to - from) - patches.size();  // sizes for now, positions below
        panel.code = panel_code_bytes(plan, p, panel, patches);
        panel.patch = patches.size();
      }
    } catch (...) {
      failed = true;
    }
  };
  for_each(threads, panels, 4, measure);
  if (failed) throw std::bad_alloc();
  place_panels(plan);
}

void begin_split(const sk_plan& plan, uint8_t* out) {
  const Header& h = plan.header;
  const int64_t panels = ceil_div(h.rows, kPanelRows), tiles = ceil_div(h.cols, 4);
  const int64_t panels_end = h.blocks_at + int64_t(sizeof(Panel)) * (panels + 1);
  const Panel& last = plan.panels[size_t(panels)];
  auto clear = [&](int64_t from, int64_t to) { memset(out + from, 0, size_t(to - from)); };
  memcpy(out + h.blocks_at, plan.panels.data(), size_t(panels_end - h.blocks_at));
  clear(panels_end, h.masks_at);
  clear(h.masks_at + panels * tiles * 8, h.values_at);
  clear(h.values_at + int64_t(last.low), h.codes_at);
  clear(h.codes_at + int64_t(last.code), h.patches_at);
  clear(h.patches_at + h.patches * int64_t(sizeof(Patch)), h.bytes);
  Patch* patches = reinterpret_cast<Patch*>(out + h.patches_at);
  for (int64_t p = 0; p < panels; ++p)
    std::copy(plan.patches[size_t(p)].begin(), plan.patches[size_t(p)].end(), patches + plan.panels[size_t(p)].patch);
}

void pack_split(const sk_plan& plan, uint8_t* out, int threads) {
  const Header& h = plan.header;
  const int64_t panels = ceil_div(h.rows, kPanelRows), tiles = ceil_div(h.cols, 4);
  begin_split(plan, out);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = plan.panels[size_t(p)];
      pack_panel(plan, p, reinterpret_cast<uint64_t*>(out + h.masks_at) + p * tiles,
                 out + h.values_at + panel.low, out + h.codes_at + panel.code);
    }
  };
  for_each(threads, panels, 4, work);
}

}  // namespace sk
