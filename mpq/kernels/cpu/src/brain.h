/* AMX in bfloat16: weights with their scales as one bfloat16, exact, or as the sum of two; sums stay in tiles.
 *
 * Wherever scales change too often for the byte unit (groups below 64), or levels have 16 bits. A product of sums of two
 * leaves out the two small parts, 2**-18 of the whole. */

/* Lanes of (even, odd) as pairs of bfloat16; `planes` 2: what rounding left over goes `plane` bytes further. */
AMX_INLINE void store_pair(uint8_t *to, size_t plane, const int planes, __m512 even, __m512 odd) {
  const __m512i top = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
  __m512i first = _mm512_add_epi32((__m512i)even, half), second = _mm512_add_epi32((__m512i)odd, half);
  if (planes == 2) {
    first = _mm512_and_si512(first, top);
    second = _mm512_and_si512(second, top);
    __m512i rest = _mm512_add_epi32((__m512i)_mm512_sub_ps(even, (__m512)first), half);
    __m512i rest2 = _mm512_add_epi32((__m512i)_mm512_sub_ps(odd, (__m512)second), half);
    STORE(to + plane, _mm512_ternarylogic_epi32(_mm512_srli_epi32(rest, 16), rest2, top, 0xf8)); /* a | b & c */
  }
  STORE(to, _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, top, 0xf8));
}

AMX_INLINE void fill_up(const mpq_weight *weight, int pair, int planes, uint8_t *out) {
  for (; pair % 16; pair++)
    for (int i = 0; i < 4 * planes; i++)
      memset(out + i / 4 * 128 * (size_t)mpq_filled(weight) + (pair / 16 * 4 + i % 4) * 1024 + pair % 16 * 64, 0, 64);
}

AMX_INLINE void decode_brain(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *levels, const uint8_t *fine,
                             const int planes, const int kind, uint8_t *out) {
  const size_t plane = 128 * (size_t)mpq_filled(weight);
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i table_offset = _mm512_set1_epi32(32768);
  int pair = 0; /* of columns: the matrix unit wants sixteen for each of sixteen rows */
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512 scale[4], minus[4];
    for (int block = 0; block < 4; block++) {
      const int index = MPQ_ROWS * (weight->row_scales ? 0 : segment) + 16 * block;
      __m512 zero = _mm512_set1_ps(weight->offset);
      if (tile->zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LOAD(__m128i, tile->zeros + index)));
      scale[block] = weight->row_scales ? _mm512_set1_ps(1) : scales16(weight->scale_kind, tile->scales, index);
      minus[block] = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), zero), scale[block]);
    }
    for (int quad = 0; quad < weight->segment / 4; quad++, pair += 2)
      for (int block = 0; block < 4; block++) {
        uint8_t *to = out + (pair / 16 * 4 + block) * 1024 + pair % 16 * 64;
        __m512 found[4];
        if (kind == MPQ_BFLOAT) {
          for (int i = 0; i < 4; i += 2) {
            __m512i both = LOAD(__m512i, levels + 128 * i + 64 * block);
            found[i] = _mm512_mul_ps((__m512)_mm512_slli_epi32(both, 16), scale[block]);
            both = _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
            found[i + 1] = _mm512_mul_ps((__m512)both, scale[block]);
          }
        } else {
          const __m512i level = LOAD(__m512i, levels + 64 * block);
          const __m512i low = kind == MPQ_TABLE16 ? LOAD(__m512i, fine + 64 * block) : level;
          for (int i = 0; i < 4; i++) {
            __m512i code = i == 3 ? _mm512_srli_epi32(low, 24) : _mm512_and_si512(_mm512_srli_epi32(low, 8 * i), byte);
            if (kind == MPQ_TABLE16) {
              __m512i high = _mm512_slli_epi32(level, 24 - 8 * i);
              code = _mm512_or_si512(code, _mm512_slli_epi32(_mm512_srli_epi32(high, 24), 8));
              code = _mm512_sub_epi32(code, table_offset);
              found[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale[block]);
            } else {
              found[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale[block], minus[block]);
            }
          }
        }
        store_pair(to, plane, planes, found[0], found[1]);
        store_pair(to + 64, plane, planes, found[2], found[3]);
        if (block == 3) levels += kind == MPQ_BFLOAT ? 512 : 256, fine += 256;
      }
  }
  fill_up(weight, pair, planes, out);
}

/* Whether adding to exponents is multiplying: all powers of two of a tile far from the ends of their range. */
AMX_INLINE int middling(const mpq_weight *weight, const mpq_tile *tile) {
  __m512i least = _mm512_set1_epi8(-1), most = _mm512_setzero_si512();
  for (int segment = 0; segment < weight->segments; segment++) {
    const __m512i scales = LOAD(__m512i, tile->scales + MPQ_ROWS * segment);
    least = _mm512_min_epu8(least, scales), most = _mm512_max_epu8(most, scales);
  }
  return !_mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(1)) && !_mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8((char)230));
}

