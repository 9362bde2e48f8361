/* AVX-512 with byte permutations and byte dot products, shared by the vector and the matrix level. */
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni,fma,f16c,avx2")))
#include "template.h"

INLINE __m512 scales16(int kind, const uint8_t *scales, int index) {
  if (kind == MPQ_FP16) return _mm512_cvtph_ps(LOAD(__m256i, scales + 2 * index));
  if (kind == MPQ_E4M3 || kind == MPQ_UE5M3) {
    __m256i code = _mm256_cvtepu8_epi16(LOAD(__m128i, scales + index));
    __m256i half = _mm256_slli_epi16(code, 7);
    if (kind == MPQ_UE5M3) return _mm512_cvtph_ps(half);
    half = _mm256_or_si256(_mm256_and_si256(half, _mm256_set1_epi16(0x3f80)),
                           _mm256_and_si256(_mm256_slli_epi16(code, 8), _mm256_set1_epi16((short)0x8000)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
  }
  if (kind == MPQ_FP32) return LOAD(__m512, scales + 4 * index);
  if (kind == MPQ_BF16) return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(LOAD(__m256i, scales + 2 * index)), 16);
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu8_epi32(LOAD(__m128i, scales + index)), 23);
}

/* Four steps (256 codes) from 32 * bits bytes. */
INLINE void codes256(int bits, const uint8_t *from, __m512i spread, __m512i shifts, __m512i out[4]) {
  const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
  if (bits == 8) {
    for (int i = 0; i < 4; i++) out[i] = LOAD(__m512i, from + 64 * i);
  } else if (bits == 4) {
    for (int i = 0; i < 4; i += 2) {
      __m512i both = LOAD(__m512i, from + 32 * i);
      out[i] = _mm512_and_si512(both, mask);
      out[i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
  } else if (bits == 2) {
    __m512i four = LOAD(__m512i, from);
    for (int i = 0; i < 4; i++) out[i] = _mm512_and_si512(_mm512_srli_epi16(four, 2 * i), mask);
  } else {
    for (int i = 0; i < 4; i++) {
      __m512i bytes = _mm512_permutexvar_epi8(spread, LOAD(__m512i, from + 8 * bits * i));
      out[i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, bytes), mask);
    }
  }
}

INLINE void decode_tile(const mpq_weight *weight, const int bits, const int kind, const uint8_t *codes, uint8_t *out,
                        size_t plane, const int form) {
  const int is_signed = form == MPQ_SIGNED;
  const int quads = weight->segment * weight->segments / 4;
  const __m512i less = _mm512_set1_epi8((char)(kind == MPQ_INTEGER ? mpq_shift(weight) : weight->offset));
  const __m512i table = LOAD(__m512i, weight->low);
  __m512i high = LOAD(__m512i, weight->high);
  if (is_signed && kind == MPQ_TABLE16) /* 256 times it and a low byte with its own sign */
    high = _mm512_sub_epi8(_mm512_xor_si512(high, _mm512_set1_epi8((char)0x80)), _mm512_movm_epi8(_mm512_movepi8_mask(table)));
  const __m512i low = is_signed && kind == MPQ_TABLE8 ? _mm512_sub_epi8(table, less) : table;
  const __m512i low2 = LOAD(__m512i, weight->low + 64), high2 = LOAD(__m512i, weight->high + 64);
  uint8_t spread[64], shifts[64];
  for (int i = 0; i < 64; i++) spread[i] = i / 8 * bits + i % 8, shifts[i] = i % 8 * bits;
  const __m512i spreads = LOAD(__m512i, spread), shift = LOAD(__m512i, shifts);
  for (int quad = 0; quad < quads; quad++, codes += 32 * bits) {
    for (int line = 0; line < 32 * bits && form <= 0; line += 64) /* otherwise products ask for what follows */
      _mm_prefetch((const char *)codes + MPQ_AHEAD + line, _MM_HINT_T0);
    if (bits == 8 && kind == MPQ_INTEGER && !is_signed) continue;
    __m512i found[4];
    codes256(bits, codes, spreads, shift, found);
    for (int i = 0; i < 4; i++) {
      uint8_t *to = out + 64 * (4 * (size_t)quad + i);
      if (kind == MPQ_INTEGER) {
        STORE(to, is_signed ? _mm512_sub_epi8(found[i], less) : found[i]);
      } else if (kind == MPQ_BFLOAT) {
        __m512i bottom, top;
        if (bits >= 7) {
          bottom = _mm512_permutex2var_epi8(low, found[i], low2);
          top = _mm512_permutex2var_epi8(high, found[i], high2);
        } else {
          bottom = _mm512_permutexvar_epi8(found[i], low), top = _mm512_permutexvar_epi8(found[i], high);
        }
        if (bits == 8) /* tables of 128 are read with seven bits; the sign is the code's own top bit */
          top = _mm512_ternarylogic_epi32(top, found[i], _mm512_set1_epi8((char)0x80), 0xf8); /* top | code & 0x80 */
        to = form == 1 ? out + 1024 * (quad / 8 * 4 + i) + quad % 8 * 128 : out + 512 * (size_t)quad + 64 * i;
        STORE(to, _mm512_unpacklo_epi8(bottom, top));
        STORE(to + (form == 1 ? 64 : 256), _mm512_unpackhi_epi8(bottom, top));
      } else {
        STORE(to, _mm512_permutexvar_epi8(found[i], low));
        if (kind == MPQ_TABLE16) STORE(to + plane, _mm512_permutexvar_epi8(found[i], high));
      }
    }
  }
}

#define DECODE(bits) \
  case bits: \
    if (form == MPQ_SIGNED && weight->kind == MPQ_INTEGER) decode_tile(weight, bits, MPQ_INTEGER, codes, out, plane, MPQ_SIGNED); \
    else if (form == MPQ_SIGNED && weight->kind == MPQ_TABLE16) decode_tile(weight, bits, MPQ_TABLE16, codes, out, plane, MPQ_SIGNED); \
    else if (form == MPQ_SIGNED) decode_tile(weight, bits, MPQ_TABLE8, codes, out, plane, MPQ_SIGNED); \
    else if (weight->kind == MPQ_INTEGER) decode_tile(weight, bits, MPQ_INTEGER, codes, out, plane, 0); \
    else if (weight->kind == MPQ_TABLE8) decode_tile(weight, bits, MPQ_TABLE8, codes, out, plane, 0); \
    else if (weight->kind == MPQ_TABLE16) decode_tile(weight, bits, MPQ_TABLE16, codes, out, plane, 0); \
    else if (form == 1) decode_tile(weight, bits, MPQ_BFLOAT, codes, out, plane, 1); \
    else decode_tile(weight, bits, MPQ_BFLOAT, codes, out, plane, 0); \
    break;

static TARGET void decode(const mpq_weight *weight, const uint8_t *codes, int form, mpq_tile *tile, uint8_t *out) {
  const size_t plane = 64 * (size_t)weight->segment * weight->segments;
  place_levels(weight, codes, tile, out);
  if (form == MPQ_CODES) tile->levels[0] = codes;
  if (form == MPQ_SIGNED && weight->kind == MPQ_INTEGER) tile->levels[0] = out;
  if (form != MPQ_CODES) switch (weight->bits) { DECODE(2) DECODE(3) DECODE(4) DECODE(5) DECODE(6) DECODE(7) DECODE(8) }
}

#include "fused.h"
#include "between.h"

/* `count` tokens from `token` on, their planes of bytes against one or two planes of levels. */
INLINE void multiply_bytes(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t token,
                           const int count, const int planes, const int two, float *sums) {
  const int width = weight->segment * weight->segments;
  const int8_t *q = x->q + (tile->index * planes * x->tokens + token) * width;
  for (int segment = 0; segment < weight->segments; segment++) {
    const int32_t *sum = x->sums + (tile->index * weight->segments + segment) * planes * x->tokens + token;
    __m512 found[3][4];
    for (int plane = 0; plane <= two; plane++) {
      const int offset = two ? 128 * !plane : weight->offset;
      const uint8_t *levels = tile->levels[plane] + 64 * (size_t)weight->segment * segment;
      __m512i dots[3][2][4];
      for (int t = 0; t < count; t++)
        for (int p = 0; p < planes; p++)
          for (int block = 0; block < 4; block++) dots[t][p][block] = _mm512_set1_epi32(-offset * sum[p * x->tokens + t]);
      for (int quad = 0; quad < weight->segment / 4; quad++, levels += 256) {
        __m512i level[4];
        for (int block = 0; block < 4; block++) level[block] = LOAD(__m512i, levels + 64 * block);
        for (int t = 0; t < count; t++)
          for (int p = 0; p < planes; p++) {
            __m512i columns = _mm512_set1_epi32(LOAD(int32_t, q + (p * x->tokens + t) * width + 4 * quad));
            for (int block = 0; block < 4; block++)
              dots[t][p][block] = _mm512_dpbusd_epi32(dots[t][p][block], level[block], columns);
          }
      }
      for (int t = 0; t < count; t++)
        for (int block = 0; block < 4; block++) {
          __m512 value = _mm512_cvtepi32_ps(dots[t][0][block]);
          if (planes == 2) value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(dots[t][1][block]));
          found[t][block] = plane ? _mm512_fmadd_ps(found[t][block], _mm512_set1_ps(256), value) : value;
        }
    }
    q += weight->segment;
    for (int block = 0; block < 4; block++) {
      const int index = MPQ_ROWS * segment + 16 * block;
      __m512 scale = scales16(weight->scale_kind, tile->scales, weight->row_scales ? 16 * block : index);
      __m512 zero = _mm512_setzero_ps();
      if (tile->zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index)));
      for (int t = 0; t < count; t++) {
        float *to = sums + (token + t) * MPQ_ROWS + 16 * block;
        if (tile->zeros) {
          float total = planes == 2 ? 256.f * sum[t] + sum[x->tokens + t] : sum[t];
          found[t][block] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(total), found[t][block]);
        }
        __m512 factor = _mm512_set1_ps(x->scale[tile->index * x->tokens + token + t] * weight->factor);
        STORE(to, _mm512_fmadd_ps(found[t][block], _mm512_mul_ps(scale, factor), LOAD(__m512, to)));
      }
    }
  }
}

