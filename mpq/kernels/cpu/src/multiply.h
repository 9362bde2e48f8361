/* The product of one tile for levels without instructions of their own: sixteen rows in a vector of the compiler's. */

/* The 32-bit sums of a segment by 64 rows, from 16-bit activations; LEVEL_DOT may be faster. */
#ifndef LEVEL_DOT
INLINE void dot_any(const uint8_t *levels, const int16_t *x, int segment, int32_t *sums) {
  for (int quad = 0; quad < segment / 4; quad++, levels += 256, x += 4)
    for (int row = 0; row < MPQ_ROWS; row++)
      sums[row] += levels[4 * row] * x[0] + levels[4 * row + 1] * x[1] + levels[4 * row + 2] * x[2] +
                   levels[4 * row + 3] * x[3];
}
#define LEVEL_DOT dot_any
#endif

/* The float sums of a segment by 64 rows, from bfloat16 weights. */
INLINE void dot_real(const uint8_t *levels, const float *x, int segment, float *sums) {
  vfloat total[4];
  memcpy(total, sums, sizeof total);
  for (int quad = 0; quad < segment / 4; quad++, x += 4)
    for (int pair = 0; pair < 2; pair++)
      for (int block = 0; block < 4; block++, levels += 64) {
        vuint both = LOAD(vuint, levels);
        total[block] += (vfloat)(both << 16) * x[2 * pair] + (vfloat)(both & 0xffff0000u) * x[2 * pair + 1];
      }
  memcpy(sums, total, sizeof total);
}

INLINE void multiply_any(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t first,
                         int64_t last, float *sums) {
  const int width = weight->segment * weight->segments, two = weight->kind == MPQ_TABLE16;
  for (int64_t token = first; token < last; token++) {
    const int64_t at = tile->index * x->tokens + token;
    for (int segment = 0; segment < weight->segments; segment++) {
      const int64_t start = at * width + segment * weight->segment;
      const size_t skip = 64 * (size_t)weight->segment * segment;
      float found[MPQ_ROWS] = {0}, factor = weight->factor;
      if (weight->kind == MPQ_BFLOAT) {
        dot_real(tile->levels[0] + 2 * skip, x->real + start, weight->segment, found);
      } else {
        const int32_t sum = x->sums[(tile->index * weight->segments + segment) * x->tokens + token];
        factor *= x->scale[at];
        for (int plane = 0; plane <= two; plane++) {
          int32_t dots[MPQ_ROWS];
          const int offset = two ? 128 * !plane : weight->offset;
          for (int row = 0; row < MPQ_ROWS; row++) dots[row] = -offset * sum;
          LEVEL_DOT(tile->levels[plane] + skip, x->wide + start, weight->segment, dots);
          for (int row = 0; row < MPQ_ROWS; row++) found[row] = 256 * found[row] + (float)dots[row];
        }
        if (tile->zeros)
          for (int row = 0; row < MPQ_ROWS; row++)
            found[row] -= (float)sum * tile->zeros[MPQ_ROWS * segment + row];
      }
      for (int block = 0; block < 4; block++) {
        const int index = MPQ_ROWS * (weight->row_scales ? 0 : segment) + 16 * block;
        vfloat scaled = load_scales(weight->scale_kind, tile->scales, index) * factor;
        float *to = sums + token * MPQ_ROWS + 16 * block;
        STORE(to, LOAD(vfloat, to) + scaled * LOAD(vfloat, found + 16 * block));
      }
    }
  }
}

static TARGET void quantize(const mpq_weight *weight, mpq_activation *to, const void *x, int bfloat, int64_t stride,
                            int64_t token, int8_t *unfit) {
  quantize_any(weight, to, x, bfloat, stride, token, unfit, 1);
}

static TARGET void decode(const mpq_weight *weight, const uint8_t *codes, int brain, mpq_tile *tile, uint8_t *out) {
  (void)brain;
  place_levels(weight, codes, tile, out);
  decode_any(weight, codes, out, 64 * (size_t)weight->segment * weight->segments);
}

static TARGET void multiply(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                            int64_t first, int64_t last, float *sums) {
  for (int i = 0; i < count; i++) multiply_any(weight, tiles + i, x, first, last, sums);
}
