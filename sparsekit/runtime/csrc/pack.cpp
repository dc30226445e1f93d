// Checks a bitmask tensor and lays out its packed buffer.
#include "mask.h"
#include "plan.h"

namespace sk {
namespace {

// Fills row_start from popcounts; false if offsets, count or padding bits disagree with the mask.
bool check_mask(sk_plan& plan, int threads) {
  const sk_bitmask& s = plan.source;
  if (!row_starts(s.mask, s.rows, s.cols, plan.row_start, threads)) return false;
  for (int64_t r = 0; s.row_offsets && r < s.rows; ++r)
    if (s.row_offsets[r] != plan.row_start[size_t(r)]) return false;
  return plan.row_start.back() == s.nnz;
}

void layout_bitmap(sk_plan& plan) {
  Header& h = plan.header;
  const int64_t blocks = ceil_div(h.rows, kBlockRows), pairs = round_up(ceil_div(h.cols, 2), 2);
  plan.block_start.resize(size_t(blocks) + 1);
  for (int64_t b = 0; b <= blocks; ++b) {
    int64_t row = b * kBlockRows < h.rows ? b * kBlockRows : h.rows;
    plan.block_start[size_t(b)] = uint64_t(plan.row_start[size_t(row)]);
  }
  h.blocks_at = sizeof(Header);
  h.masks_at = round_up(h.blocks_at + 8 * (blocks + 1), 64);
  h.values_at = round_up(h.masks_at + blocks * pairs * 16, 64);
  h.codes_at = h.patches_at = h.values_at;
  h.bytes = round_up(h.values_at + h.nnz * element_size(h.dtype) + SK_TAIL, 64);
}

int create(int layout, const sk_bitmask& s, int threads, sk_plan& plan) {
  plan.source = s;
  if (!check_mask(plan, threads)) return SK_BAD_MASK;
  Header& h = plan.header;
  memset(&h, 0, sizeof h);
  memcpy(h.magic, "SKPACK01", 8);
  h.layout = layout;
  h.dtype = s.dtype == SK_I8 ? s.weight_dtype : s.dtype;
  h.rows = s.rows;
  h.cols = s.cols;
  h.nnz = s.nnz;
  if (layout == SK_CHUNK) return plan_chunk(plan, threads);
  if (layout == SK_BLOCK) return plan_tiles(plan, threads);
  if (layout == SK_BITMAP) {
    layout_bitmap(plan);
  } else if (is_quantised(layout)) {
    if (!plan_quantised(plan, threads)) return SK_BAD_ARGUMENT;
  } else {
    plan_split(plan, threads);
    layout_split(plan);
  }
  return SK_OK;
}

bool sound(const sk_bitmask& s) {
  constexpr int64_t most = int64_t(1) << 31;
  if (s.rows < 0 || s.cols < 0 || s.nnz < 0 || s.rows >= most || s.cols >= most) return false;
  if (s.rows && s.cols > (int64_t(1) << 40) / s.rows) return false;
  if (s.dtype < SK_BF16 || s.dtype > SK_I8) return false;
  if (s.dtype == SK_I8 && (s.weight_dtype < SK_BF16 || s.weight_dtype > SK_F32)) return false;
  if (s.dtype == SK_I8 && !s.scales && s.rows && s.cols) return false;
  return (s.mask || s.rows == 0 || s.cols == 0) && (s.values || s.nnz == 0);
}

}  // namespace

void layout_split(sk_plan& plan) {
  Header& h = plan.header;
  const int64_t panels = ceil_div(h.rows, kPanelRows), tiles = ceil_div(h.cols, 4);
  const Panel& end = plan.panels[size_t(panels)];
  h.patches = int64_t(end.patch);
  h.blocks_at = sizeof(Header);
  h.masks_at = round_up(h.blocks_at + int64_t(sizeof(Panel)) * (panels + 1), 64);
  h.values_at = round_up(h.masks_at + panels * tiles * 8, 64);
  h.codes_at = round_up(h.values_at + int64_t(end.low) + SK_TAIL, 64);
  h.patches_at = round_up(h.codes_at + int64_t(end.code) + SK_TAIL, 64);
  h.bytes = round_up(h.patches_at + h.patches * int64_t(sizeof(Patch)) + SK_TAIL, 64);
}

int parse(const void* packed, int64_t bytes, View* view) {
  if (!packed || bytes < int64_t(sizeof(Header)) || reinterpret_cast<uintptr_t>(packed) % 8) return SK_BAD_PACKED;
  const Header& h = *static_cast<const Header*>(packed);
  if (memcmp(h.magic, "SKPACK01", 8) != 0 || h.bytes != bytes) return SK_BAD_PACKED;
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  View& v = *view;
  memset(&v, 0, sizeof v);
  v.layout = h.layout;
  v.dtype = h.dtype;
  v.rows = h.rows;
  v.cols = h.cols;
  v.nnz = h.nnz;
  v.values = base + h.values_at;
  if (h.layout == SK_BITMAP) {
    v.tiles = round_up(ceil_div(h.cols, 2), 2);
    v.offsets = reinterpret_cast<const uint64_t*>(base + h.blocks_at);
    v.masks32 = reinterpret_cast<const uint32_t*>(base + h.masks_at);
  } else if (h.layout == SK_SPLIT) {
    v.tiles = ceil_div(h.cols, 4);
    v.panels = reinterpret_cast<const Panel*>(base + h.blocks_at);
    v.masks64 = reinterpret_cast<const uint64_t*>(base + h.masks_at);
    v.codes = base + h.codes_at;
    v.patches = reinterpret_cast<const Patch*>(base + h.patches_at);
  } else if (is_quantised(h.layout)) {
    v.tiles = ceil_div(h.cols, 4);
    v.groups = ceil_div(v.tiles, kGroupTiles);
    v.offsets = reinterpret_cast<const uint64_t*>(base + h.blocks_at);
    v.masks64 = h.masks_at ? reinterpret_cast<const uint64_t*>(base + h.masks_at) : nullptr;
    v.scales = reinterpret_cast<const uint16_t*>(base + h.codes_at);
  } else if (h.layout == SK_CHUNK) {
    v.tiles = h.cols / 4;
    v.kept = h.kept;
    v.codes = base + h.codes_at;
  } else if (h.layout == SK_BLOCK) {
    v.tiles = h.cols / 4;
    v.offsets = reinterpret_cast<const uint64_t*>(base + h.blocks_at);
    v.columns = reinterpret_cast<const uint32_t*>(base + h.masks_at);
  } else {
    return SK_BAD_PACKED;
  }
  return SK_OK;
}

}  // namespace sk

