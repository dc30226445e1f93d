// C interface of the sparsekit CPU kernels. No C++, Python or torch types cross it; no exception leaves it.
//
// A weight is packed once (sk_plan_* -> one buffer the caller owns) and multiplied many times (sk_linear).
// Shapes: weight [rows, cols] = [out, in], x [tokens, cols], y [tokens, rows] = x weight^T + bias.
#ifndef SPARSEKIT_KERNELS_H
#define SPARSEKIT_KERNELS_H
#include <stdint.h>

#if defined(__GNUC__)
#define SK_API __attribute__((visibility("default")))
#else
#define SK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SK_ABI_VERSION 6
#define SK_TAIL 64 /* zero bytes behind every stream of a packed buffer; kernels may read them */

enum sk_status {
  SK_OK = 0,
  SK_BAD_ARGUMENT = 1, /* a null pointer, a negative size, an unknown enum value, a code or scale out of range */
  SK_BAD_MASK = 2,     /* bitmask, row offsets and value count disagree, a padding bit is set, or the mask lacks the
                          structure that the layout needs */
  SK_BAD_PACKED = 3,   /* a buffer that sk_plan_pack did not write, or of another size */
  SK_NO_MEMORY = 4,
  SK_UNSUPPORTED = 5,  /* this processor cannot run the instruction set, or the layout cannot hold the values */
};
enum sk_dtype { SK_BF16 = 0, SK_F16 = 1, SK_F32 = 2, SK_I8 = 3 /* of source values only */ };
enum sk_layout {
  SK_BITMAP = 1,
  SK_SPLIT = 2, /* bf16 */
  SK_INT8 = 3,
  SK_INT4 = 4,
  SK_CHUNK = 5, /* bf16; 64 divides cols and every row keeps the same n of each 64 columns, n = 4, 8 or 16 */
  SK_BLOCK = 6, /* 16 divides rows, 4 divides cols, and each block of 16 rows x 4 columns is kept whole or not at all */
};

/* One tensor as it lies on disk: a bitmask and raw values, or integers with one scale for every 64 columns of a row.
   SK_INT8 takes integers -127..127, SK_INT4 -8..8; weight = integer x scale, in fp32, rounded to weight_dtype. */
typedef struct sk_bitmask {
  const uint8_t* mask;        /* [rows, ceil(cols / 8)], bit i of byte j = column 8 j + i */
  const void* values;         /* [nnz] row-major, of `dtype`; any alignment */
  const int64_t* row_offsets; /* [rows], exclusive prefix sums; may be null, then they are derived */
  int64_t rows, cols, nnz;
  int32_t dtype;
  int32_t weight_dtype;       /* what sk_unpack returns if dtype is SK_I8; ignored otherwise, where it is `dtype` */
  const uint16_t* scales;     /* fp16 [rows, ceil(cols / 64)], finite, sign bit clear; null unless dtype is SK_I8 */
} sk_bitmask;

/* What a packed buffer holds. */
typedef struct sk_info {
  int64_t rows, cols, nnz, bytes, patches; /* patches: values outside their block's dictionary (SK_SPLIT) */
  int32_t layout, dtype;
  int32_t panels3, panels4, panels8; /* SK_SPLIT: 16-row blocks with 3-bit, 4-bit codes, and whole high bytes */
} sk_info;

/* One product. x and y may have any alignment; strides are in elements. */
typedef struct sk_call {
  const void* packed;
  int64_t packed_bytes;
  const void* x;
  const void* bias; /* [rows] of y_dtype, or null */
  void* y;
  int64_t tokens, x_stride, y_stride;
  int32_t x_dtype, y_dtype, threads;
} sk_call;

typedef void (*sk_body)(void* argument, int worker, int workers);
/* Runs body(argument, i, n) for all i in 0..n-1, n <= threads, and returns when all have returned. */
typedef void (*sk_runner)(void* context, int threads, sk_body body, void* argument);

SK_API int sk_abi_version(void);
SK_API const char* sk_build_id(void);