/* One token, bfloat16 weights against the activations as they are. */
INLINE void multiply_real(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t token,
                          float *sums) {
  const int width = weight->segment * weight->segments;
  const float *real = x->real + (tile->index * x->tokens + token) * width;
  const uint8_t *levels = tile->levels[0];
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512 found[2][4];
    for (int block = 0; block < 4; block++) found[0][block] = found[1][block] = _mm512_setzero_ps();
    for (int quad = 0; quad < weight->segment / 4; quad++, real += 4)
      for (int pair = 0; pair < 2; pair++)
        for (int block = 0; block < 4; block++, levels += 64) {
          __m512i both = LOAD(__m512i, levels);
          __m512 even = (__m512)_mm512_slli_epi32(both, 16);
          __m512 odd = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
          found[0][block] = _mm512_fmadd_ps(even, _mm512_set1_ps(real[2 * pair]), found[0][block]);
          found[1][block] = _mm512_fmadd_ps(odd, _mm512_set1_ps(real[2 * pair + 1]), found[1][block]);
        }
    for (int block = 0; block < 4; block++) {
      const int index = weight->row_scales ? 16 * block : MPQ_ROWS * segment + 16 * block;
      __m512 scale = _mm512_mul_ps(scales16(weight->scale_kind, tile->scales, index), _mm512_set1_ps(weight->factor));
      float *to = sums + token * MPQ_ROWS + 16 * block;
      STORE(to, _mm512_fmadd_ps(_mm512_add_ps(found[0][block], found[1][block]), scale, LOAD(__m512, to)));
    }
  }
}