extern "C" {
int sk_plan_create(int layout, const sk_bitmask* source, int threads, sk_plan** plan) {
  if (!source || !plan || !sk::sound(*source)) return SK_BAD_ARGUMENT;
  if (layout != SK_BITMAP && layout != SK_SPLIT && layout != SK_CHUNK && layout != SK_BLOCK &&
      !sk::is_quantised(layout)) return SK_BAD_ARGUMENT;
  if (sk::is_quantised(layout) != (source->dtype == SK_I8)) return SK_UNSUPPORTED;
  if ((layout == SK_SPLIT || layout == SK_CHUNK) && source->dtype != SK_BF16) return SK_UNSUPPORTED;
  return sk::make_plan(plan, [&](sk_plan& made) { return sk::create(layout, *source, threads, made); });
}

int64_t sk_plan_bytes(const sk_plan* plan) { return plan ? plan->header.bytes : 0; }

int sk_plan_pack(const sk_plan* plan, void* out, int64_t out_bytes, int threads) {
  if (!plan || !out || out_bytes != plan->header.bytes || reinterpret_cast<uintptr_t>(out) % 8)
    return SK_BAD_ARGUMENT;
  uint8_t* base = static_cast<uint8_t*>(out);
  // Everything between the streams is zero: kernels read a little past each.
  memcpy(base, &plan->header, sizeof plan->header);
  if (plan->header.layout == SK_BITMAP)
    sk::pack_bitmap(*plan, base, threads);
  else if (sk::is_quantised(plan->header.layout))
    sk::pack_quantised(*plan, base, threads);
  else if (plan->header.layout == SK_CHUNK)
    sk::pack_chunk(*plan, base, threads);
  else if (plan->header.layout == SK_BLOCK)
    sk::pack_tiles(*plan, base, threads);
  else if (plan->disk)
    sk::repack_split(*plan, base, threads);
  else
    sk::pack_split(*plan, base, threads);
  return SK_OK;
}

void sk_plan_free(sk_plan* plan) { delete plan; }

int sk_packed_info(const void* packed, int64_t bytes, sk_info* info) {
  sk::View v;
  int status = sk::parse(packed, bytes, &v);
  if (status != SK_OK || !info) return status != SK_OK ? status : SK_BAD_ARGUMENT;
  const sk::Header& h = *static_cast<const sk::Header*>(packed);
  *info = {h.rows, h.cols, h.nnz, h.bytes, h.patches, h.layout, h.dtype, 0, 0, 0};
  if (h.layout == SK_SPLIT)
    for (int64_t p = 0; p < sk::ceil_div(h.rows, sk::kPanelRows); ++p)
      ++(v.panels[p].width == 3 ? info->panels3 : v.panels[p].width == 4 ? info->panels4 : info->panels8);
  return SK_OK;
}
}