/* Instruction sets: names ("portable", "avx2", "avx512", "avx512bf16"; "portable", "neon") by rank, null past the end. */
SK_API const char* sk_isa_name(int index);
SK_API int sk_isa_supported(const char* name); /* compiled in and runnable here */
SK_API int sk_isa_use(const char* name);       /* null: the best; returns a status */
SK_API const char* sk_isa_current(void);

/* Threads. Default: a pool of parked threads owned by this library. */
SK_API void sk_use_runner(sk_runner runner, void* context);
SK_API void sk_use_own_pool(void);
/* Run on the OpenMP runtime the process already has, by its entry points (GOMP_parallel, omp_get_thread_num,
   omp_get_num_threads): torch's own threads, without linking a second runtime. */
SK_API void sk_use_openmp(void* gomp_parallel, void* thread_num, void* num_threads);

/* Packing. The source arrays must stay alive until sk_plan_free. */
typedef struct sk_plan sk_plan;
SK_API int sk_plan_create(int layout, const sk_bitmask* source, int threads, sk_plan** plan);
SK_API int64_t sk_plan_bytes(const sk_plan* plan);
SK_API int sk_plan_pack(const sk_plan* plan, void* out, int64_t out_bytes, int threads);
SK_API void sk_plan_free(sk_plan* plan);
SK_API int sk_packed_info(const void* packed, int64_t bytes, sk_info* info);
/* Dense weight [rows, cols] in the packed dtype, bit for bit; holes are +0. */
SK_API int sk_unpack(const void* packed, int64_t bytes, void* dense, int threads);

/* One packed tensor as docs/format.md lays it on disk. Nothing in it is trusted but the sizes of the buffers. */
enum sk_disk_layout { SK_DISK_DENSE = 0, SK_DISK_BITMASK = 1, SK_DISK_NM = 2, SK_DISK_BLOCK = 3 };
enum sk_encoding { SK_ENCODING_RAW = 0, SK_ENCODING_SPLIT = 1, SK_ENCODING_INT8 = 2, SK_ENCODING_INT4 = 3 };
typedef struct sk_part {
  const void* data; /* any alignment */
  int64_t bytes;    /* -1: the tensor has no such part */
} sk_part;
typedef struct sk_disk {
  sk_part mask, offsets, index, values, low, code, width, dictionary, patch_row, patch_col, patch_value, scales;
  int64_t rows, cols, nnz;
  int32_t layout, encoding, dtype;
  int32_t unit[2]; /* nm: N, M; block: rows, columns of a block */
} sk_disk;
/* Proves every length, index, count and padding bit, and writes what kernels are packed from:
   mask [rows, ceil(cols / 8)], wanted for nm and block; values [nnz] row-major, of the dtype (split, block) or i8
   (int8, int4; an int4 code q is written as the number it stands for). Both are null where the stored part is that
   already. SK_BAD_MASK: something does not hold, and what was written so far means nothing. */
SK_API int sk_disk_read(const sk_disk* disk, void* mask, void* values, int threads);
/* Proves a tensor of the form bitmask/split and plans its SK_SPLIT buffer without decoding a value; the tensor must stay
   alive until sk_plan_free. SK_UNSUPPORTED for other forms and on instruction sets without a fast way. */
SK_API int sk_plan_from_disk(const sk_disk* disk, int threads, sk_plan** plan);
/* Values of codes: [nnz] of `dtype` = code x scale of its row and 64 columns, multiplied in fp32. The mask, null for
   all ones, and the f16 scales [rows, ceil(cols / 64)] fit together as sk_disk_read has proven. */
SK_API int sk_dequantize(const sk_bitmask* codes, const void* scales, void* values, int threads);
/* Mask and values to the dense matrix, with +0 in the holes, and back: a weight is kept unless all its bits are 0.
   sk_dense_mask returns the number of kept weights, or -1 if memory runs out. */
SK_API int sk_expand(const sk_bitmask* source, void* dense, int threads);
SK_API int64_t sk_dense_mask(const void* dense, int64_t rows, int64_t cols, int64_t size, void* mask, int threads);
SK_API int sk_compact(const void* dense, const sk_bitmask* shape, void* values, int threads);

