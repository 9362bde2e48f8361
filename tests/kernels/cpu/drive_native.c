/* Runs each case at every level on allocations of exact size: products of several batches, convolutions, the whole
 * weight, its rows, calls by PyTorch's dispatcher, attention to caches of its codes, and where it is square, steps of a
 * decoder whose layers all have that weight. A case is a file: an mpq_weight, the 256 numbers of its codes, the weight
 * as float32 (rows, cols), the panels. Prints the best level's name, then for each case the hash of what the first
 * level computed. Gaps between rows hold NaN: none may be read or written. Levels that share multiply.h must agree bit
 * for bit (without fused multiply-adds).
 */
#include <pthread.h>

#include "drive.h"
#include "drive_caches.h"
#include "drive_dispatch.h"

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
      mpq_call call = {.x = x, .tokens = tokens, .stride = stride, .x_is_bf16 = is_bf16, .planes = 1 + (variant >> 1),
          .threads = 3};
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
      mpq_call call = {.panels = one->panels, .x = x, .tokens = tokens, .stride = cols, .out_stride = rows,
          .x_is_bf16 = is_bf16,
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

/* Two parts whose rows take turns in the output get the bits of the products alone, and one token with NaN is
 * skipped. */
static int parts(const test_case *one) {
  const int batches[] = {1, 3, 9, 40};
  const int64_t rows = one->weight.rows, cols = one->weight.cols;
  int64_t *places = malloc(2 * rows * sizeof *places);
  for (int64_t row = 0; row < rows; row++) places[row] = 2 * row, places[rows + row] = 2 * row + 1;
  for (size_t batch = 0; batch < sizeof batches / sizeof *batches; batch++)
    for (int variant = 0; variant < 4; variant++) {
      const int64_t tokens = batches[batch];
      const int is_bf16 = variant & 1, element = is_bf16 ? 2 : 4;
      uint8_t *x = malloc(tokens * cols * element), *bias = malloc(2 * rows * element),
          *plain_bias = malloc(rows * element);
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
    images.out[i] = (images.size[i] + 2 * images.padding[i] - images.dilation[i] * (images.kernel[i] - 1) - 1) /
        images.stride[i] + 1;
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
    const int64_t image = token / positions,
        from = image * steps[0] + channel * steps[1] + line * steps[2] + column * steps[3];
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
      const mpq_vectors vectors = {.width = head, .element = is_bf16 ? MPQ_SCALE_BF16 : MPQ_SCALE_FP32,
          .element_bytes = element};
      const int64_t blocks = position / BLOCK + 1;
      const mpq_slab slabs[4] = {{memory[0], blocks, 0}, {memory[1], blocks, 0}, {memory[2], blocks, 0},
          {memory[3], blocks, 0}};
      const mpq_block_cache caches[2] = {{&vectors, &vectors, slabs, slabs + 1},
          {&vectors, &vectors, slabs + 2, slabs + 3}};
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

static int drive(const char *name) {
  test_case one;
  FILE *file = fopen(name, "rb");
  if (!file || fread(&one.weight, sizeof one.weight, 1, file) != 1 ||
      fread(one.values, sizeof one.values, 1, file) != 1)
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
    for (int variant = 0; variant < 6; variant++)
        TRY(decode(&one, (const int[]){0, 37, 700}[variant / 2], variant & 1));
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
