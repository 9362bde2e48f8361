/* Attention to a block of 64 tokens stored as codes, by integer products: queries and probabilities become integers. */
#ifndef MPQ_ATTEND_CODES_H
#define MPQ_ATTEND_CODES_H
#include "../attention.h"
#include "exponential.h"
#include "integers.h"

#ifndef LEVEL_LOAD_HALVES
/* Sixteen float16, with infinities and NaN. */
INLINE vfloat load_halves_any(const uint8_t *from) {
  const vuint32 half = __builtin_convertvector(LOAD(vuint16, from), vuint32);
  const vuint32 special = (vuint32)((half & 0x7c00) == 0x7c00);
  const vuint32 word = ((half & 0x7fff) << 13) + (112u << 23) + (special & (112u << 23)), sign = (half & 0x8000) << 16;
  const vfloat finite = load_scales(MPQ_SCALE_FP16, from, 0);
  return (vfloat)((special & (word | sign)) | (~special & (vuint32)finite));
}
#define LEVEL_LOAD_HALVES load_halves_any
#endif

/* Sixteen numbers of a MPQ_SCALE_* type, with its NaN. */
INLINE vfloat load_any(const int kind, const uint8_t *from) {
  if (kind == MPQ_SCALE_FP16) return LEVEL_LOAD_HALVES(from);
#ifdef LEVEL_LOAD_E4M3
  if (kind == MPQ_SCALE_E4M3) return LEVEL_LOAD_E4M3(from);
#endif
  const vfloat value = load_scales(kind, from, 0);
  if (kind == MPQ_SCALE_FP32 || kind == MPQ_SCALE_BF16) return value;
  const uint32_t none = kind == MPQ_SCALE_E4M3 ? 0x7f : 0xff; /* e4m3 has a sign */
  const vuint32 code = __builtin_convertvector(LOAD(vuint8, from), vuint32);
  return (vfloat)((vuint32)value | ((vuint32)((code & none) == none) & 0x7fc00000));
}

/* Query heads of one key head as integers. */
typedef struct {
  const uint8_t *integers; /* (heads, planes, padded width) */
  const float *scale;      /* (heads,), times that of scores */
  const int32_t *sums;     /* (heads, padded width / 16) */
} integer_queries;

/* A block's scales and minima; levels are `middle` too large: value = factor * scale * (level - middle) + minimum. */
typedef struct {
  const mpq_vectors *vectors;
  const uint8_t *scales, *minima;
  float factor, shift; /* of the minimum: factor * (middle - offset) scales */
  int32_t middle;
} block_scales;

INLINE block_scales scales_of(const mpq_vectors *vectors, const uint8_t *at) {
  const int32_t offset = vectors->weight->offset, middle = vectors->has_minimum ? 1 << (vectors->weight->bits - 1) : offset;
  const float factor = vectors->weight->factor;
  const int64_t scales = mpq_table_entries(vectors) * vectors->scale_bytes;
  return (block_scales){vectors, at, vectors->has_minimum ? at + scales : NULL, factor, factor * (middle - offset), middle};
}

static TARGET __attribute__((noinline)) void load_scales_out(int kind, const uint8_t *from, vfloat *out) {
  STORE(out, load_any(kind, from));
}

INLINE vfloat load_scale(const block_scales *from, int64_t index) {
  const uint8_t *at = from->scales + index * from->vectors->scale_bytes;
  vfloat scale;
  if (from->vectors->scale_kind == MPQ_SCALE_FP16) return LEVEL_LOAD_HALVES(at);
  load_scales_out(from->vectors->scale_kind, at, &scale);
  return scale;
}

INLINE vfloat load_minimum(const block_scales *from, int64_t index) {
  return LEVEL_LOAD_HALVES(from->minima + 2 * index) + load_scale(from, index) * from->shift;
}

/* Whether products take a block's codes as they are, two to a byte. */
INLINE int in_nibbles(const mpq_vectors *vectors) {
  return LEVEL_DOTS_NIBBLES && vectors->weight->bits == 4 && vectors->weight->kind == MPQ_INTEGER;
}

#ifndef LEVEL_DECODE
static TARGET void decode_levels(const mpq_weight *weight, const uint8_t *codes, int form, mpq_tile *tile, uint8_t *out) {
  (void)form;
  set_levels(weight, codes, tile, out);
  decode_any(weight, codes, out, 0);
}
#define LEVEL_DECODE decode_levels
#endif

/* Decode a block's codes to levels; bytes, and nibbles if products take them, stay where they are. */
INLINE const uint8_t *levels_of(const mpq_vectors *vectors, const uint8_t *block, uint8_t *out) {
  mpq_tile tile;
  if (in_nibbles(vectors)) return block;
  LEVEL_DECODE(vectors->weight, block, TILE_LEVELS, &tile, out);
  return tile.levels[0];
}

/* Columns of a group: the last one ends with the padding. */
INLINE int64_t group_end(const mpq_vectors *vectors, int64_t group) {
  return group + 1 == mpq_groups(vectors) ? mpq_padded_width(vectors) : (group + 1) * vectors->group;
}

/* Strips from level `start` on; `ahead` is where the next block's codes are. */
INLINE level_strips strips_at(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, int64_t start,
                              int64_t apart, int64_t steps) {
  const int64_t bits = block->vectors->weight->bits;
  const int nibbles = in_nibbles(block->vectors);
  return (level_strips){levels + (start >> nibbles), ahead ? ahead + start * bits / 8 : NULL, apart >> nibbles, steps,
                        apart * bits / 8, 8 * bits, nibbles};
}

