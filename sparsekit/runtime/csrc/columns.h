// Products that pass over inputs. Weights lie column by column, [in][out], so that an input which counts for nothing
// costs no read: its column is never touched.
//
// The algorithms are here once, written for a vector type V that each instruction set provides:
//   V::Floats                      kLanes floats
//   V::load<dtype>(p)              kLanes values of a dtype, as floats
//   V::part<dtype>(p, n)           the first n of them, zeros behind; nothing behind them is read
//   V::broadcast(f), V::multiply_add(a, b, c) = a b + c, V::get(p), V::put(p, v)
// Internal linkage, as in generic.h: each file that includes this compiles it for its own target.
#pragma once
#include "internal.h"

namespace sk {

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
};

// Work of one instruction set. Both arrays of Kept have room for kSelectTail more than there are columns.
struct ColumnKernels {
  void (*select)(const Inputs& in, Kept& kept);
  // sums [tokens][ld] = kept inputs times outputs [begin, end) of a weight [cols][rows].
  void (*multiply)(const void* weight, int32_t dtype, int64_t rows, const Kept& kept, int64_t begin, int64_t end,
                   float* sums, int64_t ld);
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
constexpr int64_t kColumnsAhead = 8192;  // bytes, of all columns together

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
  const int64_t ahead = kColumnsAhead / N / kSize < outputs ? kColumnsAhead / N / kSize : outputs;
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
  for (int n = 0; n < kTogether; ++n) next[n] = column(n);
  int64_t k = 0;
  for (; k + kTogether <= kept.count; k += kTogether) {
    for (int n = 0; n < kTogether; ++n) {
      at[n] = next[n];
      next[n] = column(k + kTogether + n);
    }
    add_columns<V, Dtype, T, kTogether>(at, next, kept.values + k, kept.ld, end - begin, sums, ld);
  }
  for (; k < kept.count; ++k) {
    at[0] = column(k);
    next[0] = column(k + 1);
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

#pragma GCC diagnostic pop

}  // namespace
}  // namespace sk
