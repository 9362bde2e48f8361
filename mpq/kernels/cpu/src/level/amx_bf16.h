/* AMX in bf16: a weight, scale included, is one bf16 (exact) or the sum of two; sums stay in the unit's tiles.
 *
 * Used where scales change too often for the int8 unit (groups below 64) or levels have 16 bits. When weight and
 * activation both are sums of two, the product of both low terms is dropped: 2**-18 relative. */
#ifndef MPQ_AMX_BF16_H
#define MPQ_AMX_BF16_H
#include "amx.h"


/* Store lanes of (even, odd) as pairs of bf16. With two terms, the rounding residual goes `plane` bytes further. */
AMX_INLINE void store_bf16_pair(uint8_t *to, size_t plane, const int planes, __m512 even, __m512 odd) {
  const __m512i top = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
  __m512i first = _mm512_add_epi32((__m512i)even, half), second = _mm512_add_epi32((__m512i)odd, half);
  if (planes == 2) {
    first = _mm512_and_si512(first, top);
    second = _mm512_and_si512(second, top);
    __m512i second_term = _mm512_add_epi32((__m512i)_mm512_sub_ps(even, (__m512)first), half);
    __m512i odd_rest = _mm512_add_epi32((__m512i)_mm512_sub_ps(odd, (__m512)second), half);
    STORE(to + plane, _mm512_ternarylogic_epi32(_mm512_srli_epi32(second_term, 16), odd_rest, top, 0xf8)); /* a | b & c */
  }
  STORE(to, _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, top, 0xf8));
}

AMX_INLINE void zero_padding(const mpq_weight *weight, int pair, int planes, uint8_t *out) {
  for (; pair % 16; pair++)
    for (int i = 0; i < 4 * planes; i++)
      memset(out + i / 4 * 128 * (size_t)mpq_bf16_columns(weight) + (pair / 16 * 4 + i % 4) * 1024 + pair % 16 * 64, 0, 64);
}

AMX_INLINE void decode_to_bf16(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *levels, const uint8_t *low_levels,
                               const int planes, const int kind, uint8_t *out) {
  const size_t plane = 128 * (size_t)mpq_bf16_columns(weight);
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i table_offset = _mm512_set1_epi32(32768);
  int pair = 0; /* pair of columns; the unit wants sixteen pairs for each of sixteen rows */
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512 scale[4], offsets[4];
    for (int block = 0; block < 4; block++) {
      const int index = PANEL_ROWS * (weight->row_scales ? 0 : segment) + 16 * block;
      __m512 zero = _mm512_set1_ps(weight->offset);
      if (tile->zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index)));
      scale[block] = weight->row_scales ? _mm512_set1_ps(1) : load_scales16(weight->scale_kind, tile->scales, index);
      offsets[block] = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), zero), scale[block]);
    }
    for (int quad = 0; quad < weight->segment / 4; quad++, pair += 2)
      for (int block = 0; block < 4; block++) {
        uint8_t *to = out + (pair / 16 * 4 + block) * 1024 + pair % 16 * 64;
        __m512 values[4];
        if (kind == MPQ_TABLE_BF16) {
          for (int i = 0; i < 4; i += 2) {
            __m512i both = LOAD(__m512i, levels + 128 * i + 64 * block);
            values[i] = _mm512_mul_ps((__m512)_mm512_slli_epi32(both, 16), scale[block]);
            both = _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
            values[i + 1] = _mm512_mul_ps((__m512)both, scale[block]);
          }
        } else {
          const __m512i level = LOAD(__m512i, levels + 64 * block);
          const __m512i low = kind == MPQ_TABLE16 ? LOAD(__m512i, low_levels + 64 * block) : level;
          for (int i = 0; i < 4; i++) {
            __m512i code = i == 3 ? _mm512_srli_epi32(low, 24) : _mm512_and_si512(_mm512_srli_epi32(low, 8 * i), byte);
            if (kind == MPQ_TABLE16) {
              __m512i high = _mm512_slli_epi32(level, 24 - 8 * i);
              code = _mm512_or_si512(code, _mm512_slli_epi32(_mm512_srli_epi32(high, 24), 8));
              code = _mm512_sub_epi32(code, table_offset);
              values[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale[block]);
            } else {
              values[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale[block], offsets[block]);
            }
          }
        }
        store_bf16_pair(to, plane, planes, values[0], values[1]);
        store_bf16_pair(to + 64, plane, planes, values[2], values[3]);
        if (block == 3) levels += kind == MPQ_TABLE_BF16 ? 512 : 256, low_levels += 256;
      }
  }
  zero_padding(weight, pair, planes, out);
}

