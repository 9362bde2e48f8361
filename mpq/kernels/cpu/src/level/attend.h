/* Attention of the query heads of one key head to a run of tokens, by an online softmax (Milakov and Gimelshein
 * 2018, arXiv 1805.02867) over blocks of 64: each block of keys and values is read once. */
#ifndef MPQ_ATTEND_H
#define MPQ_ATTEND_H
#include "attend_columns.h"
#include "attend_floats.h"
#include "decoder_ops.h"

/* A part's queries, and where it stands. */
typedef struct {
  const mpq_attention_part *part;
  const float *q; /* (heads, padded width), times the scale of scores; for keys of codes by token unused */
  integer_queries integers;
  uint8_t *levels[2]; /* decoded keys and values */
} attention_state;

/* A block of keys or values: its decoded levels or rows of floats, its scales, and where the next block is. */
typedef struct {
  const mpq_vectors *vectors;
  const uint8_t *levels, *scales, *ahead;
} cache_block;

/* A sequence's keys or values of one head, block after block. */
typedef struct {
  const mpq_vectors *vectors;
  mpq_vectors newest_vectors;
  const uint8_t *newest;   /* by column: the newest tokens, which stand in place of the block `filled` */
  const mpq_slab *slab;
  int64_t before, filled, key_head;
  uint8_t *buffer;
} cache_stream;

INLINE cache_stream stream_of(const mpq_attention_part *part, const mpq_vectors *vectors, const mpq_slab *slabs, uint8_t *buffer) {
  cache_stream stream = {.vectors = vectors, .slab = slabs, .filled = -1, .key_head = part->key_head, .buffer = buffer};
  if (!vectors->by_column) return stream;
  stream.newest_vectors = mpq_newest(vectors);
  stream.newest = slabs->data + part->key_head * slabs->head_bytes;
  stream.slab++, stream.filled = part->sequence->length / BLOCK;
  return stream;
}

INLINE cache_block open_block(const mpq_vectors *vectors, const uint8_t *data, uint8_t *buffer) {
  const uint8_t *levels = vectors->weight ? levels_of(vectors, data, buffer) : data;
  return (cache_block){vectors, levels, data + mpq_codes_bytes(vectors), data + mpq_block_bytes(vectors)};
}

/* Blocks are asked for in ascending order. */
INLINE cache_block block_of(cache_stream *from, int64_t block) {
  if (block == from->filled) return open_block(&from->newest_vectors, from->newest, from->buffer);
  const int64_t bytes = mpq_block_bytes(from->vectors);
  return open_block(from->vectors, mpq_find_block(&from->slab, &from->before, block, from->key_head, bytes), from->buffer);
}

INLINE void prepare_queries(const mpq_attention_part *part, attention_state *state) {
  const mpq_attention *call = part->call;
  const int64_t group = call->heads / call->key_heads, width = call->keys->width, padded = mpq_padded_width(call->keys);
  const float *from = part->sequence->q + part->key_head * group * width;
  float *q = (float *)part->memory, *scale = q + group * padded;
  int32_t *sums = (int32_t *)(scale + group);
  uint8_t *integers = (uint8_t *)(sums + group * (padded / 16)), *levels = integers + 2 * group * padded;
  for (int64_t i = 0; i < group; i++) {
    float *row = q + i * padded;
    memset(row, 0, padded * sizeof *row);
    memcpy(row, from + i * width, width * sizeof *row);
    if (call->keys->weight && !call->keys->by_column)
      scale[i] = call->scale * to_integers(row, padded, call->planes, 16, integers + i * padded * PLANES_BYTES(call->planes),
                                           sums + i * (padded / 16));
    else
      for (int64_t j = 0; j < width; j++) row[j] *= call->scale;
  }
  levels += -(uintptr_t)levels & 63;
  *state = (attention_state){part, q, {integers, scale, sums}, {levels, levels + BLOCK * padded}};
}

/* Block scales of floats: scores and probabilities are multiplied by their tokens'. */
INLINE void scale_tokens(const mpq_vectors *vectors, const uint8_t *block, const int count, const float *from, float *to) {
  for (int j = 0; j < BLOCK; j += 16) {
    vfloat scale;
    load_scales_out(vectors->scale_kind, block + j * vectors->scale_bytes, &scale);
    for (int i = 0; i < count; i++) STORE(to + i * BLOCK + j, LOAD(vfloat, from + i * BLOCK + j) * scale);
  }
}

#define EACH_ELEMENT(function, ...) \
  switch (element) { \
    case MPQ_SCALE_FP32: function(__VA_ARGS__, MPQ_SCALE_FP32, count, out); break; \
    case MPQ_SCALE_FP16: function(__VA_ARGS__, MPQ_SCALE_FP16, count, out); break; \
    case MPQ_SCALE_BF16: function(__VA_ARGS__, MPQ_SCALE_BF16, count, out); break; \
    default: function(__VA_ARGS__, MPQ_SCALE_E4M3, count, out); \
  }

INLINE void score_block(const attention_state *state, const cache_block *keys, int first, int last, int64_t head,
                        const int count, float *out) {
  const mpq_vectors *vectors = keys->vectors;
  if (vectors->weight) {
    const block_scales scales = scales_of(vectors, keys->scales);
    const uint8_t *ahead = head ? NULL : keys->ahead;
    if (vectors->by_column)
      score_by_column(&scales, keys->levels, ahead, state->q + head * mpq_padded_width(vectors), count, out);
    else if (state->part->call->planes == 2)
      score_codes(&scales, keys->levels, ahead, &state->integers, head, count, 2, out);
    else
      score_codes(&scales, keys->levels, ahead, &state->integers, head, count, 1, out);
    return;
  }
  const int element = vectors->element;
  const float *q = state->q + head * mpq_padded_width(vectors);
  EACH_ELEMENT(score_floats, vectors, keys->levels, first, last, q)
  if (vectors->scale_bytes) scale_tokens(vectors, keys->scales, count, out, out);
}

