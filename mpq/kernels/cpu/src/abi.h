/* Structs and constants shared with Python: mpq/kernels/cpu/abi.py declares each as a ctypes.Structure.
 *
 * A weight is cut into panels of 64 rows; a panel is one stream that one thread reads front to back. It is a sequence of
 * tiles: the scales of the tile's segments (64 for each segment), their zero points (64 bytes for each), then the codes.
 * With one scale for a whole row, the 64 scales stand once, at the panel's end.
 *
 * Codes come in steps of 64: 4 columns of 16 rows, a row's 4 columns side by side. A quad is 4 columns of the panel's
 * 64 rows: 4 steps, 32 * bits bytes. 8 bits: one step after another; 4 bits: two steps in the nibbles of 64 bytes; 2 bits:
 * four steps in the bit pairs of 64 bytes; other widths: 64 codes as a little-endian bit stream. docs/kernels.md draws it.
 */
#ifndef MPQ_ABI_H
#define MPQ_ABI_H
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if UINTPTR_MAX == UINT64_MAX /* abi.py declares the same layout; its test compares every field */
#define ABI_ASSERT(type, size, last, offset) \
  _Static_assert(sizeof(type) == (size) && offsetof(type, last) == (offset), "abi.py declares another layout of " #type)
#else
#define ABI_ASSERT(type, size, last, offset) _Static_assert(1, "")
#endif

#define PANEL_ROWS 64

/* Weight kinds: how a code becomes a number, factor * (level - offset) * scale. The level is
 * INTEGER: the code; TABLE8: a byte from `low`; TABLE16: 256 * (high - 128) + low, from both tables;
 * TABLE_BF16: a bf16 from both tables (its steps hold columns 0 and 1 of four rows, then columns 2 and 3, four times). */
enum { MPQ_INTEGER, MPQ_TABLE8, MPQ_TABLE16, MPQ_TABLE_BF16 };
enum { MPQ_SCALE_FP32, MPQ_SCALE_FP16, MPQ_SCALE_BF16, MPQ_SCALE_E8M0, MPQ_SCALE_E4M3, MPQ_SCALE_UE5M3 };

typedef void (*mpq_parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, or NULL */

/* A weight's metadata, independent of its values. */
typedef struct {
  int64_t rows, cols, panel_bytes;
  int32_t bits, kind, offset;
  int32_t group;       /* columns that share a scale */
  int32_t segment;     /* the same, padded to a multiple of 4 */
  int32_t segments;    /* of a tile */
  int32_t tiles;       /* of a panel */
  int32_t scale_kind;
  int32_t scale_bytes;
  int32_t row_scales;  /* one scale for each row, at the panel's end */
  int32_t zeros;       /* zero points follow the scales */
  int32_t bf16_terms;  /* bf16 numbers whose sum is a weight with its group's scale: 1 exactly, 2 to 2**-17 of it */
  float factor;
  uint8_t low[256], high[256];      /* tables by code: of bytes, or of a bf16's two bytes */
  uint64_t low_matrix, high_matrix; /* TABLE_BF16: 8 x 8 matrices over GF(2) from a code's bits to those bytes', for */
  int32_t high_flip, normal_mask;   /* codes with any bit of `normal_mask`; then high ^= high_flip. 0: no such map */
} mpq_weight;
ABI_ASSERT(mpq_weight, 616, normal_mask, 612);

typedef struct {
  const uint8_t *panels;
  const float *tensor_scale; /* or NULL */
  const void *x;             /* (tokens, cols), rows `stride` elements apart */
  int64_t tokens, stride;
  const void *bias;          /* (rows,) or NULL */
  void *out;                 /* (tokens, rows), rows `out_stride` elements apart */
  int64_t out_stride;
  int32_t x_is_bf16, bias_is_bf16, out_is_bf16; /* otherwise float32 */
  int32_t planes;            /* int8 planes of an activation: 2 is nearly exact; 1 has a float16 scale for each token */
  int32_t threads, level;
  int8_t *skipped;           /* (tokens,) or NULL: 1 for tokens not computed, which integers cannot represent */
  mpq_parallel parallel;
} mpq_call;
ABI_ASSERT(mpq_call, 104, parallel, 96);

/* The input of a convolution: output positions are tokens, whose patches are gathered one at a time. Pairs are (height,
 * width). */
typedef struct {
  int64_t channels, size[2], kernel[2], out[2], stride[2], padding[2], dilation[2];
  int64_t steps[4]; /* elements between images, channels, rows and columns */
} mpq_images;
ABI_ASSERT(mpq_images, 136, steps, 104);

/* A linear layer of a decoder. */
typedef struct {
  const mpq_weight *weight; /* NULL: the preceding layer's weight includes these rows */
  const uint8_t *panels;
  const float *tensor_scale; /* or NULL */
  const void *bias;          /* or NULL */
  int32_t bias_is_bf16, planes;
} mpq_layer;
ABI_ASSERT(mpq_layer, 40, planes, 36);

typedef struct {
  mpq_layer q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm;
} mpq_block;
ABI_ASSERT(mpq_block, 296, mlp_norm, 288);

typedef struct {
  const mpq_block *blocks;
  int64_t count, width, hidden, heads, key_heads, head_width; /* of blocks; of elements and heads */
  float epsilon;
  int32_t is_bf16, level; /* the model's dtype: bf16, otherwise float32 */
  mpq_parallel parallel;
  mpq_layer head;
  const float *norm;
} mpq_decoder;
ABI_ASSERT(mpq_decoder, 128, norm, 120);

/* One token and its cache, in the model's dtype. */
typedef struct {
  const void *x;         /* (width,) its embedding */
  const void *cos, *sin; /* (head width,) of its position; the first half of `sin` is negated */
  void *logits;          /* (rows of the head,) */
  void *const *cache;    /* (key heads, capacity, head width): keys of each block, then values of each */
  int64_t position, capacity;
  int64_t threads;
} mpq_token;
ABI_ASSERT(mpq_token, 64, threads, 56);

/* y = x W^T + bias. Returns how many tokens were skipped and must be recomputed by the caller, or -1 if out of memory. */
EXPORT int64_t mpq_linear(const mpq_weight *, const mpq_call *);

/* The same for image patches: x is the images' first element, and `tokens` counts output positions. */
EXPORT int64_t mpq_conv(const mpq_weight *, const mpq_call *, const mpq_images *);

/* Compute the logits after a token. Returns 0; 1 if a product met values that it cannot represent: the caller recomputes
 * the step, and only the token's own cache entries were written; -1 if out of memory. */
EXPORT int64_t mpq_step(const mpq_decoder *, const mpq_token *);

/* out (rows, cols) = the weight; `values` maps a code to its number. */
EXPORT void mpq_dequantize(const mpq_weight *, const uint8_t *panels, const float *tensor_scale, const float *values,
                           float *out, int threads, mpq_parallel);

/* out (count, cols) = the chosen rows; returns -1 if an index is out of range. */
EXPORT int mpq_embedding(const mpq_weight *, const uint8_t *panels, const float *tensor_scale, const float *values,
                         const int64_t *rows, int64_t count, float *out);

/* The best level this machine runs, at most `most`: an index for mpq_level_name. */
EXPORT int mpq_best_level(int most);
EXPORT const char *mpq_level_name(int level);

/* The path (tile.h) that the planner chooses, by number of planes and type of the activations. */
EXPORT int mpq_path(const mpq_weight *, int level, int64_t tokens, int planes, int x_is_bf16);

/* The layout of the structs above, for abi.py's test: a field is "struct.field"; the last name is NULL. */
typedef struct {
  const char *name;
  int64_t offset, size;
} mpq_field;
EXPORT const mpq_field *mpq_fields(void);

/* Read memory in whole megabytes, to measure bandwidth; returns whether any bit was set. */
EXPORT int mpq_read(const uint8_t *data, int64_t size, int threads, mpq_parallel);
#endif
