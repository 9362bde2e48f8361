/* Vectors of integers that stand for floats, and their dot products with steps of levels: 16 lanes, 4 bytes each. A
 * level may define LEVEL_DOT_STRIPS, which takes int8 planes; otherwise both planes are one int16. */
#ifndef MPQ_INTEGERS_H
#define MPQ_INTEGERS_H
#include "strips.h"

#define LARGEST_INTEGER 32639 /* 127 * 256 + 127 */

/* Bytes of an integer in memory, and of all its planes. */
#ifdef LEVEL_DOT_STRIPS
#define INTEGER_BYTES 1
#define PLANES_BYTES(planes) (planes)
#else
#define INTEGER_BYTES 2
#define PLANES_BYTES(planes) 2
#endif

/* Store sixteen integers, the vector's elements from `i` on, `count` being all. For int16, pairs of columns
 * (0, 2) and (1, 3) stand together. */
INLINE void store_integers(vint32 q, const int planes, void *out, int64_t i, int64_t count) {
#ifdef LEVEL_DOT_STRIPS
  int8_t *high = (int8_t *)out + i, *low = high + (planes - 1) * count;
  const vint32 top = (q + 128) >> 8;
  STORE(low, __builtin_convertvector(planes == 2 ? q - (top << 8) : q, vint8));
  if (planes == 2) STORE(high, __builtin_convertvector(top, vint8));
#else
  int16_t *to = (int16_t *)out + i;
  const vint16 whole = __builtin_convertvector(q, vint16);
  (void)planes, (void)count;
  for (int j = 0; j < 16; j++) to[(j & ~3) + (j % 4 >> 1) + (j % 2) * 2] = whole[j];
#endif
}

/* x = scale * integer; returns the scale, NaN if any number is not finite. `sums` are of each `each` integers. Two
 * planes: to 1 / 32639 of the largest magnitude; one: int8 with a float16 scale, rounded as activations are. */
INLINE float to_integers(const float *x, const int64_t count, const int planes, const int64_t each, void *out, int32_t *sums) {
  const float magic = 0x1.8p23f;
  vint32 magnitude = {0}, sum = {0};
  for (int64_t i = 0; i < count; i += 16) magnitude = larger(magnitude, LOAD(vint32, x + i) & 0x7fffffff);
  const int32_t bits = integer_max16(magnitude);
  const float largest = LOAD(float, &bits);
  if (bits > 0x7f7fffff || (planes == 2 && largest < 0x1p-100f)) {
    memset(out, 0, count * PLANES_BYTES(planes));
    memset(sums, 0, count / each * sizeof *sums);
    return bits > 0x7f7fffff ? __builtin_nanf("") : 0;
  }
  const float scale = planes == 2 ? largest / LARGEST_INTEGER : largest > 0 ? round_to_fp16(largest / 127) : 1;
  const float inverse = 1 / scale;
  for (int64_t i = 0; i < count; i += 16) {
    vfloat nearest = planes == 2 ? LOAD(vfloat, x + i) * inverse : LOAD(vfloat, x + i) / scale;
    if (planes == 1) {
      const vint32 above = nearest > 127, below = nearest < -128;
      nearest = (vfloat)(((vint32)nearest & ~above & ~below) | (above & (vint32)((vfloat){0} + 127)) |
                         (below & (vint32)((vfloat){0} - 128)));
    }
    const vint32 q = (vint32)(nearest + magic) - (vint32)((vfloat){0} + magic);
    store_integers(q, planes, out, i, count);
    sum += q;
    if ((i + 16) % each) continue;
    sums[i / each] = integer_sum16(sum);
    sum = (vint32){0};
  }
  return scale;
}

#ifndef LEVEL_DOT_STRIPS
#ifndef LEVEL_DOT_PAIRS
/* sums + the products of pairs of 16-bit numbers. */
INLINE vint32 dot_pairs(vint32 sums, vuint32 levels, int32_t pair) {
  return sums + (vint32)(levels & 0xffff) * (int16_t)pair + (vint32)(levels >> 16) * (pair >> 16);
}
#define LEVEL_DOT_PAIRS dot_pairs
#endif

/* dots (strips, count): products of one or two strips with `count` vectors of integers from `x` on, `stride` bytes
 * apart and their planes `plane` bytes. */
INLINE void dot_strips_any(const level_strips *from, const uint8_t *x, int64_t stride, int64_t plane, const int count,
                           const int planes, const int strips, vint32 *dots) {
  (void)plane, (void)planes;
  for (int strip = 0; strip < strips; strip++) {
    const uint8_t *levels = from->levels + strip * from->apart;
    vint32 sums[4];
    for (int i = 0; i < count; i++) sums[i] = (vint32){0};
    for (int64_t step = 0; step < from->steps; step++) {
      const vuint32 both = LOAD(vuint32, levels + 64 * step);
      const vuint32 even = both & 0xff00ff, odd = both >> 8 & 0xff00ff;
      prefetch_step(from, strip, step);
      for (int i = 0; i < count; i++) {
        const uint8_t *pairs = x + i * stride + 8 * step;
        sums[i] = LEVEL_DOT_PAIRS(LEVEL_DOT_PAIRS(sums[i], even, LOAD(int32_t, pairs)), odd, LOAD(int32_t, pairs + 4));
      }
    }
    for (int i = 0; i < count; i++) dots[strip * count + i] = sums[i];
  }
}
#define LEVEL_DOT_STRIPS dot_strips_any
#define LEVEL_DOTS_NIBBLES 0
#endif
#endif
