// Packs random weights in every layout through the C interface alone, multiplies with every instruction set that runs
// here, and compares with float64; unpacking must give every bit back. Prints a line for each instruction set, or what
// is wrong and fails. Meant for processors this was cross-compiled for, under an emulator as well.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "sparsekit_kernels.h"

namespace {

std::mt19937 random_bits(7);

struct Case {
  int layout, dtype;
  int64_t rows, cols;
  int kept;        // SK_CHUNK: values in 64 columns; others: percent of the weights, or of the blocks
  bool wild;       // exponents all over the place: patches and wide codes for SK_SPLIT
};

struct Weight {
  std::vector<uint8_t> mask, bits, values;  // bits: dense, of the dtype
  std::vector<double> dense;
  std::vector<uint16_t> scales;  // fp16, SK_INT8 and SK_INT4
  int64_t nnz = 0;
};

bool quantised(int layout) { return layout == SK_INT8 || layout == SK_INT4; }
int64_t size_of(int dtype) { return dtype == SK_F32 ? 4 : 2; }
bool chance(int percent) { return int(random_bits() % 100) < percent; }

double decode(uint32_t bits, int dtype) {
  if (dtype != SK_F16) {
    const uint32_t wide = dtype == SK_F32 ? bits : bits << 16;
    float f;
    memcpy(&f, &wide, 4);
    return double(f);
  }
  const int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
  const double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

// A finite value of about 2^-7, or of any size between 2^-30 and 2^8.
uint32_t some_bits(int dtype, bool wild) {
  const uint32_t r = uint32_t(random_bits());
  const uint32_t below = wild && chance(20) ? r >> 8 & 31 : r >> 8 & 3;
  if (dtype == SK_F16) return (r & 1) << 15 | (below < 4 ? 8 - below : 20) << 10 | (r >> 16 & 1023);
  const uint32_t bits = (r & 1) << 31 | (below < 4 ? 120 - below : 104 + below) << 23 | (r >> 8 & 0x7fffff);
  return dtype == SK_F32 ? bits : bits >> 16;
}

std::vector<bool> choose(const Case& c) {
  std::vector<bool> keep(size_t(c.rows * c.cols));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t k = 0; k < c.cols; ++k) {
      const size_t at = size_t(r * c.cols + k);
      if (c.layout == SK_CHUNK) {  // selection sampling
        const int64_t left = 64 - k % 64;
        int64_t taken = 0;
        for (int64_t j = k - k % 64; j < k; ++j) taken += keep[size_t(r * c.cols + j)];
        keep[at] = int64_t(random_bits() % uint32_t(left)) < c.kept - taken;
      } else if (c.layout == SK_BLOCK && (r % 16 || k % 4)) {
        keep[at] = keep[size_t((r - r % 16) * c.cols + k - k % 4)];
      } else {
        keep[at] = chance(c.kept);
      }
    }
  return keep;
}

Weight make(const Case& c) {
  Weight w;
  const std::vector<bool> keep = choose(c);
  const int64_t stride = (c.cols + 7) / 8, groups = (c.cols + 63) / 64, size = size_of(c.dtype);
  w.mask.assign(size_t(c.rows * stride), 0);
  w.bits.assign(size_t(c.rows * c.cols * size), 0);
  w.dense.assign(size_t(c.rows * c.cols), 0.0);
  for (int64_t i = 0; i < c.rows * groups; ++i) w.scales.push_back(uint16_t(0x2000 + random_bits() % 1024));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t k = 0; k < c.cols; ++k) {
      const size_t at = size_t(r * c.cols + k);
      if (!keep[at]) continue;
      ++w.nnz;
      w.mask[size_t(r * stride + k / 8)] |= uint8_t(1 << k % 8);
      if (quantised(c.layout)) {
        const int most = c.layout == SK_INT8 ? 127 : 8;
        int q = int(random_bits() % uint32_t(2 * most)) - most;
        q += q >= 0;  // a mask keeps no zero of int4
        w.values.push_back(uint8_t(int8_t(q)));
        const float value = float(q) * float(decode(w.scales[size_t(r * groups + k / 64)], SK_F16));
        w.dense[at] = double(value);
        memcpy(&w.bits[at * 4], &value, 4);
        continue;
      }
      const uint32_t bits = some_bits(c.dtype, c.wild);
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&bits);  // little-endian, as the kernels assume
      w.values.insert(w.values.end(), bytes, bytes + size);
      memcpy(&w.bits[at * size_t(size)], bytes, size_t(size));
      w.dense[at] = decode(bits, c.dtype);
    }
  return w;
}