/* scores (count, 64) of `count` heads from `head` on. */
INLINE void score_codes(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, const integer_queries *queries,
                        int64_t head, const int count, const int planes, float *scores) {
  const int64_t width = mpq_padded_width(block->vectors), groups = mpq_groups(block->vectors), apart = 16 * width;
  const int64_t bytes = width * PLANES_BYTES(planes);
  for (int strip = 0; strip < 4; strip += 2) {
    vfloat totals[2][4];
    for (int i = 0; i < count; i++) totals[0][i] = totals[1][i] = (vfloat){0};
    for (int64_t group = 0, start = 0; group < groups; group++) {
      const int64_t end = group_end(block->vectors, group);
      vint32 dots[8];
      const level_strips strips = strips_at(block, levels, ahead, strip * apart + 16 * start, apart, (end - start) / 4);
      LEVEL_DOT_STRIPS(&strips, queries->integers + head * bytes + start * INTEGER_BYTES, bytes, width, count, planes, 2, dots);
      int32_t sums[4];
      for (int i = 0; i < count; i++) {
        sums[i] = 0;
        for (int64_t j = start / 16; j < end / 16; j++) sums[i] += queries->sums[(head + i) * (width / 16) + j];
      }
      for (int s = 0; s < 2; s++) {
        const int64_t index = group * BLOCK + 16 * (strip + s);
        const vfloat scale = load_scale(block, index) * block->factor;
        const vfloat minimum = block->minima ? load_minimum(block, index) : (vfloat){0};
        for (int i = 0; i < count; i++) {
          const vint32 centered = (vint32)((vuint32)dots[s * count + i] - (uint32_t)block->middle * (uint32_t)sums[i]);
          totals[s][i] += __builtin_convertvector(centered, vfloat) * scale;
          if (block->minima) totals[s][i] += minimum * (float)sums[i];
        }
      }
      start = end;
    }
    for (int s = 0; s < 2; s++)
      for (int i = 0; i < count; i++)
        STORE(scores + i * BLOCK + 16 * (strip + s), totals[s][i] * queries->scale[head + i]);
  }
}

/* Floats as integers: x = scale * integer, times a block's scales where they are folded in, with the products of the
 * block's middle and minima with them. */
typedef struct {
  float scale, bias;
  uint32_t offset;
} folded;

/* Numbers times the scales at `index` of a block's table, as two planes; those that are not `valid` are 0 (NULL: all
 * are). */
INLINE folded fold_scales(const block_scales *block, int64_t index, const vint32 *valid, const float *x, const int64_t count,
                          uint8_t *integers) {
  float scaled[MAX_HEAD_WIDTH] __attribute__((aligned(64)));
  vfloat minima = {0};
  int32_t sum = 0;
  for (int64_t j = 0; j < count; j += 16) {
    const vfloat some = LOAD(vfloat, x + j);
    vfloat product = some * load_scale(block, index + j), minimum = block->minima ? some * load_minimum(block, index + j) : minima;
    if (valid) product = (vfloat)((vint32)product & valid[j / 16]), minimum = (vfloat)((vint32)minimum & valid[j / 16]);
    STORE(scaled + j, product);
    if (block->minima) minima += minimum;
  }
  const float scale = to_integers(scaled, count, 2, count, integers, &sum) * block->factor;
  return (folded){scale, block->minima ? sum16(minima) : 0, (uint32_t)block->middle * (uint32_t)sum};
}

/* The products of levels with integers, as floats without the minima's. */
INLINE vfloat unfold(vint32 dots, folded by) {
  return __builtin_convertvector((vint32)((vuint32)dots - by.offset), vfloat) * by.scale;
}

/* Products of values' levels with two planes of a block's 64 tokens, from a column on: one or two strips, returns
 * how many. */
INLINE int dot_values(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, int64_t column, int64_t end,
                      const uint8_t *integers, const int count, vint32 *dots) {
  const int strips = end - column >= 32 ? 2 : 1;
  const level_strips from = strips_at(block, levels, ahead, 64 * column, 16 * BLOCK, BLOCK / 4);
  if (strips == 2) LEVEL_DOT_STRIPS(&from, integers, 2 * BLOCK, BLOCK, count, 2, 2, dots);
  else LEVEL_DOT_STRIPS(&from, integers, 2 * BLOCK, BLOCK, count, 2, 1, dots);
  return strips;
}

/* mixed (count, padded width) = mixed * decay + probabilities (count, 64) times the values; invalid tokens are not
 * read. */
INLINE void mix_codes(const block_scales *block, const uint8_t *levels, const uint8_t *ahead, const vint32 *valid, const float *p,
                      const float *decay, const int count, float *mixed) {
  const int64_t width = mpq_padded_width(block->vectors), groups = mpq_groups(block->vectors);
  uint8_t integers[4 * 2 * BLOCK] __attribute__((aligned(64)));
  for (int64_t group = 0, column = 0; group < groups; group++) {
    const int64_t end = group_end(block->vectors, group);
    folded by[4];
    for (int i = 0; i < count; i++)
      by[i] = fold_scales(block, group * BLOCK, valid, p + i * BLOCK, BLOCK, integers + i * 2 * BLOCK);
    while (column < end) {
      vint32 dots[8];
      const int strips = dot_values(block, levels, ahead, column, end, integers, count, dots);
      for (int s = 0; s < strips; s++, column += 16)
        for (int i = 0; i < count; i++) {
          float *to = mixed + i * width + column;
          STORE(to, LOAD(vfloat, to) * decay[i] + (unfold(dots[s * count + i], by[i]) + by[i].bias));
        }
    }
  }
}
#endif
