// The packed buffer back to a dense matrix, bit for bit: the proof that packing loses nothing.
#include "parallel.h"
#include "quantised.h"

namespace sk {
namespace {

template <class T>
void unpack_block(const View& w, int64_t b, uint8_t* dense) {
  const uint8_t* value = w.values + w.offsets[b] * sizeof(T);
  const uint32_t* masks = w.masks32 + b * w.tiles * 4;
  for (int64_t c = 0; c < w.tiles; ++c)
    for (int q = 0; q < 4; ++q)
      for (uint32_t rest = masks[4 * c + q]; rest; rest &= rest - 1) {
        const int j = __builtin_ctz(rest);
        const int64_t row = b * kBlockRows + 16 * q + j / 2, column = 2 * c + (j & 1);
        memcpy(dense + (row * w.cols + column) * int64_t(sizeof(T)), value, sizeof(T));
        value += sizeof(T);
      }
}

void unpack_panel(const View& w, int64_t p, uint8_t* dense) {
  const Panel& panel = w.panels[p];
  const uint8_t* low = w.values + panel.low;
  const uint8_t* code = w.codes + panel.code;
  auto put = [&](int64_t row, int64_t column, uint16_t value) {
    memcpy(dense + 2 * ((p * kPanelRows + row) * w.cols + column), &value, 2);
  };
  for (int64_t t = 0; t < w.tiles; ++t) {
    const uint64_t mask = w.masks64[p * w.tiles + t];
    unsigned bit = 0;
    for (uint64_t rest = mask; rest; rest &= rest - 1, bit += panel.width) {
      const int j = __builtin_ctzll(rest);
      const unsigned window = unsigned(code[bit / 8]) | unsigned(code[bit / 8 + 1]) << 8;
      const unsigned index = window >> (bit % 8) & ((1u << panel.width) - 1);
      const unsigned high = panel.width == 8 ? index : panel.dictionary[index];
      put(split_row(j), 4 * t + split_column(j), uint16_t(high << 8 | *low++));
    }
    code += code_bytes(uint64_t(__builtin_popcountll(mask)), panel.width);
  }
  for (uint64_t i = panel.patch; i < w.panels[p + 1].patch; ++i)
    put(w.patches[i].row, w.patches[i].column, w.patches[i].value);
}

void unpack_quantised(const View& w, int64_t p, uint8_t* dense) {
  const uint8_t* at = w.values + w.offsets[p];
  const int64_t rows = w.rows - p * kPanelRows < kPanelRows ? w.rows - p * kPanelRows : kPanelRows;
  for (int64_t t = 0; t < w.tiles; ++t) {
    const uint16_t* scales = w.scales + (p * w.groups + t / kGroupTiles) * kPanelRows;
    int8_t tile[64];
    integers_of_tile(w, p, t, at, tile);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 4 * t; column < 4 * t + 4 && column < w.cols; ++column) {
        const float weight = float(tile[4 * row + column % 4]) * f16_to_float(scales[row]);
        from_float(weight, dense, w.dtype, (p * kPanelRows + row) * w.cols + column);
      }
  }
}

}  // namespace
}  // namespace sk

extern "C" int sk_unpack(const void* packed, int64_t bytes, void* dense, int threads) {
  sk::View w;
  const int status = sk::parse(packed, bytes, &w);
  if (status != SK_OK) return status;
  if (!dense && w.rows > 0 && w.cols > 0) return SK_BAD_ARGUMENT;
  uint8_t* out = static_cast<uint8_t*>(dense);
  const bool bitmap = w.layout == SK_BITMAP;
  const int64_t height = bitmap ? sk::kBlockRows : sk::kPanelRows;
  const int64_t row_bytes = w.cols * sk::element_size(w.dtype);
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t last = (b + 1) * height < w.rows ? (b + 1) * height : w.rows;
      if (row_bytes) memset(out + b * height * row_bytes, 0, size_t((last - b * height) * row_bytes));
      if (sk::is_quantised(w.layout))
        sk::unpack_quantised(w, b, out);
      else if (w.layout == SK_CHUNK)
        sk::unpack_chunk(w, b, out);
      else if (w.layout == SK_BLOCK)
        sk::unpack_tiles(w, b, out);
      else if (!bitmap)
        sk::unpack_panel(w, b, out);
      else if (sk::element_size(w.dtype) == 2)
        sk::unpack_block<uint16_t>(w, b, out);
      else
        sk::unpack_block<uint32_t>(w, b, out);
    }
  };
  sk::for_each(threads, sk::ceil_div(w.rows, height), 1, work);
  return SK_OK;
}
