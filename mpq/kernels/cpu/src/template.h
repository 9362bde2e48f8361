/* What every level does alike, compiled once for each: the including file defines TARGET, the function attribute of its
 * instruction set. Vectors of sixteen are the compiler's own and become whatever the target has. */
#include <string.h>

#include "mpq.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef uint16_t vshort __attribute__((vector_size(32)));
typedef int16_t vwide __attribute__((vector_size(32)));
typedef uint8_t vbyte __attribute__((vector_size(16)));
typedef int8_t vplane __attribute__((vector_size(16)));

#define LOAD(type, pointer) ({ type loaded_; memcpy(&loaded_, (pointer), sizeof loaded_); loaded_; })
#define STORE(pointer, value) ({ __typeof__(value) stored_ = (value); memcpy((pointer), &stored_, sizeof stored_); })

/* Sixteen scales of one segment, exact. */
INLINE vfloat load_scales(int kind, const uint8_t *scales, int index) {
  if (kind == MPQ_FP32) return LOAD(vfloat, scales + 4 * index);
  if (kind == MPQ_BF16) return (vfloat)(__builtin_convertvector(LOAD(vshort, scales + 2 * index), vuint) << 16);
  if (kind == MPQ_E8M0) return (vfloat)(__builtin_convertvector(LOAD(vbyte, scales + index), vuint) << 23);
  vuint half;
  float unit = 1;
  if (kind == MPQ_FP16) {
    half = __builtin_convertvector(LOAD(vshort, scales + 2 * index), vuint);
  } else { /* both small floats are float16 with another bias or no sign */
    half = __builtin_convertvector(LOAD(vbyte, scales + index), vuint);
    if (kind == MPQ_E4M3) half = (half & 0x7f) << 7 | (half & 0x80) << 8, unit = 256;
    else half <<= 7;
  }
  vuint magnitude = (half & 0x7fff) << 13;
  vfloat tiny = (vfloat)(magnitude + (113u << 23)) - 0x1p-14f; /* subnormals, without meeting one */
  vfloat value = (vfloat)((vuint)(magnitude < (1u << 23)) & (vuint)tiny) ;
  value = (vfloat)((vuint)value | ((vuint)(magnitude >= (1u << 23)) & (magnitude + (112u << 23))));
  return (vfloat)((vuint)value | (half & 0x8000) << 16) * unit;
}

/* Where a tile's levels are once decoded: 8-bit integers stay where they were. */
INLINE void place_levels(const mpq_weight *weight, const uint8_t *codes, mpq_tile *tile, const uint8_t *out) {
  const size_t plane = 64 * (size_t)weight->segment * weight->segments;
  const int two = weight->kind == MPQ_TABLE16;
  tile->levels[0] = weight->bits == 8 && weight->kind == MPQ_INTEGER ? codes : out + (two ? plane : 0);
  tile->levels[1] = two ? out : NULL;
}

/* Codes of a tile as levels. */
INLINE void decode_any(const mpq_weight *weight, const uint8_t *codes, uint8_t *out, size_t plane) {
  const int bits = weight->bits, steps = weight->segment * weight->segments;
  if (bits == 8 && weight->kind == MPQ_INTEGER) return;
  for (int i = 0; i < steps; i++, codes += 8 * bits) {
    uint8_t *to = out + 64 * (size_t)i, found[64];
    if (bits == 8) {
      memcpy(found, codes, 64);
    } else if (bits == 4) { /* two steps share 64 bytes */
      if (i % 2 == 0) for (int j = 0; j < 64; j++) found[j] = codes[j] & 15;
      else for (int j = 0; j < 64; j++) found[j] = codes[j - 32] >> 4;
    } else if (bits == 2) {
      for (int j = 0; j < 64; j++) found[j] = codes[j - 16 * (i % 4)] >> 2 * (i % 4) & 3;
    } else {
      for (int j = 0; j < 8; j++) {
        uint64_t word = 0;
        for (int byte = 0; byte < bits; byte++) word |= (uint64_t)codes[j * bits + byte] << 8 * byte;
        for (int k = 0; k < 8; k++) found[8 * j + k] = word >> k * bits & ((1 << bits) - 1);
      }
    }
    if (weight->kind == MPQ_INTEGER) {
      memcpy(to, found, 64);
    } else if (weight->kind == MPQ_BFLOAT) {
      uint8_t *half = out + 512 * (size_t)(i / 4) + 64 * (i % 4);
      for (int j = 0; j < 64; j++) { /* (lane, pair, row, column) to (pair, step, lane, row, column) */
        uint8_t *element = half + (j >> 3 & 1) * 256 + (j >> 4) * 16 + (j & 7) * 2;
        element[0] = weight->low[found[j]], element[1] = weight->high[found[j]];
      }
    } else {
      for (int j = 0; j < 64; j++) to[j] = weight->low[found[j]];
      if (weight->kind == MPQ_TABLE16) for (int j = 0; j < 64; j++) to[plane + j] = weight->high[found[j]];
    }
  }
}

