/* Runs each case at every level on allocations of exact size: products of several batches, convolutions, the whole weight,
 * its rows, calls by PyTorch's dispatcher, attention to caches of its codes, and where it is square, steps of a decoder whose layers all have that weight.
 * A case is a file: an mpq_weight, the 256 numbers of its codes, the weight as float32 (rows, cols), the panels.
 * Prints the best level's name, then for each case the hash of what the first level computed. Gaps between rows hold NaN:
 * none may be read, nor written. Levels that share multiply.h must agree to the bit (without fused multiply-adds).
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

typedef struct {
  mpq_weight weight;
  float values[256], *matrix;
  uint8_t *panels;
} test_case;

enum { FAILED = 1, NOT_A_NUMBER, GAP_WRITTEN, LEVELS_DIFFER, PATCHES_DIFFER, WEIGHTS_DIFFER, THREADS_DIFFER, NO_CASE, NOT_SKIPPED };
#define TRY(call) do { const int failed_ = (call); if (failed_) return failed_; } while (0)

static uint64_t hash;

static void *filled(size_t size, int byte) { return memset(malloc(size), byte, size); }

static void remember(const uint8_t *bytes, size_t size) {
  for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
}

static void put(void *to, int64_t index, int is_bf16, float value) {
  const int element = is_bf16 ? 2 : 4;
  memcpy((uint8_t *)to + index * element, (uint8_t *)&value + 4 - element, element);
}

static float number(int64_t index) { return (float)((index * 37) % 101) / 50 - 1; }

/* Every element of rows `stride` apart is a number, and what stands between them is as it was. */
static int look(const uint8_t *out, int64_t tokens, int64_t rows, int64_t stride, int element) {
  for (int64_t at = 0; at < tokens * stride; at++) {
    float value = 0;
    memcpy((uint8_t *)&value + 4 - element, out + at * element, element);
    if (at % stride < rows && value != value) return NOT_A_NUMBER;
    for (int i = 0; i < element && at % stride >= rows; i++)
      if (out[at * element + i] != 0xff) return GAP_WRITTEN;
  }
  return 0;
}

static int alike(int level) {
  const char *name = mpq_level_name(level);
  return !strcmp(name, "avx2") || !strcmp(name, "avxvnni") || !strcmp(name, "neon");
}

/* One call at every level: those alike agree. `images` or NULL; `patches`, the same tokens as rows of x, or NULL. */
static int levels_agree(const test_case *one, mpq_call call, const mpq_images *images, const void *patches) {
  const int element = call.x_is_bf16 ? 2 : 4;
  const int64_t gap = 3, size = call.tokens * (one->weight.rows + gap) * element;
  uint8_t *bias = calloc(one->weight.rows, element), *first = NULL;
  for (int64_t i = 0; i < one->weight.rows; i++) put(bias, i, call.x_is_bf16, number(i + 5));
  call.panels = one->panels, call.bias = bias, call.out_stride = one->weight.rows + gap;
  call.bias_is_bf16 = call.out_is_bf16 = call.x_is_bf16;
  for (call.level = 0; call.level <= mpq_best_level(99); call.level++) {
    if (mpq_best_level(call.level) != call.level) continue;
    uint8_t *out = filled(size, 0xff), *again = filled(size, 0xff);
    call.out = out, call.skipped = malloc(call.tokens);
    if ((images ? mpq_conv(&one->weight, &call, images) : mpq_linear(&one->weight, &call)) != 0) return FAILED;
    TRY(look(out, call.tokens, one->weight.rows, call.out_stride, element));
    if (patches) {
      mpq_call plain = call;
      plain.x = patches, plain.stride = one->weight.cols, plain.out = again;
      if (mpq_linear(&one->weight, &plain) != 0) return FAILED;
      if (memcmp(out, again, size)) return PATCHES_DIFFER;
    }
    if (first && alike(call.level) && memcmp(first, out, size)) return LEVELS_DIFFER;
    free(again), free(call.skipped);
    if (first) free(out);
    else remember(first = out, size);
  }
  free(bias), free(first);
  return 0;
}