/* Whether scaling by an exponent add is exact: all e8m0 scales of the tile stay far from overflow and underflow. */
AMX_INLINE int exponents_in_safe_range(const mpq_weight *weight, const mpq_tile *tile) {
  __m512i least = _mm512_set1_epi8(-1), most = _mm512_setzero_si512();
  for (int segment = 0; segment < weight->segments; segment++) {
    const __m512i scales = LOAD(__m512i, tile->scales + PANEL_ROWS * segment);
    least = _mm512_min_epu8(least, scales), most = _mm512_max_epu8(most, scales);
  }
  return !_mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(1)) && !_mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8((char)230));
}

/* The level of a code, for tables. */
AMX_INLINE float level_of(const mpq_weight *weight, int code) {
  if (weight->kind == MPQ_TABLE16) return 256 * (weight->high[code] - 128) + weight->low[code];
  return (weight->kind == MPQ_TABLE8 ? weight->low[code] : code) - weight->offset;
}

/* Decode up to six bits by bf16 lookup, and scale by adding power-of-two scales to the exponents. */
AMX_INLINE void decode_bf16_lookup(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *codes, const int bits,
                                   uint8_t *out) {
  uint16_t values[64];
  uint8_t spread[64], shift[64], first[64];
  for (int i = 0; i < 64; i++) {
    const float level = level_of(weight, i & ((1 << bits) - 1));
    uint32_t word;
    memcpy(&word, &level, 4);
    values[i] = word >> 16, first[i] = i / 4 * 4 + i % 4 / 2;
    spread[i] = i / 8 * bits + i % 8, shift[i] = i % 8 * bits;
  }
  const __m512i table = LOAD(__m512i, values), table2 = LOAD(__m512i, values + 32), picks = LOAD(__m512i, first);
  const __m512i picks2 = _mm512_add_epi8(picks, _mm512_set1_epi8(2));
  const __m512i spreads = LOAD(__m512i, spread), shifts = LOAD(__m512i, shift);
  int pair = 0;
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512i powers[4] = {0};
    for (int block = 0; block < 4 && !weight->row_scales; block++) {
      const __m512i power = _mm512_cvtepu8_epi32(LOAD(__m128i, tile->scales + PANEL_ROWS * segment + 16 * block));
      const __m512i added = _mm512_slli_epi32(_mm512_sub_epi32(power, _mm512_set1_epi32(127)), 7);
      powers[block] = _mm512_or_si512(_mm512_and_si512(added, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(added, 16));
    }
    for (int quad = 0; quad < weight->segment / 4; quad++, pair += 2, codes += 32 * bits) {
      __m512i values[4];
      unpack_quad(bits, codes, spreads, shifts, values);
      for (int i = 0; i < 8; i++) {
        __m512i both = _mm512_permutexvar_epi8(i % 2 ? picks2 : picks, values[i / 2]);
        if (bits == 6) both = _mm512_permutex2var_epi16(table, both, table2);
        else both = _mm512_permutexvar_epi16(both, table);
        if (!weight->row_scales) both = _mm512_mask_add_epi16(both, _mm512_test_epi16_mask(both, both), both, powers[i / 2]);
        STORE(out + (pair / 16 * 4 + i / 2) * 1024 + (pair % 16 + i % 2) * 64, both);
      }
    }
  }
  zero_padding(weight, pair, 1, out);
}

