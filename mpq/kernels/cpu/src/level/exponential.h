/* Sums and exponentials of vectors, equal to the bit at every level. */
#ifndef MPQ_EXPONENTIAL_H
#define MPQ_EXPONENTIAL_H
#include "common.h"

/* Define NAME: the sum of sixteen lanes in a fixed order, so that all levels agree to the bit. */
#define SUM16(NAME, VECTOR, ELEMENT, RESULT)                                              \
  INLINE RESULT NAME(VECTOR x) {                                                          \
    typedef ELEMENT half __attribute__((vector_size(32)));                                \
    typedef ELEMENT quarter __attribute__((vector_size(16)));                             \
    half halves[2];                                                                       \
    memcpy(halves, &x, sizeof x);                                                         \
    halves[0] += halves[1];                                                               \
    quarter quarters[2];                                                                  \
    memcpy(quarters, halves, sizeof quarters);                                            \
    quarters[0] += quarters[1];                                                           \
    return (RESULT)((quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3])); \
  }

SUM16(sum16, vfloat, float, float)
SUM16(integer_sum16, vint32, uint32_t, int32_t) /* modulo 2**32 */

INLINE vint32 larger(vint32 x, vint32 y) {
  const vint32 above = x > y;
  return (x & above) | (y & ~above);
}

/* The largest of sixteen lanes. */
INLINE int32_t integer_max16(vint32 x) {
  typedef int32_t half __attribute__((vector_size(32)));
  typedef int32_t quarter __attribute__((vector_size(16)));
  half halves[2];
  memcpy(halves, &x, sizeof x);
  const half above = halves[0] > halves[1];
  halves[0] = (halves[0] & above) | (halves[1] & ~above);
  quarter quarters[2];
  memcpy(quarters, halves, sizeof quarters);
  const quarter over = quarters[0] > quarters[1];
  quarters[0] = (quarters[0] & over) | (quarters[1] & ~over);
  const int32_t first = quarters[0][0] > quarters[0][1] ? quarters[0][0] : quarters[0][1];
  const int32_t last = quarters[0][2] > quarters[0][3] ? quarters[0][2] : quarters[0][3];
  return first > last ? first : last;
}

/* e**x to about 2**-22 relative, clamped to 2**-126 .. 2**127; NaN for a non-finite input. */
INLINE vfloat exponential(vfloat x) {
  const vint32 below = x < -87.f, above = x > 88.f;
  const vint32 least = below & (vint32)((vfloat){0} - 87.f), most = above & (vint32)((vfloat){0} + 88.f);
  const vfloat inside = (vfloat)(((vint32)x & ~(below | above)) | least | most);
  const vfloat rounded = inside * 0x1.715476p0f + 0x1.8p23f, whole = rounded - 0x1.8p23f;
  const vfloat rest = inside - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
  vfloat power = rest * (1 / 720.f) + 1 / 120.f;
  power = power * rest + 1 / 24.f;
  power = power * rest + 1 / 6.f;
  power = power * rest + 0.5f;
  power = power * rest * rest + rest + 1;
  return (vfloat)((vint32)power + ((vint32)rounded << 23)) + (x - x);
}
#endif
