/* Types that the planner and the levels share: decoded tiles, quantized activations, a level's functions. */
#ifndef MPQ_TILE_H
#define MPQ_TILE_H
#include "abi.h"

#define MAX_TILE_COLUMNS 256
#define CHUNK_TOKENS 256        /* tokens that share one decoding of a tile */
#define BLOCK_TOKENS 32         /* tokens multiplied together */
#define RUN_TILES 2             /* tiles decoded before a bf16 product, given enough tokens */
#define PANEL_STREAMS 2         /* panels that few tokens read alternately, to keep more memory requests in flight */
#define BLOCK_PANELS 8          /* panels that share one pass over the activations, given enough tokens */
#define TAIL_UNITS 2            /* work units at a range's end that are taken one by one */
#define MAX_THREADS 256
#define SHARED_QUANTIZE_MIN_TOKENS 8 /* from here on, threads share quantization; below, each quantizes for itself */
#define PREFETCH_L2_BYTES 3328  /* how far before use a stream is prefetched into L2 */
#define PREFETCH_L1_BYTES 768   /* and into L1 */

#if defined(__x86_64__) && defined(__GNUC__)
#define MPQ_X86 1
#endif
#if defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MPQ_ARM 1
#endif

/* Forms of a decoded tile: TILE_CODES: the stored codes; TILE_LEVELS: unsigned levels; TILE_SIGNED: levels less
 * `mpq_signed_shift`, as int8; TILE_BF16: the weight's `bf16_terms`, scaled, in the matrix unit's layout. */
enum { TILE_CODES = -1, TILE_LEVELS, TILE_BF16, TILE_SIGNED = 3 };

/* How a chunk of tokens is multiplied; planner.c decides. FUSED: codes are decoded in registers; VECTORS: dot
 * products of a decoded tile; AMX_SMALL: one activation tile of int8; AMX_INT8: many tokens in int8; AMX_BF16: in
 * bf16. */
enum { PATH_FUSED, PATH_VECTORS, PATH_AMX_SMALL, PATH_AMX_INT8, PATH_AMX_BF16 };

/* Activations of a chunk of tokens, cut like the weight's tiles. Integers: x = scale * (256 q[0] + q[1]) with two
 * planes, or scale * q[0] with one. For PATH_AMX_INT8, tokens of scale and sums are padded to mpq_padded_tokens. */
typedef struct {
  int64_t tokens;
  int32_t planes, path;
  int8_t *q;         /* (tiles, planes, tokens, tile); for PATH_AMX_INT8 (tiles, tokens / 16, tile / 64, planes, 16, 64) */
  int16_t *q16;      /* (tiles, tokens, tile): both planes as one number, for levels that multiply 16 bits */
  float *fp32;       /* (tiles, tokens, tile): not quantized, for TABLE_BF16 */
  uint16_t *bf16;    /* (tiles, planes, tokens / 16, tile / 32, 16, 32): nearest bf16, and the residual in a second plane */
  float *scale;      /* (tiles, tokens), of integers */
  int32_t *sums;     /* (tiles, segments, planes, tokens): of q; for PATH_AMX_INT8, of both planes together as one float */
} mpq_activation;

/* One decoded tile: (level planes, quads, 4 steps, 64) bytes, or for TABLE_BF16 (quads, 2 pairs, 4 steps, 32) bf16. As
 * TILE_BF16: `bf16_terms` planes of (tile / 32, 4 steps, 16 pairs, 32) bf16, scales applied unless they are per row. */
typedef struct {
  const uint8_t *levels[2];
  const uint8_t *scales, *zeros;
  const uint8_t *prefetch; /* the tile read after this one, to be prefetched */
  int64_t index, bytes;    /* `bytes` of the stored tile */
} mpq_tile;

/* A decoder's operations between its linear layers: level/decoder_ops.h and level/attend.h. */
typedef struct {
  void (*normalize)(const float *x, const float *weight, float epsilon, int64_t count, float *out);
  void (*activate)(float *gate, const float *up, int64_t count);
  void (*attend)(const void *part); /* mpq_attention_part */
} mpq_decoder_ops;

/* The functions of one instruction-set level. */
typedef struct {
  const char *name;
  int has_bf16;  /* multiplies TILE_BF16 */
  int has_fused; /* multiplies TILE_CODES */
  void (*quantize)(const mpq_weight *, mpq_activation *, const void *x, int is_bf16, int64_t stride, int64_t token,
                   int8_t *skipped);
  /* Decode to a TILE_* form; `out` has room for it. */
  void (*decode)(const mpq_weight *, const uint8_t *codes, int form, mpq_tile *, uint8_t *out);
  /* sums (tokens, 64) += the products of `count` tiles, for tokens `first` to `last`. */
  void (*multiply)(const mpq_weight *, const mpq_tile *, int count, const mpq_activation *, int64_t first, int64_t last,
                   float *sums);
  void (*begin)(void); /* once for each thread and call, or NULL */
  void (*end)(void);
  const mpq_decoder_ops *decoder_ops;
} mpq_level;

/* Bytes of a stored tile's codes. */
static inline size_t mpq_code_bytes(const mpq_weight *weight) {
  return (size_t)weight->segment * weight->segments * 8 * weight->bits;
}

/* Tokens padded to whole tiles of the matrix unit. */
static inline int64_t mpq_padded_tokens(int64_t tokens) { return (tokens + 31) & ~(int64_t)31; }

/* Columns of a tile, padded for bf16 products. */
static inline int mpq_bf16_columns(const mpq_weight *weight) { return (weight->segment * weight->segments + 31) & ~31; }

/* Whether segments fill the int8 matrix unit: whole steps of 64 columns, or half ones. */
static inline int mpq_fits_int8_unit(const mpq_weight *weight) { return weight->segment % 64 == 0 || weight->segment == 32; }

/* TILE_SIGNED = TILE_LEVELS - this. */
static inline int mpq_signed_shift(const mpq_weight *weight) { return weight->bits == 8 ? 128 : weight->zeros ? 0 : weight->offset; }

extern const mpq_decoder_ops mpq_portable_ops, mpq_avx2_ops, mpq_avx512_ops, mpq_neon_ops;
extern const mpq_level mpq_portable, mpq_avx2, mpq_avxvnni, mpq_avx512, mpq_amx, mpq_neon;
extern const mpq_level *const mpq_levels[]; /* by level */
#endif