/* Decode four bits by float32 lookup, with any scale. */
AMX_INLINE void decode_fp32_lookup(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *codes, const int planes,
                                   uint8_t *out) {
  const size_t plane = 128 * (size_t)mpq_bf16_columns(weight);
  float values[16];
  for (int i = 0; i < 16; i++) values[i] = level_of(weight, i);
  const __m512 table = LOAD(__m512, values);
  int pair = 0;
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512 scale[4];
    for (int block = 0; block < 4; block++)
      scale[block] = weight->row_scales ? _mm512_set1_ps(1)
                                        : load_scales16(weight->scale_kind, tile->scales, PANEL_ROWS * segment + 16 * block);
    for (int quad = 0; quad < weight->segment / 4; quad++, pair += 2, codes += 128)
      for (int block = 0; block < 4; block++) {
        uint8_t *to = out + (pair / 16 * 4 + block) * 1024 + pair % 16 * 64;
        const __m512i both = LOAD(__m512i, codes + block / 2 * 64); /* permutexvar uses only the low four bits of an index */
        __m512 values[4];
        for (int i = 0; i < 4; i++)
          values[i] = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(both, 8 * i + block % 2 * 4), table), scale[block]);
        store_bf16_pair(to, plane, planes, values[0], values[1]);
        store_bf16_pair(to + 64, plane, planes, values[2], values[3]);
      }
  }
  zero_padding(weight, pair, planes, out);
}

/* Decode from codes directly where a fast path exists; returns whether one did. */
AMX_INLINE int decode_directly(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *codes, uint8_t *out) {
  const int table = weight->kind == MPQ_TABLE8 || weight->kind == MPQ_TABLE16, bits = weight->bits;
  if (weight->bf16_terms == 1 && table && bits <= 6 &&
      (weight->row_scales || (weight->scale_kind == MPQ_SCALE_E8M0 && exponents_in_safe_range(weight, tile)))) {
    if (bits == 4) decode_bf16_lookup(weight, tile, codes, 4, out);
    else if (bits == 5) decode_bf16_lookup(weight, tile, codes, 5, out);
    else if (bits == 6) decode_bf16_lookup(weight, tile, codes, 6, out);
    else return 0;
    return 1;
  }
  if (bits != 4 || weight->kind == MPQ_TABLE_BF16 || weight->zeros) return 0;
  if (weight->bf16_terms == 2) decode_fp32_lookup(weight, tile, codes, 2, out);
  else decode_fp32_lookup(weight, tile, codes, 1, out);
  return 1;
}

static AMX_TARGET void decode_amx(const mpq_weight *weight, const uint8_t *codes, int form, mpq_tile *tile,
                                  uint8_t *out) {
  const int kind = weight->kind, terms = weight->bf16_terms;
  if (form != TILE_BF16) {
    decode(weight, codes, form, tile, out);
    return;
  }
  tile->levels[0] = out, tile->levels[1] = terms == 2 ? out + 128 * (size_t)mpq_bf16_columns(weight) : NULL;
  if (kind == MPQ_TABLE_BF16 && terms == 1 && weight->row_scales) {
    decode(weight, codes, TILE_BF16, tile, out);
    tile->levels[0] = out;
    return;
  }
  if (decode_directly(weight, tile, codes, out)) return;
  uint8_t levels[128 * MAX_TILE_COLUMNS] __attribute__((aligned(64)));
  decode(weight, codes, TILE_LEVELS, tile, levels);
  const uint8_t *first = tile->levels[0], *second = tile->levels[1];
  if (terms == 2) {
    if (kind == MPQ_TABLE16) decode_to_bf16(weight, tile, first, second, 2, MPQ_TABLE16, out);
    else if (kind == MPQ_TABLE_BF16) decode_to_bf16(weight, tile, first, first, 2, MPQ_TABLE_BF16, out);
    else decode_to_bf16(weight, tile, first, first, 2, MPQ_INTEGER, out);
  } else {
    if (kind == MPQ_TABLE16) decode_to_bf16(weight, tile, first, second, 1, MPQ_TABLE16, out);
    else if (kind == MPQ_TABLE_BF16) decode_to_bf16(weight, tile, first, first, 1, MPQ_TABLE_BF16, out);
    else decode_to_bf16(weight, tile, first, first, 1, MPQ_INTEGER, out);
  }
  tile->levels[0] = out, tile->levels[1] = terms == 2 ? out + 128 * (size_t)mpq_bf16_columns(weight) : NULL;
}

