// A split tensor on disk to the layout split in memory. Both have a dictionary and a code width for every 16 rows, so no
// value is decoded: low bytes and codes move from the order of rows to the order of tiles.
#include "disk.h"
#include "plan.h"

namespace sk {
namespace {

void describe_panel(sk_plan& plan, int64_t p) {
  const sk_disk& d = *plan.disk;
  const int64_t last = (p + 1) * kPanelRows < d.rows ? (p + 1) * kPanelRows : d.rows;
  Panel& panel = plan.panels[size_t(p)];
  const std::vector<Patch>& patches = plan.patches[size_t(p)];
  panel.width = bytes_of(d.width)[p];
  memcpy(panel.dictionary, bytes_of(d.dictionary) + 16 * p, 16);
  if (panel.width == 3) memcpy(panel.dictionary + 8, panel.dictionary, 8);  // as pack_split.cpp says
  panel.low = uint64_t(plan.row_start[size_t(last)] - plan.row_start[size_t(p * kPanelRows)]) - patches.size();
  panel.code = panel_code_bytes(plan, p, panel, patches);
  panel.patch = patches.size();
}

int create(const sk_disk& d, int threads, sk_plan& plan) {
  if (!read_positions(d, plan.row_start, nullptr, threads) || !prove_split(d, plan.row_start, plan.code_start))
    return SK_BAD_MASK;
  plan.disk = &d;
  plan.source = {bytes_of(d.mask), nullptr, nullptr, d.rows, d.cols, d.nnz, SK_BF16, SK_BF16, nullptr};
  Header& h = plan.header;
  memset(&h, 0, sizeof h);
  memcpy(h.magic, "SKPACK01", 8);
  h.layout = SK_SPLIT;
  h.dtype = SK_BF16;
  h.rows = d.rows;
  h.cols = d.cols;
  h.nnz = d.nnz;
  const int64_t panels = ceil_div(d.rows, kPanelRows);
  plan.panels.assign(size_t(panels) + 1, Panel{});
  plan.patches.resize(size_t(panels));
  for (int64_t i = 0; i < patch_count(d); ++i) {
    const uint32_t row = load<uint32_t>(bytes_of(d.patch_row) + 4 * i), col = load<uint32_t>(bytes_of(d.patch_col) + 4 * i);
    const uint16_t value = load<uint16_t>(bytes_of(d.patch_value) + 2 * i);
    plan.patches[row / kPanelRows].push_back({col, uint16_t(row % kPanelRows), value});
  }
  std::atomic<bool> failed{false};
  auto measure = [&](int64_t begin, int64_t end, int) {
    try {
      for (int64_t p = begin; p < end; ++p) describe_panel(plan, p);
    } catch (...) {
      failed = true;
    }
  };
  for_each(threads, panels, 4, measure);
  if (failed) return SK_NO_MEMORY;
  place_panels(plan);
  layout_split(plan);
  return SK_OK;
}

}  // namespace

void repack_split(const sk_plan& plan, uint8_t* out, int threads) {
  const sk_disk& d = *plan.disk;
  const Header& h = plan.header;
  const int64_t panels = ceil_div(h.rows, kPanelRows), tiles = ceil_div(h.cols, 4);
  begin_split(plan, out);
  const Kernels& k = kernels();
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = plan.panels[size_t(p)];
      PanelSource source = {};
      source.cols = d.cols;
      source.width = panel.width;
      source.patches = plan.patches[size_t(p)].data();
      source.patch_count = int64_t(plan.patches[size_t(p)].size());
      for (int64_t r = p * kPanelRows; r < (p + 1) * kPanelRows && r < d.rows; ++r) {
        source.mask[r % kPanelRows] = bytes_of(d.mask) + r * ceil_div(d.cols, 8);
        source.low[r % kPanelRows] = bytes_of(d.low) + plan.row_start[size_t(r)];
        source.code[r % kPanelRows] = bytes_of(d.code) + plan.code_start[size_t(r)];
      }
      k.repack(source, reinterpret_cast<uint64_t*>(out + h.masks_at) + p * tiles, out + h.values_at + panel.low,
               out + h.codes_at + panel.code);
    }
  };
  for_each(threads, panels, 4, work);
}

}  // namespace sk

extern "C" int sk_plan_from_disk(const sk_disk* disk, int threads, sk_plan** plan) {
  if (!disk || !plan || !sk::sound(*disk)) return SK_BAD_ARGUMENT;
  if (disk->layout != SK_DISK_BITMASK || disk->encoding != SK_ENCODING_SPLIT || disk->dtype != SK_BF16)
    return SK_UNSUPPORTED;
  if (!sk::kernels().repack) return SK_UNSUPPORTED;
  return sk::make_plan(plan, [&](sk_plan& made) { return sk::create(*disk, threads, made); });
}
