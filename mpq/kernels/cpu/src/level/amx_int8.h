/* AMX in int8 for many tokens: two tiles of activations (both planes of 16 tokens, or one plane of 32 tokens) times
 * signed levels of 16 rows, in one plane or two. With two planes on both sides, the product of both low planes is dropped:
 * 2**-16 of the largest product.
 *
 * A software pipeline of three stages: multiply; read the sums back one stage later; add them to the floats another stage
 * later, between the products of that stage. Stores, vector operations and the matrix unit overlap. */
#ifndef MPQ_AMX_INT8_H
#define MPQ_AMX_INT8_H
#include "amx.h"


/* Destination and scaling of one stage's sums. */
typedef struct {
  float *to;
  const float *scale;   /* of 16 tokens, or 32 in one plane */
  const float *total; /* sums of the integers, for the residual offset */
  __m512 scales, residual;
} stage;

/* The part of the offset that signed levels do not subtract, zero points aside. */
AMX_INLINE int residual_offset(const mpq_weight *weight) {
  return weight->kind == MPQ_INTEGER ? weight->offset - mpq_signed_shift(weight) : 0;
}

AMX_INLINE void accumulate_row(const stage *done, int token, __m512i sum, const int residual) {
  float *to = done->to + token * PANEL_ROWS;
  __m512 value = _mm512_cvtepi32_ps(sum);
  if (residual) value = _mm512_fnmadd_ps(done->residual, _mm512_set1_ps(done->total[token]), value);
  STORE(to, _mm512_fmadd_ps(value, _mm512_mul_ps(done->scales, _mm512_set1_ps(done->scale[token])), LOAD(__m512, to)));
}

/* Add 32-bit sums to the floats, from `token` on. Both planes' sums fit one integer: 127 * 128 * 256 columns, times
 * 256. */
AMX_INLINE void accumulate_rows(const stage *done, const int32_t *dots, int token, const int count, const int planes,
                                const int residual) {
  for (int t = token; t < token + count && t < 16; t++) {
    const __m512i first = LOAD(__m512i, dots + 16 * t), second = LOAD(__m512i, dots + 256 + 16 * t);
    if (planes == 2) {
      accumulate_row(done, t, _mm512_add_epi32(_mm512_slli_epi32(first, 8), second), residual);
    } else {
      accumulate_row(done, t, first, residual);
      accumulate_row(done, t + 16, second, residual);
    }
  }
}

/* Multiply a segment into tiles 4 and 5 (or 6 and 7 if odd) while accumulating the sums of two stages before. */
AMX_INLINE void multiply_segment(const uint8_t *levels, const uint8_t *low, const uint8_t *x, int64_t second, int64_t step_bytes,
                                 const int steps, const int odd, const stage *before, const int32_t *dots, const int planes,
                                 const int residual, const int is_int16) {
  const stage copy = *before, *done = &copy; /* a local copy: the compiler sees that no store changes it */
  const int rows_per_step = (16 + 2 * steps - 1) / (2 * steps);
  if (odd) { _tile_zero(6); _tile_zero(7); } else { _tile_zero(4); _tile_zero(5); }
  for (int step = 0; step < steps; step++, levels += 16 * 256, x += step_bytes) {
    _tile_loadd(2, levels, 256);
    _tile_loadd(0, x, 64);
    if (odd) _tile_dpbssd(6, 0, 2); else _tile_dpbssd(4, 0, 2);
    accumulate_rows(done, dots, 2 * step * rows_per_step, rows_per_step, planes, residual);
    if (is_int16) {
      _tile_loadd(3, low + step * 16 * 256, 256);
      if (odd) _tile_dpbssd(7, 0, 3); else _tile_dpbssd(5, 0, 3);
    }
    _tile_loadd(1, x + second, 64);
    if (odd) _tile_dpbssd(7, 1, 2); else _tile_dpbssd(5, 1, 2);
    accumulate_rows(done, dots, (2 * step + 1) * rows_per_step, rows_per_step, planes, residual);
  }
}

