/* AMX in bytes for many tokens: two tiles of activations (both planes of 16 tokens, or 32 tokens in one plane) by 16
 * rows of signed levels, in one plane or two. Two planes of both leave out the product of the two low ones, a part of
 * 2**-16 of the largest product there can be. Sums leave the unit a stage late and are added to the floats another stage later, between
 * the products of the stage that then begins: stores, vectors and the matrix unit work side by side. */

/* Where the sums of a stage go. */
typedef struct {
  float *to;
  const float *scale;   /* of 16 tokens, or 32 in one plane */
  const float *total; /* of their integers, where `rest` stays with the levels */
  __m512 by, rest;
} stage;

/* What signed levels still have too much, besides zero points. */
AMX_INLINE int left_over(const mpq_weight *weight) {
  return weight->kind == MPQ_INTEGER ? weight->offset - mpq_shift(weight) : 0;
}

AMX_INLINE void land(const stage *done, int token, __m512i sum, const int rest) {
  float *to = done->to + token * MPQ_ROWS;
  __m512 value = _mm512_cvtepi32_ps(sum);
  if (rest) value = _mm512_fnmadd_ps(done->rest, _mm512_set1_ps(done->total[token]), value);
  STORE(to, _mm512_fmadd_ps(value, _mm512_mul_ps(done->by, _mm512_set1_ps(done->scale[token])), LOAD(__m512, to)));
}

/* Tokens from `token` on to their floats. The integer sums of both planes fit as one: 127 * 128 * 256 columns, 256 times. */
AMX_INLINE void finish(const stage *done, const int32_t *dots, int token, const int count, const int planes,
                       const int rest) {
  for (int t = token; t < token + count && t < 16; t++) {
    const __m512i first = LOAD(__m512i, dots + 16 * t), second = LOAD(__m512i, dots + 256 + 16 * t);
    if (planes == 2) {
      land(done, t, _mm512_add_epi32(_mm512_slli_epi32(first, 8), second), rest);
    } else {
      land(done, t, first, rest);
      land(done, t + 16, second, rest);
    }
  }
}

/* The products of a segment, into tiles 4 and 5 or (odd) 6 and 7, and meanwhile what was done two stages before. */
AMX_INLINE void products(const uint8_t *levels, const uint8_t *low, const uint8_t *x, int64_t second, int64_t step_bytes,
                         const int steps, const int odd, const stage *before, const int32_t *dots, const int planes,
                         const int rest, const int two) {
  const stage copy = *before, *done = &copy; /* which no store changes */
  const int each = (16 + 2 * steps - 1) / (2 * steps);
  if (odd) { _tile_zero(6); _tile_zero(7); } else { _tile_zero(4); _tile_zero(5); }
  for (int step = 0; step < steps; step++, levels += 16 * 256, x += step_bytes) {
    _tile_loadd(2, levels, 256);
    _tile_loadd(0, x, 64);
    if (odd) _tile_dpbssd(6, 0, 2); else _tile_dpbssd(4, 0, 2);
    finish(done, dots, 2 * step * each, each, planes, rest);
    if (two) {
      _tile_loadd(3, low + step * 16 * 256, 256);
      if (odd) _tile_dpbssd(7, 0, 3); else _tile_dpbssd(5, 0, 3);
    }
    _tile_loadd(1, x + second, 64);
    if (odd) _tile_dpbssd(7, 1, 2); else _tile_dpbssd(5, 1, 2);
    finish(done, dots, (2 * step + 1) * each, each, planes, rest);
  }
}

AMX_INLINE void fetch(const int odd, int32_t *dots) {
  if (odd) {
    _tile_stored(6, dots, 64);
    _tile_stored(7, dots + 256, 64);
  } else {
    _tile_stored(4, dots, 64);
    _tile_stored(5, dots + 256, 64);
  }
}

AMX_INLINE void multiply_bytes_run(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                                   int64_t first, int64_t last, const int width, const int planes, const int rest,
                                   const int two, float *sums) {
  const int steps = (width + 63) / 64;
  const int64_t padded = mpq_padded(x->tokens), block_bytes = 16 * planes * weight->segment * weight->segments;
  const int64_t second = planes == 2 ? 1024 : block_bytes, step_bytes = 1024 * planes;
  static const float nothing[32];
  static _Thread_local int32_t kept[2][512] __attribute__((aligned(64)));
  int32_t(*dots)[512] = kept;
  stage stages[2]; /* the first have nothing to add */
  for (int i = 0; i < 2; i++)
    stages[i] = (stage){sums + first * MPQ_ROWS, nothing, nothing, _mm512_setzero_ps(), _mm512_setzero_ps()};
  shape(16, 16, width < 64 ? width : 64);
  for (int64_t token = first; token < last; token += planes == 2 ? 16 : 32)
    for (int i = 0; i < count; i++) {
      const mpq_tile *tile = tiles + i;
      const uint8_t *ahead = tile->ahead, *end = token == first ? ahead + tile->bytes : ahead;
      const int64_t part = (tile->bytes / (4 * weight->segments) + 64) & ~(int64_t)63;
      const uint8_t *all = (const uint8_t *)x->q + (tile->index * (padded / 16) + token / 16) * block_bytes;
      for (int segment = 0; segment < weight->segments; segment++) {
        const int column = segment * width;
        const uint8_t *q = all + column / 64 * step_bytes + column % 64, *levels = tile->levels[0] + 64 * (size_t)column;
        const uint8_t *low = two ? tile->levels[1] + 64 * (size_t)column : levels;
        for (int block = 0; block < 4; block++) {
          const int odd = block & 1, index = MPQ_ROWS * segment + 16 * block;
          stage *mine = stages + odd;
          ahead = ask_part(ahead, part, end);
          if (odd) products(levels + 64 * block, low + 64 * block, q, second, step_bytes, steps, 1, mine, dots[1], planes, rest, two);
          else products(levels + 64 * block, low + 64 * block, q, second, step_bytes, steps, 0, mine, dots[0], planes, rest, two);
          fetch(!odd, dots[!odd]);
          mine->to = sums + token * MPQ_ROWS + 16 * block;
          mine->scale = x->scale + tile->index * padded + token;
          mine->total = (const float *)x->sums + (tile->index * weight->segments + segment) * padded + token;
          mine->by = _mm512_mul_ps(scales16(weight->scale_kind, tile->scales, weight->row_scales ? 16 * block : index),
                                   _mm512_set1_ps(two ? 256 * weight->factor : weight->factor));
          if (rest) {
            __m512 zero = _mm512_set1_ps(left_over(weight));
            if (tile->zeros)
              zero = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index))),
                                   _mm512_set1_ps(mpq_shift(weight)));
            mine->rest = zero;
          }
        }
      }
    }
  finish(&stages[0], dots[0], 0, 16, planes, rest);
  fetch(1, dots[1]);
  finish(&stages[1], dots[1], 0, 16, planes, rest);
}