int failures = 0;
void expect(bool good, const char* what, const Case& c, int64_t tokens) {
  if (good) return;
  ++failures;
  printf("%s: %s, layout %d dtype %d, %d x %d, tokens %d\n", sk_isa_current(), what, c.layout, c.dtype, int(c.rows),
         int(c.cols), int(tokens));
}

void product(const Case& c, const Weight& w, const std::vector<uint64_t>& packed, int64_t tokens, int x_dtype) {
  std::vector<uint8_t> x(size_t(tokens * c.cols * size_of(x_dtype)) + 1);
  std::vector<double> exact(size_t(tokens * c.cols));
  for (size_t i = 0; i < exact.size(); ++i) {
    const uint32_t bits = some_bits(x_dtype, false);
    memcpy(&x[i * size_t(size_of(x_dtype))], &bits, size_t(size_of(x_dtype)));
    exact[i] = decode(bits, x_dtype);
  }
  std::vector<float> y(size_t(tokens * c.rows), NAN), bias(size_t(c.rows), 0.25f);
  sk_call call = {packed.data(), int64_t(packed.size() * 8), x.data(), bias.data(), y.data(), tokens, c.cols, c.rows,
                  x_dtype, SK_F32, 2};
  expect(sk_linear(&call) == SK_OK, "sk_linear refused", c, tokens);
  double worst = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < c.rows; ++r) {
      double sum = 0.25, scale = 1e-6;
      for (int64_t k = 0; k < c.cols; ++k) {
        const double term = w.dense[size_t(r * c.cols + k)] * exact[size_t(t * c.cols + k)];
        sum += term;
        scale += fabs(term);
      }
      const double error = fabs(double(y[size_t(t * c.rows + r)]) - sum) / (scale + 0.25);
      if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
  // Few tokens of int8 and int4 are multiplied with activations of eight bits.
  expect(worst < (quantised(c.layout) ? 2e-2 : 1e-5), "wrong product", c, tokens);
}

void check(const Case& c) {
  const Weight w = make(c);
  sk_bitmask source = {};
  source.mask = w.mask.data();
  source.values = w.values.data();
  source.rows = c.rows;
  source.cols = c.cols;
  source.nnz = w.nnz;
  source.dtype = quantised(c.layout) ? SK_I8 : c.dtype;
  source.weight_dtype = c.dtype;
  source.scales = quantised(c.layout) ? w.scales.data() : nullptr;
  sk_plan* plan = nullptr;
  expect(sk_plan_create(c.layout, &source, 2, &plan) == SK_OK, "sk_plan_create refused", c, 0);
  if (!plan) return;
  std::vector<uint64_t> packed(size_t(sk_plan_bytes(plan)) / 8);
  expect(sk_plan_pack(plan, packed.data(), sk_plan_bytes(plan), 2) == SK_OK, "sk_plan_pack refused", c, 0);
  sk_plan_free(plan);
  std::vector<uint8_t> dense(w.bits.size() + 1);
  expect(sk_unpack(packed.data(), int64_t(packed.size() * 8), dense.data(), 2) == SK_OK, "sk_unpack refused", c, 0);
  expect(memcmp(dense.data(), w.bits.data(), w.bits.size()) == 0, "unpack changed a bit", c, 0);
  for (int64_t tokens : {1, 2, 3, 5, 17, 29})
    for (int x_dtype : {SK_BF16, SK_F16, SK_F32}) product(c, w, packed, tokens, x_dtype);
}