static int multiply(const test_case *one) {
  const int batches[] = {1, 2, 3, 4, 9, 40, 257};
  for (size_t batch = 0; batch < sizeof batches / sizeof *batches; batch++)
    for (int variant = 0; variant < 4; variant++) {
      const int is_bf16 = variant & 1;
      const int64_t tokens = batches[batch], cols = one->weight.cols, stride = cols + 5;
      uint8_t *x = filled(((tokens - 1) * stride + cols) * (is_bf16 ? 2 : 4), 0xff);
      for (int64_t i = 0; i < tokens * cols; i++) put(x, i / cols * stride + i % cols, is_bf16, number(i));
      mpq_call call = {.x = x, .tokens = tokens, .stride = stride, .x_is_bf16 = is_bf16, .planes = 1 + (variant >> 1), .threads = 3};
      TRY(levels_agree(one, call, NULL, NULL));
      free(x);
    }
  return 0;
}

/* A token with NaN is skipped at every level, and the others get the same bits as without it. */
static int skip(const test_case *one) {
  const int batches[] = {1, 3, 9, 40};
  const int64_t rows = one->weight.rows, cols = one->weight.cols;
  for (size_t batch = 0; batch < sizeof batches / sizeof *batches; batch++)
    for (int variant = 0; variant < 4; variant++) {
      const int64_t tokens = batches[batch], bad = tokens / 2;
      const int is_bf16 = variant & 1, element = is_bf16 ? 2 : 4;
      uint8_t *x = malloc(tokens * cols * element);
      for (int64_t i = 0; i < tokens * cols; i++) put(x, i, is_bf16, number(i));
      mpq_call call = {.panels = one->panels, .x = x, .tokens = tokens, .stride = cols, .out_stride = rows, .x_is_bf16 = is_bf16,
                       .out_is_bf16 = is_bf16, .planes = 1 + (variant >> 1), .threads = 2};
      for (call.level = 0; call.level <= mpq_best_level(99); call.level++) {
        if (mpq_best_level(call.level) != call.level) continue;
        const size_t row = rows * element;
        uint8_t *whole = filled(tokens * row, 0xff), *out = filled(tokens * row, 0xff);
        call.skipped = malloc(tokens), call.out = whole;
        put(x, bad * cols, is_bf16, number(bad * cols));
        if (mpq_linear(&one->weight, &call) != 0) return FAILED;
        call.out = out;
        put(x, bad * cols, is_bf16, __builtin_nanf(""));
        if (mpq_linear(&one->weight, &call) != 1 || !call.skipped[bad]) return NOT_SKIPPED;
        for (int64_t token = 0; token < tokens; token++)
          if (token != bad && memcmp(out + token * row, whole + token * row, row)) return LEVELS_DIFFER;
        free(whole), free(out), free(call.skipped);
      }
      free(x);
    }
  return 0;
}

