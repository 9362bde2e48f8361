/* AMX: the matrix unit multiplies 16 tokens by 64 columns by 16 rows. A quad is stored in the unit's operand layout. */
#include "../tile.h"
#ifdef MPQ_X86
#include "amx_bf16.h"
#include "amx_int8.h"
#include "avx512_multiply.h"

/* Accumulate `steps` of 64 columns: up to 16 activation rows times 2 x 16 weight rows, or times both planes of
 * 16 weight rows. dots (2, 16, 16). */
AMX_INLINE void dot(const uint8_t *first, const uint8_t *second, const uint8_t *x, int64_t stride, int steps,
                    const int is_int16, int32_t *dots) {
  _tile_zero(4);
  _tile_zero(5);
  for (int step = 0; step < steps; step++) {
    _tile_loadd(0, x + 64 * step, stride);
    _tile_loadd(2, first + 16 * 256 * step, 256);
    _tile_loadd(3, second + 16 * 256 * step, 256);
    if (is_int16) {
      _tile_dpbssd(4, 0, 2);
      _tile_dpbssd(5, 0, 3);
    } else {
      _tile_dpbsud(4, 0, 2); /* signed activations, unsigned levels */
      _tile_dpbsud(5, 0, 3);
    }
  }
  _tile_stored(4, dots, 64);
  _tile_stored(5, dots + 256, 64);
}

/* Per-token values that all rows of a segment share: the scale and the sum of the integers. */
typedef struct {
  float scale[16], total[16];
} token_values;

AMX_INLINE void load_token_values(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int segment,
                                  int64_t token, int count, const int planes, token_values *values) {
  const int32_t *sum = x->sums + (tile->index * weight->segments + segment) * planes * x->tokens + token;
  const float *scale = x->scale + tile->index * x->tokens + token;
  const __mmask16 some = (__mmask16)((1 << count) - 1);
  __m512 total = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, sum));
  if (planes == 2) {
    __m512 rest = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, sum + x->tokens));
    total = _mm512_fmadd_ps(total, _mm512_set1_ps(256), rest);
  }
  STORE(values->total, total);
  STORE(values->scale, _mm512_maskz_loadu_ps(some, scale));
}

/* Combine a token's plane products into one float. The integers fit 32 bits: at most 127 * 255 * 256 columns, times
 * 256, plus 128 * 255 * 256. With two level planes, the product of both low planes is dropped: 2**-16 of the largest
 * product. */
AMX_INLINE __m512 combine_planes(const int32_t *dots, int t, int count, const int planes, const int is_int16) {
  __m512i sum = LOAD(__m512i, dots + 16 * t);
  if (planes == 2 || is_int16) sum = _mm512_slli_epi32(sum, 8);
  if (planes == 2) sum = _mm512_add_epi32(sum, LOAD(__m512i, dots + 16 * (count + t)));
  if (is_int16) sum = _mm512_add_epi32(sum, LOAD(__m512i, dots + 256 + 16 * t));
  return _mm512_cvtepi32_ps(sum);
}

AMX_INLINE void accumulate_block(const mpq_weight *weight, const mpq_tile *tile, const token_values *values, int segment,
                                 int64_t token, int count, const int planes, const int is_int16, const int32_t *dots, int block,
                                 float *sums) {
  const int index = PANEL_ROWS * segment + 16 * block;
  const __m512 scales = _mm512_mul_ps(load_scales16(weight->scale_kind, tile->scales, weight->row_scales ? 16 * block : index),
                                      _mm512_set1_ps(is_int16 && planes == 2 ? 256 * weight->factor : weight->factor));
  __m512 zero = _mm512_set1_ps(weight->offset);
  if (tile->zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index)));
  float *to = sums + token * PANEL_ROWS + 16 * block;
  for (int t = 0; t < count; t++, to += PANEL_ROWS) {
    __m512 value = combine_planes(dots, t, count, planes, is_int16);
    if (!is_int16) value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(values->total[t]), value);
    STORE(to, _mm512_fmadd_ps(value, _mm512_mul_ps(scales, _mm512_set1_ps(values->scale[t])), LOAD(__m512, to)));
  }
}

/* `count` tokens: up to 8 with two planes side by side, or up to 16 with one. The sums of one segment are read back
 * while the unit multiplies the next. */