INLINE void mix_block(const attention_state *state, const cache_block *values, int first, int last, const vint32 *valid,
                      const float *p, const float *decay, int64_t head, const int count) {
  const mpq_vectors *vectors = values->vectors;
  float *out = state->part->mixed + head * mpq_padded_width(vectors), scaled[4 * BLOCK];
  if (vectors->weight) {
    const block_scales scales = scales_of(vectors, values->scales);
    const uint8_t *ahead = head ? NULL : values->ahead;
    if (vectors->by_column) mix_by_column(&scales, values->levels, ahead, p, decay, count, out);
    else mix_codes(&scales, values->levels, ahead, valid, p, decay, count, out);
    return;
  }
  const int element = vectors->element;
  if (vectors->scale_bytes) scale_tokens(vectors, values->scales, count, p, scaled), p = scaled;
  EACH_ELEMENT(mix_floats, vectors, values->levels, first, last, p, decay)
}

/* Floats as integers of the same order, and back. */
INLINE vint32 ordered(vint32 bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

/* The softmax numerators of a block's tokens in place of their scores; returns how much the sums so far shrink. */
INLINE float update_softmax(float *scores, const vint32 *valid, float *largest, float *total) {
  const vint32 none = (vint32){0} + INT32_MIN;
  vint32 most = none;
  vfloat sum = {0};
  for (int j = 0; j < 4; j++) most = larger(most, (ordered(LOAD(vint32, scores + 16 * j)) & valid[j]) | (none & ~valid[j]));
  int32_t bits = integer_max16(most);
  bits ^= (bits >> 31) & 0x7fffffff;
  const float block = LOAD(float, &bits), top = block > *largest ? block : *largest; /* NaN compares below all */
  for (int j = 0; j < 4; j++) {
    const vfloat p = (vfloat)((vint32)exponential(LOAD(vfloat, scores + 16 * j) - top) & valid[j]);
    STORE(scores + 16 * j, p);
    sum += p;
  }
  float decay = 1;
  if (top > *largest) decay = *largest == -__builtin_inff() ? 0 : exponential((vfloat){0} + (*largest - top))[0];
  *largest = top;
  *total = *total * decay + sum16(sum);
  return decay;
}

INLINE void attend_heads(const attention_state *state, const cache_block *keys, const cache_block *values, int first, int last,
                         const vint32 *valid, int64_t head, const int count) {
  float scores[4 * BLOCK] __attribute__((aligned(64))), decay[4];
  score_block(state, keys, first, last, head, count, scores);
  for (int i = 0; i < count; i++)
    decay[i] = update_softmax(scores + i * BLOCK, valid, state->part->largest + head + i, state->part->total + head + i);
  mix_block(state, values, first, last, valid, scores, decay, head, count);
}

static TARGET void attend_four(const attention_state *state, const cache_block *keys, const cache_block *values, int first,
                               int last, const vint32 *valid, int64_t head) {
  attend_heads(state, keys, values, first, last, valid, head, 4);
}

static TARGET void attend_two(const attention_state *state, const cache_block *keys, const cache_block *values, int first,
                              int last, const vint32 *valid, int64_t head) {
  attend_heads(state, keys, values, first, last, valid, head, 2);
}

static TARGET void attend_one(const attention_state *state, const cache_block *keys, const cache_block *values, int first,
                              int last, const vint32 *valid, int64_t head) {
  attend_heads(state, keys, values, first, last, valid, head, 1);
}

static TARGET void attend(const void *argument) {
  const mpq_attention_part *part = argument;
  const mpq_attention *call = part->call;
  const int64_t group = call->heads / call->key_heads, padded = mpq_padded_width(call->values);
  const vint32 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  attention_state state;
  prepare_queries(part, &state);
  cache_stream keys = stream_of(part, call->keys, part->sequence->keys, state.levels[0]);
  cache_stream values = stream_of(part, call->values, part->sequence->values, state.levels[1]);
  for (int64_t i = 0; i < group; i++) part->largest[i] = -__builtin_inff(), part->total[i] = 0;
  memset(part->mixed, 0, group * padded * sizeof(float));
  for (int64_t token = part->first; token < part->last;) {
    const int64_t block = token / BLOCK, start = block * BLOCK, end = start + BLOCK < part->last ? start + BLOCK : part->last;
    const int first = (int)(token - start), last = (int)(end - start);
    vint32 valid[4];
    for (int i = 0; i < 4; i++) valid[i] = (lanes + 16 * i >= first) & (lanes + 16 * i < last);
    const cache_block key_block = block_of(&keys, block), value_block = block_of(&values, block);
    int64_t head = 0;
    for (; head + 4 <= group; head += 4) attend_four(&state, &key_block, &value_block, first, last, valid, head);
    for (; head + 2 <= group; head += 2) attend_two(&state, &key_block, &value_block, first, last, valid, head);
    if (head < group) attend_one(&state, &key_block, &value_block, first, last, valid, head);
    token = end;
  }
}
#endif
