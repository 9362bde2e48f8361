/* AVX-512 with VNNI, VBMI and GFNI: decode, quantize and int8 products. Shared by the avx512 and amx levels. */
#ifndef MPQ_AVX512_H
#define MPQ_AVX512_H
#include <immintrin.h>

#ifndef TARGET
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni,fma,f16c,avx2")))
#endif
#include "common.h"


INLINE __m512 load_scales16(int kind, const uint8_t *scales, int index) {
  if (kind == MPQ_SCALE_FP16) return _mm512_cvtph_ps(LOAD(__m256i, scales + 2 * index));
  if (kind == MPQ_SCALE_E4M3 || kind == MPQ_SCALE_UE5M3) {
    __m256i code = _mm256_cvtepu8_epi16(LOAD(__m128i, scales + index));
    __m256i is_bf16_tile = _mm256_slli_epi16(code, 7);
    if (kind == MPQ_SCALE_UE5M3) return _mm512_cvtph_ps(is_bf16_tile);
    is_bf16_tile = _mm256_or_si256(_mm256_and_si256(is_bf16_tile, _mm256_set1_epi16(0x3f80)),
                                   _mm256_and_si256(_mm256_slli_epi16(code, 8), _mm256_set1_epi16((short)0x8000)));
    return _mm512_mul_ps(_mm512_cvtph_ps(is_bf16_tile), _mm512_set1_ps(256));
  }
  if (kind == MPQ_SCALE_FP32) return LOAD(__m512, scales + 4 * index);
  if (kind == MPQ_SCALE_BF16) return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(LOAD(__m256i, scales + 2 * index)), 16);
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu8_epi32(LOAD(__m128i, scales + index)), 23);
}

/* Unpack a quad's four steps (256 codes) from 32 * bits bytes. */
INLINE void unpack_quad(int bits, const uint8_t *from, __m512i byte_of, __m512i shifts, __m512i out[4]) {
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
      __m512i bytes = _mm512_permutexvar_epi8(byte_of, LOAD(__m512i, from + 8 * bits * i));
      out[i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, bytes), mask);
    }
  }
}

INLINE void decode_tile(const mpq_weight *weight, const int bits, const int kind, const uint8_t *codes, uint8_t *out,
                        size_t plane, const int form) {
  const int is_signed = form == TILE_SIGNED;
  const int quads = weight->segment * weight->segments / 4;
  const __m512i shift_by = _mm512_set1_epi8((char)(kind == MPQ_INTEGER ? mpq_signed_shift(weight) : weight->offset));
  const __m512i table = LOAD(__m512i, weight->low);
  __m512i high = LOAD(__m512i, weight->high);
  if (is_signed && kind == MPQ_TABLE16) /* 256 * high plus a signed low byte */
    high = _mm512_sub_epi8(_mm512_xor_si512(high, _mm512_set1_epi8((char)0x80)), _mm512_movm_epi8(_mm512_movepi8_mask(table)));
  const __m512i low = is_signed && kind == MPQ_TABLE8 ? _mm512_sub_epi8(table, shift_by) : table;
  const __m512i low2 = LOAD(__m512i, weight->low + 64), high2 = LOAD(__m512i, weight->high + 64);
  uint8_t byte_of[64], shifts[64];
  for (int i = 0; i < 64; i++) byte_of[i] = i / 8 * bits + i % 8, shifts[i] = i % 8 * bits;
  const __m512i bytes_of = LOAD(__m512i, byte_of), shift = LOAD(__m512i, shifts);
  for (int quad = 0; quad < quads; quad++, codes += 32 * bits) {
    for (int line = 0; line < 32 * bits && form <= TILE_LEVELS; line += 64) /* for signed and bf16 tiles, multiply prefetches */
      _mm_prefetch((const char *)codes + PREFETCH_L2_BYTES + line, _MM_HINT_T0);
    if (bits == 8 && kind == MPQ_INTEGER && !is_signed) continue;
    __m512i values[4];
    unpack_quad(bits, codes, bytes_of, shift, values);
    for (int i = 0; i < 4; i++) {
      uint8_t *to = out + 64 * (4 * (size_t)quad + i);
      if (kind == MPQ_INTEGER) {
        STORE(to, is_signed ? _mm512_sub_epi8(values[i], shift_by) : values[i]);
      } else if (kind == MPQ_TABLE_BF16) {
        __m512i bottom, top;
        if (bits >= 7) {
          bottom = _mm512_permutex2var_epi8(low, values[i], low2);
          top = _mm512_permutex2var_epi8(high, values[i], high2);
        } else {
          bottom = _mm512_permutexvar_epi8(values[i], low), top = _mm512_permutexvar_epi8(values[i], high);
        }
        if (bits == 8) /* permutexvar reads 7 index bits (tables of 128 entries); the sign is the code's top bit */
          top = _mm512_ternarylogic_epi32(top, values[i], _mm512_set1_epi8((char)0x80), 0xf8); /* top | code & 0x80 */
        to = form == TILE_BF16 ? out + 1024 * (quad / 8 * 4 + i) + quad % 8 * 128 : out + 512 * (size_t)quad + 64 * i;
        STORE(to, _mm512_unpacklo_epi8(bottom, top));
        STORE(to + (form == TILE_BF16 ? 64 : 256), _mm512_unpackhi_epi8(bottom, top));
      } else {
        STORE(to, _mm512_permutexvar_epi8(values[i], low));
        if (kind == MPQ_TABLE16) STORE(to + plane, _mm512_permutexvar_epi8(values[i], high));
      }
    }
  }
}

