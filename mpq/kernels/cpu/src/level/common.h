/* What every level shares, compiled once for each. The including file defines TARGET, the function attribute of its
 * instruction set. 16-lane vectors are the compiler's own and map to whatever the target has. */
#ifndef MPQ_COMMON_H
#define MPQ_COMMON_H
#include <string.h>

#include "../tile.h"

#ifndef TARGET
#define TARGET
#endif

#define INLINE static inline __attribute__((always_inline)) TARGET
typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint32 __attribute__((vector_size(64)));
typedef uint32_t vuint32 __attribute__((vector_size(64)));
typedef uint16_t vuint16 __attribute__((vector_size(32)));
typedef int16_t vint16 __attribute__((vector_size(32)));
typedef uint8_t vuint8 __attribute__((vector_size(16)));
typedef int8_t vint8 __attribute__((vector_size(16)));

#define LOAD(type, pointer) ({ type loaded_; memcpy(&loaded_, (pointer), sizeof loaded_); loaded_; })
#define STORE(pointer, value) ({ __typeof__(value) stored_ = (value); memcpy((pointer), &stored_, sizeof stored_); })

/* Load sixteen scales of one segment, exactly. */
INLINE vfloat load_scales(int kind, const uint8_t *scales, int index) {
  if (kind == MPQ_SCALE_FP32) return LOAD(vfloat, scales + 4 * index);
  if (kind == MPQ_SCALE_BF16) return (vfloat)(__builtin_convertvector(LOAD(vuint16, scales + 2 * index), vuint32) << 16);
  if (kind == MPQ_SCALE_E8M0) return (vfloat)(__builtin_convertvector(LOAD(vuint8, scales + index), vuint32) << 23);
  vuint32 half;
  float unit = 1;
  if (kind == MPQ_SCALE_FP16) {
    half = __builtin_convertvector(LOAD(vuint16, scales + 2 * index), vuint32);
  } else { /* both fp8 scale types are float16 with another bias or without a sign */
    half = __builtin_convertvector(LOAD(vuint8, scales + index), vuint32);
    if (kind == MPQ_SCALE_E4M3) half = (half & 0x7f) << 7 | (half & 0x80) << 8, unit = 256;
    else half <<= 7;
  }
  vuint32 magnitude = (half & 0x7fff) << 13;
  vfloat tiny = (vfloat)(magnitude + (113u << 23)) - 0x1p-14f; /* subnormals, without subnormal arithmetic */
  vfloat value = (vfloat)((vuint32)(magnitude < (1u << 23)) & (vuint32)tiny);
  value = (vfloat)((vuint32)value | ((vuint32)(magnitude >= (1u << 23)) & (magnitude + (112u << 23))));
  return (vfloat)((vuint32)value | (half & 0x8000) << 16) * unit;
}

/* Set where a tile's decoded levels are: 8-bit integers stay in the stream. */
INLINE void set_levels(const mpq_weight *weight, const uint8_t *codes, mpq_tile *tile, const uint8_t *out) {
  const size_t plane = 64 * (size_t)weight->segment * weight->segments;
  const int two_planes = weight->kind == MPQ_TABLE16;
  tile->levels[0] = weight->bits == 8 && weight->kind == MPQ_INTEGER ? codes : out + (two_planes ? plane : 0);
  tile->levels[1] = two_planes ? out : NULL;
}

/* Decode a tile's codes to levels. */
INLINE void decode_any(const mpq_weight *weight, const uint8_t *codes, uint8_t *out, size_t plane) {
  const int bits = weight->bits, steps = weight->segment * weight->segments;
  if (bits == 8 && weight->kind == MPQ_INTEGER) return;
  for (int i = 0; i < steps; i++, codes += 8 * bits) {
    uint8_t *to = out + 64 * (size_t)i, unpacked[64];
    if (bits == 8) {
      memcpy(unpacked, codes, 64);
    } else if (bits == 4) { /* two steps share 64 bytes */
      if (i % 2 == 0) for (int j = 0; j < 64; j++) unpacked[j] = codes[j] & 15;
      else for (int j = 0; j < 64; j++) unpacked[j] = codes[j - 32] >> 4;
    } else if (bits == 2) {
      for (int j = 0; j < 64; j++) unpacked[j] = codes[j - 16 * (i % 4)] >> 2 * (i % 4) & 3;
    } else {
      for (int j = 0; j < 8; j++) {
        uint64_t word = 0;
        for (int byte = 0; byte < bits; byte++) word |= (uint64_t)codes[j * bits + byte] << 8 * byte;
        for (int k = 0; k < 8; k++) unpacked[8 * j + k] = word >> k * bits & ((1 << bits) - 1);
      }
    }
    if (weight->kind == MPQ_INTEGER) {
      memcpy(to, unpacked, 64);
    } else if (weight->kind == MPQ_TABLE_BF16) {
      uint8_t *half = out + 512 * (size_t)(i / 4) + 64 * (i % 4);
      for (int j = 0; j < 64; j++) { /* (lane, pair, row, column) to (pair, step, lane, row, column) */
        uint8_t *element = half + (j >> 3 & 1) * 256 + (j >> 4) * 16 + (j & 7) * 2;
        element[0] = weight->low[unpacked[j]], element[1] = weight->high[unpacked[j]];
      }
    } else {
      for (int j = 0; j < 64; j++) to[j] = weight->low[unpacked[j]];
      if (weight->kind == MPQ_TABLE16) for (int j = 0; j < 64; j++) to[plane + j] = weight->high[unpacked[j]];
    }
  }
}

