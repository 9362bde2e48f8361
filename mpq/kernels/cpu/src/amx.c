/* AMX: products of 16 tokens by 64 columns by 16 rows; a tile's quads are already what the matrix unit wants. */
#include "mpq.h"
#ifdef MPQ_X86
#include "avx512.h"
#define AMX_TARGET                                                                                    \
  __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni," \
                        "avx512vbmi,gfni,fma,f16c,avx2")))
#define AMX_INLINE static inline __attribute__((always_inline)) AMX_TARGET

static _Thread_local int shaped; /* how this thread's unit is set up */

/* Tiles 0 and 1: activations of so many tokens, `columns` bytes of each; 2 and 3: weights; 4 to 7: sums, (first, second)
 * activations by (first, second) rows. */
AMX_INLINE void shape(int first, int second, int columns) {
  const int wanted = (first * 32 + second) * 128 + columns;
  if (shaped == wanted) return;
  shaped = wanted;
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config __attribute__((aligned(64))) = {0};
  const int rows[8] = {first, second, columns / 4, columns / 4, first, first, second, second};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.bytes[i] = rows[i] ? i < 2 ? columns : 64 : 0, config.rows[i] = rows[i];
  __asm__ volatile("" : : "r"(&config) : "memory"); /* the intrinsic tells of its first bytes only */
  _tile_loadconfig(&config);
}

/* Asks for `part` bytes of what is read next, none from `end` on, into the second cache; returns where to go on. */
AMX_INLINE const uint8_t *ask_part(const uint8_t *ahead, int64_t part, const uint8_t *end) {
  for (const uint8_t *line = ahead; line < ahead + part && line < end; line += 64)
    _mm_prefetch((const char *)line, _MM_HINT_T1);
  return ahead + part;
}

/* Sums over `steps` of 64 bytes of up to 16 activation rows and twice 16 weight rows, or both planes of 16:
 * dots (2, 16, 16). */
AMX_INLINE void dot(const uint8_t *first, const uint8_t *second, const uint8_t *x, int64_t stride, int steps,
                    const int two, int32_t *dots) {
  _tile_zero(4);
  _tile_zero(5);
  for (int step = 0; step < steps; step++) {
    _tile_loadd(0, x + 64 * step, stride);
    _tile_loadd(2, first + 16 * 256 * step, 256);
    _tile_loadd(3, second + 16 * 256 * step, 256);
    if (two) {
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

/* What a segment's tokens have in common for all rows: their scales and the sums of their integers. */
typedef struct {
  float scale[16], total[16];
} segment_facts;

AMX_INLINE void know(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int segment,
                     int64_t token, int count, const int planes, segment_facts *facts) {
  const int32_t *sum = x->sums + (tile->index * weight->segments + segment) * planes * x->tokens + token;
  const float *scale = x->scale + tile->index * x->tokens + token;
  const __mmask16 some = (__mmask16)((1 << count) - 1);
  __m512 total = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, sum));
  if (planes == 2) {
    __m512 rest = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, sum + x->tokens));
    total = _mm512_fmadd_ps(total, _mm512_set1_ps(256), rest);
  }
  STORE(facts->total, total);
  STORE(facts->scale, _mm512_maskz_loadu_ps(some, scale));
}

/* The sums of a token's integers as one. They fit: 127 * 255 * 256 columns, 256 times, and 128 * 255 * 256. Two planes of
 * levels leave out the product of the two low planes, a part of 2**-16 of the largest product there can be. */
AMX_INLINE __m512 joined(const int32_t *dots, int t, int count, const int planes, const int two) {
  __m512i sum = LOAD(__m512i, dots + 16 * t);
  if (planes == 2 || two) sum = _mm512_slli_epi32(sum, 8);
  if (planes == 2) sum = _mm512_add_epi32(sum, LOAD(__m512i, dots + 16 * (count + t)));
  if (two) sum = _mm512_add_epi32(sum, LOAD(__m512i, dots + 256 + 16 * t));
  return _mm512_cvtepi32_ps(sum);
}

AMX_INLINE void add(const mpq_weight *weight, const mpq_tile *tile, const segment_facts *facts, int segment,
                    int64_t token, int count, const int planes, const int two, const int32_t *dots, int block,
                    float *sums) {
  const int index = MPQ_ROWS * segment + 16 * block;
  const __m512 scales = _mm512_mul_ps(scales16(weight->scale_kind, tile->scales, weight->row_scales ? 16 * block : index),
                                      _mm512_set1_ps(two && planes == 2 ? 256 * weight->factor : weight->factor));
  __m512 zero = _mm512_set1_ps(weight->offset);
  if (tile->zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index)));
  float *to = sums + token * MPQ_ROWS + 16 * block;
  for (int t = 0; t < count; t++, to += MPQ_ROWS) {
    __m512 value = joined(dots, t, count, planes, two);
    if (!two) value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(facts->total[t]), value);
    STORE(to, _mm512_fmadd_ps(value, _mm512_mul_ps(scales, _mm512_set1_ps(facts->scale[t])), LOAD(__m512, to)));
  }
}

