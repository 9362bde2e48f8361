/* Attention of one token to a cache: types that attention.c and the levels share. docs/kernels.md draws the blocks. */
#ifndef MPQ_ATTENTION_H
#define MPQ_ATTENTION_H
#include "tile.h"

#define HEADS_AT_ONCE 4 /* query heads whose sums fit registers */
#define MAX_HEAD_WIDTH 256

/* The tokens `first` to `last` of one key head, and the running softmax of its query heads over them. */
typedef struct {
  const mpq_attention *call;
  const mpq_sequence *sequence;
  int64_t key_head, first, last;
  float *largest, *total; /* (group,): the largest score, and the sum of exp(score - largest) */
  float *mixed;           /* (group, padded width): the sum of exp(score - largest) * value */
  uint8_t *memory;        /* mpq_attention_memory(call) bytes */
} mpq_attention_part;

/* Columns of a head, padded to whole vectors. */
static inline int64_t mpq_padded_width(const mpq_vectors *vectors) { return (vectors->width + 15) & ~(int64_t)15; }

/* Groups of columns with a scale of their own. */
static inline int64_t mpq_groups(const mpq_vectors *vectors) {
  return vectors->scale_bytes ? (vectors->width + vectors->group - 1) / vectors->group : 0;
}

/* Bytes of the codes or floats of a block, which precede its scales. */
static inline int64_t mpq_codes_bytes(const mpq_vectors *vectors) {
  const int64_t width = vectors->width;
  return vectors->weight ? 8 * vectors->weight->bits * mpq_padded_width(vectors) : BLOCK * width * vectors->element_bytes;
}

/* Entries of a block's table of scales, and of minima. */
static inline int64_t mpq_table_entries(const mpq_vectors *vectors) {
  return vectors->by_column ? mpq_padded_width(vectors) : mpq_groups(vectors) * BLOCK;
}

/* Bytes of 64 tokens of one head. */
static inline int64_t mpq_block_bytes(const mpq_vectors *vectors) {
  return mpq_codes_bytes(vectors) + mpq_table_entries(vectors) * (vectors->scale_bytes + (vectors->has_minimum ? 2 : 0));
}

/* The format of the newest tokens, which fill no block yet: floats. */
static inline mpq_vectors mpq_newest(const mpq_vectors *vectors) {
  return (mpq_vectors){.width = vectors->width, .element = vectors->newest, .element_bytes = vectors->newest == MPQ_SCALE_FP32 ? 4 : 2,
                       .group = vectors->group};
}

/* Where a block of a key head is. `slab` and `before`, the blocks before it, are kept between ascending calls. */
static inline uint8_t *mpq_find_block(const mpq_slab **slab, int64_t *before, int64_t block, int64_t key_head,
                                      int64_t block_bytes) {
  while (block - *before >= (*slab)->blocks) *before += (*slab)->blocks, ++*slab;
  return (*slab)->data + key_head * (*slab)->head_bytes + (block - *before) * block_bytes;
}

/* `mpq_append_tokens` of one head. */
void mpq_append_head(const mpq_append *, int64_t head);

/* Scratch of a part: queries as floats and as integers, their scales and sums, two blocks of decoded levels. */
static inline int64_t mpq_attention_memory(const mpq_attention *call) {
  const int64_t group = call->heads / call->key_heads, width = mpq_padded_width(call->keys);
  return group * (width * 6 + 64 + 4 * (width / 16)) + 2 * BLOCK * width + 256;
}
#endif