/* Gather one tile of a token as float32, segments zero-padded; `x` is the row, `column` the tile's first. */
INLINE void gather(const mpq_weight *weight, const void *x, int is_bf16, int64_t column, float *out) {
  const int tile = weight->segment * weight->segments;
  const int64_t group = weight->group;
  const int whole = weight->group == weight->segment;
  if (!whole || column + tile > weight->cols || tile % 32) memset(out, 0, (MAX_TILE_COLUMNS + 16) * sizeof *out);
  for (int segment = 0; segment < (whole ? 1 : weight->segments); segment++) {
    int64_t start = column + segment * group, count = whole ? tile : group;
    if (start + count > weight->cols) count = weight->cols - start;
    float *to = out + segment * weight->segment;
    if (count <= 0) break;
    if (!is_bf16) {
      memcpy(to, (const float *)x + start, count * sizeof(float));
      continue;
    }
    const uint16_t *from = (const uint16_t *)x + start;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
      STORE(to + i, (vfloat)(__builtin_convertvector(LOAD(vuint16, from + i), vuint32) << 16));
    for (; i < count; i++) {
      uint32_t word = (uint32_t)from[i] << 16;
      memcpy(to + i, &word, 4);
    }
  }
}

/* The largest magnitude; NaN if any number is not finite. */
INLINE float absmax(const float *x, int count) {
  vfloat largest = {0}, non_finite = {0};
  for (int i = 0; i < count; i += 16) {
    vfloat value = LOAD(vfloat, x + i);
    vfloat magnitude = (vfloat)((vuint32)value & 0x7fffffff);
    non_finite += value * 0.0f;
    vint32 above = magnitude > largest;
    largest = (vfloat)(((vint32)magnitude & above) | ((vint32)largest & ~above));
  }
  float result = 0, not_finite = 0;
  for (int i = 0; i < 16; i++) result = largest[i] > result ? largest[i] : result, not_finite += non_finite[i];
  return result + not_finite;
}

