/* Round new tokens' keys or values to a cache's format and store them in its blocks, as mpq/kernels/kv_cache.py
 * defines: the same codes and scales. */
#include <math.h>

#include "attention.h"
#include "numbers.h"
#include "threads.h"

#define HALF_MAX 65504.f
#define HALF_NAN 0x7e00
#define E4M3_MAX 448.f
#define E4M3_ONE 0x38
#define E4M3_NAN 0x7f

/* Nearest float16 of a number within its range, ties to even. */
static uint16_t to_half(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  const uint16_t sign = (uint16_t)(word >> 16 & 0x8000);
  if (value != value) return HALF_NAN;
  if (fabsf(value) < 0x1p-14f) return (uint16_t)(sign | (uint16_t)((fabsf(value) * 0x1p24f + 0x1p23f) - 0x1p23f));
  word &= 0x7fffffff;
  return (uint16_t)(sign | ((word + 0xfff + (word >> 13 & 1) - (112u << 23)) >> 13));
}

static float from_half(uint16_t half) {
  const uint32_t word = (uint32_t)(half & 0x7fff) * (1u << 13);
  float value;
  memcpy(&value, &word, 4);
  value *= 0x1p112f; /* rebias; exact for subnormals, too */
  return half & 0x8000 ? -value : value;
}