#define TOKENS(count) \
  if (planes == 2 && !two) multiply_bytes(weight, tile, x, token, count, 2, 0, sums); \
  else if (planes == 2) multiply_bytes(weight, tile, x, token, count, 2, 1, sums); \
  else if (!two) multiply_bytes(weight, tile, x, token, count, 1, 0, sums); \
  else multiply_bytes(weight, tile, x, token, count, 1, 1, sums);

INLINE void multiply_tile(const mpq_weight *weight, const mpq_tile *tile, const mpq_activation *x, int64_t first,
                          int64_t last, float *sums) {
  const int planes = x->planes, two = weight->kind == MPQ_TABLE16;
  if (weight->kind == MPQ_BFLOAT) {
    for (int64_t token = first; token < last; token++) multiply_real(weight, tile, x, token, sums);
    return;
  }
  for (int64_t token = first; token < last;) {
    const int64_t left = last - token, count = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
    if (count == 3) { TOKENS(3) } else if (count == 2) { TOKENS(2) } else { TOKENS(1) }
    token += count;
  }
}

static TARGET void multiply_vectors(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                                    int64_t first, int64_t last, float *sums) {
  for (int i = 0; i < count; i++)
    if (x->fused) fused(weight, tiles + i, x, sums);
    else multiply_tile(weight, tiles + i, x, first, last, sums);
}

INLINE __m512 reals16(const void *x, int bfloat, int64_t index) {
  if (!bfloat) return LOAD(__m512, (const float *)x + index);
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(LOAD(__m256i, (const uint16_t *)x + index)), 16);
}

/* The bits of the largest magnitude: they are in the numbers' order, NaN and infinities above all. */
INLINE uint32_t largest_bits(const void *x, int bfloat, int64_t count) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16)
    largest = _mm512_max_epu32(largest, _mm512_and_si512((__m512i)reals16(x, bfloat, i), _mm512_set1_epi32(0x7fffffff)));
  return _mm512_reduce_max_epu32(largest);
}