/* Nearest float16 of a positive number, never zero or infinite: the scale of an int8 token. */
INLINE float round_to_fp16(float value) {
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

/* Store the nearest bf16 of finite numbers in the matrix unit's layout, 32 columns of 16 tokens; the rounding residual
 * replaces them in `x`. */
INLINE void split_bf16(float *x, uint16_t *nearest, int count) {
  for (int i = 0; i < count; i += 16) {
    vuint32 word = LOAD(vuint32, x + i);
    vuint32 rounded = (word + 0x7fff + (word >> 16 & 1)) & 0xffff0000u;
    STORE(nearest + i / 32 * 512 + i % 32, __builtin_convertvector(rounded >> 16, vuint16));
    STORE(x + i, (vfloat)word - (vfloat)rounded);
  }
}

INLINE void store_bf16(const mpq_weight *weight, const mpq_activation *to, int tile, int64_t token, float *x) {
  const int64_t blocks = (to->tokens + 15) / 16, filled = mpq_bf16_columns(weight);
  for (int plane = 0; plane < to->planes; plane++)
    split_bf16(x, to->bf16 + (((int64_t)tile * to->planes + plane) * blocks + token / 16) * filled * 16 + token % 16 * 32,
               (int)filled);
}

/* The sum of 16-bit or of 8-bit integers. */
INLINE int32_t integer_sum(const int16_t *int16s, const int8_t *int8s, int count) {
  vint32 sums = {0};
  int32_t sum = 0;
  int i = 0;
  for (; i + 16 <= count; i += 16)
    sums += int16s ? __builtin_convertvector(LOAD(vint16, int16s + i), vint32)
                   : __builtin_convertvector(LOAD(vint8, int8s + i), vint32);
  for (; i < count; i++) sum += int16s ? int16s[i] : int8s[i];
  for (int j = 0; j < 16; j++) sum += sums[j];
  return sum;
}

/* Quantize a token's activations; set `skipped` where integers cannot represent them (NaN, infinities, vanishing
 * numbers). */
INLINE void quantize_any(const mpq_weight *weight, mpq_activation *to, const void *x, int is_bf16, int64_t stride,
                         int64_t token, int8_t *skipped, int use_int16) {
  const int tile = weight->segment * weight->segments;
  const int64_t step = (int64_t)weight->group * weight->segments, tokens = to->tokens;
  const float magic = 0x1.8p23f; /* adding it rounds to the nearest integer, ties to even */
  float buffer[MAX_TILE_COLUMNS + 16] __attribute__((aligned(64)));
  float scale = 1;
  x = (const char *)x + token * stride * (is_bf16 ? 2 : 4);
  skipped[token] = 0;
  if (to->planes == 1 && to->scale) {
    float largest = 0;
    for (int t = 0; t < weight->tiles; t++) {
      gather(weight, x, is_bf16, t * step, buffer);
      float tile_largest = absmax(buffer, tile);
      if (!(tile_largest <= largest)) largest = tile_largest;
      if (!(largest == largest)) break;
    }
    if (!(largest <= 0x1.fffffep127f)) { skipped[token] = 1; return; }
    if (largest > 0) scale = round_to_fp16(largest / 127);
  }
  for (int t = 0; t < weight->tiles; t++) {
    gather(weight, x, is_bf16, t * step, buffer);
    int64_t at = (t * tokens + token) * tile;
    if (!to->scale) { /* scales apply after summing: huge numbers would overflow */
      if (!(absmax(buffer, tile) <= 0x1p100f)) skipped[token] = 1;
      if (to->fp32) memcpy(to->fp32 + at, buffer, tile * sizeof(float));
      if (to->bf16) store_bf16(weight, to, t, token, buffer);
      continue;
    }
    if (to->planes == 2) {
      float largest = absmax(buffer, tile);
      if (!(largest <= 0x1.fffffep127f) || (largest > 0 && largest < 0x1p-100f)) skipped[token] = 1;
      scale = skipped[token] ? 0 : largest / 32639;
    }
    to->scale[t * tokens + token] = scale;
    if (skipped[token]) return;
    const float inverse = scale > 0 ? 1 / scale : 0;
    int8_t *high = to->q + (t * to->planes * tokens + token) * tile, *low = high + tokens * tile;
    for (int i = 0; i < tile; i += 16) {
      vfloat value = LOAD(vfloat, buffer + i);
      value = to->planes == 1 ? value / scale : value * inverse;
      vint32 q = (vint32)(value + magic) - (vint32)((vfloat){0} + magic);
      if (to->planes == 1) { /* compare as floats: the integers of numbers beyond 2**23 wrap */
        vint32 above = value > 127, below = value < -128;
        q = (q & ~above & ~below) | (above & 127) | (below & -128);
      }
      int count = tile - i < 16 ? tile - i : 16;
      if (to->bf16) STORE(buffer + i, __builtin_convertvector(q, vfloat));
      else if (use_int16) {
        vint16 whole = __builtin_convertvector(q, vint16);
        memcpy(to->q16 + at + i, &whole, 2 * count);
      } else if (to->planes == 1) {
        vint8 whole = __builtin_convertvector(q, vint8);
        memcpy(high + i, &whole, count);
      } else {
        vint32 top = (q + 128) >> 8;
        vint8 high_bytes = __builtin_convertvector(top, vint8), low_bytes = __builtin_convertvector(q - (top << 8), vint8);
        memcpy(high + i, &high_bytes, count), memcpy(low + i, &low_bytes, count);
      }
    }
    if (to->bf16) {
      store_bf16(weight, to, t, token, buffer);
      continue;
    }
    for (int segment = 0; segment < weight->segments; segment++)
      for (int plane = 0; plane < (use_int16 ? 1 : to->planes); plane++) {
        const int start = segment * weight->segment;
        const int32_t sum = use_int16 ? integer_sum(to->q16 + at + start, NULL, weight->segment)
                                 : integer_sum(NULL, (plane ? low : high) + start, weight->segment);
        to->sums[((t * weight->segments + segment) * (use_int16 ? 1 : to->planes) + plane) * tokens + token] = sum;
      }
  }
}
#endif
