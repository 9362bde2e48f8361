/* NEON: exact int8 dot products of levels and 16-bit activations split into two planes. */
#include "../tile.h"
#ifdef MPQ_ARM
#include <arm_neon.h>
#ifdef __ARM_FEATURE_DOTPROD
#define TARGET
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#include "common.h"

INLINE void dot(const uint8_t *levels, const int16_t *x, int segment, int32_t *sums) {
  const uint8x16_t sign = vdupq_n_u8(0x80); /* level - 128 is signed; the difference is added back below */
  for (int half = 0; half < 2; half++) {    /* 32 rows: eight vectors of four */
    int32x4_t low[8], high[8];
    int32x2_t plane_sums = vdup_n_s32(0);
    for (int i = 0; i < 8; i++) low[i] = high[i] = vdupq_n_s32(0);
    for (int quad = 0; quad < segment / 4; quad++) {
      const uint8_t *from = levels + 256 * quad + 128 * half;
      const int16x4_t columns = vld1_s16(x + 4 * quad);
      const int8x8_t planes = vmovn_s16(vcombine_s16(columns, vrshr_n_s16(columns, 8))); /* x = low + 256 high */
      plane_sums = vdot_s32(plane_sums, planes, vdup_n_s8(1));
      for (int i = 0; i < 8; i++) {
        const int8x16_t level = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from + 16 * i), sign));
        low[i] = vdotq_lane_s32(low[i], level, planes, 0);
        high[i] = vdotq_lane_s32(high[i], level, planes, 1);
      }
    }
    const int32x4_t correction = vdupq_n_s32(128 * (vget_lane_s32(plane_sums, 0) + 256 * vget_lane_s32(plane_sums, 1)));
    for (int i = 0; i < 8; i++) {
      int32_t *to = sums + 32 * half + 4 * i;
      const int32x4_t sum = vaddq_s32(vaddq_s32(low[i], correction), vshlq_n_s32(high[i], 8));
      vst1q_s32(to, vaddq_s32(vld1q_s32(to), sum));
    }
  }
}
#define LEVEL_DOT dot
#include "multiply.h"
#include "attend.h"

const mpq_decoder_ops mpq_neon_ops = {normalize, activate, attend};
const mpq_level mpq_neon = {"neon", 0, 0, quantize, decode, multiply, NULL, NULL, &mpq_neon_ops};
#endif