/* Two parts whose rows take turns in the output get the bits of the products alone, and one token with NaN is skipped. */
static int parts(const test_case *one) {
  const int batches[] = {1, 3, 9, 40};
  const int64_t rows = one->weight.rows, cols = one->weight.cols;
  int64_t *places = malloc(2 * rows * sizeof *places);
  for (int64_t row = 0; row < rows; row++) places[row] = 2 * row, places[rows + row] = 2 * row + 1;
  for (size_t batch = 0; batch < sizeof batches / sizeof *batches; batch++)
    for (int variant = 0; variant < 4; variant++) {
      const int64_t tokens = batches[batch];
      const int is_bf16 = variant & 1, element = is_bf16 ? 2 : 4;
      uint8_t *x = malloc(tokens * cols * element), *bias = malloc(2 * rows * element), *plain_bias = malloc(rows * element);
      for (int64_t i = 0; i < tokens * cols; i++) put(x, i, is_bf16, number(i));
      for (int64_t i = 0; i < 2 * rows; i++) put(bias, i, is_bf16, number(i / 2));
      for (int64_t i = 0; i < rows; i++) put(plain_bias, i, is_bf16, number(i));
      mpq_call call = {.panels = one->panels, .x = x, .tokens = tokens, .stride = cols, .x_is_bf16 = is_bf16,
                       .bias_is_bf16 = is_bf16, .out_is_bf16 = is_bf16, .planes = 1 + (variant >> 1), .threads = 3};
      for (call.level = 0; call.level <= mpq_best_level(99); call.level++) {
        if (mpq_best_level(call.level) != call.level) continue;
        uint8_t *alone = filled(tokens * rows * element, 0xff), *both = filled(2 * tokens * rows * element, 0xff);
        call.out = alone, call.out_stride = rows, call.bias = plain_bias, call.places = NULL;
        if (mpq_linear(&one->weight, &call) != 0) return FAILED;
        call.out = both, call.out_stride = 2 * rows, call.bias = bias;
        const mpq_weight *weights[] = {&one->weight, &one->weight};
        mpq_call calls[] = {call, call};
        calls[0].places = places, calls[1].places = places + rows;
        if (mpq_linear_parts(weights, calls, 2) != 0) return FAILED;
        for (int64_t i = 0; i < 2 * tokens * rows; i++)
          if (memcmp(both + i * element, alone + i / 2 * element, element)) return LEVELS_DIFFER;
        put(x, 0, is_bf16, __builtin_nanf(""));
        if (mpq_linear_parts(weights, calls, 2) != 1) return NOT_SKIPPED;
        put(x, 0, is_bf16, number(0));
        free(alone), free(both);
      }
      free(x), free(bias), free(plain_bias);
    }
  free(places);
  return 0;
}

/* A batch of two images whose lines or pixels have gaps, and the same patches as rows. */
static int convolve(const test_case *one, int64_t down, int64_t along, int variant) {
  const int is_bf16 = variant & 1, last = variant >> 1 & 1, element = is_bf16 ? 2 : 4;
  const int64_t area = down * along, channels = one->weight.cols / area, lines = 5, columns = 9, apart = columns + 2;
  mpq_images images = {.channels = channels, .size = {lines, columns}, .kernel = {down, along}, .stride = {2, 1 + last},
                       .padding = {1, 2}, .dilation = {2, 3}};
  for (int i = 0; i < 2; i++)
    images.out[i] = (images.size[i] + 2 * images.padding[i] - images.dilation[i] * (images.kernel[i] - 1) - 1) / images.stride[i] + 1;
  const int64_t pixel = channels + 1; /* channels first with gaps between lines, or last with gaps between pixels */
  const int64_t first_steps[] = {channels * lines * apart, lines * apart, apart, 1};
  const int64_t last_steps[] = {lines * columns * pixel, 1, columns * pixel, pixel};
  memcpy(images.steps, last ? last_steps : first_steps, sizeof images.steps);
  const int64_t *steps = images.steps;
  const int64_t end = steps[0] + (channels - 1) * steps[1] + (lines - 1) * steps[2] + (columns - 1) * steps[3] + 1;
  uint8_t *x = filled(end * element, 0xff);
  for (int64_t i = 0; i < 2 * channels * lines * columns; i++)
    put(x, i / (channels * lines * columns) * steps[0] + i / (lines * columns) % channels * steps[1] +
        i / columns % lines * steps[2] + i % columns * steps[3], is_bf16, number(i));
  const int64_t positions = images.out[0] * images.out[1], tokens = 2 * positions;
  uint8_t *patches = calloc(tokens * one->weight.cols, element);
  for (int64_t i = 0; i < tokens * one->weight.cols; i++) {
    const int64_t token = i / one->weight.cols, col = i % one->weight.cols, channel = col / area;
    const int64_t line = token % positions / images.out[1] * 2 - 1 + col % area / along * 2;
    const int64_t column = token % images.out[1] * images.stride[1] - 2 + col % along * 3;
    if (line < 0 || line >= lines || column < 0 || column >= columns) continue;
    const int64_t image = token / positions, from = image * steps[0] + channel * steps[1] + line * steps[2] + column * steps[3];
    memcpy(patches + i * element, x + from * element, element);
  }
  mpq_call call = {.x = x, .tokens = tokens, .x_is_bf16 = is_bf16, .planes = 2, .threads = 3};
  TRY(levels_agree(one, call, &images, patches));
  free(x), free(patches);
  return 0;
}