#define DECODE(bits) \
  case bits: \
    if (form == TILE_SIGNED && weight->kind == MPQ_INTEGER) \
      decode_tile(weight, bits, MPQ_INTEGER, codes, out, plane, TILE_SIGNED); \
    else if (form == TILE_SIGNED && weight->kind == MPQ_TABLE16) \
      decode_tile(weight, bits, MPQ_TABLE16, codes, out, plane, TILE_SIGNED); \
    else if (form == TILE_SIGNED) decode_tile(weight, bits, MPQ_TABLE8, codes, out, plane, TILE_SIGNED); \
    else if (weight->kind == MPQ_INTEGER) decode_tile(weight, bits, MPQ_INTEGER, codes, out, plane, TILE_LEVELS); \
    else if (weight->kind == MPQ_TABLE8) decode_tile(weight, bits, MPQ_TABLE8, codes, out, plane, TILE_LEVELS); \
    else if (weight->kind == MPQ_TABLE16) decode_tile(weight, bits, MPQ_TABLE16, codes, out, plane, TILE_LEVELS); \
    else if (form == TILE_BF16) decode_tile(weight, bits, MPQ_TABLE_BF16, codes, out, plane, TILE_BF16); \
    else decode_tile(weight, bits, MPQ_TABLE_BF16, codes, out, plane, TILE_LEVELS); \
    break;

static TARGET void decode(const mpq_weight *weight, const uint8_t *codes, int form, mpq_tile *tile, uint8_t *out) {
  const size_t plane = 64 * (size_t)weight->segment * weight->segments;
  set_levels(weight, codes, tile, out);
  if (form == TILE_CODES) tile->levels[0] = codes;
  if (form == TILE_SIGNED && weight->kind == MPQ_INTEGER) tile->levels[0] = out;
  if (form != TILE_CODES) switch (weight->bits) { DECODE(2) DECODE(3) DECODE(4) DECODE(5) DECODE(6) DECODE(7) DECODE(8) }
}

INLINE __m512 load_floats16(const void *x, int is_bf16, int64_t index) {
  if (!is_bf16) return LOAD(__m512, (const float *)x + index);
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(LOAD(__m256i, (const uint16_t *)x + index)), 16);
}

/* The bit pattern of the largest magnitude. Magnitudes order like their bits; NaN and infinity compare above all. */
INLINE uint32_t largest_bits(const void *x, int is_bf16, int64_t count) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16)
    largest = _mm512_max_epu32(largest, _mm512_and_si512((__m512i)load_floats16(x, is_bf16, i), _mm512_set1_epi32(0x7fffffff)));
  return _mm512_reduce_max_epu32(largest);
}

INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* Point `from` at the tile's activations where they stand if they are contiguous; otherwise gather them into
 * `buffer`. */
