// Layouts in memory and the table of kernels one instruction set provides.
//
// Included by files compiled for different instruction sets: everything here is either plain data or has internal
// linkage, so that the linker can never pick a copy built for a processor we do not run on.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "sparsekit_kernels.h"

namespace sk {

constexpr int64_t kBlockRows = 64;  // bitmap: rows of a block
constexpr int64_t kPanelRows = 16;  // split: rows of a panel; also the height of every tile
constexpr int64_t kChunk = 64;      // chunk: columns of which each row keeps n
constexpr int64_t kTileColumns = 4;  // block: columns of a tile
constexpr int64_t kMaxFused = 16;   // tokens of the kernels that multiply while they decode
constexpr int64_t kGroupTiles = 16; // int8, int4: tiles that share the scales of their rows: 64 columns
constexpr int64_t kAnyTokens = INT64_MAX;  // of `fusable`: decoding first is never faster
constexpr int64_t kDenseTokens = 4; // tokens of one pass over a plain matrix

struct Header {  // at the start of a packed buffer, which is 8-byte aligned at least
  char magic[8];
  int32_t layout, dtype;
  int64_t rows, cols, nnz, bytes, patches;
  int64_t masks_at, blocks_at, values_at, codes_at, patches_at;  // int8, int4: scales at codes_at
  int64_t kept;  // chunk: n
  int64_t reserved[3];
};
static_assert(sizeof(Header) == 128, "header");

struct Panel {  // split: one per 16 rows, and one more that ends the last
  uint64_t low, code;   // where the panel's low bytes and codes begin
  uint8_t dictionary[16];
  uint32_t width;       // bits of a code: 3, 4, or 8 when the code is the high byte itself
  uint32_t reserved;
  uint64_t patch;       // first patch of the panel
};
static_assert(sizeof(Panel) == 48, "panel");

struct Patch {  // split: a value whose high byte is not in its panel's dictionary; its mask bit is clear
  uint32_t column;
  uint16_t row;  // in the panel
  uint16_t value;
};

struct View {  // a packed buffer, parsed
  int32_t layout, dtype;
  int64_t rows, cols, nnz;
  int64_t tiles;             // bitmap: column pairs (even number); split, chunk, block: groups of four columns
  int64_t kept;              // chunk: values of a row in 64 columns
  const uint32_t* masks32;   // bitmap [block][pair][4]: bit j of mask q = row 16 q + j / 2, column 2 c + (j & 1)
  const uint64_t* offsets;   // bitmap [blocks + 1], in values; block [panels + 1], in tiles
  const uint64_t* masks64;   // split [panel][tile]: bit 16 L + 8 h + 2 q + e = row 4 L + q, column 4 c + 2 h + e
  const Panel* panels;
  const uint32_t* columns;   // block: first column of each kept tile, ascending in a panel
  const uint8_t* values;     // bitmap: values; split: low bytes; chunk [panel][64 columns][16][n];
                             // block: tiles as panels hold them, bf16 [pair][16][2], others [column][16]
  const uint8_t* codes;      // split: codes, every tile begins at a byte; chunk: columns 0..63, as the values lie
  const Patch* patches;
  // int8, int4: masks64 [panel][groups * 16]: bit j = row j / 4, column 4 t + (j & 3); offsets [panels + 1], in bytes;
  // values: integers, or their codes with two a byte and every tile at a byte. Without holes there are no masks
  // (masks64 is null), and all 64 values of every tile, the padding too.
  int64_t groups;          // of 64 columns; tiles behind the last column have empty masks
  const uint16_t* scales;  // fp16 [panel][group][16]
};

struct Input {  // activations of one call, shared by all threads
  const uint32_t* pairs;  // bf16 pairs [column pair][tokens], or null
  const float* floats;    // [column][tokens], or null; both are zero behind the last column
  int64_t tokens;         // chunk: [tokens][column pair] and [tokens][column] instead
};

struct Bytes {  // activations of one call, quantised: x = (byte - 128) * scale
  const uint8_t* bytes;  // [groups * 16][tokens][4]; 128 behind the last column
  const float* scales;   // [group][tokens]
  int64_t tokens;
};

struct Cursor {  // how far a block has been decoded
  uint64_t value[4];
  uint64_t code[4];
};

// Work of one instruction set on int8 and int4.
struct QuantisedKernels {
  int64_t tokens;  // that `fused` handles; more are multiplied with decoded weights and exact activations
  // Token `token` of `tokens`: x [cols] to its places in bytes and scales.
  void (*quantise)(const void* x, int32_t dtype, int64_t cols, int64_t token, int64_t tokens, uint8_t* bytes,
                   float* scales);
  // out [tokens][ld] = the product for panel p.
  void (*fused)(const View& w, const Bytes& x, int64_t p, float* out, int64_t ld);
  // As Kernels::decode; `begin` is the first tile of a group, the weights are those of sk_unpack.
  void (*decode)(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, void* panels,
                 int64_t panel_stride);
};

// Work of one instruction set. `pairs` selects bf16 pair arithmetic (vdpbf16ps) against fp32 arithmetic.
struct PanelSource {  // 16 rows of a split tensor on disk; rows behind the last are null
  const uint8_t* mask[16];
  const uint8_t* low[16];
  const uint8_t* code[16];
  int64_t cols;
  uint32_t width;
  const Patch* patches;  // on disk their weights are stored like others; here they leave the mask
  int64_t patch_count;
};

struct ColumnKernels;  // products that pass over inputs, columns.h

struct Kernels {
  const char* name;
  bool pairs;
  // Up to how many tokens `fused` is the faster way for this weight; 0 = never. One call takes kMaxFused at most.
  int64_t (*fusable)(const View& w, bool pairs);
  // out [tokens][ld] = the product for block `b` (64 rows of bitmap, 16 of the others), without patches.
  void (*fused)(const View& w, const Input& x, int64_t b, bool pairs, float* out, int64_t ld);
  // Decode tiles [begin, end) of 64-row group g into 4 panels: bf16 [pair][16][2] or float [column][16].
  void (*decode)(const View& w, int64_t g, Cursor& at, int64_t begin, int64_t end, bool pairs, void* panels,
                 int64_t panel_stride);
  // acc [tokens][ld] (+)= panels a, b (16 rows each) times x [step][tokens], tokens <= 12.
  void (*micro)(const void* a, const void* b, const void* x, int64_t steps, int tokens, bool pairs, bool first,
                float* acc, int64_t ld);
  // out [tokens][ld] = rows [begin, end) of a plain matrix times 1..kDenseTokens tokens, which lie one after the other
  // here: x [tokens][x_stride], stride in pairs or floats.
  void (*dense)(const void* weight, int32_t dtype, int64_t cols, int64_t begin, int64_t end, const Input& x,
                int64_t x_stride, float* out, int64_t ld);
  // y[i] = sums[i] + bias[i], rounded to dtype; bias of the same dtype, or null.
  void (*store)(const float* sums, const void* bias, int64_t count, int32_t dtype, void* y);
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  const QuantisedKernels* quantised;
  const ColumnKernels* columns;
  // Masks, low bytes and codes of a panel in the order of its tiles; null where there is no fast way.
  void (*repack)(const PanelSource& source, uint64_t* masks, uint8_t* low, uint8_t* code);
  // sums [cols, cols], on and above the diagonal, += X^T X of bf16 inputs [tokens, cols]; what it writes below means
  // nothing. False if memory runs out; null where floats are no slower.
  bool (*gram)(const uint16_t* x, int64_t tokens, int64_t stride, int64_t cols, double* sums, int threads);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
extern const QuantisedKernels kQuantisedAvx2, kQuantisedAvx512;
extern const ColumnKernels kColumnsAvx2, kColumnsAvx512, kColumnsAvx512Bf16;
void repack_avx512(const PanelSource& source, uint64_t* masks, uint8_t* low, uint8_t* code);
bool gram_avx512bf16(const uint16_t* x, int64_t tokens, int64_t stride, int64_t cols, double* sums, int threads);
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const ColumnKernels kColumnsNeon;
#endif
extern const QuantisedKernels kQuantisedPortable;
extern const ColumnKernels kColumnsPortable;

const Kernels& kernels();  // the chosen table
int parse(const void* packed, int64_t bytes, View* view);
void run(int threads, sk_body body, void* argument);
void unpack_chunk(const View& w, int64_t panel, uint8_t* dense);  // into rows that are zero
void unpack_tiles(const View& w, int64_t panel, uint8_t* dense);

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t element_size(int32_t dtype) { return dtype == SK_F32 ? 4 : 2; }
inline bool is_quantised(int32_t layout) { return layout == SK_INT8 || layout == SK_INT4; }

template <class T>
inline T load(const void* p) {  // unaligned load
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float bf16_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }
inline uint16_t float_to_bf16(float f) {  // nearest even; NaN stays NaN
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float f16_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Shift exponent and mantissa into place and let one multiplication rebias, denormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000)));
}
inline uint16_t float_to_f16(float f) {  // nearest even
  uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (u < 0x38800000) {  // denormal: adding 0.5 aligns the mantissa, with rounding
    uint32_t d = float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000;
    return uint16_t(sign | d);
  }
  return uint16_t(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13));
}
inline float to_float(const void* p, int32_t dtype, int64_t i) {
  if (dtype == SK_F32) return load<float>(static_cast<const char*>(p) + 4 * i);
  uint16_t v = load<uint16_t>(static_cast<const char*>(p) + 2 * i);
  return dtype == SK_BF16 ? bf16_to_float(v) : f16_to_float(v);
}
inline void from_float(float f, void* p, int32_t dtype, int64_t i) {
  if (dtype == SK_F32) {
    memcpy(static_cast<char*>(p) + 4 * i, &f, 4);
    return;
  }
  uint16_t v = dtype == SK_BF16 ? float_to_bf16(f) : float_to_f16(f);
  memcpy(static_cast<char*>(p) + 2 * i, &v, 2);
}

// Bytes the codes of a tile with n values take.
inline uint64_t code_bytes(uint64_t n, uint32_t width) { return (n * width + 7) >> 3; }
// Row and column in the 16 x 4 tile of split's mask bit j.
inline int split_row(int j) { return 4 * (j >> 4) + ((j >> 1) & 3); }
inline int split_column(int j) { return 2 * ((j >> 3) & 1) + (j & 1); }

}  // namespace
}  // namespace sk