static int dequantize(const test_case *one) {
  const int64_t count = one->weight.rows * one->weight.cols;
  for (int threads = 1; threads <= 3; threads += 2) {
    float *out = filled(count * sizeof *out, 0xff);
    mpq_dequantize(&one->weight, one->panels, NULL, one->values, out, threads, NULL);
    for (int64_t i = 0; i < count; i++)
      if (!(out[i] == one->matrix[i])) return WEIGHTS_DIFFER;
    free(out);
  }
  return 0;
}

static int look_up(const test_case *one) {
  const int64_t rows[] = {one->weight.rows - 1, 0, one->weight.rows / 2, one->weight.rows}, cols = one->weight.cols;
  float *out = filled(3 * cols * sizeof *out, 0xff);
  if (mpq_embedding(&one->weight, one->panels, NULL, one->values, rows, 3, out) != 0) return FAILED;
  for (int64_t i = 0; i < 3 * cols; i++)
    if (!(out[i] == one->matrix[rows[i / cols] * cols + i % cols])) return WEIGHTS_DIFFER;
  if (mpq_embedding(&one->weight, one->panels, NULL, one->values, rows + 3, 1, out) == 0) return FAILED;
  free(out);
  return 0;
}

static void *numbers(int64_t count, int is_bf16) {
  void *made = malloc(count * (is_bf16 ? 2 : 4));
  for (int64_t i = 0; i < count; i++) put(made, i, is_bf16, number(i + count));
  return made;
}

/* Two blocks of four heads that share one of keys; the memory ends with the token. */
static int decode(const test_case *one, int64_t position, int is_bf16) {
  const int64_t width = one->weight.rows, head = width / 4, past = (position + 1) * head;
  const int element = is_bf16 ? 2 : 4;
  mpq_weight few = one->weight, rest = one->weight;
  few.rows = head, rest.rows = width - head;
  float *norm = numbers(width, 0);
  int64_t *places = malloc(width * sizeof *places);
  for (int64_t i = 0; i < width; i++) places[i] = width - 1 - i;
  const mpq_part all = {&one->weight, one->panels, NULL, NULL}, some = {&few, one->panels, NULL, NULL};
  const mpq_part two[2] = {{&few, one->panels, NULL, places}, {&rest, one->panels, NULL, places + head}};
  const mpq_layer whole = {&all, norm, 1, 0, 2}, part = {&some, NULL, 1, 0, 2}, mix = {two, norm, 2, 0, 2};
  const mpq_block blocks[2] = {{whole, part, part, whole, whole, whole, whole, norm, norm},
                               {mix, part, part, mix, mix, mix, mix, norm, norm}};
  mpq_decoder decoder = {blocks, 2, width, width, 4, 1, head, 1e-5f, is_bf16, 0, NULL, whole, norm};
  uint8_t *first = NULL;
  for (decoder.level = 0; decoder.level <= mpq_best_level(99); decoder.level++) {
    if (mpq_best_level(decoder.level) != decoder.level) continue;
    uint8_t *alone = NULL;
    for (int threads = 1; threads <= 3; threads += 2) {
      void *memory[4], *x = numbers(width, is_bf16), *cos = numbers(head, is_bf16), *sin = numbers(head, is_bf16);
      uint8_t *out = filled(width * element, 0xff);
      for (int i = 0; i < 4; i++) memory[i] = numbers(past, is_bf16);
      const mpq_vectors vectors = {.width = head, .element = is_bf16 ? MPQ_SCALE_BF16 : MPQ_SCALE_FP32, .element_bytes = element};
      const int64_t blocks = position / BLOCK + 1;
      const mpq_slab slabs[4] = {{memory[0], blocks, 0}, {memory[1], blocks, 0}, {memory[2], blocks, 0}, {memory[3], blocks, 0}};
      const mpq_block_cache caches[2] = {{&vectors, &vectors, slabs, slabs + 1}, {&vectors, &vectors, slabs + 2, slabs + 3}};
      const mpq_token token = {x, cos, sin, out, caches, position, threads};
      if (mpq_step(&decoder, &token) != 0) return FAILED;
      TRY(look(out, 1, width, width, element));
      if (alone && memcmp(alone, out, width * element)) return THREADS_DIFFER;
      if (alone) free(out);
      else alone = out;
      for (int i = 0; i < 4; i++) free(memory[i]);
      free(x), free(cos), free(sin);
    }
    if (first && alike(decoder.level) && memcmp(first, alone, width * element)) return LEVELS_DIFFER;
    if (first) free(alone);
    else remember(first = alone, width * element);
  }
  free(norm), free(places), free(first);
  return 0;
}

