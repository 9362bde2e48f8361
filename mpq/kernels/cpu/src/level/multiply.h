/* The product of one tile without intrinsics, on the compiler's 16-lane vectors; a level may replace the dot
 * product. */
#ifndef MPQ_MULTIPLY_H
#define MPQ_MULTIPLY_H
#include "common.h"


/* int32 sums of a segment by 64 rows from 16-bit activations; define LEVEL_DOT to replace it. */
#ifndef LEVEL_DOT
INLINE void dot_any(const uint8_t *levels, const int16_t *x, int segment, int32_t *sums) {
  for (int quad = 0; quad < segment / 4; quad++, levels += 256, x += 4)
    for (int row = 0; row < PANEL_ROWS; row++)
      sums[row] += levels[4 * row] * x[0] + levels[4 * row + 1] * x[1] + levels[4 * row + 2] * x[2] +
                   levels[4 * row + 3] * x[3];
}
#define LEVEL_DOT dot_any
#endif

/* float32 sums of a segment by 64 rows from bf16 weights. */
INLINE void dot_fp32(const uint8_t *levels, const float *x, int segment, float *sums) {
  vfloat total[4];
  memcpy(total, sums, sizeof total);
  for (int quad = 0; quad < segment / 4; quad++, x += 4)
    for (int pair = 0; pair < 2; pair++)
      for (int block = 0; block < 4; block++, levels += 64) {
        vuint32 both = LOAD(vuint32, levels);
        total[block] += (vfloat)(both << 16) * x[2 * pair] + (vfloat)(both & 0xffff0000u) * x[2 * pair + 1];
      }
  memcpy(sums, total, sizeof total);
}

INLINE void multiply_any(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t first,
                         int64_t last, float *sums) {
  const int width = weight->segment * weight->segments, is_int16 = weight->kind == MPQ_TABLE16;
  for (int64_t token = first; token < last; token++) {
    const int64_t at = tile->index * x->tokens + token;
    for (int segment = 0; segment < weight->segments; segment++) {
      const int64_t start = at * width + segment * weight->segment;
      const size_t skip = 64 * (size_t)weight->segment * segment;
      float values[PANEL_ROWS] = {0}, factor = weight->factor;
      if (weight->kind == MPQ_TABLE_BF16) {
        dot_fp32(tile->levels[0] + 2 * skip, x->fp32 + start, weight->segment, values);
      } else {
        const int32_t sum = x->sums[(tile->index * weight->segments + segment) * x->tokens + token];
        factor *= x->scale[at];
        for (int plane = 0; plane <= is_int16; plane++) {
          int32_t dots[PANEL_ROWS];
          const int offset = is_int16 ? 128 * !plane : weight->offset;
          for (int row = 0; row < PANEL_ROWS; row++) dots[row] = -offset * sum;
          LEVEL_DOT(tile->levels[plane] + skip, x->q16 + start, weight->segment, dots);
          for (int row = 0; row < PANEL_ROWS; row++) values[row] = 256 * values[row] + (float)dots[row];
        }
        if (tile->zeros)
          for (int row = 0; row < PANEL_ROWS; row++)
            values[row] -= (float)sum * tile->zeros[PANEL_ROWS * segment + row];
      }
      for (int block = 0; block < 4; block++) {
        const int index = PANEL_ROWS * (weight->row_scales ? 0 : segment) + 16 * block;
        vfloat scaled = load_scales(weight->scale_kind, tile->scales, index) * factor;
        float *to = sums + token * PANEL_ROWS + 16 * block;
        STORE(to, LOAD(vfloat, to) + scaled * LOAD(vfloat, values + 16 * block));
      }
    }
  }
}

static TARGET void quantize(const mpq_weight *weight, mpq_activation *to, const void *x, int is_bf16, int64_t stride,
                            int64_t token, int8_t *skipped) {
  quantize_any(weight, to, x, is_bf16, stride, token, skipped, 1);
}

static TARGET void decode(const mpq_weight *weight, const uint8_t *codes, int form, mpq_tile *tile, uint8_t *out) {
  (void)form;
  set_levels(weight, codes, tile, out);
  decode_any(weight, codes, out, 64 * (size_t)weight->segment * weight->segments);
}

static TARGET void multiply(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                            int64_t first, int64_t last, float *sums) {
  for (int i = 0; i < count; i++) multiply_any(weight, tiles + i, x, first, last, sums);
}
#endif