/* The level of code i, of tables. */
AMX_INLINE float level_of(const mpq_weight *weight, int code) {
  if (weight->kind == MPQ_TABLE16) return 256 * (weight->high[code] - 128) + weight->low[code];
  return (weight->kind == MPQ_TABLE8 ? weight->low[code] : code) - weight->offset;
}

/* Codes of up to six bits as bfloat16 looked up whole; the scales, powers of two, are added to exponents. */
AMX_INLINE void decode_halves(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *codes, const int bits,
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
  const __m512i table = LOAD(__m512i, values), table2 = LOAD(__m512i, values + 32), pick = LOAD(__m512i, first);
  const __m512i pick2 = _mm512_add_epi8(pick, _mm512_set1_epi8(2)), spreads = LOAD(__m512i, spread), shifts = LOAD(__m512i, shift);
  int pair = 0;
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512i powers[4] = {0};
    for (int block = 0; block < 4 && !weight->row_scales; block++) {
      const __m512i power = _mm512_cvtepu8_epi32(LOAD(__m128i, tile->scales + MPQ_ROWS * segment + 16 * block));
      const __m512i added = _mm512_slli_epi32(_mm512_sub_epi32(power, _mm512_set1_epi32(127)), 7);
      powers[block] = _mm512_or_si512(_mm512_and_si512(added, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(added, 16));
    }
    for (int quad = 0; quad < weight->segment / 4; quad++, pair += 2, codes += 32 * bits) {
      __m512i found[4];
      codes256(bits, codes, spreads, shifts, found);
      for (int i = 0; i < 8; i++) {
        __m512i both = _mm512_permutexvar_epi8(i % 2 ? pick2 : pick, found[i / 2]);
        if (bits == 6) both = _mm512_permutex2var_epi16(table, both, table2);
        else both = _mm512_permutexvar_epi16(both, table);
        if (!weight->row_scales) both = _mm512_mask_add_epi16(both, _mm512_test_epi16_mask(both, both), both, powers[i / 2]);
        STORE(out + (pair / 16 * 4 + i / 2) * 1024 + (pair % 16 + i % 2) * 64, both);
      }
    }
  }
  fill_up(weight, pair, 1, out);
}

/* Codes of four bits as float32 looked up, with any scale. */
AMX_INLINE void decode_nibbles(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *codes, const int planes,
                               uint8_t *out) {
  const size_t plane = 128 * (size_t)mpq_filled(weight);
  float values[16];
  for (int i = 0; i < 16; i++) values[i] = level_of(weight, i);
  const __m512 table = LOAD(__m512, values);
  int pair = 0;
  for (int segment = 0; segment < weight->segments; segment++) {
    __m512 scale[4];
    for (int block = 0; block < 4; block++)
      scale[block] = weight->row_scales ? _mm512_set1_ps(1)
                                        : scales16(weight->scale_kind, tile->scales, MPQ_ROWS * segment + 16 * block);
    for (int quad = 0; quad < weight->segment / 4; quad++, pair += 2, codes += 128)
      for (int block = 0; block < 4; block++) {
        uint8_t *to = out + (pair / 16 * 4 + block) * 1024 + pair % 16 * 64;
        const __m512i both = LOAD(__m512i, codes + block / 2 * 64); /* a lookup takes the last four bits */
        __m512 found[4];
        for (int i = 0; i < 4; i++)
          found[i] = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(both, 8 * i + block % 2 * 4), table), scale[block]);
        store_pair(to, plane, planes, found[0], found[1]);
        store_pair(to + 64, plane, planes, found[2], found[3]);
      }
  }
  fill_up(weight, pair, planes, out);
}

/* Straight from codes where that can be; whether it was. */
AMX_INLINE int decode_at_once(const mpq_weight *weight, const mpq_tile *tile, const uint8_t *codes, uint8_t *out) {
  const int table = weight->kind == MPQ_TABLE8 || weight->kind == MPQ_TABLE16, bits = weight->bits;
  if (weight->brain == 1 && table && bits <= 6 &&
      (weight->row_scales || (weight->scale_kind == MPQ_E8M0 && middling(weight, tile)))) {
    if (bits == 4) decode_halves(weight, tile, codes, 4, out);
    else if (bits == 5) decode_halves(weight, tile, codes, 5, out);
    else if (bits == 6) decode_halves(weight, tile, codes, 6, out);
    else return 0;
    return 1;
  }
  if (bits != 4 || weight->kind == MPQ_BFLOAT || weight->zeros) return 0;
  if (weight->brain == 2) decode_nibbles(weight, tile, codes, 2, out);
  else decode_nibbles(weight, tile, codes, 1, out);
  return 1;
}

