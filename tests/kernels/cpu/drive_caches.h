/* Attention to caches: new tokens rounded into slabs, then every level and number of threads. */
#include "drive.h"

/* Slabs of one block and of the rest, each of exact size, before them by column the newest tokens; and the format
 * they have. */
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
  made.weight.cols = padded, made.weight.segment = (int32_t)padded, made.weight.segments = 1,
      made.weight.factor = 0.01f;
  made.vectors = (mpq_vectors){.width = width, .group = group, .scale_kind = MPQ_SCALE_FP16, .scale_bytes = 2,
      .has_minimum = has_minimum};
  if (element >= 0)
    made.vectors = (mpq_vectors){.width = width, .element = element,
        .element_bytes = element == MPQ_SCALE_E4M3 ? 1 : element ? 2 : 4,
                                 .group = (int32_t)padded};
  return made;
}

/* Round some tokens into both slabs, where the format is one that the library rounds to. */
static void append_some(const cache *made, int values) {
  if (made->vectors.weight && made->vectors.weight->kind != MPQ_INTEGER) return;
  const int64_t width = made->vectors.width, tokens = 11;
  float *x = numbers(2 * tokens * width, 0);
  const mpq_append call = {&made->vectors, made->slabs, x, tokens * width, width, 2, tokens, BLOCK - 5, values, 3,
      NULL};
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
  mpq_attention call = {&keys->vectors, &values->vectors, sequences, 2, heads, 2, window, window ? sinks : NULL, 0.1f,
      planes, 1, 0, NULL};
  for (call.level = 0; call.level <= mpq_best_level(99); call.level++) {
    if (mpq_best_level(call.level) != call.level) continue;
    float *alone = NULL;
    for (call.threads = 1; call.threads <= 3; call.threads += 2) {
      float *out = filled(size * sizeof *out, 0xff);
      for (int i = 0; i < 2; i++)
        sequences[i] = (mpq_sequence){q + i * heads * width, out + i * heads * width, copies[i][0].slabs,
            copies[i][1].slabs, lengths[i]};
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
  const int codes = one->weight.kind == MPQ_INTEGER || one->weight.kind == MPQ_TABLE8,
      minimum = one->weight.kind == MPQ_INTEGER;
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
