// Products that pass over inputs or outputs. Weights lie column by column, [in][out], so that an input which counts for
// nothing costs no read: its column is never touched. Rows of outputs that nobody asks for are passed over likewise.
//
// The algorithms are here once, written for a vector type V that each instruction set provides:
//   V::Floats                      kLanes floats
//   V::load<dtype>(p)              kLanes values of a dtype, as floats
//   V::part<dtype>(p, n)           the first n of them, zeros behind; nothing behind them is read
//   V::broadcast(f), V::multiply_add(a, b, c) = a b + c, V::get(p), V::put(p, v), V::sum(v)
// Internal linkage, as in generic.h: each file that includes this compiles it for its own target.
#pragma once
#include "internal.h"

namespace sk {

// Outputs that are multiplied by all columns before the next: their sums stay in the first-level cache meanwhile.
constexpr int64_t kMostOutputs = 2048;

struct Inputs {  // activations of one call and what decides about them
  const char* x;  // [tokens][stride]
  int64_t stride, tokens, cols;
  int32_t dtype;
  const float* thresholds;
  int64_t step;  // from one threshold to the next: 0 if there is one for all, otherwise 1
};

struct Kept {  // what is left of them
  int32_t* columns;  // [count], ascending: those that some token keeps
  float* values;     // [tokens][ld]; 0 where this token does not keep the column
  int64_t count, ld, tokens;
  bool bf16;  // the values are bf16 numbers
};

struct RowList {  // rows of a plain weight [rows][cols]
  const void* weight;
  int32_t dtype;
  int64_t cols;
  const int32_t* rows;
  int64_t count;
};

struct PackedColumns;  // columns_packed.h

// Work of one instruction set. Both arrays of Kept have room for kSelectTail more than there are columns.
struct ColumnKernels {
  void (*select)(const Inputs& in, Kept& kept);
  // sums [tokens][ld] = kept inputs times outputs [begin, end) of a weight [cols][rows].
  void (*multiply)(const void* weight, int32_t dtype, int64_t rows, const Kept& kept, int64_t begin, int64_t end,
                   float* sums, int64_t ld);
  // The same for a panel of a packed weight; the sums have room for a multiple of 64 outputs.
  void (*packed)(const PackedColumns& w, const Kept& kept, int64_t panel, float* sums, int64_t ld);
  // One column of a panel: all its outputs.
  void (*unpack)(const PackedColumns& w, int64_t panel, int64_t column, uint16_t* to);
  // out [tokens][ld] = x [tokens][x_ld] times each of the rows.
  void (*rows)(const RowList& w, const float* x, int64_t x_ld, int64_t tokens, float* out, int64_t ld);
};

constexpr int64_t kSelectTail = 16;

namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

// --- which inputs count ----------------------------------------------------------------------------------------
// Written as a negation, so that NaN counts.
inline bool counts(float x, float threshold) { return !(__builtin_fabsf(x) <= threshold); }

template <int32_t Dtype>
void select_scalar(const Inputs& in, Kept& kept) {
  const int64_t size = element_size(Dtype);
  int64_t n = 0;
  for (int64_t j = 0; j < in.cols; ++j) {
    const float threshold = in.thresholds[j * in.step];
    bool any = false;
    for (int64_t t = 0; t < in.tokens; ++t) {
      const float x = to_float(in.x + t * in.stride * size, Dtype, j);
      const bool keep = counts(x, threshold);
      kept.values[t * kept.ld + n] = keep ? x : 0.0f;
      any |= keep;
    }
    kept.columns[n] = int32_t(j);
    n += any;
  }
  kept.count = n;
}

void generic_select(const Inputs& in, Kept& kept) {
  if (in.dtype == SK_BF16) return select_scalar<SK_BF16>(in, kept);
  if (in.dtype == SK_F16) return select_scalar<SK_F16>(in, kept);
  select_scalar<SK_F32>(in, kept);
}

// --- their columns ---------------------------------------------------------------------------------------------
// Columns that are added in one pass over the sums. No processor foresees where the next ones begin, so every line is
// asked for ahead of its use: towards the end of these columns, the first lines of the next.
constexpr int kTogether = 4;
constexpr int64_t kAhead = 8192;  // bytes, of all columns together
// Columns from one that is added to the one that is asked for meanwhile, if pieces of so many bytes are read of them.
inline int64_t columns_ahead(int64_t bytes, int64_t ahead) {
  const int64_t sets = ahead / kTogether / (bytes > 0 ? bytes : 1);
  return (sets > 1 ? sets : 1) * kTogether;
}

template <class V, int32_t Dtype, int T, int N>
inline void add_columns(const uint8_t* const* at, const uint8_t* const* next, const float* x, int64_t x_ld,
                        int64_t outputs, float* sums, int64_t ld) {
  constexpr int64_t kSize = Dtype == SK_F32 ? 4 : 2, kLine = 64 / kSize;
  auto step = [&](int64_t i, auto load) __attribute__((always_inline)) {
    typename V::Floats sum[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[t] = V::get(sums + t * ld + i);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const typename V::Floats w = load(at[n] + i * kSize);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[t] = V::multiply_add(w, V::broadcast(x[t * x_ld + n]), sum[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) V::put(sums + t * ld + i, sum[t]);
  };
  int64_t i = 0;
  auto lines = [&](int64_t end, const uint8_t* const* ask, int64_t shift) __attribute__((always_inline)) {
    for (; i + kLine <= end; i += kLine) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(ask[n] + i * kSize + shift);
#pragma GCC unroll 8
      for (int64_t k = 0; k < kLine; k += V::kLanes)
        step(i + k, [](const uint8_t* p) __attribute__((always_inline)) { return V::template load<Dtype>(p); });
    }
  };
  const int64_t ahead = kAhead / N / kSize < outputs ? kAhead / N / kSize : outputs;
  lines(outputs - ahead, at, ahead * kSize);
  lines(outputs, next, (ahead - outputs) * kSize);
  for (; i < outputs; i += V::kLanes) {
    const int rest = int(outputs - i < V::kLanes ? outputs - i : V::kLanes);
    step(i, [=](const uint8_t* p) __attribute__((always_inline)) { return V::template part<Dtype>(p, rest); });
  }
}

// The sums have room for whole vectors.
template <class V, int32_t Dtype, int T>
void multiply_columns(const void* weight, int64_t rows, const Kept& kept, int64_t begin, int64_t end, float* sums,
                      int64_t ld) {
  const int64_t size = element_size(Dtype);
  const uint8_t* base = static_cast<const uint8_t*>(weight) + begin * size;
  const int64_t last = kept.count - 1;
  auto column = [&](int64_t k) { return base + (last < 0 ? 0 : kept.columns[k < last ? k : last]) * rows * size; };
  for (int t = 0; t < T; ++t) memset(sums + t * ld, 0, size_t(round_up(end - begin, V::kLanes)) * 4);
  const uint8_t* at[kTogether];
  const uint8_t* next[kTogether];
  const int64_t ahead = columns_ahead((end - begin) * size, kAhead);
  int64_t k = 0;
  for (; k + kTogether <= kept.count; k += kTogether) {
    for (int n = 0; n < kTogether; ++n) {
      at[n] = column(k + n);
      next[n] = column(k + ahead + n);
    }
    add_columns<V, Dtype, T, kTogether>(at, next, kept.values + k, kept.ld, end - begin, sums, ld);
  }
  for (; k < kept.count; ++k) {
    at[0] = column(k);
    next[0] = column(k + ahead);
    add_columns<V, Dtype, T, 1>(at, next, kept.values + k, kept.ld, end - begin, sums, ld);
  }
}

template <class V, int T>
void multiply_tokens(const void* weight, int32_t dtype, int64_t rows, const Kept& kept, int64_t begin, int64_t end,
                     float* sums, int64_t ld) {
  if (dtype == SK_BF16) return multiply_columns<V, SK_BF16, T>(weight, rows, kept, begin, end, sums, ld);
  if (dtype == SK_F16) return multiply_columns<V, SK_F16, T>(weight, rows, kept, begin, end, sums, ld);
  multiply_columns<V, SK_F32, T>(weight, rows, kept, begin, end, sums, ld);
}

template <class V>
void multiply(const void* weight, int32_t dtype, int64_t rows, const Kept& kept, int64_t begin, int64_t end,
              float* sums, int64_t ld) {
  switch (kept.tokens) {
    case 1: return multiply_tokens<V, 1>(weight, dtype, rows, kept, begin, end, sums, ld);
    case 2: return multiply_tokens<V, 2>(weight, dtype, rows, kept, begin, end, sums, ld);
    case 3: return multiply_tokens<V, 3>(weight, dtype, rows, kept, begin, end, sums, ld);
    case 4: return multiply_tokens<V, 4>(weight, dtype, rows, kept, begin, end, sums, ld);
  }
}

// --- rows that are asked for -----------------------------------------------------------------------------------
template <class V, int32_t Dtype, int T, int N>
inline void add_rows(const uint8_t* const* at, const uint8_t* const* next, int64_t cols, const float* x, int64_t x_ld,
                     float (*out)[N]) {
  constexpr int64_t kSize = Dtype == SK_F32 ? 4 : 2, kLine = 64 / kSize;
  typename V::Floats sum[T][N];
  for (auto& token : sum)
    for (auto& s : token) s = V::broadcast(0.0f);
  auto step = [&](int64_t i, auto load, auto input) __attribute__((always_inline)) {
    typename V::Floats v[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) v[t] = input(x + t * x_ld + i);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const typename V::Floats w = load(at[n] + i * kSize);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[t][n] = V::multiply_add(w, v[t], sum[t][n]);
    }
  };
  int64_t i = 0;
  auto lines = [&](int64_t end, const uint8_t* const* ask, int64_t shift) __attribute__((always_inline)) {
    for (; i + kLine <= end; i += kLine) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) __builtin_prefetch(ask[n] + i * kSize + shift);
#pragma GCC unroll 8
      for (int64_t k = 0; k < kLine; k += V::kLanes)
        step(i + k, [](const uint8_t* p) __attribute__((always_inline)) { return V::template load<Dtype>(p); },
             [](const float* p) __attribute__((always_inline)) { return V::get(p); });
    }
  };
  const int64_t ahead = kAhead / N / kSize < cols ? kAhead / N / kSize : cols;
  lines(cols - ahead, at, ahead * kSize);
  lines(cols, next, (ahead - cols) * kSize);
  for (; i < cols; i += V::kLanes) {
    const int rest = int(cols - i < V::kLanes ? cols - i : V::kLanes);
    step(i, [=](const uint8_t* p) __attribute__((always_inline)) { return V::template part<Dtype>(p, rest); },
         [=](const float* p) __attribute__((always_inline)) {
           return V::template part<SK_F32>(reinterpret_cast<const uint8_t*>(p), rest);
         });
  }
  for (int t = 0; t < T; ++t)
    for (int n = 0; n < N; ++n) out[t][n] = V::sum(sum[t][n]);
}