/* Slabs of one block and of the rest, each of exact size, before them by column the newest tokens; and the format they have. */
typedef struct {
  mpq_weight weight;
  mpq_vectors vectors;
  mpq_slab slabs[3];
} cache;

/* Numbers as a stream of float16, of scales or of elements; bytes of codes. */
static void fill_cache(cache *made, int64_t heads, int64_t tokens) {
  const mpq_vectors *vectors = &made->vectors;
  const int64_t blocks = (tokens + BLOCK - 1) / BLOCK, bytes = mpq_block_bytes(vectors);
  const int64_t start = vectors->weight ? mpq_codes_bytes(vectors) : 0;
  mpq_slab *slabs = made->slabs;
  made->slabs[2].data = NULL;
  if (vectors->by_column) {
    const int64_t size = heads * BLOCK * vectors->width;
    uint16_t *newest = malloc(2 * size);
    for (int64_t i = 0; i < size; i++) newest[i] = (uint16_t)(0x2c00 + i * 31 % 2048);
    *slabs++ = (mpq_slab){(uint8_t *)newest, 1, 2 * BLOCK * vectors->width};
  }
  for (int slab = 0; slab < 2; slab++) {
    const int64_t own = slab ? blocks - 1 : 1;
    uint8_t *data = malloc(heads * own * bytes);
    for (int64_t i = 0; i < heads * own * bytes; i++) data[i] = (uint8_t)(i * 37 + i / 91);
    for (int64_t block = 0; block < heads * own; block++)
      for (int64_t i = 0; i < (bytes - start) / 2; i++) {
        const uint16_t half = (uint16_t)(0x2c00 + (i * 29 + block) % 2048); /* 1/16 to 1/4 */
        if (vectors->element_bytes != 1) memcpy(data + block * bytes + start + 2 * i, &half, 2);
      }
    if (vectors->element_bytes == 1) for (int64_t i = 0; i < heads * own * bytes; i++) data[i] &= 0xbf; /* below 2 */
    slabs[slab] = (mpq_slab){data, own, own * bytes};
  }
}

static cache new_cache(const test_case *one, int64_t width, int group, int element, int has_minimum) {
  const int64_t padded = (width + 15) / 16 * 16;
  cache made = {.weight = one->weight};
  made.weight.cols = padded, made.weight.segment = (int32_t)padded, made.weight.segments = 1, made.weight.factor = 0.01f;
  made.vectors = (mpq_vectors){.width = width, .group = group, .scale_kind = MPQ_SCALE_FP16, .scale_bytes = 2, .has_minimum = has_minimum};
  if (element >= 0)
    made.vectors = (mpq_vectors){.width = width, .element = element, .element_bytes = element == MPQ_SCALE_E4M3 ? 1 : element ? 2 : 4,
                                 .group = (int32_t)padded};
  return made;
}

/* Round some tokens into both slabs, where the format is one that the library rounds to. */
static void append_some(const cache *made, int values) {
  if (made->vectors.weight && made->vectors.weight->kind != MPQ_INTEGER) return;
  const int64_t width = made->vectors.width, tokens = 11;
  float *x = numbers(2 * tokens * width, 0);
  const mpq_append call = {&made->vectors, made->slabs, x, tokens * width, width, 2, tokens, BLOCK - 5, values, 3, NULL};
  mpq_append_tokens(&call, 1);
  free(x);
}