AMX_INLINE void multiply_int8_small(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x,
                                    int64_t token, int count, const int planes, const int is_int16,
                                    float *sums) {
  const int width = weight->segment * weight->segments, steps = (weight->segment + 63) / 64;
  const int units_per_segment = is_int16 ? 4 : 2; /* a unit is both planes of one row block, or two row blocks */
  const int units = units_per_segment * weight->segments;
  const uint8_t *q = (const uint8_t *)x->q + (tile->index * planes * x->tokens + token) * width;
  int32_t dots[2][2 * 256] __attribute__((aligned(64)));
  token_values values;
  configure_tiles(planes * count, 0, weight->segment < 64 ? weight->segment : 64);
  /* When levels are unsigned, decode has prefetched already. */
  const uint8_t *next = tile->prefetch, *end = next + (is_int16 ? tile->bytes : 0);
  const int64_t bytes = (tile->bytes / units + 64) & ~(int64_t)63;
  for (int unit = 0; unit <= units; unit++) {
    next = prefetch_range(next, bytes, end);
    if (unit < units) {
      const int start = unit / units_per_segment * weight->segment;
      const int64_t at = 64 * (int64_t)start + (is_int16 ? 64 : 128) * (unit % units_per_segment);
      const uint8_t *first = tile->levels[0] + at, *second = is_int16 ? tile->levels[1] + at : first + 64;
      dot(first, second, q + start, width, steps, is_int16, dots[unit % 2]);
    }
    if (!unit) continue;
    const int last = unit - 1, segment = last / units_per_segment, block = last % units_per_segment;
    const int32_t *from = dots[last % 2];
    if (!block) load_token_values(weight, tile, x, segment, token, count, planes, &values);
    if (is_int16) {
      accumulate_block(weight, tile, &values, segment, token, count, planes, is_int16, from, block, sums);
    } else {
      accumulate_block(weight, tile, &values, segment, token, count, planes, is_int16, from, 2 * block, sums);
      accumulate_block(weight, tile, &values, segment, token, count, planes, is_int16, from + 256, 2 * block + 1, sums);
    }
  }
}

/* At most 16 activation rows, counting all planes of all tokens. */
AMX_INLINE void multiply_small_batch(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t first,
                                     int count, float *sums) {
  const int is_int16 = weight->kind == MPQ_TABLE16;
  if (x->planes == 2 && is_int16) multiply_int8_small(weight, tile, x, first, count, 2, 1, sums);
  else if (x->planes == 2) multiply_int8_small(weight, tile, x, first, count, 2, 0, sums);
  else if (is_int16) multiply_int8_small(weight, tile, x, first, count, 1, 1, sums);
  else multiply_int8_small(weight, tile, x, first, count, 1, 0, sums);
}

static AMX_TARGET void multiply(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                                int64_t first, int64_t last, float *sums) {
  const int two_terms = weight->bf16_terms == 2;
  switch (x->path) {
    case PATH_AMX_BF16:
      if (two_terms && x->planes == 2) multiply_bf16(weight, tiles, count, x, first, last, 1, 2, sums);
      else if (two_terms) multiply_bf16(weight, tiles, count, x, first, last, 1, 1, sums);
      else if (x->planes == 2) multiply_bf16(weight, tiles, count, x, first, last, 0, 2, sums);
      else multiply_bf16(weight, tiles, count, x, first, last, 0, 1, sums);
      break;
    case PATH_AMX_INT8: multiply_int8_tiles(weight, tiles, count, x, first, last, sums); break;
    case PATH_AMX_SMALL:
      for (int i = 0; i < count; i++) multiply_small_batch(weight, tiles + i, x, first, (int)(last - first), sums);
      break;
    default: multiply_vectors(weight, tiles, count, x, first, last, sums);
  }
}

static AMX_TARGET void quantize_amx(const mpq_weight *weight, mpq_activation *to, const void *x, int is_bf16,
                                    int64_t stride, int64_t token, int8_t *skipped) {
  const char *row = (const char *)x + token * stride * (is_bf16 ? 2 : 4);
  if (to->path != PATH_AMX_INT8) quantize(weight, to, x, is_bf16, stride, token, skipped);
  else if (to->planes == 2) quantize_amx_tiles(weight, to, row, is_bf16, token, skipped, 2);
  else quantize_amx_tiles(weight, to, row, is_bf16, token, skipped, 1);
}

static AMX_TARGET void begin(void) { configured = -1; }
static AMX_TARGET void end(void) { _tile_release(); }

const mpq_level mpq_amx = {"amx", 1, 1, quantize_amx, decode_amx, multiply, begin, end, &mpq_avx512_ops};
#endif