/* One tile of a token as floats, segments filled up with zeros; `cols` columns are left in the row from `x` on. */
INLINE void gather(const mpq_weight *weight, const void *x, int bfloat, int64_t column, float *out) {
  const int tile = weight->segment * weight->segments;
  const int64_t group = weight->group;
  const int whole = weight->group == weight->segment;
  if (!whole || column + tile > weight->cols || tile % 32) memset(out, 0, (MPQ_MAX_TILE + 16) * sizeof *out);
  for (int segment = 0; segment < (whole ? 1 : weight->segments); segment++) {
    int64_t start = column + segment * group, count = whole ? tile : group;
    if (start + count > weight->cols) count = weight->cols - start;
    float *to = out + segment * weight->segment;
    if (count <= 0) break;
    if (!bfloat) {
      memcpy(to, (const float *)x + start, count * sizeof(float));
      continue;
    }
    const uint16_t *from = (const uint16_t *)x + start;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
      STORE(to + i, (vfloat)(__builtin_convertvector(LOAD(vshort, from + i), vuint) << 16));
    for (; i < count; i++) {
      uint32_t word = (uint32_t)from[i] << 16;
      memcpy(to + i, &word, 4);
    }
  }
}

/* The largest magnitude; NaN if any number is not finite. */
INLINE float absmax(const float *x, int count) {
  vfloat largest = {0}, poison = {0};
  for (int i = 0; i < count; i += 16) {
    vfloat value = LOAD(vfloat, x + i);
    vfloat magnitude = (vfloat)((vuint)value & 0x7fffffff);
    poison += value * 0.0f;
    vint above = magnitude > largest;
    largest = (vfloat)(((vint)magnitude & above) | ((vint)largest & ~above));
  }
  float result = 0, bad = 0;
  for (int i = 0; i < 16; i++) result = largest[i] > result ? largest[i] : result, bad += poison[i];
  return result + bad;
}

/* Nearest float16 of a positive number, never zero or infinite: the scale that a row of int8 is given. */
INLINE float as_half(float value) {
  if (value > 65504) return 65504;
  if (value < 0x1p-14f) {
    float units = (value * 0x1p24f + 0x1p23f) - 0x1p23f;
    return units < 1 ? 0x1p-24f : units * 0x1p-24f;
  }
  uint32_t word;
  memcpy(&word, &value, 4);
  word = (word + 0xfff + (word >> 13 & 1)) & ~0x1fffu;
  memcpy(&value, &word, 4);
  return value;
}

/* Nearest bfloat16 of finite numbers, 32 in a row of the matrix unit's tiles of 16 tokens; what it leaves over stays in
 * their place. */
INLINE void split_brain(float *x, uint16_t *near, int count) {
  for (int i = 0; i < count; i += 16) {
    vuint word = LOAD(vuint, x + i);
    vuint rounded = (word + 0x7fff + (word >> 16 & 1)) & 0xffff0000u;
    STORE(near + i / 32 * 512 + i % 32, __builtin_convertvector(rounded >> 16, vshort));
    STORE(x + i, (vfloat)word - (vfloat)rounded);
  }
}

INLINE void put_brain(const mpq_weight *weight, const mpq_activation *to, int tile, int64_t token, float *x) {
  const int64_t blocks = (to->tokens + 15) / 16, filled = mpq_filled(weight);
  for (int plane = 0; plane < to->planes; plane++)
    split_brain(x, to->brain + (((int64_t)tile * to->planes + plane) * blocks + token / 16) * filled * 16 + token % 16 * 32,
                (int)filled);
}