template <class V, int32_t Dtype, int T, int N>
void rows_together(const RowList& w, int64_t first, const float* x, int64_t x_ld, float* out, int64_t ld) {
  const uint8_t* at[N];
  const uint8_t* next[N];
  for (int n = 0; n < N; ++n) {
    const int64_t after = first + kTogether + n < w.count ? first + kTogether + n : w.count - 1;
    at[n] = static_cast<const uint8_t*>(w.weight) + w.rows[first + n] * w.cols * element_size(Dtype);
    next[n] = static_cast<const uint8_t*>(w.weight) + w.rows[after] * w.cols * element_size(Dtype);
  }
  float sums[T][N];
  add_rows<V, Dtype, T, N>(at, next, w.cols, x, x_ld, sums);
  for (int t = 0; t < T; ++t) memcpy(out + t * ld + first, sums[t], sizeof sums[t]);
}

template <class V, int32_t Dtype, int T>
void rows_of_dtype(const RowList& w, const float* x, int64_t x_ld, float* out, int64_t ld) {
  int64_t i = 0;
  for (; i + kTogether <= w.count; i += kTogether) rows_together<V, Dtype, T, kTogether>(w, i, x, x_ld, out, ld);
  for (; i < w.count; ++i) rows_together<V, Dtype, T, 1>(w, i, x, x_ld, out, ld);
}

template <class V, int T>
void rows_of_tokens(const RowList& w, const float* x, int64_t x_ld, float* out, int64_t ld) {
  if (w.dtype == SK_BF16) return rows_of_dtype<V, SK_BF16, T>(w, x, x_ld, out, ld);
  if (w.dtype == SK_F16) return rows_of_dtype<V, SK_F16, T>(w, x, x_ld, out, ld);
  rows_of_dtype<V, SK_F32, T>(w, x, x_ld, out, ld);
}

template <class V>
void rows(const RowList& w, const float* x, int64_t x_ld, int64_t tokens, float* out, int64_t ld) {
  switch (tokens) {
    case 1: return rows_of_tokens<V, 1>(w, x, x_ld, out, ld);
    case 2: return rows_of_tokens<V, 2>(w, x, x_ld, out, ld);
    case 3: return rows_of_tokens<V, 3>(w, x, x_ld, out, ld);
    case 4: return rows_of_tokens<V, 4>(w, x, x_ld, out, ld);
  }
}

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
