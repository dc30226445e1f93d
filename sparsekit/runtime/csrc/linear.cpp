// y = x weight^T + bias: prepares the activations once, shares the rows out, adds patches and bias.
//
// Few tokens: `fused` kernels multiply while they decode, so the weight is read once and never written. More tokens:
// 64 rows are decoded into a scratch that stays in the second-level cache and a plain micro-kernel runs over it.
// Kernels that pass over what is missing instead of multiplying zeros stay fused for any number of tokens.
#include "linear.h"

namespace sk {
namespace {

constexpr int64_t kTokenTile = 12;    // tokens of one micro-kernel call
constexpr int64_t kTokenChunk = 512;  // tokens per pass over the weight; bounds the accumulators of a thread
constexpr int64_t kScratch = 256 << 10;

thread_local Scratch activations, decoded;

// x [tokens, cols] to [steps][tile tokens], tiles of at most `tile` tokens one after the other.
template <class T, class Get>
void interleave(T* out, int64_t steps, int64_t tokens, int64_t tile, int64_t begin, int64_t end, Get get) {
  for (int64_t first = begin * tile; first < tokens && first < end * tile; first += tile) {
    const int64_t n = tokens - first < tile ? tokens - first : tile;
    T* base = out + first * steps;
    for (int64_t k0 = 0; k0 < steps; k0 += 16) {  // a cache line of every token at a time
      const int64_t k1 = k0 + 16 < steps ? k0 + 16 : steps;
      for (int64_t t = 0; t < n; ++t)
        for (int64_t k = k0; k < k1; ++k) base[k * n + t] = get(first + t, k);
    }
  }
}

}  // namespace

bool prepare(const sk_call& call, int64_t cols, int64_t first, int64_t tokens, int64_t tile, bool pairs,
             Prepared& out) {
  const int64_t width = round_up(cols, 4), steps = pairs ? width / 2 : width;
  const int64_t tiles = ceil_div(tokens, tile);
  void* memory = activations.need(steps * 4 * tokens + 64);
  if (!memory) return false;
  out.steps = steps;
  out.tile = tile;
  out.pairs = pairs;
  out.input = {pairs ? static_cast<uint32_t*>(memory) : nullptr, pairs ? nullptr : static_cast<float*>(memory),
               tokens};
  const int64_t size = element_size(call.x_dtype);
  const char* x = static_cast<const char*>(call.x) + first * call.x_stride * size;
  if (pairs && tokens == 1) {
    memset(static_cast<char*>(memory) + (steps ? steps - 2 : 0) * 4, 0, steps ? 8 : 0);
    if (cols) memcpy(memory, x, size_t(cols * 2));
    return true;
  }
  auto work = [&](int64_t begin, int64_t end, int) {
    if (pairs) {
      interleave(static_cast<uint32_t*>(memory), steps, tokens, tile, begin, end, [&](int64_t t, int64_t k) {
        const char* p = x + (t * call.x_stride + 2 * k) * 2;
        if (2 * k + 1 < cols) return load<uint32_t>(p);
        return 2 * k < cols ? uint32_t(load<uint16_t>(p)) : 0u;
      });
    } else {
      interleave(static_cast<float*>(memory), steps, tokens, tile, begin, end, [&](int64_t t, int64_t k) {
        return k < cols ? to_float(x + t * call.x_stride * size, call.x_dtype, k) : 0.0f;
      });
    }
  };
  for_each(tokens > 64 ? call.threads : 1, tiles, 1, work);
  return true;
}

namespace {

float activation(const Input& x, int64_t column, int64_t token) {
  if (x.floats) return x.floats[column * x.tokens + token];
  const uint32_t pair = x.pairs[column / 2 * x.tokens + token];
  return bf16_to_float(uint16_t(column & 1 ? pair >> 16 : pair));
}

void add_patches(const View& w, const Input& x, int64_t p, float* out, int64_t ld) {
  for (uint64_t i = w.panels[p].patch; i < w.panels[p + 1].patch; ++i) {
    const Patch& patch = w.patches[i];
    for (int64_t t = 0; t < x.tokens; ++t)
      out[t * ld + patch.row] += bf16_to_float(patch.value) * activation(x, patch.column, t);
  }
}

// Patches of panel p whose column lies in the decoded columns [begin, end).
void write_patches(const View& w, int64_t p, int64_t begin, int64_t end, bool pairs, void* panel) {
  for (uint64_t i = w.panels[p].patch; i < w.panels[p + 1].patch; ++i) {
    const Patch& patch = w.patches[i];
    const int64_t column = int64_t(patch.column) - begin;
    if (column < 0 || column >= end - begin) continue;
    if (pairs)
      static_cast<uint16_t*>(panel)[column / 2 * 32 + patch.row * 2 + (column & 1)] = patch.value;
    else
      static_cast<float*>(panel)[column * 16 + patch.row] = bf16_to_float(patch.value);
  }
}

// Tokens [first, first + count) of prepared activations, `count` of them being a tile.
Input part(const Prepared& x, int64_t first, int64_t count) {
  const int64_t at = first * x.steps;
  return {x.pairs ? x.input.pairs + at : nullptr, x.pairs ? nullptr : x.input.floats + at, count};
}

int64_t block_height(const View& w) { return w.layout == SK_BITMAP ? kBlockRows : kPanelRows; }

// Products of the same few tokens with several weights: x is prepared once and the rows of all are shared out at once.
int fused_group(const Kernels& k, const sk_call* calls, const View* weights, int count, bool pairs) {
  const int64_t tokens = calls[0].tokens;
  Prepared x;
  if (!prepare(calls[0], weights[0].cols, 0, tokens, tokens, pairs, x)) return SK_NO_MEMORY;
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += ceil_div(weights[i].rows, block_height(weights[i]));
  auto work = [&](int64_t begin, int64_t end, int) {
    alignas(64) float sums[kMaxFused * kBlockRows];
    for (int i = 0; i < count; ++i) {  // begin and end count from the first block of weight i
      const View& w = weights[i];
      const int64_t height = block_height(w), here = ceil_div(w.rows, height);
      for (int64_t b = begin < 0 ? 0 : begin; b < end && b < here; ++b) {
        k.fused(w, x.input, b, pairs, sums, height);
        if (w.layout == SK_SPLIT) add_patches(w, x.input, b, sums, height);
        const int64_t row = b * height, rows = w.rows - row < height ? w.rows - row : height;
        for (int64_t t = 0; t < tokens; ++t) store(k, calls[i], t, row, rows, sums + t * height);
      }
      begin -= here;
      end -= here;
    }
  };
  const int64_t grain = blocks / (int64_t(calls[0].threads) * 8);
  for_each(calls[0].threads, blocks, grain > 4 ? 4 : grain, work);
  return SK_OK;
}

int fused(const Kernels& k, const sk_call& call, const View& w, bool pairs) {
  const bool bitmap = w.layout == SK_BITMAP;
  const int64_t height = bitmap ? kBlockRows : kPanelRows, blocks = ceil_div(w.rows, height);
  // Many tokens: a few panels stay in the second-level cache while the tokens pass.
  int64_t grain = call.tokens > kMaxFused ? 4 : bitmap ? 1 : blocks / (int64_t(call.threads) * 8);
  grain = grain > 4 ? 4 : grain < 1 ? 1 : grain;
  for (int64_t first = 0; first < call.tokens; first += kTokenChunk) {
    const int64_t tokens = call.tokens - first < kTokenChunk ? call.tokens - first : kTokenChunk;
    const int64_t tile = tokens < kMaxFused ? tokens : kMaxFused;
    Prepared x;
    // chunk selects from the activations of one token, so each token's lie together.
    if (!prepare(call, w.cols, first, tokens, w.layout == SK_CHUNK ? 1 : tile, pairs, x)) return SK_NO_MEMORY;
    auto work = [&](int64_t begin, int64_t end, int) {
      alignas(64) float sums[kMaxFused * kBlockRows];
      for (int64_t group = begin; group < end; group += grain)
        for (int64_t t = 0; t < tokens; t += tile)
          for (int64_t b = group; b < group + grain && b < end; ++b) {
            const Input input = part(x, t, tokens - t < tile ? tokens - t : tile);
            k.fused(w, input, b, pairs, sums, height);
            if (w.layout == SK_SPLIT) add_patches(w, input, b, sums, height);
            const int64_t row = b * height, count = w.rows - row < height ? w.rows - row : height;
            for (int64_t i = 0; i < input.tokens; ++i) store(k, call, first + t + i, row, count, sums + i * height);
          }
    };
    for_each(call.threads, blocks, grain, work);
  }
  return SK_OK;
}

struct Group {  // 64 rows being multiplied by the tokens of one pass
  const Kernels& k;
  const View& w;
  const Prepared& x;
  char* panels;
  float* sums;
};

void multiply_group(const Group& g, int64_t group) {
  const int64_t tile_columns = g.w.layout == SK_BITMAP ? 2 : 4;
  const int64_t panel_bytes = kScratch / 4, column_bytes = g.x.pairs ? 32 : 64;
  const int64_t chunk_tiles = panel_bytes / column_bytes / tile_columns;
  Cursor at = {};
  for (int64_t begin = 0; begin < g.w.tiles; begin += chunk_tiles) {
    const int64_t end = begin + chunk_tiles < g.w.tiles ? begin + chunk_tiles : g.w.tiles;
    const int64_t c0 = begin * tile_columns, c1 = end * tile_columns;
    (is_quantised(g.w.layout) ? g.k.quantised->decode : g.k.decode)(g.w, group, at, begin, end, g.x.pairs, g.panels, panel_bytes);
    for (int64_t q = 0; g.w.layout == SK_SPLIT && q < 4 && group * 4 + q < ceil_div(g.w.rows, kPanelRows); ++q)
      write_patches(g.w, group * 4 + q, c0, c1, g.x.pairs, g.panels + q * panel_bytes);
    const int64_t step0 = g.x.pairs ? c0 / 2 : c0, steps = (g.x.pairs ? c1 / 2 : c1) - step0;
    const char* input = g.x.pairs ? reinterpret_cast<const char*>(g.x.input.pairs)
                                  : reinterpret_cast<const char*>(g.x.input.floats);
    for (int64_t t = 0; t < g.x.input.tokens; t += g.x.tile) {
      const int64_t n = g.x.input.tokens - t < g.x.tile ? g.x.input.tokens - t : g.x.tile;
      const char* tile = input + (t * g.x.steps + step0 * n) * 4;
      for (int64_t half = 0; half < 2; ++half)
        g.k.micro(g.panels + 2 * half * panel_bytes, g.panels + (2 * half + 1) * panel_bytes, tile, steps, int(n),
                  g.x.pairs, begin == 0, g.sums + t * kBlockRows + 32 * half, kBlockRows);
    }
  }
}

int blocked(const Kernels& k, const sk_call& call, const View& w, bool pairs) {
  std::atomic<bool> failed{false};
  for (int64_t first = 0; first < call.tokens; first += kTokenChunk) {
    const int64_t tokens = call.tokens - first < kTokenChunk ? call.tokens - first : kTokenChunk;
    Prepared x;
    if (!prepare(call, w.cols, first, tokens, kTokenTile, pairs, x)) return SK_NO_MEMORY;
    const int64_t sums_bytes = tokens * kBlockRows * 4;
    auto work = [&](int64_t begin, int64_t end, int) {
      char* memory = static_cast<char*>(decoded.need(kScratch + sums_bytes));
      if (!memory) {
        failed = true;
        return;
      }
      Group g{k, w, x, memory, reinterpret_cast<float*>(memory + kScratch)};
      for (int64_t b = begin; b < end; ++b) {
        if (w.tiles == 0) memset(g.sums, 0, size_t(sums_bytes));
        multiply_group(g, b);
        const int64_t row = b * kBlockRows, count = w.rows - row < kBlockRows ? w.rows - row : kBlockRows;
        for (int64_t t = 0; t < tokens; ++t) store(k, call, first + t, row, count, g.sums + t * kBlockRows);
      }
    };
    for_each(call.threads, ceil_div(w.rows, kBlockRows), 1, work);
  }
  return failed ? SK_NO_MEMORY : SK_OK;
}

}  // namespace
}  // namespace sk