/* Two sequences whose query heads share two key heads, at every level and number of threads. */
static int attend_caches(cache *keys, cache *values, int group, int planes, int64_t window) {
  const int64_t lengths[2] = {70, 330}, width = keys->vectors.width, heads = 2 * group, size = 2 * heads * width;
  float *q = numbers(size, 0), *sinks = numbers(heads, 0), *first = NULL;
  mpq_sequence sequences[2];
  cache copies[2][2];
  if (keys->vectors.element_bytes == 0) keys->vectors.weight = &keys->weight;
  if (values->vectors.element_bytes == 0) values->vectors.weight = &values->weight;
  for (int i = 0; i < 2; i++) {
    copies[i][0] = *keys, copies[i][1] = *values;
    for (int j = 0; j < 2; j++) fill_cache(&copies[i][j], 2, lengths[i]), append_some(&copies[i][j], j);
  }
  mpq_attention call = {&keys->vectors, &values->vectors, sequences, 2, heads, 2, window, window ? sinks : NULL, 0.1f, planes, 1, 0, NULL};
  for (call.level = 0; call.level <= mpq_best_level(99); call.level++) {
    if (mpq_best_level(call.level) != call.level) continue;
    float *alone = NULL;
    for (call.threads = 1; call.threads <= 3; call.threads += 2) {
      float *out = filled(size * sizeof *out, 0xff);
      for (int i = 0; i < 2; i++)
        sequences[i] = (mpq_sequence){q + i * heads * width, out + i * heads * width, copies[i][0].slabs, copies[i][1].slabs, lengths[i]};
      if (mpq_attend(&call) != 0) return FAILED;
      TRY(look((uint8_t *)out, 2, heads * width, heads * width, 4));
      if (alone && memcmp(alone, out, size * sizeof *out)) return THREADS_DIFFER;
      if (alone) free(out);
      else alone = out;
    }
    if (first && alike(call.level) && memcmp(first, alone, size * sizeof *first)) return LEVELS_DIFFER;
    if (first) free(alone);
    else remember((uint8_t *)(first = alone), size * sizeof *first);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 6; j++) free(copies[i][j / 3].slabs[j % 3].data);
  free(q), free(sinks), free(first);
  return 0;
}

static int attend_all(const test_case *one) {
  const int codes = one->weight.kind == MPQ_INTEGER || one->weight.kind == MPQ_TABLE8, minimum = one->weight.kind == MPQ_INTEGER;
  if (codes) {
    cache keys = new_cache(one, 40, 32, -1, minimum), values = new_cache(one, 40, 48, -1, minimum);
    cache floats = new_cache(one, 40, 0, MPQ_SCALE_BF16, 0);
    TRY(attend_caches(&keys, &floats, 5, 1, 100));
    TRY(attend_caches(&keys, &values, 7, 2, 0));
    if (!minimum) return 0;
    keys.vectors.by_column = values.vectors.by_column = 1, values.vectors.has_minimum = 0;
    keys.vectors.newest = values.vectors.newest = MPQ_SCALE_FP16;
    TRY(attend_caches(&keys, &values, 7, 2, 0));
    TRY(attend_caches(&keys, &floats, 2, 2, 100));
    return 0;
  }
  const int elements[] = {MPQ_SCALE_FP32, MPQ_SCALE_FP16, MPQ_SCALE_BF16, MPQ_SCALE_E4M3};
  for (int i = 0; i < 4; i++) {
    cache keys = new_cache(one, 40, 0, elements[i], 0), values = new_cache(one, 40, 0, elements[(i + 1) % 4], 0);
    TRY(attend_caches(&keys, &values, 3, 2, 64 * (i % 2)));
  }
  return 0;
}

/* What torch_dispatch.c calls of PyTorch, on objects of the heap: the sanitizers see what is lost or dropped twice. */
typedef uint64_t stable_value;
typedef struct {
  void *data;
  int64_t dims, sizes[2], strides[2];
  int32_t type; /* 1: float32; 2: bfloat16 */
} tensor;

static void (*kernel)(stable_value *, uint64_t, uint64_t);
static int forwarded;