INLINE float as_real(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* Whether a tile's numbers can be read where they stand; otherwise they are gathered. */
INLINE int in_place(const mpq_weight *weight, const void **from, const void *x, int bfloat, int64_t column, float *buffer) {
  if (weight->segment == weight->group && column + weight->segment * weight->segments <= weight->cols) {
    *from = (const char *)x + column * (bfloat ? 2 : 4);
    return 1;
  }
  gather(weight, x, bfloat, column, buffer);
  return 0;
}

/* What the largest scale there is leaves too large, before it is made an integer: larger ones wrap around. */
INLINE __m512 within_bytes(__m512 value) {
  return _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(127)), _mm512_set1_ps(-128));
}

/* As `quantize_any` does it, for segments of whole vectors: one or two planes of integers and their sums. */
INLINE void quantize_vectors(const mpq_weight *weight, mpq_activation *to, const void *x, int bfloat, int64_t token,
                             int8_t *unfit, const int planes) {
  const int tile = weight->segment * weight->segments;
  const int64_t tokens = to->tokens;
  const __m512 magic = _mm512_set1_ps(0x1.8p23f);
  float buffer[MPQ_MAX_TILE + 16] __attribute__((aligned(64)));
  float scale = 1;
  unfit[token] = 0;
  if (planes == 1) {
    uint32_t largest = 0;
    for (int t = 0; t < weight->tiles; t++) {
      const void *from = buffer;
      const int direct = in_place(weight, &from, x, bfloat, (int64_t)t * tile, buffer);
      const uint32_t found = largest_bits(from, direct && bfloat, tile);
      if (found > largest) largest = found;
    }
    if (largest > 0x7f7fffff) { unfit[token] = 1; return; }
    if (largest) scale = as_half(as_real(largest) / 127);
  }
  for (int t = 0; t < weight->tiles; t++) {
    const void *from = buffer;
    const int half = in_place(weight, &from, x, bfloat, (int64_t)t * tile, buffer) && bfloat;
    if (planes == 2) {
      const uint32_t bits = largest_bits(from, half, tile);
      const float largest = as_real(bits);
      if (bits > 0x7f7fffff || (bits && largest < 0x1p-100f)) unfit[token] = 1;
      scale = unfit[token] ? 0 : largest / 32639;
    }
    to->scale[t * tokens + token] = scale;
    if (unfit[token]) return;
    const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    int8_t *high = to->q + (t * planes * tokens + token) * tile, *low = high + tokens * tile;
    int32_t *sums = to->sums + (int64_t)t * weight->segments * planes * tokens + token;
    for (int segment = 0, i = 0; segment < weight->segments; segment++, sums += planes * tokens) {
      __m512i whole = _mm512_setzero_si512(), tops = whole;
      for (const int end = i + weight->segment; i < end; i += 16) {
        const __m512 value = reals16(from, half, i);
        const __m512 near = planes == 1 ? within_bytes(_mm512_div_ps(value, divisor)) : _mm512_mul_ps(value, inverse);
        const __m512i q = _mm512_sub_epi32((__m512i)_mm512_add_ps(near, magic), (__m512i)magic);
        if (planes == 1) {
          STORE(high + i, _mm512_cvtepi32_epi8(q));
        } else {
          const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
          STORE(high + i, _mm512_cvtepi32_epi8(top));
          STORE(low + i, _mm512_cvtepi32_epi8(q)); /* the last eight bits of q - 256 top */
          tops = _mm512_add_epi32(tops, top);
        }
        whole = _mm512_add_epi32(whole, q);
      }
      const int32_t sum = _mm512_reduce_add_epi32(whole);
      if (planes == 1) { sums[0] = sum; continue; }
      sums[0] = _mm512_reduce_add_epi32(tops);
      sums[tokens] = sum - 256 * sums[0];
    }
  }
}

static TARGET void quantize(const mpq_weight *weight, mpq_activation *to, const void *x, int bfloat, int64_t stride,
                            int64_t token, int8_t *unfit) {
  if (!to->scale || to->brain || weight->segment % 16 || weight->segment != weight->group)
    quantize_any(weight, to, x, bfloat, stride, token, unfit, 0);
  else if (to->planes == 2)
    quantize_vectors(weight, to, (const char *)x + token * stride * (bfloat ? 2 : 4), bfloat, token, unfit, 2);
  else
    quantize_vectors(weight, to, (const char *)x + token * stride * (bfloat ? 2 : 4), bfloat, token, unfit, 1);
}