#define RUN(width) \
  case width: \
    if (two) multiply_bytes_run(weight, tiles, count, x, first, last, width, 2, 0, 1, sums); \
    else if (planes == 2 && rest) multiply_bytes_run(weight, tiles, count, x, first, last, width, 2, 1, 0, sums); \
    else if (planes == 2) multiply_bytes_run(weight, tiles, count, x, first, last, width, 2, 0, 0, sums); \
    else if (rest) multiply_bytes_run(weight, tiles, count, x, first, last, width, 1, 1, 0, sums); \
    else multiply_bytes_run(weight, tiles, count, x, first, last, width, 1, 0, 0, sums); \
    break;

/* `first` is a multiple of 32. */
static AMX_TARGET void multiply_signed(const mpq_weight *weight, const mpq_tile *tiles, int count,
                                       const mpq_activation *x, int64_t first, int64_t last, float *sums) {
  const int planes = x->planes, two = weight->kind == MPQ_TABLE16, rest = weight->zeros || left_over(weight);
  switch (weight->segment) { RUN(32) RUN(64) RUN(128) RUN(192) RUN(256) }
}

/* A token's integers where the matrix unit wants them; the last token's also for those that fill its tiles up. */
AMX_INLINE void quantize_signed(const mpq_weight *weight, mpq_activation *to, const void *x, int bfloat, int64_t token,
                                int8_t *unfit, const int planes) {
  const int width = weight->segment * weight->segments;
  const int64_t step = (int64_t)weight->group * weight->segments, padded = mpq_padded(to->tokens);
  float buffer[MPQ_MAX_TILE + 16] __attribute__((aligned(64))), scale = 1;
  uint32_t largest = 0;
  unfit[token] = 0;
  for (int t = 0; t < weight->tiles * (planes == 1); t++) {
    const void *from = buffer;
    const int half = in_place(weight, &from, x, bfloat, t * step, buffer) && bfloat;
    const uint32_t found = largest_bits(from, half, width);
    if (found > largest) largest = found;
  }
  if (largest > 0x7f7fffff) { unfit[token] = 1; return; }
  if (largest) scale = as_half(as_real(largest) / 127);
  for (int t = 0; t < weight->tiles; t++) {
    const void *from = buffer;
    const int half = in_place(weight, &from, x, bfloat, t * step, buffer) && bfloat;
    if (planes == 2) {
      largest = largest_bits(from, half, width);
      if (largest > 0x7f7fffff || (largest && as_real(largest) < 0x1p-100f)) unfit[token] = 1;
      scale = unfit[token] ? 0 : as_real(largest) / 32639;
    }
    to->scale[t * padded + token] = scale;
    if (unfit[token]) return;
    const __m512 by = _mm512_set1_ps(planes == 1 ? scale : scale > 0 ? 1 / scale : 0);
    int8_t *q = to->q + (t * (padded / 16) + token / 16) * 16 * planes * width + token % 16 * 64;
    for (int segment = 0, i = 0; segment < weight->segments; segment++) {
      __m512i sum = _mm512_setzero_si512();
      for (const int end = i + weight->segment; i < end; i += 16) {
        const __m512 value = reals16(from, half, i);
        int8_t *place = q + i / 64 * 1024 * planes + i % 64;
        const __m512i near =
            _mm512_cvtps_epi32(planes == 1 ? within_bytes(_mm512_div_ps(value, by)) : _mm512_mul_ps(value, by));
        if (planes == 1) {
          STORE(place, _mm512_cvtepi32_epi8(near));
        } else {
          STORE(place, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(near, _mm512_set1_epi32(128)), 8)));
          STORE(place + 1024, _mm512_cvtepi32_epi8(near)); /* the last eight bits of what the first plane leaves */
        }
        sum = _mm512_add_epi32(sum, near);
      }
      const float total = _mm512_reduce_add_epi32(sum); /* below 2**24 */
      memcpy(to->sums + ((int64_t)t * weight->segments + segment) * padded + token, &total, 4);
    }
  }
}
