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

/* Weight kinds: how a code becomes a number, factor * (level - offset) * scale. The level is INTEGER: the code;
 * TABLE8: a byte from `low`; TABLE16: 256 * (high - 128) + low, from both tables; TABLE_BF16: a bf16 from both
 * tables (its steps hold columns 0 and 1 of four rows, then columns 2 and 3, four times). */
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
  const int64_t *places;     /* (rows,): the column of `out` and of the bias for each row; NULL: in order */
  int32_t x_is_bf16, bias_is_bf16, out_is_bf16; /* otherwise float32 */
  int32_t planes;            /* int8 planes of an activation: 2 is nearly exact; 1 has a float16 scale for each token */
  int32_t threads, level;
  int8_t *skipped;           /* (tokens,) or NULL: 1 for tokens not computed, which integers cannot represent */
  mpq_parallel parallel;
} mpq_call;
ABI_ASSERT(mpq_call, 112, parallel, 104);

/* The input of a convolution: output positions are tokens, whose patches are gathered one at a time. Pairs are (height,
 * width). */
typedef struct {
  int64_t channels, size[2], kernel[2], out[2], stride[2], padding[2], dilation[2];
  int64_t steps[4]; /* elements between images, channels, rows and columns */
} mpq_images;
ABI_ASSERT(mpq_images, 136, steps, 104);

/* Rows of a decoder's linear layer that have one format. */
typedef struct {
  const mpq_weight *weight;
  const uint8_t *panels;
  const float *tensor_scale; /* or NULL */
  const int64_t *places;     /* as a call's */
} mpq_part;
ABI_ASSERT(mpq_part, 32, places, 24);

/* A linear layer of a decoder. */
typedef struct {
  const mpq_part *parts; /* at most MPQ_MAX_PARTS */
  const void *bias;      /* or NULL */
  int32_t count;         /* 0: the preceding layer's parts include these rows */
  int32_t bias_is_bf16, planes;
} mpq_layer;
ABI_ASSERT(mpq_layer, 32, planes, 24);

typedef struct {
  mpq_layer q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm;
} mpq_block;
ABI_ASSERT(mpq_block, 240, mlp_norm, 232);

typedef struct {
  const mpq_block *blocks;
  int64_t count, width, hidden, heads, key_heads, head_width; /* of blocks; of elements and heads */
  float epsilon;
  int32_t is_bf16, level; /* the model's dtype: bf16, otherwise float32 */
  mpq_parallel parallel;
  mpq_layer head;
  const float *norm;
} mpq_decoder;
ABI_ASSERT(mpq_decoder, 120, norm, 112);

#define BLOCK 64 /* tokens of a cache that are stored together */

/* How a cache stores vectors of keys or values, one for each token and head, in blocks of 64 tokens. Floats stand
 * token after token. Codes stand in steps of 64, as a weight's do. Of keys, a step holds 4 columns of 16 tokens; the
 * steps of a block are ordered by (16 tokens, 4 columns). Of values it holds 4 tokens of 16 columns, ordered by (16
 * columns, 4 tokens). After them stand the block's scales (groups, 64), or (padded columns,), then its float16
 * minima; columns are padded to a multiple of 16. A number is factor * (level - offset) * scale + minimum. */
typedef struct {
  const mpq_weight *weight; /* bits, kind (INTEGER or TABLE8), offset, factor and tables of the codes; NULL: floats */
  int64_t width;
  int32_t element, element_bytes; /* of floats: MPQ_SCALE_FP32, FP16, BF16 or E4M3 */
  int32_t group;                  /* columns that share a scale: a multiple of 16, or all */
  int32_t scale_kind, scale_bytes; /* 0 bytes: no scales, of floats only */
  int32_t has_minimum;
  int32_t by_column; /* a block's columns have a scale and a minimum each, which its tokens share; integers with float16 scales */
  int32_t newest;    /* by_column: MPQ_SCALE_FP32, FP16 or BF16 of the newest tokens, which fill no block yet */
} mpq_vectors;
ABI_ASSERT(mpq_vectors, 48, newest, 44);