static int32_t make_library(const char *space, const char *key, const char *file, uint32_t line, void **out) {
  (void)space, (void)key, (void)file, (void)line;
  *out = &kernel;
  return 0;
}
static int32_t implement(void *library, const char *name, void (*function)(stable_value *, uint64_t, uint64_t)) {
  (void)library;
  if (!strcmp(name, "linear")) kernel = function; /* linear_parts: tests/kernels/cpu/test_dispatch.py */
  return 0;
}
static int32_t drop_tensor(tensor *t) { free(t->data), free(t); return 0; }
static int32_t drop(void *object) { free(object); return 0; }
static int32_t forward(const char *name, const char *overload, stable_value *stack) { /* owns its arguments, as any op */
  (void)name, (void)overload;
  stable_value *weight = (stable_value *)stack[1], *bias = (stable_value *)stack[2];
  drop_tensor((tensor *)stack[0]), drop_tensor((tensor *)weight[0]), free(weight);
  if (bias) drop_tensor((tensor *)*bias), free(bias);
  free((void *)stack[3]), free((void *)stack[6]), free((void *)stack[7]);
  forwarded++, stack[0] = 0;
  return 0;
}
static void check(_Bool fine, const char *f, const char *file, uint32_t line, const char *text) {
  (void)fine, (void)f, (void)file, (void)line, (void)text;
}
static const char *last_error(void) { return ""; }
static int32_t list_size(stable_value *list, size_t *out) { (void)list; *out = 1; return 0; }
static int32_t list_item(stable_value *list, size_t i, stable_value *out) { *out = list[i]; return 0; }
static int32_t string_of(const char *text, const char **out) { *out = text; return 0; }
static int32_t data_of(tensor *t, void **out) { *out = t->data; return 0; }
static int32_t dims_of(tensor *t, int64_t *out) { *out = t->dims; return 0; }
static int32_t sizes_of(tensor *t, int64_t **out) { *out = t->sizes; return 0; }
static int32_t strides_of(tensor *t, int64_t **out) { *out = t->strides; return 0; }
static int32_t type_of(tensor *t, int32_t *out) { *out = t->type; return 0; }
static int32_t float32_type(void) { return 1; }
static int32_t bfloat16_type(void) { return 2; }
static int32_t cpu_device(void) { return 0; }
static int32_t thread_count(uint32_t *out) { *out = 3; return 0; }

static tensor *new_tensor(int64_t dims, int64_t first, int64_t second, int32_t type) {
  tensor *t = malloc(sizeof *t);
  *t = (tensor){malloc(first * (dims > 1 ? second : 1) * (type == 2 ? 2 : 4)), dims, {first, second}, {dims > 1 ? second : 1, 1}, type};
  return t;
}
static int32_t new_empty(int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t type, int32_t device, int32_t index, tensor **out) {
  (void)strides, (void)device, (void)index;
  *out = new_tensor(dims, sizes[0], sizes[1], type);
  return 0;
}

int mpq_serve(void *const *interface, int level, mpq_parallel parallel);
void mpq_know(const char *format, const mpq_weight *weight);

static stable_value boxed(stable_value value) {
  stable_value *box = malloc(sizeof *box);
  *box = value;
  return (stable_value)box;
}