extern "C" {
int sk_linear(const sk_call* call) {
  if (!call) return SK_BAD_ARGUMENT;
  sk::View w;
  const int status = sk::parse(call->packed, call->packed_bytes, &w);
  if (status != SK_OK) return status;
  if (!sk::sound(*call, w.rows, w.cols)) return SK_BAD_ARGUMENT;
  if (call->tokens == 0 || w.rows == 0) return SK_OK;
  const sk::Kernels& k = sk::kernels();
  const bool pairs = k.pairs && w.dtype == SK_BF16 && call->x_dtype == SK_BF16;
  if (sk::is_quantised(w.layout)) {
    if (call->tokens <= k.quantised->tokens) return sk::linear_quantised(k, *call, w);
    return sk::blocked(k, *call, w, pairs);
  }
  if (call->tokens <= k.fusable(w, pairs)) return sk::fused(k, *call, w, pairs);
  return sk::blocked(k, *call, w, pairs);
}

int sk_linear_group(const sk_call* calls, int count) {
  if (!calls || count < 1 || count > SK_GROUP) return SK_BAD_ARGUMENT;
  const sk::Kernels& k = sk::kernels();
  sk::View weights[SK_GROUP];
  bool together = count > 1, pairs = false;
  for (int i = 0; i < count; ++i) {
    const sk_call& call = calls[i];
    const int status = sk::parse(call.packed, call.packed_bytes, &weights[i]);
    if (status != SK_OK) return status;
    const sk::View& w = weights[i];
    if (!sk::sound(call, w.rows, w.cols)) return SK_BAD_ARGUMENT;
    if (call.x != calls[0].x || call.tokens != calls[0].tokens || call.x_stride != calls[0].x_stride ||
        call.x_dtype != calls[0].x_dtype || call.threads != calls[0].threads || w.cols != weights[0].cols)
      return SK_BAD_ARGUMENT;
    const bool own = k.pairs && w.dtype == SK_BF16 && call.x_dtype == SK_BF16;
    if (i == 0) pairs = own;
    const bool streams = w.layout == SK_SPLIT || w.layout == SK_BITMAP;
    together = together && streams && own == pairs && call.tokens <= sk::kMaxFused && call.tokens <= k.fusable(w, own);
  }
  if (together && calls[0].tokens > 0) return sk::fused_group(k, calls, weights, count, pairs);
  for (int i = 0; i < count; ++i) {
    const int status = sk_linear(&calls[i]);
    if (status != SK_OK) return status;
  }
  return SK_OK;
}

int sk_dense(const sk_call* call, const void* weight, int64_t rows, int64_t cols, int32_t w_dtype) {
  if (!call || rows < 0 || cols < 0 || !sk::known(w_dtype) || (!weight && rows > 0 && cols > 0)) return SK_BAD_ARGUMENT;
  if (!sk::sound(*call, rows, cols)) return SK_BAD_ARGUMENT;
  const sk::Kernels& k = sk::kernels();
  const bool pairs = k.pairs && w_dtype == SK_BF16 && call->x_dtype == SK_BF16;
  for (int64_t first = 0; first < call->tokens; first += sk::kDenseTokens) {
    const int64_t tokens = call->tokens - first < sk::kDenseTokens ? call->tokens - first : sk::kDenseTokens;
    sk::Prepared x;
    if (!sk::prepare(*call, cols, first, tokens, 1, pairs, x)) return SK_NO_MEMORY;
    auto work = [&](int64_t begin, int64_t end, int) {
      alignas(64) float sums[sk::kDenseTokens][64];
      for (int64_t r = begin; r < end; r += 64) {
        const int64_t last = r + 64 < end ? r + 64 : end;
        k.dense(weight, w_dtype, cols, r, last, x.input, x.steps, sums[0], 64);
        for (int64_t t = 0; t < tokens; ++t) sk::store(k, *call, first + t, r, last - r, sums[t]);
      }
    };
    sk::for_each(call->threads, rows, rows >= 512 ? 64 : 16, work);
  }
  return SK_OK;
}

int sk_gram(const void* x, int64_t tokens, int64_t stride, int64_t cols, double* sums, int threads) {
  if (tokens < 0 || cols < 0 || stride < cols || ((!x || !sums) && tokens > 0 && cols > 0)) return SK_BAD_ARGUMENT;
  const sk::Kernels& k = sk::kernels();
  if (!k.gram) return SK_UNSUPPORTED;
  return k.gram(static_cast<const uint16_t*>(x), tokens, stride, cols, sums, threads) ? SK_OK : SK_NO_MEMORY;
}

uint64_t sk_read(const void* data, int64_t bytes, int threads) {
  std::atomic<uint64_t> sum{0};
  const sk::Kernels& k = sk::kernels();
  constexpr int64_t piece = 256 << 10;
  auto work = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i * piece, to = from + piece < bytes ? from + piece : bytes;
      sum += k.read(static_cast<const uint8_t*>(data) + from, to - from);
    }
  };
  sk::for_each(threads, sk::ceil_div(bytes, piece), 1, work);
  return sum;
}
}