/* Memory for some blocks of every key head: (key heads, blocks, bytes). By column, the first slab of a cache holds
 * the newest tokens as floats, (key heads, 64, width). */
typedef struct {
  uint8_t *data;
  int64_t blocks, head_bytes; /* blocks of a head; bytes between heads */
} mpq_slab;
ABI_ASSERT(mpq_slab, 24, head_bytes, 16);

/* One sequence's newest token and its cache, whose slabs follow each other. */
typedef struct {
  const float *q; /* (heads, width) */
  float *out;     /* (heads, width) */
  const mpq_slab *keys, *values;
  int64_t length; /* tokens in the cache, at least 1 */
} mpq_sequence;
ABI_ASSERT(mpq_sequence, 40, length, 32);

/* Attention of the newest token of each sequence. */
typedef struct {
  const mpq_vectors *keys, *values;
  const mpq_sequence *sequences;
  int64_t count, heads, key_heads; /* key heads divide heads */
  int64_t window;     /* newest tokens seen; 0: all */
  const float *sinks; /* (heads,) scores of nothing, or NULL */
  float scale;        /* of scores */
  int32_t planes;     /* int8 planes of a query, for keys of codes: 2 is nearly exact; 1 has a float16 scale for each head */
  int32_t threads, level;
  mpq_parallel parallel;
} mpq_attention;
ABI_ASSERT(mpq_attention, 88, parallel, 80);

/* Tokens that follow those in a cache: keys or values of each head, float32. */
typedef struct {
  const mpq_vectors *vectors; /* floats, or INTEGER codes with float16 scales */
  const mpq_slab *slabs;
  const float *x;             /* (heads, tokens, width), `head_stride` and `token_stride` elements apart */
  int64_t head_stride, token_stride, heads, tokens;
  int64_t position; /* of the first */
  int32_t values, threads;
  mpq_parallel parallel;
} mpq_append;
ABI_ASSERT(mpq_append, 80, parallel, 72);

/* The cache of a decoder's block. */
typedef struct {
  const mpq_vectors *keys, *values;
  const mpq_slab *key_slabs, *value_slabs;
} mpq_block_cache;
ABI_ASSERT(mpq_block_cache, 32, value_slabs, 24);

/* One token and the decoder's cache. */
typedef struct {
  const void *x;         /* (width,) its embedding */
  const void *cos, *sin; /* (head width,) of its position; the first half of `sin` is negated */
  void *logits;          /* (rows of the head,) */
  const mpq_block_cache *caches; /* of each block, with room for the token */
  int64_t position;
  int64_t threads;
} mpq_token;
ABI_ASSERT(mpq_token, 56, threads, 48);

/* y = x W^T + bias. Returns how many tokens were skipped and must be recomputed by the caller, or -1 if out of
 * memory. */
EXPORT int64_t mpq_linear(const mpq_weight *, const mpq_call *);

/* The same for a matrix in several weights, each with some of its rows: `count` calls that differ in panels, tensor
 * scale and places alone. At most MPQ_MAX_PARTS, which share one parallel region where tokens are few. Returns how
 * many were skipped, or -1. */
EXPORT int64_t mpq_linear_parts(const mpq_weight *const *, const mpq_call *, int64_t count);
#define MPQ_MAX_PARTS 16

/* The same for image patches: x is the images' first element, and `tokens` counts output positions. */
EXPORT int64_t mpq_conv(const mpq_weight *, const mpq_call *, const mpq_images *);

/* Compute the logits after a token. Returns 0; 1 if a product met values that it cannot represent: the caller
 * recomputes the step, and only the token's own cache entries were written; -1 if out of memory. */
EXPORT int64_t mpq_step(const mpq_decoder *, const mpq_token *);

/* Attention of each sequence's newest token; the result does not depend on the number of threads. Returns 0, or -1
 * if out of memory. */
EXPORT int64_t mpq_attend(const mpq_attention *);

/* Round tokens of `count` sequences to a cache's format and store them in their blocks; calls differ in slabs, x and
 * position alone. */
EXPORT void mpq_append_tokens(const mpq_append *, int64_t count);

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