/* The sum of either kind of integers. */
INLINE int32_t sum_of(const int16_t *wide, const int8_t *bytes, int count) {
  vint sums = {0};
  int32_t sum = 0;
  int i = 0;
  for (; i + 16 <= count; i += 16)
    sums += wide ? __builtin_convertvector(LOAD(vwide, wide + i), vint) : __builtin_convertvector(LOAD(vplane, bytes + i), vint);
  for (; i < count; i++) sum += wide ? wide[i] : bytes[i];
  for (int j = 0; j < 16; j++) sum += sums[j];
  return sum;
}

/* A token's activations; `unfit` where integers cannot stand for them (NaN, infinities, vanishing numbers). */
INLINE void quantize_any(const mpq_weight *weight, mpq_activation *to, const void *x, int bfloat, int64_t stride,
                         int64_t token, int8_t *unfit, int wide) {
  const int tile = weight->segment * weight->segments;
  const int64_t step = (int64_t)weight->group * weight->segments, tokens = to->tokens;
  const float magic = 0x1.8p23f; /* adding it rounds to the nearest integer, ties to even */
  float buffer[MPQ_MAX_TILE + 16] __attribute__((aligned(64)));
  float scale = 1;
  x = (const char *)x + token * stride * (bfloat ? 2 : 4);
  unfit[token] = 0;
  if (to->planes == 1 && to->scale) {
    float largest = 0;
    for (int t = 0; t < weight->tiles; t++) {
      gather(weight, x, bfloat, t * step, buffer);
      float found = absmax(buffer, tile);
      if (!(found <= largest)) largest = found;
      if (!(largest == largest)) break;
    }
    if (!(largest <= 0x1.fffffep127f)) { unfit[token] = 1; return; }
    if (largest > 0) scale = as_half(largest / 127);
  }
  for (int t = 0; t < weight->tiles; t++) {
    gather(weight, x, bfloat, t * step, buffer);
    int64_t at = (t * tokens + token) * tile;
    if (!to->scale) { /* products are scaled after they are summed: huge numbers would overflow */
      if (!(absmax(buffer, tile) <= 0x1p100f)) unfit[token] = 1;
      if (to->real) memcpy(to->real + at, buffer, tile * sizeof(float));
      if (to->brain) put_brain(weight, to, t, token, buffer);
      continue;
    }
    if (to->planes == 2) {
      float largest = absmax(buffer, tile);
      if (!(largest <= 0x1.fffffep127f) || (largest > 0 && largest < 0x1p-100f)) unfit[token] = 1;
      scale = unfit[token] ? 0 : largest / 32639;
    }
    to->scale[t * tokens + token] = scale;
    if (unfit[token]) return;
    const float inverse = scale > 0 ? 1 / scale : 0;
    int8_t *high = to->q + (t * to->planes * tokens + token) * tile, *low = high + tokens * tile;
    for (int i = 0; i < tile; i += 16) {
      vfloat value = LOAD(vfloat, buffer + i);
      value = to->planes == 1 ? value / scale : value * inverse;
      vint q = (vint)(value + magic) - (vint)((vfloat){0} + magic);
      if (to->planes == 1) { /* by the numbers: integers of those beyond 2**23 wrap around */
        vint above = value > 127, below = value < -128;
        q = (q & ~above & ~below) | (above & 127) | (below & -128);
      }
      int count = tile - i < 16 ? tile - i : 16;
      if (to->brain) STORE(buffer + i, __builtin_convertvector(q, vfloat));
      else if (wide) {
        vwide whole = __builtin_convertvector(q, vwide);
        memcpy(to->wide + at + i, &whole, 2 * count);
      } else if (to->planes == 1) {
        vplane whole = __builtin_convertvector(q, vplane);
        memcpy(high + i, &whole, count);
      } else {
        vint top = (q + 128) >> 8;
        vplane tops = __builtin_convertvector(top, vplane), rests = __builtin_convertvector(q - (top << 8), vplane);
        memcpy(high + i, &tops, count), memcpy(low + i, &rests, count);
      }
    }
    if (to->brain) {
      put_brain(weight, to, t, token, buffer);
      continue;
    }
    for (int segment = 0; segment < weight->segments; segment++)
      for (int plane = 0; plane < (wide ? 1 : to->planes); plane++) {
        const int start = segment * weight->segment;
        const int32_t sum = wide ? sum_of(to->wide + at + start, NULL, weight->segment)
                                 : sum_of(NULL, (plane ? low : high) + start, weight->segment);
        to->sums[((t * weight->segments + segment) * (wide ? 1 : to->planes) + plane) * tokens + token] = sum;
      }
  }
}