static float clamp(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

/* Nearest integer of a number below 2**22, ties to even. */
static float nearest(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }

/* Nearest e4m3, saturating. */
static uint8_t to_e4m3(float value) {
  const float size = clamp(fabsf(value), 0, E4M3_MAX);
  int exponent = -6;
  if (size >= 0x1p-6f) frexpf(size, &exponent), exponent--;
  const int code = (int)nearest(ldexpf(size, 3 - exponent)) + ((exponent + 6) << 3);
  return (uint8_t)(code | (value < 0 && code ? 0x80 : 0));
}

/* A positive scale as float16, never 0. */
static uint16_t scale_of(float scale) {
  if (!(scale > 0)) return to_half(1);
  const uint16_t half = to_half(clamp(scale, 0, HALF_MAX));
  return half ? half : 1;
}

/* A positive scale as e4m3, never 0. */
static uint8_t small_scale_of(float scale) {
  if (!(scale > 0)) return E4M3_ONE;
  const uint8_t code = to_e4m3(scale);
  return code ? code : 1;
}

static float from_positive_e4m3(uint8_t code) {
  const int exponent = code >> 3, mantissa = code & 7;
  return exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
}

/* Round a group's scale, store it at `index` of the block's table, NaN unless the group is finite; returns it. */
static float store_scale(const mpq_vectors *vectors, uint8_t *table, int64_t index, float scale, int finite) {
  if (vectors->scale_bytes == 1) {
    const uint8_t code = small_scale_of(scale);
    table[index] = finite ? code : E4M3_NAN;
    return from_positive_e4m3(code);
  }
  const uint16_t half = scale_of(scale);
  ((uint16_t *)table)[index] = finite ? half : HALF_NAN;
  return from_half(half);
}

/* Store code `index` of a step of 64. */
static void place(uint8_t *codes, int bits, int64_t step, int index, unsigned code) {
  if (8 % bits == 0) {
    const int together = 8 / bits, shift = (int)(step % together) * bits;
    uint8_t *byte = codes + step / together * 64 + index;
    *byte = (uint8_t)((*byte & ~(((1u << bits) - 1) << shift)) | code << shift);
    return;
  }
  for (int bit = 0; bit < bits; bit++) {
    const int at = index * bits + bit;
    uint8_t *byte = codes + step * 8 * bits + at / 8;
    *byte = (uint8_t)((*byte & ~(1u << at % 8)) | (code >> bit & 1) << at % 8);
  }
}

/* The code of a token's column at its place in a block. */
static void place_code(const mpq_append *call, uint8_t *block, int token, int64_t column, unsigned code) {
  const int bits = call->vectors->weight->bits;
  const int64_t steps = mpq_padded_width(call->vectors) / 4;
  if (call->values) place(block, bits, column / 16 * (BLOCK / 4) + token / 4, (int)(column % 16 * 4 + token % 4), code);
  else place(block, bits, token / 16 * steps + column / 4, (int)(token % 16 * 4 + column % 4), code);
}

/* Finite numbers of a group, 0 for the others; returns whether all are. */
static int copy_finite(const float *x, int64_t count, float *out, float *low, float *high) {
  int all = 1;
  for (int64_t i = 0; i < count; i++) {
    const int finite = fabsf(x[i]) <= 0x1.fffffep127f;
    out[i] = finite ? x[i] : 0, all &= finite;
    if (!i || out[i] < *low) *low = out[i];
    if (!i || out[i] > *high) *high = out[i];
  }
  return all;
}

/* Codes of numbers that share the scale and the minimum at `index` of a block's tables. */
static void round_group(const mpq_vectors *vectors, const float *x, int64_t count, uint8_t *block, int64_t index, uint8_t *codes) {
  const int bits = vectors->weight->bits, offset = vectors->weight->offset;
  const float most = (float)((1 << bits) - 1 - offset), least = (float)-offset;
  uint8_t *scales = block + mpq_codes_bytes(vectors);
  uint16_t *minima = (uint16_t *)(scales + mpq_table_entries(vectors) * vectors->scale_bytes);
  float finite[MAX_HEAD_WIDTH], low = 0, high = 0, minimum = 0;
  const int all = copy_finite(x, count, finite, &low, &high);
  const float size = -low > high ? -low : high;
  const float wanted = (vectors->has_minimum ? high - low : size) / most;
  const float scale = store_scale(vectors, scales, index, wanted, all);
  if (vectors->has_minimum) {
    minima[index] = to_half(clamp(low, -HALF_MAX, HALF_MAX));
    minimum = from_half(minima[index]);
  }
  for (int64_t i = 0; i < count; i++)
    codes[i] = (uint8_t)(nearest(clamp((finite[i] - minimum) / scale, least, most)) + (float)offset);
}

/* A token's vector, each group of columns for itself. */
static void append_integers(const mpq_append *call, const float *x, uint8_t *block, int token) {
  const mpq_vectors *vectors = call->vectors;
  uint8_t codes[MAX_HEAD_WIDTH];
  for (int64_t group = 0, first = 0; first < vectors->width; group++, first += vectors->group) {
    const int64_t end = first + vectors->group, last = end < vectors->width ? end : vectors->width;
    round_group(vectors, x + first, last - first, block, group * BLOCK + token, codes);
    for (int64_t column = first; column < last; column++) place_code(call, block, token, column, codes[column - first]);
  }
}

/* A float of a type that the newest tokens may have. */
static float newest_float(int element, const uint8_t *from, int64_t index) {
  if (element != MPQ_SCALE_FP16) return load_float(from, element == MPQ_SCALE_BF16, index);
  const uint16_t half = ((const uint16_t *)from)[index];
  return (half & 0x7c00) == 0x7c00 ? __builtin_nanf("") : from_half(half);
}

/* A block of 64 tokens, each column for itself. */
static void append_columns(const mpq_append *call, const uint8_t *newest, uint8_t *block) {
  const mpq_vectors *vectors = call->vectors;
  const int64_t width = vectors->width, entries = mpq_table_entries(vectors);
  memset(block + mpq_codes_bytes(vectors), 0, entries * (vectors->scale_bytes + (vectors->has_minimum ? 2 : 0)));
  for (int64_t column = 0; column < width; column++) {
    float x[BLOCK];
    uint8_t codes[BLOCK];
    for (int token = 0; token < BLOCK; token++) x[token] = newest_float(vectors->newest, newest, token * width + column);
    round_group(vectors, x, BLOCK, block, column, codes);
    for (int token = 0; token < BLOCK; token++) place_code(call, block, token, column, codes[token]);
  }
}

/* One of the newest tokens, whose infinities stay: rounding their block finds them. */
static void append_newest(const mpq_vectors *vectors, const float *x, uint8_t *newest, int token) {
  const int64_t width = vectors->width, start = token * width;
  for (int64_t i = 0; i < width; i++) {
    if (vectors->newest != MPQ_SCALE_FP16) store_float(newest, vectors->newest == MPQ_SCALE_BF16, start + i, x[i]);
    else ((uint16_t *)newest)[start + i] = fabsf(x[i]) > HALF_MAX ? (x[i] < 0 ? 0xfc00 : 0x7c00) : to_half(x[i]);
  }
}

static void append_floats(const mpq_append *call, const float *x, uint8_t *block, int token) {
  const mpq_vectors *vectors = call->vectors;
  const int64_t width = vectors->width, start = token * width;
  float finite[MAX_HEAD_WIDTH], low = 0, high = 0, scale = 1;
  int all = 1;
  if (vectors->element == MPQ_SCALE_E4M3) all = copy_finite(x, width, finite, &low, &high);
  if (vectors->scale_bytes) {
    uint16_t *scales = (uint16_t *)(block + mpq_codes_bytes(vectors));
    const uint16_t half = scale_of((-low > high ? -low : high) / E4M3_MAX);
    scale = from_half(half), scales[token] = all ? half : HALF_NAN;
  }
  for (int64_t i = 0; i < width; i++) {
    const float limit = vectors->element == MPQ_SCALE_FP16 ? HALF_MAX : vectors->element == MPQ_SCALE_BF16 ? 0x1.fep127f : 0x1.fffffep127f;
    const float value = clamp(x[i], -limit, limit);
    if (vectors->element == MPQ_SCALE_FP32) ((float *)block)[start + i] = value;
    else if (vectors->element == MPQ_SCALE_FP16) ((uint16_t *)block)[start + i] = to_half(value);
    else if (vectors->element == MPQ_SCALE_BF16) ((uint16_t *)block)[start + i] = to_bf16(value);
    else block[start + i] = vectors->scale_bytes || fabsf(x[i]) <= limit ? to_e4m3(finite[i] / scale) : 0x7f;
  }
}

void mpq_append_head(const mpq_append *call, int64_t head) {
  const mpq_vectors *vectors = call->vectors;
  const mpq_slab *slab = call->slabs;
  uint8_t *newest = slab->data + head * slab->head_bytes; /* by column */
  int64_t before = 0;
  if (vectors->by_column) slab++;
  for (int64_t i = 0; i < call->tokens; i++) {
    const float *x = call->x + head * call->head_stride + i * call->token_stride;
    const int64_t position = call->position + i;
    const int token = (int)(position % BLOCK);
    uint8_t *block = mpq_find_block(&slab, &before, position / BLOCK, head, mpq_block_bytes(vectors));
    if (vectors->by_column) {
      append_newest(vectors, x, newest, token);
      if (token == BLOCK - 1) append_columns(call, newest, block);
    } else if (vectors->weight) append_integers(call, x, block, token);
    else append_floats(call, x, block, token);
  }
}

typedef struct {
  const mpq_append *calls;
  work_ranges ranges;
} append_job;

static void append_heads(void *argument) {
  append_job *job = argument;
  const int64_t heads = job->calls->heads;
  int own = join_range(&job->ranges);
  for (work_item item; take_item(&job->ranges, &own, &item);) mpq_append_head(job->calls + item.start / heads, item.start % heads);
}

void mpq_append_tokens(const mpq_append *calls, int64_t count) {
  append_job job = {.calls = calls};
  const int64_t rows = count * calls->heads;
  const int few = calls->tokens * rows * calls->vectors->width < 1 << 14;
  share_work(few ? 1 : calls->threads, calls->parallel, append_heads, &job, &job.ranges, rows, 1);
}
