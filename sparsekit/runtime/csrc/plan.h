// Packing in two steps: the plan measures (sizes, dictionaries, patches), then the writers fill one buffer.
#pragma once
#include <memory>
#include <vector>

#include "internal.h"

struct sk_plan {
  sk_bitmask source;
  sk::Header header;
  std::vector<int64_t> row_start;        // [rows + 1] index of each row's first value
  std::vector<uint64_t> block_start;     // bitmap [blocks + 1], in values; int8, int4, block [panels + 1]
  std::vector<sk::Panel> panels;         // split [panels + 1]
  std::vector<std::vector<sk::Patch>> patches;  // split [panels]
  const sk_disk* disk = nullptr;                // split from a split tensor on disk; then `source` has no values
  std::vector<int64_t> code_start;              // [rows + 1], with `disk`: each row's first byte of codes
};

namespace sk {
// Makes a plan with `fill(plan)`, which returns a status and may throw; none is left behind unless it is SK_OK.
template <class F>
int make_plan(sk_plan** plan, F fill) {
  *plan = nullptr;
  try {
    std::unique_ptr<sk_plan> made(new sk_plan);
    const int status = fill(*made);
    if (status == SK_OK) *plan = made.release();
    return status;
  } catch (...) {
    return SK_NO_MEMORY;
  }
}

void pack_bitmap(const sk_plan& plan, uint8_t* out, int threads);
void plan_split(sk_plan& plan, int threads);  // may throw std::bad_alloc
void place_panels(sk_plan& plan);          // sizes of panels to positions
void layout_split(sk_plan& plan);
uint64_t panel_code_bytes(const sk_plan& plan, int64_t p, const Panel& panel, const std::vector<Patch>& patches);
void begin_split(const sk_plan& plan, uint8_t* out);  // all but masks, low bytes and codes
void pack_split(const sk_plan& plan, uint8_t* out, int threads);
void repack_split(const sk_plan& plan, uint8_t* out, int threads);
bool plan_quantised(sk_plan& plan, int threads);  // false: a code or scale out of range
void pack_quantised(const sk_plan& plan, uint8_t* out, int threads);
int plan_chunk(sk_plan& plan, int threads);  // SK_BAD_MASK if the mask lacks the structure
void pack_chunk(const sk_plan& plan, uint8_t* out, int threads);
int plan_tiles(sk_plan& plan, int threads);  // the same for the layout block
void pack_tiles(const sk_plan& plan, uint8_t* out, int threads);

namespace {

inline int64_t mask_stride(const sk_bitmask& s) { return ceil_div(s.cols, 8); }

// 64 mask bits of row r from column 64 * strip on; columns behind the last are 0.
inline uint64_t mask_strip(const sk_bitmask& s, int64_t r, int64_t strip) {
  const int64_t stride = mask_stride(s), at = strip * 8;
  const uint8_t* p = s.mask + r * stride + at;
  uint64_t bits = 0;
  memcpy(&bits, p, size_t(stride - at < 8 ? stride - at : 8));
  return bits;
}

}  // namespace
}  // namespace sk