/* Tiles 0 and 1: activations, up to 16 tokens each; 2 and 3: sixteen rows each; 4 to 7: sums. */
AMX_INLINE void multiply_accumulate(const int second) {
  _tile_dpbf16ps(4, 0, 2);
  _tile_dpbf16ps(5, 0, 3);
  if (!second) return;
  _tile_dpbf16ps(6, 1, 2);
  _tile_dpbf16ps(7, 1, 3);
}

/* Up to 32 tokens by 32 rows by all columns of a run of tiles. */
AMX_INLINE void multiply_bf16_block(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                                    int64_t token, int block, const int second, const int two_terms, const int planes, int prefetch,
                                    float *to) {
  const int64_t filled = mpq_bf16_columns(weight), next = 32 * filled, plane = (x->tokens + 15) / 16 * next;
  _tile_loadd(4, to, 256);
  _tile_loadd(5, to + 16, 256);
  if (second) {
    _tile_loadd(6, to + 16 * PANEL_ROWS, 256);
    _tile_loadd(7, to + 16 * PANEL_ROWS + 16, 256);
  }
  for (int i = 0; i < count; i++) {
    const uint8_t *from = (const uint8_t *)x->bf16 + tiles[i].index * planes * plane + token / 16 * next;
    const uint8_t *levels = tiles[i].levels[0] + 1024 * block, *second_term = two_terms ? tiles[i].levels[1] + 1024 * block : NULL;
    const int64_t bytes = (tiles[i].bytes / (filled / 16) + 64) & ~(int64_t)63;
    const uint8_t *next_tile = tiles[i].prefetch + (block ? filled / 32 * bytes : 0);
    const uint8_t *end = tiles[i].prefetch + (prefetch ? tiles[i].bytes : 0);
    for (int step = 0; step < filled / 32; step++, from += 1024, levels += 4096) {
      next_tile = prefetch_range(next_tile, bytes, end);
      _tile_loadd(0, from, 64);
      if (second) _tile_loadd(1, from + next, 64);
      if (two_terms) {
        _tile_loadd(2, second_term + 4096 * step, 64);
        _tile_loadd(3, second_term + 4096 * step + 1024, 64);
        multiply_accumulate(second);
      }
      _tile_loadd(2, levels, 64);
      _tile_loadd(3, levels + 1024, 64);
      multiply_accumulate(second);
      if (planes == 2) {
        _tile_loadd(0, from + plane, 64);
        if (second) _tile_loadd(1, from + plane + next, 64);
        multiply_accumulate(second);
      }
    }
  }
  _tile_stored(4, to, 256);
  _tile_stored(5, to + 16, 256);
  if (second) {
    _tile_stored(6, to + 16 * PANEL_ROWS, 256);
    _tile_stored(7, to + 16 * PANEL_ROWS + 16, 256);
  }
}

/* `first` is a multiple of 16. */
AMX_INLINE void multiply_bf16(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                              int64_t first, int64_t last, const int two_terms, const int planes, float *sums) {
  for (int block = 0; block < 4; block += 2) /* half of the decoded rows at a time stays in L1 */
    for (int64_t token = first; token < last; token += 32) {
      const int tokens = last - token < 32 ? (int)(last - token) : 32;
      float *to = sums + token * PANEL_ROWS + 16 * block;
      configure_tiles(tokens > 16 ? 16 : tokens, tokens > 16 ? tokens - 16 : 0, 64);
      if (tokens > 16) multiply_bf16_block(weight, tiles, count, x, token, block, 1, two_terms, planes, token == first, to);
      else multiply_bf16_block(weight, tiles, count, x, token, block, 0, two_terms, planes, token == first, to);
    }
}
#endif