void check_dense(int dtype, int64_t rows, int64_t cols) {
  const Case c = {0, dtype, rows, cols, 100, false};
  const Weight w = make(c);
  std::vector<float> x(size_t(cols), 0.5f), y(size_t(rows), NAN);
  sk_call call = {nullptr, 0, x.data(), nullptr, y.data(), 1, cols, rows, SK_F32, SK_F32, 1};
  expect(sk_dense(&call, w.bits.data(), rows, cols, dtype) == SK_OK, "sk_dense refused", c, 1);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0, scale = 1e-6;
    for (int64_t k = 0; k < cols; ++k) {
      sum += w.dense[size_t(r * cols + k)] * 0.5;
      scale += fabs(w.dense[size_t(r * cols + k)]);
    }
    if (!(fabs(double(y[size_t(r)]) - sum) < 1e-5 * scale)) return expect(false, "wrong dense product", c, 1);
  }
}

// Columns of inputs up to 0.5 are passed over; each of the tokens has its own.
void check_columns(int dtype, int64_t rows, int64_t cols, int64_t tokens) {
  const Case c = {0, dtype, rows, cols, 100, false};
  const Weight w = make(c);
  const int64_t size = size_of(dtype);
  std::vector<uint8_t> columns(w.bits.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < cols; ++k)
      memcpy(&columns[size_t((k * rows + r) * size)], &w.bits[size_t((r * cols + k) * size)], size_t(size));
  std::vector<float> x(size_t(tokens * cols)), y(size_t(tokens * rows), NAN);
  for (float& value : x) value = float(int(random_bits() % 17) - 8) / 8;
  const float threshold = 0.5f;
  sk_call call = {nullptr, 0, x.data(), nullptr, y.data(), tokens, cols, rows, SK_F32, SK_F32, 2};
  expect(sk_columns(&call, columns.data(), rows, cols, dtype, &threshold, 1) == SK_OK, "sk_columns refused", c, tokens);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0, scale = 1e-6;
      for (int64_t k = 0; k < cols; ++k) {
        const double input = double(x[size_t(t * cols + k)]);
        if (!(fabs(input) > 0.5)) continue;
        sum += w.dense[size_t(r * cols + k)] * input;
        scale += fabs(w.dense[size_t(r * cols + k)] * input);
      }
      if (!(fabs(double(y[size_t(t * rows + r)]) - sum) < 1e-5 * scale))
        return expect(false, "wrong product of columns", c, tokens);
    }
}

}  // namespace

int main() {
  const Case cases[] = {
      {SK_BITMAP, SK_BF16, 70, 133, 50, false}, {SK_BITMAP, SK_F16, 70, 133, 50, false},
      {SK_BITMAP, SK_F32, 65, 66, 30, true},    {SK_SPLIT, SK_BF16, 70, 133, 50, false},
      {SK_SPLIT, SK_BF16, 40, 260, 90, false},  {SK_SPLIT, SK_BF16, 33, 518, 60, true},
      {SK_INT8, SK_F32, 50, 133, 50, false},    {SK_INT4, SK_F32, 50, 133, 50, false},
      {SK_CHUNK, SK_BF16, 40, 192, 4, false},   {SK_CHUNK, SK_BF16, 40, 192, 8, false},
      {SK_CHUNK, SK_BF16, 33, 128, 16, true},   {SK_BLOCK, SK_BF16, 48, 132, 50, true},
      {SK_BLOCK, SK_F16, 48, 132, 50, false},   {SK_BLOCK, SK_F32, 80, 68, 30, true},
      {SK_BITMAP, SK_BF16, 64, 5000, 50, false}, {SK_SPLIT, SK_BF16, 16, 5000, 50, false},
  };
  for (int i = 0; sk_isa_name(i); ++i) {
    if (!sk_isa_supported(sk_isa_name(i))) continue;
    if (sk_isa_use(sk_isa_name(i)) != SK_OK || strcmp(sk_isa_current(), sk_isa_name(i)) != 0) return 2;
    const int before = failures;
    random_bits.seed(7);
    for (const Case& c : cases) check(c);
    for (int dtype : {SK_BF16, SK_F16, SK_F32}) check_dense(dtype, 17, 75);
    for (int dtype : {SK_BF16, SK_F16, SK_F32})
      for (int64_t tokens = 1; tokens <= SK_COLUMN_TOKENS; ++tokens) check_columns(dtype, 131, 75, tokens);
    printf("%s: %s\n", sk_isa_name(i), failures == before ? "good" : "WRONG");
  }
  return failures ? 1 : 0;
}