AMX_INLINE void store_sums(const int odd, int32_t *dots) {
  if (odd) {
    _tile_stored(6, dots, 64);
    _tile_stored(7, dots + 256, 64);
  } else {
    _tile_stored(4, dots, 64);
    _tile_stored(5, dots + 256, 64);
  }
}

AMX_INLINE void multiply_int8_run(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                                  int64_t first, int64_t last, const int width, const int planes, const int residual,
                                  const int is_int16, float *sums) {
  const int steps = (width + 63) / 64;
  const int64_t padded = mpq_padded_tokens(x->tokens), block_bytes = 16 * planes * weight->segment * weight->segments;
  const int64_t second = planes == 2 ? 1024 : block_bytes, step_bytes = 1024 * planes;
  static const float zeros[32];
  static _Thread_local int32_t buffers[2][512] __attribute__((aligned(64)));
  int32_t(*dots)[512] = buffers;
  stage stages[2]; /* the first two stages add zeros */
  for (int i = 0; i < 2; i++)
    stages[i] = (stage){sums + first * PANEL_ROWS, zeros, zeros, _mm512_setzero_ps(), _mm512_setzero_ps()};
  configure_tiles(16, 16, width < 64 ? width : 64);
  for (int64_t token = first; token < last; token += planes == 2 ? 16 : 32)
    for (int i = 0; i < count; i++) {
      const mpq_tile *tile = tiles + i;
      const uint8_t *next = tile->prefetch, *end = token == first ? next + tile->bytes : next;
      const int64_t bytes = (tile->bytes / (4 * weight->segments) + 64) & ~(int64_t)63;
      const uint8_t *chunk = (const uint8_t *)x->q + (tile->index * (padded / 16) + token / 16) * block_bytes;
      for (int segment = 0; segment < weight->segments; segment++) {
        const int column = segment * width;
        const uint8_t *q = chunk + column / 64 * step_bytes + column % 64, *levels = tile->levels[0] + 64 * (size_t)column;
        const uint8_t *low = is_int16 ? tile->levels[1] + 64 * (size_t)column : levels;
        for (int block = 0; block < 4; block++) {
          const int odd = block & 1, index = PANEL_ROWS * segment + 16 * block;
          stage *current = stages + odd;
          next = prefetch_range(next, bytes, end);
          const uint8_t *high_block = levels + 64 * block, *low_block = low + 64 * block;
          if (odd)
            multiply_segment(high_block, low_block, q, second, step_bytes, steps, 1, current, dots[1], planes, residual, is_int16);
          else
            multiply_segment(high_block, low_block, q, second, step_bytes, steps, 0, current, dots[0], planes, residual, is_int16);
          store_sums(!odd, dots[!odd]);
          current->to = sums + token * PANEL_ROWS + 16 * block;
          current->scale = x->scale + tile->index * padded + token;
          current->total = (const float *)x->sums + (tile->index * weight->segments + segment) * padded + token;
          current->scales = _mm512_mul_ps(load_scales16(weight->scale_kind, tile->scales, weight->row_scales ? 16 * block : index),
                                          _mm512_set1_ps(is_int16 ? 256 * weight->factor : weight->factor));
          if (residual) {
            __m512 zero = _mm512_set1_ps(residual_offset(weight));
            if (tile->zeros)
              zero = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index))),
                                   _mm512_set1_ps(mpq_signed_shift(weight)));
            current->residual = zero;
          }
        }
      }
    }
  accumulate_rows(&stages[0], dots[0], 0, 16, planes, residual);
  store_sums(1, dots[1]);
  accumulate_rows(&stages[1], dots[1], 0, 16, planes, residual);
}

#define MULTIPLY_WIDTH(width) \
  case width: \
    if (is_int16) multiply_int8_run(weight, tiles, count, x, first, last, width, 2, 0, 1, sums); \
    else if (planes == 2 && residual) multiply_int8_run(weight, tiles, count, x, first, last, width, 2, 1, 0, sums); \
    else if (planes == 2) multiply_int8_run(weight, tiles, count, x, first, last, width, 2, 0, 0, sums); \
    else if (residual) multiply_int8_run(weight, tiles, count, x, first, last, width, 1, 1, 0, sums); \
    else multiply_int8_run(weight, tiles, count, x, first, last, width, 1, 0, 0, sums); \
    break;

