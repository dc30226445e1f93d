// bitmap: blocks of 64 rows; per pair of columns four 16 x 2 tiles, values in the order of the mask bits.
#include "parallel.h"
#include "plan.h"

namespace sk {
namespace {

template <class T>
void pack_block(const sk_plan& plan, int64_t block, uint32_t* masks, uint8_t* values) {
  const sk_bitmask& s = plan.source;
  const int64_t pairs = round_up(ceil_div(s.cols, 2), 2), first = block * kBlockRows;
  const int rows = int(s.rows - first < kBlockRows ? s.rows - first : kBlockRows);
  const char* next[kBlockRows] = {};
  for (int r = 0; r < rows; ++r)
    next[r] = static_cast<const char*>(s.values) + plan.row_start[size_t(first + r)] * int64_t(sizeof(T));
  for (int64_t strip = 0; strip * 32 < pairs; ++strip) {
    uint64_t bits[kBlockRows] = {};
    for (int r = 0; r < rows; ++r) bits[r] = mask_strip(s, first + r, strip);
    const int64_t count = pairs - strip * 32 < 32 ? pairs - strip * 32 : 32;
    for (int64_t c = 0; c < count; ++c) {
      for (int q = 0; q < 4; ++q) {
        uint32_t mask = 0;
        for (int i = 0; i < 16; ++i) mask |= uint32_t(bits[16 * q + i] >> (2 * c) & 3) << (2 * i);
        *masks++ = mask;
        for (uint32_t rest = mask; rest; rest &= rest - 1) {
          const char*& from = next[16 * q + __builtin_ctz(rest) / 2];
          memcpy(values, from, sizeof(T));
          values += sizeof(T);
          from += sizeof(T);
        }
      }
    }
  }
}

}  // namespace

void pack_bitmap(const sk_plan& plan, uint8_t* out, int threads) {
  const Header& h = plan.header;
  const int64_t blocks = ceil_div(h.rows, kBlockRows), pairs = round_up(ceil_div(h.cols, 2), 2);
  const int64_t size = element_size(h.dtype), offsets_end = h.blocks_at + 8 * (blocks + 1);
  memcpy(out + h.blocks_at, plan.block_start.data(), size_t(8 * (blocks + 1)));
  memset(out + offsets_end, 0, size_t(h.masks_at - offsets_end));
  const int64_t masks_end = h.masks_at + blocks * pairs * 16, values_end = h.values_at + h.nnz * size;
  memset(out + masks_end, 0, size_t(h.values_at - masks_end));
  memset(out + values_end, 0, size_t(h.bytes - values_end));
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      uint32_t* masks = reinterpret_cast<uint32_t*>(out + h.masks_at) + b * pairs * 4;
      uint8_t* values = out + h.values_at + int64_t(plan.block_start[size_t(b)]) * size;
      if (size == 2)
        pack_block<uint16_t>(plan, b, masks, values);
      else
        pack_block<uint32_t>(plan, b, masks, values);
    }
  };
  for_each(threads, blocks, 1, work);
}

}  // namespace sk
