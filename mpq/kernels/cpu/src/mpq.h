/* Fused low-bit linear layers: y = x W^T with W as codes and scales, decoded in cache and never written back.
 *
 * A weight is cut into panels of 64 rows; a panel is one stream that one thread reads front to back. It is a row of
 * tiles, each of `tile` columns: the codes, the scales of the tile's segments (64 for each) and their zero points
 * (64 bytes for each). When one scale serves a whole row, the 64 scales stand once, at the panel's end.
 *
 * Codes come in steps of 64: 4 columns of 16 rows, a row's 4 columns side by side. A quad is 4 columns of the
 * panel's 64 rows: 4 steps, 32 * bits bytes. 8 bits: the steps in turn; 4 bits: two steps in the nibbles of 64 bytes;
 * 2 bits: four steps in the bit pairs of 64 bytes; other widths: 64 codes as a little-endian bit stream.
 */
#ifndef MPQ_H
#define MPQ_H
#include <stddef.h>
#include <stdint.h>

#define MPQ_ROWS 64       /* rows of a panel */
#define MPQ_MAX_TILE 256  /* columns of a tile at most */
#define MPQ_CHUNK 256     /* tokens that share one decoding of a tile */
#define MPQ_BLOCK 32      /* tokens that are taken together */
#define MPQ_RUN 2         /* tiles that are decoded before they are multiplied in bfloat16, when there are tokens enough */
#define MPQ_STREAMS 2     /* panels that one token reads in turns: the memory always has something to fetch */
#define MPQ_SINGLE 2      /* panels that end a thread's range one by one */
#define MPQ_PANELS 8      /* panels that share one passage of the activations, likewise */
#define MPQ_THREADS 256   /* at most */
#define MPQ_ALONE 8       /* from so many tokens on, threads share the making of integers */
#define MPQ_AHEAD 3328    /* bytes of a stream that are asked for ahead of use, into the second cache */
#define MPQ_NEAR 768      /* and into the first */
#if defined(__x86_64__) && defined(__GNUC__)
#define MPQ_X86 1
#endif
#if defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MPQ_ARM 1
#endif

/* How codes become numbers. value = factor * (level - offset) * scale, where a level is
 * INTEGER the code; TABLE8 a byte looked up; TABLE16 two bytes looked up, 256 * (high - 128) + low;
 * BFLOAT a bfloat16 looked up (steps hold columns 0 and 1 of four rows, then columns 2 and 3, four times). */
enum { MPQ_INTEGER, MPQ_TABLE8, MPQ_TABLE16, MPQ_BFLOAT };
enum { MPQ_CODES = -1, MPQ_LEVELS, MPQ_SIGNED = 3 }; /* as they stand; unsigned; less `mpq_shift` */
enum { MPQ_FP32, MPQ_FP16, MPQ_BF16, MPQ_E8M0, MPQ_E4M3, MPQ_UE5M3 };

typedef struct {
  int64_t rows, cols, panel_bytes;
  int32_t bits, kind, offset;
  int32_t group;       /* columns that share a scale */
  int32_t segment;     /* the same, filled up to a multiple of 4 */
  int32_t segments;    /* segments of a tile */
  int32_t tiles;       /* tiles of a panel */
  int32_t scale_kind;
  int32_t scale_bytes;
  int32_t row_scales;  /* scales stand at the panel's end */
  int32_t zeros;       /* zero points stand after the scales */
  int32_t brain;       /* how many bfloat16 add up to a weight with its group's scale: 1 exactly, 2 to 2**-17 of it */
  float factor;
  uint8_t low[256], high[256]; /* tables: of bytes, or of a bfloat16's halves */
  uint64_t bits_of_low, bits_of_high; /* BFLOAT: how a code's bits become the halves', rows of a matrix over GF(2), */
  int32_t flip, normal;               /* the high half's bits then flipped; for codes with any bit of `normal`, or 0 */
} mpq_weight;

/* Activations of a chunk of tokens, cut like the weight's tiles.
 * Integers: x = scale * (256 q[0] + q[1]) in two planes, or scale * q[0] in one. */