/* `count` tokens: up to 8, their planes side by side, or up to 16 in one. Sums leave the matrix unit while it works on the next ones. */
AMX_INLINE void multiply_bytes_amx(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x,
                                   int64_t token, int count, const int planes, const int two,
                                   float *sums) {
  const int width = weight->segment * weight->segments, steps = (weight->segment + 63) / 64;
  const int each = two ? 4 : 2, works = each * weight->segments; /* of both planes of a block, or of two blocks */
  const uint8_t *q = (const uint8_t *)x->q + (tile->index * planes * x->tokens + token) * width;
  int32_t dots[2][2 * 256] __attribute__((aligned(64)));
  segment_facts facts;
  shape(planes * count, 0, weight->segment < 64 ? weight->segment : 64);
  const uint8_t *ahead = tile->ahead, *end = ahead + (two ? tile->bytes : 0); /* decoding asks where levels are unsigned */
  const int64_t part = (tile->bytes / works + 64) & ~(int64_t)63;
  for (int work = 0; work <= works; work++) {
    ahead = ask_part(ahead, part, end);
    if (work < works) {
      const int start = work / each * weight->segment;
      const int64_t at = 64 * (int64_t)start + (two ? 64 : 128) * (work % each);
      const uint8_t *first = tile->levels[0] + at, *second = two ? tile->levels[1] + at : first + 64;
      dot(first, second, q + start, width, steps, two, dots[work % 2]);
    }
    if (!work) continue;
    const int last = work - 1, segment = last / each, block = last % each;
    const int32_t *from = dots[last % 2];
    if (!block) know(weight, tile, x, segment, token, count, planes, &facts);
    if (two) {
      add(weight, tile, &facts, segment, token, count, planes, two, from, block, sums);
    } else {
      add(weight, tile, &facts, segment, token, count, planes, two, from, 2 * block, sums);
      add(weight, tile, &facts, segment, token, count, planes, two, from + 256, 2 * block + 1, sums);
    }
  }
}

#include "brain.h"
#include "bytes.h"

/* At most 16 rows of integers, all planes of all tokens. */
AMX_INLINE void multiply_few(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t first,
                             int count, float *sums) {
  const int two = weight->kind == MPQ_TABLE16;
  if (x->planes == 2 && two) multiply_bytes_amx(weight, tile, x, first, count, 2, 1, sums);
  else if (x->planes == 2) multiply_bytes_amx(weight, tile, x, first, count, 2, 0, sums);
  else if (two) multiply_bytes_amx(weight, tile, x, first, count, 1, 1, sums);
  else multiply_bytes_amx(weight, tile, x, first, count, 1, 0, sums);
}

static AMX_TARGET void multiply(const mpq_weight *weight, const mpq_tile *tiles, int run, const mpq_activation *x,
                                int64_t first, int64_t last, float *sums) {
  if (x->brain) {
    const int two = weight->brain == 2;
    if (two && x->planes == 2) multiply_brain(weight, tiles, run, x, first, last, 1, 2, sums);
    else if (two) multiply_brain(weight, tiles, run, x, first, last, 1, 1, sums);
    else if (x->planes == 2) multiply_brain(weight, tiles, run, x, first, last, 0, 2, sums);
    else multiply_brain(weight, tiles, run, x, first, last, 0, 1, sums);
  } else if (x->matrix) {
    multiply_signed(weight, tiles, run, x, first, last, sums);
  } else if (x->fused || weight->kind == MPQ_BFLOAT || !mpq_in_steps(weight) ||
             (weight->kind != MPQ_TABLE16 && x->tokens * x->planes < 6)) {
    multiply_vectors(weight, tiles, run, x, first, last, sums);
  } else {
    for (int i = 0; i < run; i++) multiply_few(weight, tiles + i, x, first, (int)(last - first), sums);
  }
}

static AMX_TARGET void quantize_any_way(const mpq_weight *weight, mpq_activation *to, const void *x, int bfloat,
                                        int64_t stride, int64_t token, int8_t *unfit) {
  const char *row = (const char *)x + token * stride * (bfloat ? 2 : 4);
  if (!to->matrix) quantize(weight, to, x, bfloat, stride, token, unfit);
  else if (to->planes == 2) quantize_signed(weight, to, row, bfloat, token, unfit, 2);
  else quantize_signed(weight, to, row, bfloat, token, unfit, 1);
}

static AMX_TARGET void begin(void) { shaped = -1; }
static AMX_TARGET void end(void) { _tile_release(); }

const mpq_level mpq_amx = {"amx", 0, 1, 1, quantize_any_way, decode_any_brain, multiply, begin, end, &between};
#endif