/* `first` is a multiple of 32. */
static AMX_TARGET void multiply_int8_tiles(const mpq_weight *weight, const mpq_tile *tiles, int count,
                                           const mpq_activation *x, int64_t first, int64_t last, float *sums) {
  const int planes = x->planes, is_int16 = weight->kind == MPQ_TABLE16, residual = weight->zeros || residual_offset(weight);
  switch (weight->segment) { MULTIPLY_WIDTH(32) MULTIPLY_WIDTH(64) MULTIPLY_WIDTH(128) MULTIPLY_WIDTH(192) MULTIPLY_WIDTH(256) }
}

/* Quantize a token into the matrix unit's tile layout. */
AMX_INLINE void quantize_amx_tiles(const mpq_weight *weight, mpq_activation *to, const void *x, int is_bf16, int64_t token,
                                   int8_t *skipped, const int planes) {
  const int width = weight->segment * weight->segments;
  const int64_t step = (int64_t)weight->group * weight->segments, padded = mpq_padded_tokens(to->tokens);
  float buffer[MAX_TILE_COLUMNS + 16] __attribute__((aligned(64))), scale = 1;
  uint32_t largest = 0;
  skipped[token] = 0;
  for (int t = 0; t < weight->tiles * (planes == 1); t++) {
    const void *from = buffer;
    const int is_bf16_tile = read_in_place(weight, &from, x, is_bf16, t * step, buffer) && is_bf16;
    const uint32_t tile_largest = largest_bits(from, is_bf16_tile, width);
    if (tile_largest > largest) largest = tile_largest;
  }
  if (largest > 0x7f7fffff) { skipped[token] = 1; return; }
  if (largest) scale = round_to_fp16(float_of_bits(largest) / 127);
  for (int t = 0; t < weight->tiles; t++) {
    const void *from = buffer;
    const int is_bf16_tile = read_in_place(weight, &from, x, is_bf16, t * step, buffer) && is_bf16;
    if (planes == 2) {
      largest = largest_bits(from, is_bf16_tile, width);
      if (largest > 0x7f7fffff || (largest && float_of_bits(largest) < 0x1p-100f)) skipped[token] = 1;
      scale = skipped[token] ? 0 : float_of_bits(largest) / 32639;
    }
    to->scale[t * padded + token] = scale;
    if (skipped[token]) return;
    const __m512 scales = _mm512_set1_ps(planes == 1 ? scale : scale > 0 ? 1 / scale : 0);
    int8_t *q = to->q + (t * (padded / 16) + token / 16) * 16 * planes * width + token % 16 * 64;
    for (int segment = 0, i = 0; segment < weight->segments; segment++) {
      __m512i sum = _mm512_setzero_si512();
      for (const int end = i + weight->segment; i < end; i += 16) {
        const __m512 value = load_floats16(from, is_bf16_tile, i);
        int8_t *to_q = q + i / 64 * 1024 * planes + i % 64;
        const __m512i rounded =
            _mm512_cvtps_epi32(planes == 1 ? clamp_int8(_mm512_div_ps(value, scales)) : _mm512_mul_ps(value, scales));
        if (planes == 1) {
          STORE(to_q, _mm512_cvtepi32_epi8(rounded));
        } else {
          STORE(to_q, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)), 8)));
          STORE(to_q + 1024, _mm512_cvtepi32_epi8(rounded)); /* the low eight bits of q - 256 * high plane */
        }
        sum = _mm512_add_epi32(sum, rounded);
      }
      const float total = _mm512_reduce_add_epi32(sum); /* exact in float32: below 2**24 */
      memcpy(to->sums + ((int64_t)t * weight->segments + segment) * padded + token, &total, 4);
    }
  }
}
#endif