INLINE int read_in_place(const mpq_weight *weight, const void **from, const void *x, int is_bf16, int64_t column, float *buffer) {
  if (weight->segment == weight->group && column + weight->segment * weight->segments <= weight->cols) {
    *from = (const char *)x + column * (is_bf16 ? 2 : 4);
    return 1;
  }
  gather(weight, x, is_bf16, column, buffer);
  return 0;
}

/* Clamp to int8 before conversion: the scale is capped at the largest float16, and larger values would wrap. */
INLINE __m512 clamp_int8(__m512 value) {
  return _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(127)), _mm512_set1_ps(-128));
}

/* `quantize_any` for segments that are whole vectors: one or two int8 planes and their sums. */
INLINE void quantize_vectors(const mpq_weight *weight, mpq_activation *to, const void *x, int is_bf16, int64_t token,
                             int8_t *skipped, const int planes) {
  const int tile = weight->segment * weight->segments;
  const int64_t tokens = to->tokens;
  const __m512 magic = _mm512_set1_ps(0x1.8p23f);
  float buffer[MAX_TILE_COLUMNS + 16] __attribute__((aligned(64)));
  float scale = 1;
  skipped[token] = 0;
  if (planes == 1) {
    uint32_t largest = 0;
    for (int t = 0; t < weight->tiles; t++) {
      const void *from = buffer;
      const int direct = read_in_place(weight, &from, x, is_bf16, (int64_t)t * tile, buffer);
      const uint32_t tile_largest = largest_bits(from, direct && is_bf16, tile);
      if (tile_largest > largest) largest = tile_largest;
    }
    if (largest > 0x7f7fffff) { skipped[token] = 1; return; }
    if (largest) scale = round_to_fp16(float_of_bits(largest) / 127);
  }
  for (int t = 0; t < weight->tiles; t++) {
    const void *from = buffer;
    const int is_bf16_tile = read_in_place(weight, &from, x, is_bf16, (int64_t)t * tile, buffer) && is_bf16;
    if (planes == 2) {
      const uint32_t bits = largest_bits(from, is_bf16_tile, tile);
      const float largest = float_of_bits(bits);
      if (bits > 0x7f7fffff || (bits && largest < 0x1p-100f)) skipped[token] = 1;
      scale = skipped[token] ? 0 : largest / 32639;
    }
    to->scale[t * tokens + token] = scale;
    if (skipped[token]) return;
    const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    int8_t *high = to->q + (t * planes * tokens + token) * tile, *low = high + tokens * tile;
    int32_t *sums = to->sums + (int64_t)t * weight->segments * planes * tokens + token;
    for (int segment = 0, i = 0; segment < weight->segments; segment++, sums += planes * tokens) {
      __m512i whole = _mm512_setzero_si512(), tops = whole;
      for (const int end = i + weight->segment; i < end; i += 16) {
        const __m512 value = load_floats16(from, is_bf16_tile, i);
        const __m512 nearest = planes == 1 ? clamp_int8(_mm512_div_ps(value, divisor)) : _mm512_mul_ps(value, inverse);
        const __m512i q = _mm512_sub_epi32((__m512i)_mm512_add_ps(nearest, magic), (__m512i)magic);
        if (planes == 1) {
          STORE(high + i, _mm512_cvtepi32_epi8(q));
        } else {
          const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
          STORE(high + i, _mm512_cvtepi32_epi8(top));
          STORE(low + i, _mm512_cvtepi32_epi8(q)); /* the low eight bits of q - 256 * top */
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

static TARGET void quantize(const mpq_weight *weight, mpq_activation *to, const void *x, int is_bf16, int64_t stride,
                            int64_t token, int8_t *skipped) {
  if (!to->scale || to->bf16 || weight->segment % 16 || weight->segment != weight->group)
    quantize_any(weight, to, x, is_bf16, stride, token, skipped, 0);
  else if (to->planes == 2)
    quantize_vectors(weight, to, (const char *)x + token * stride * (is_bf16 ? 2 : 4), is_bf16, token, skipped, 2);
  else
    quantize_vectors(weight, to, (const char *)x + token * stride * (is_bf16 ? 2 : 4), is_bf16, token, skipped, 1);
}
#endif