typedef struct {
  int64_t tokens;
  int32_t planes;
  int8_t *q;       /* (tiles, planes, tokens, tile) */
  int32_t fused;   /* whether tiles come as codes, undecoded */
  int32_t matrix;  /* whether q is (tiles, tokens / 16, tile / 64, planes, 16, 64), scale and sums are (..., mpq_padded) */
  int16_t *wide;   /* (tiles, tokens, tile): the planes as one number, for machines that multiply 16 bits */
  float *real;     /* (tiles, tokens, tile): as they are, for BFLOAT */
  uint16_t *brain; /* (tiles, planes, tokens / 16, tile / 32, 16, 32): bfloat16, and what it left over in a second plane */
  float *scale;    /* (tiles, tokens), of integers */
  int32_t *sums;   /* (tiles, segments, planes, tokens): of q; of both planes as one float where `matrix` */
} mpq_activation;

/* One tile, decoded: (level planes, quads, 4 steps, 64) bytes, or (quads, 2 pairs, 4 steps, 32) bfloat16. Where
 * activations are bfloat16: as many planes as the weight's `brain` says of (tile / 32, 4 steps, 16 pairs, 32) bfloat16,
 * scales applied unless they are rows'. */
typedef struct {
  const uint8_t *levels[2];
  const uint8_t *scales, *zeros;
  const uint8_t *ahead; /* what is read next, of as many bytes as the tile has */
  int64_t index, bytes;
} mpq_tile;

/* Attention of one token's query heads to keys and values of all tokens until it, (key heads, capacity, width). */
typedef struct {
  const float *q; /* (heads, width) */
  const void *keys, *values;
  float *out; /* (heads, width) */
  int64_t heads, key_heads, width, capacity, length;
  int32_t bfloat; /* keys and values */
} mpq_attention;

/* What stands between a decoder's linear layers, see between.h. */
typedef struct {
  void (*normalize)(const float *x, const float *weight, float epsilon, int64_t count, float *out);
  void (*activate)(float *gate, const float *up, int64_t count);
  void (*attend)(const mpq_attention *, int64_t key_head, float *scores);
} mpq_between;

typedef struct {
  const char *name;
  int wide;  /* activations as 16-bit numbers instead of planes of bytes */
  int brain; /* whether weights and activations can be bfloat16 */
  int fused; /* whether few tokens can be multiplied by codes as they stand */
  void (*quantize)(const mpq_weight *, mpq_activation *, const void *x, int bfloat, int64_t stride, int64_t token,
                   int8_t *unfit);
  /* `out` has room for the levels that are not the codes as they stand; `form`: MPQ_*, or how many bfloat16 */
  void (*decode)(const mpq_weight *, const uint8_t *codes, int form, mpq_tile *, uint8_t *out);
  /* sums (tokens, 64) += the part of `count` tiles for the tokens from `first` to `last` */
  void (*multiply)(const mpq_weight *, const mpq_tile *, int count, const mpq_activation *, int64_t first, int64_t last,
                   float *sums);
  void (*begin)(void); /* once for each thread and call, or NULL */
  void (*end)(void);
  const mpq_between *between;
} mpq_level;

/* Tokens with those that fill the matrix unit's tiles up. */
static inline int64_t mpq_padded(int64_t tokens) { return (tokens + 31) & ~(int64_t)31; }

/* Columns of a tile that bfloat16 activations have. */
static inline int mpq_filled(const mpq_weight *weight) { return (weight->segment * weight->segments + 31) & ~31; }

/* Whether the matrix unit takes bytes of the weight: in whole steps of 64 columns, or half ones. */
static inline int mpq_in_steps(const mpq_weight *weight) { return weight->segment % 64 == 0 || weight->segment == 32; }

/* What signed levels are less than the unsigned ones. */
static inline int mpq_shift(const mpq_weight *weight) { return weight->bits == 8 ? 128 : weight->zeros ? 0 : weight->offset; }

extern const mpq_level mpq_portable, mpq_avx2, mpq_avxvnni, mpq_avx512, mpq_amx, mpq_neon;
#endif