SK_API int sk_linear(const sk_call* call);
/* Up to SK_GROUP products of one x (pointer, tokens, stride, dtype and threads are the same in all calls): for few
   tokens x is prepared once, and the threads share the rows of all weights in one go. */
#define SK_GROUP 3
SK_API int sk_linear_group(const sk_call* calls, int count);
/* The same with a plain row-major weight [rows, cols] of `w_dtype`: the streaming dense kernel. */
SK_API int sk_dense(const sk_call* call, const void* weight, int64_t rows, int64_t cols, int32_t w_dtype);
/* Products that pass over inputs: token t of up to SK_COLUMN_TOKENS counts input j unless |x[t, j]| <= thresholds[j],
   compared in fp32, so NaN counts. The weight is column-major, [cols][rows]; a column is read if some token counts its
   input. `count` thresholds: cols, or 1 for all. Sums are fp32, in an order that neither threads nor their number
   change. */
#define SK_COLUMN_TOKENS 4
SK_API int sk_columns(const sk_call* call, const void* weight, int64_t rows, int64_t cols, int32_t w_dtype,
                      const float* thresholds, int64_t count);
/* The same with a bf16 weight in a buffer of its own, in fewer bytes and without zeros, which are passed over too: a
   weight is stored unless all its bits are 0. A plan makes it of dense [cols][rows], which must stay alive until
   sk_columns_plan_free; sk_columns_unpack gives dense back bit for bit. Only sk_columns_prove looks at all of a buffer,
   the others at its header: SK_BAD_PACKED. Info: rows, columns, values. */
typedef struct sk_columns_plan sk_columns_plan;
SK_API int sk_columns_plan_create(const void* dense, int64_t rows, int64_t cols, int threads, sk_columns_plan** plan);
SK_API int64_t sk_columns_plan_bytes(const sk_columns_plan* plan);
SK_API int sk_columns_plan_pack(const sk_columns_plan* plan, void* out, int64_t out_bytes, int threads);
SK_API void sk_columns_plan_free(sk_columns_plan* plan);
SK_API int sk_columns_info(const void* packed, int64_t bytes, int64_t info[3]);
SK_API int sk_columns_prove(const void* packed, int64_t bytes, int threads);
SK_API int sk_columns_unpack(const void* packed, int64_t bytes, void* dense, int threads);
SK_API int sk_columns_packed(const sk_call* call, const float* thresholds, int64_t count);
/* Up to SK_COLUMN_TOKENS tokens times the rows of a plain row-major weight [rows, cols] that some token keeps: keep
   [tokens][keep_stride], not 0 = kept. Where a token does not keep a row its result is 0, without bias. */
SK_API int sk_rows(const sk_call* call, const void* weight, int64_t rows, int64_t cols, int32_t w_dtype,
                   const uint8_t* keep, int64_t keep_stride);
/* sums [cols, cols] float64 += X^T X of bf16 inputs x [tokens, cols], on and above the diagonal; below it nothing has a
   meaning. Products are exact; sums of up to 512 tokens are float32. SK_UNSUPPORTED where no instruction set in use
   multiplies bf16 faster than floats. */
SK_API int sk_gram(const void* x, int64_t tokens, int64_t stride, int64_t cols, double* sums, int threads);
/* Reads `bytes` bytes and returns a checksum: the memory bandwidth a kernel can hope for. */
SK_API uint64_t sk_read(const void* data, int64_t bytes, int threads);

/* Registers the CPU kernels of the torch operators sparsekit::linear_* (whose schemas exist already) through
   libtorch's stable C interface. `addresses` are those of sk_torch_symbol(0 .. count - 1) in the libtorch that is
   loaded, `dtypes` its numbers of bf16, fp16, fp32, u8 and bool, `torch_version` its version as it encodes it. */
SK_API const char* sk_torch_symbol(int index);
SK_API int sk_torch_register(void* const* addresses, int count, const int32_t* dtypes, uint64_t torch_version);
/* The same for the operators that pass over inputs, after sk_torch_register. */
SK_API int sk_torch_register_columns(uint64_t torch_version);

#ifdef __cplusplus
}
#endif
#endif