/* One call of torch.ops.mpq.linear: served as mpq_linear computes it, or forwarded where a token is not finite. */
static int dispatch(const test_case *one, const char *name, int is_bf16, int finite) {
  const int64_t rows = one->weight.rows, cols = one->weight.cols, tokens = 3;
  const size_t size = (rows + PANEL_ROWS - 1) / PANEL_ROWS * one->weight.panel_bytes, bytes = is_bf16 ? 2 : 4;
  tensor *x = new_tensor(2, tokens, cols, 1 + is_bf16), *weight = new_tensor(1, size, 0, 1), *bias = new_tensor(1, rows, 0, 1);
  for (int64_t i = 0; i < tokens * cols; i++) put(x->data, i, is_bf16, number(i));
  for (int64_t i = 0; i < rows; i++) put(bias->data, i, 0, number(i));
  if (!finite) put(x->data, 0, is_bf16, 0.0f / 0.0f);
  free(weight->data);
  weight->data = memcpy(malloc(size), one->panels, size);
  uint8_t *expected = filled(tokens * rows * bytes, 0xff);
  const mpq_call call = {.panels = one->panels, .x = x->data, .tokens = tokens, .stride = cols, .bias = bias->data, .out = expected,
                         .out_stride = rows, .x_is_bf16 = is_bf16, .out_is_bf16 = is_bf16, .planes = 2, .threads = 3, .level = mpq_best_level(99)};
  const int64_t skipped = mpq_linear(&one->weight, &call);
  stable_value stack[8] = {(stable_value)x, boxed((stable_value)weight), boxed((stable_value)bias), (stable_value)strdup(name), rows, cols,
                           (stable_value)strdup("panels"), (stable_value)strdup("")};
  const int before = forwarded;
  kernel(stack, 8, 1);
  if ((forwarded - before) != !finite || (skipped != 0) != !finite) return FAILED;
  if (finite && memcmp(((tensor *)stack[0])->data, expected, tokens * rows * bytes)) return LEVELS_DIFFER;
  if (finite) drop_tensor((tensor *)stack[0]);
  free(expected);
  return 0;
}

static int serve(const test_case *one, const char *name) {
  void *const interface[] = { /* as torch_interface orders them */
      make_library, implement, forward, check, last_error, list_size, list_item, string_of, data_of, dims_of, sizes_of, strides_of,
      type_of, new_empty, thread_count, drop_tensor, drop, drop, drop, float32_type, bfloat16_type, cpu_device,
  };
  if (mpq_serve(interface, mpq_best_level(99), NULL)) return FAILED;
  mpq_know(name, &one->weight);
  for (int is_bf16 = 0; is_bf16 < 2; is_bf16++) TRY(dispatch(one, name, is_bf16, 1)); /* others: tests/kernels/cpu/test_dispatch.py */
  return 0;
}

static int drive(const char *name) {
  test_case one;
  FILE *file = fopen(name, "rb");
  if (!file || fread(&one.weight, sizeof one.weight, 1, file) != 1 || fread(one.values, sizeof one.values, 1, file) != 1)
    return NO_CASE;
  const size_t count = one.weight.rows * one.weight.cols;
  const size_t size = (one.weight.rows + PANEL_ROWS - 1) / PANEL_ROWS * one.weight.panel_bytes;
  one.matrix = malloc(count * sizeof *one.matrix), one.panels = malloc(size);
  if (fread(one.matrix, sizeof *one.matrix, count, file) != count || fread(one.panels, 1, size, file) != size ||
      fgetc(file) != EOF)
    return NO_CASE;
  fclose(file);
  hash = 0xcbf29ce484222325u;
  TRY(multiply(&one));
  TRY(skip(&one));
  TRY(parts(&one));
  TRY(dequantize(&one));
  TRY(look_up(&one));
  TRY(serve(&one, name));
  TRY(attend_all(&one));
  if (one.weight.rows == one.weight.cols)
    for (int variant = 0; variant < 6; variant++) TRY(decode(&one, (const int[]){0, 37, 700}[variant / 2], variant & 1));
  for (int variant = 0; variant < 4; variant++) {
    TRY(convolve(&one, 1, 3, variant));
    if (one.weight.cols % 6 == 0) TRY(convolve(&one, 2, 3, variant));
    else TRY(convolve(&one, 3, 1, variant));
  }
  free(one.matrix), free(one.panels);
  printf("%016llx\n", (unsigned long long)hash);
  return 0;
}

static int count;
static char **names;
static int result;

static void *in_a_thread(void *none) { /* so that its memory is seen to be given back */
  for (int i = 1; i < count && !result; i++) {
    result = drive(names[i]);
    if (result) fprintf(stderr, "%s: %d\n", names[i], result);
  }
  return none;
}

int main(int argument_count, char **arguments) {
  pthread_t thread;
  count = argument_count, names = arguments;
  puts(mpq_level_name(mpq_best_level(99)));
  pthread_create(&thread, NULL, in_a_thread, NULL);
  pthread_join(thread, NULL);
  return result;
}