static AMX_TARGET void decode_any_brain(const mpq_weight *weight, const uint8_t *codes, int form, mpq_tile *tile,
                                        uint8_t *out) {
  const int kind = weight->kind, brain = form;
  if (form != 1 && form != 2) {
    decode(weight, codes, form, tile, out);
    return;
  }
  tile->levels[0] = out, tile->levels[1] = brain == 2 ? out + 128 * (size_t)mpq_filled(weight) : NULL;
  if (kind == MPQ_BFLOAT && brain == 1 && weight->row_scales) {
    decode(weight, codes, 1, tile, out);
    tile->levels[0] = out;
    return;
  }
  if (decode_at_once(weight, tile, codes, out)) return;
  uint8_t levels[128 * MPQ_MAX_TILE] __attribute__((aligned(64)));
  decode(weight, codes, MPQ_LEVELS, tile, levels);
  const uint8_t *first = tile->levels[0], *second = tile->levels[1];
  if (brain == 2) {
    if (kind == MPQ_TABLE16) decode_brain(weight, tile, first, second, 2, MPQ_TABLE16, out);
    else if (kind == MPQ_BFLOAT) decode_brain(weight, tile, first, first, 2, MPQ_BFLOAT, out);
    else decode_brain(weight, tile, first, first, 2, MPQ_INTEGER, out);
  } else {
    if (kind == MPQ_TABLE16) decode_brain(weight, tile, first, second, 1, MPQ_TABLE16, out);
    else if (kind == MPQ_BFLOAT) decode_brain(weight, tile, first, first, 1, MPQ_BFLOAT, out);
    else decode_brain(weight, tile, first, first, 1, MPQ_INTEGER, out);
  }
  tile->levels[0] = out, tile->levels[1] = brain == 2 ? out + 128 * (size_t)mpq_filled(weight) : NULL;
}

/* Tiles 0 and 1: activations of up to 16 tokens each; 2 and 3: sixteen rows each; 4 to 7: their sums. */
AMX_INLINE void dot_brain(const int second) {
  _tile_dpbf16ps(4, 0, 2);
  _tile_dpbf16ps(5, 0, 3);
  if (!second) return;
  _tile_dpbf16ps(6, 1, 2);
  _tile_dpbf16ps(7, 1, 3);
}

/* Up to 32 tokens by 32 rows by the columns of a run of tiles. */
AMX_INLINE void multiply_block(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                               int64_t token, int block, const int second, const int two, const int planes, int asks,
                               float *to) {
  const int64_t filled = mpq_filled(weight), next = 32 * filled, plane = (x->tokens + 15) / 16 * next;
  _tile_loadd(4, to, 256);
  _tile_loadd(5, to + 16, 256);
  if (second) {
    _tile_loadd(6, to + 16 * MPQ_ROWS, 256);
    _tile_loadd(7, to + 16 * MPQ_ROWS + 16, 256);
  }
  for (int i = 0; i < count; i++) {
    const uint8_t *near = (const uint8_t *)x->brain + tiles[i].index * planes * plane + token / 16 * next;
    const uint8_t *levels = tiles[i].levels[0] + 1024 * block, *rest = two ? tiles[i].levels[1] + 1024 * block : NULL;
    const int64_t part = (tiles[i].bytes / (filled / 16) + 64) & ~(int64_t)63;
    const uint8_t *ahead = tiles[i].ahead + (block ? filled / 32 * part : 0), *end = tiles[i].ahead + (asks ? tiles[i].bytes : 0);
    for (int step = 0; step < filled / 32; step++, near += 1024, levels += 4096) {
      ahead = ask_part(ahead, part, end);
      _tile_loadd(0, near, 64);
      if (second) _tile_loadd(1, near + next, 64);
      if (two) {
        _tile_loadd(2, rest + 4096 * step, 64);
        _tile_loadd(3, rest + 4096 * step + 1024, 64);
        dot_brain(second);
      }
      _tile_loadd(2, levels, 64);
      _tile_loadd(3, levels + 1024, 64);
      dot_brain(second);
      if (planes == 2) {
        _tile_loadd(0, near + plane, 64);
        if (second) _tile_loadd(1, near + plane + next, 64);
        dot_brain(second);
      }
    }
  }
  _tile_stored(4, to, 256);
  _tile_stored(5, to + 16, 256);
  if (second) {
    _tile_stored(6, to + 16 * MPQ_ROWS, 256);
    _tile_stored(7, to + 16 * MPQ_ROWS + 16, 256);
  }
}

/* `first` is a multiple of 16. */
AMX_INLINE void multiply_brain(const mpq_weight *weight, const mpq_tile *tiles, int count, const mpq_activation *x,
                               int64_t first, int64_t last, const int two, const int planes, float *sums) {
  for (int block = 0; block < 4; block += 2) /* half of the decoded weights stays in the first cache */
    for (int64_t token = first; token < last; token += 32) {
      const int tokens = last - token < 32 ? (int)(last - token) : 32;
      float *to = sums + token * MPQ_ROWS + 16 * block;
      shape(tokens > 16 ? 16 : tokens, tokens > 16 ? tokens - 16 : 0, 64);
      if (tokens > 16) multiply_block(weight, tiles, count, x, token, block, 1, two, planes, token == first, to);
      else multiply_block(weight, tiles, count, x, token, block, 0, two, planes, token == first, to);
    }
}
