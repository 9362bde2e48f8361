/* Attention of one token to its cache: each key head's tokens are cut into parts, which threads share. The cut
 * depends on the length alone, and parts are merged in their order: the same bits whatever the number of threads. */
#include "attention.h"

#include "level/exponential.h"
#include "threads.h"

#define MAX_PARTS 16
#define MIN_PART_BLOCKS 4

typedef struct {
  const mpq_attention *call;
  int64_t parts;       /* of the longest sequence */
  int64_t part_floats; /* of a part's results: largest, total, mixed */
  float *results;      /* (sequences, key heads, parts, part_floats) */
  atomic_int *done;    /* (sequences, key heads) parts */
  work_ranges ranges;
  atomic_int failed;
} attention_job;

/* The blocks seen, from the first of the window on, and how many of them a part has. */
typedef struct {
  int64_t first_token, first_block, blocks, part_blocks, parts;
} partition;

static partition cut(const mpq_attention *call, const mpq_sequence *sequence) {
  partition cut = {.first_token = call->window && call->window < sequence->length ? sequence->length - call->window : 0};
  cut.first_block = cut.first_token / BLOCK;
  cut.blocks = (sequence->length + BLOCK - 1) / BLOCK - cut.first_block;
  cut.part_blocks = (cut.blocks + MAX_PARTS - 1) / MAX_PARTS;
  if (cut.part_blocks < MIN_PART_BLOCKS) cut.part_blocks = MIN_PART_BLOCKS;
  cut.parts = (cut.blocks + cut.part_blocks - 1) / cut.part_blocks;
  return cut;
}

/* exp(score - largest), the first of which may be minus infinity. */
static float numerator(float score, float largest) {
  return score == -__builtin_inff() ? 0 : exponential((vfloat){0} + (score - largest))[0];
}

static mpq_attention_part results_of(const attention_job *job, int64_t unit, uint8_t *memory) {
  const mpq_attention *call = job->call;
  const int64_t group = call->heads / call->key_heads;
  float *results = job->results + unit * job->part_floats;
  return (mpq_attention_part){.call = call, .largest = results, .total = results + group, .mixed = results + 2 * group,
                              .memory = memory};
}

/* out = the softmax over all parts, starting with the unit `first`. */
static void merge(const attention_job *job, int64_t first, int64_t parts, int64_t key_head, const mpq_sequence *sequence) {
  const mpq_attention *call = job->call;
  const int64_t group = call->heads / call->key_heads, width = call->values->width, padded = mpq_padded_width(call->values);
  for (int64_t i = 0; i < group; i++) {
    const int64_t head = key_head * group + i;
    float *out = sequence->out + head * width, largest = call->sinks ? call->sinks[head] : -__builtin_inff(), total = 0;
    for (int64_t part = 0; part < parts; part++) {
      const float own = results_of(job, first + part, NULL).largest[i];
      if (own > largest) largest = own;
    }
    if (call->sinks) total = numerator(call->sinks[head], largest);
    for (int64_t j = 0; j < width; j++) out[j] = 0;
    for (int64_t part = 0; part < parts; part++) {
      const mpq_attention_part one = results_of(job, first + part, NULL);
      const float weight = parts == 1 && !call->sinks ? 1 : numerator(one.largest[i], largest);
      total += weight * one.total[i];
      for (int64_t j = 0; j < width; j++) out[j] += weight * one.mixed[i * padded + j];
    }
    for (int64_t j = 0; j < width; j++) out[j] /= total;
  }
}

static void attend_parts(void *argument) {
  attention_job *job = argument;
  const mpq_attention *call = job->call;
  uint8_t *memory = scratch(SCRATCH_SCORES, mpq_attention_memory(call));
  if (!memory) { atomic_store(&job->failed, 1); return; }
  int own = join_range(&job->ranges);
  for (work_item item; take_item(&job->ranges, &own, &item);) {
    const int64_t row = item.start / job->parts, index = item.start % job->parts;
    const mpq_sequence *sequence = call->sequences + row / call->key_heads;
    const partition parts = cut(call, sequence);
    if (index >= parts.parts) continue;
    mpq_attention_part part = results_of(job, item.start, memory);
    const int64_t first = (parts.first_block + index * parts.part_blocks) * BLOCK;
    const int64_t last = first + parts.part_blocks * BLOCK;
    part.sequence = sequence, part.key_head = row % call->key_heads;
    part.first = first > parts.first_token ? first : parts.first_token;
    part.last = last < sequence->length ? last : sequence->length;
    mpq_levels[call->level]->decoder_ops->attend(&part);
    if (atomic_fetch_add(&job->done[row], 1) + 1 == parts.parts)
      merge(job, row * job->parts, parts.parts, part.key_head, sequence);
  }
}

int64_t mpq_attend(const mpq_attention *call) {
  attention_job job = {.call = call};
  int64_t blocks = 0;
  for (int64_t i = 0; i < call->count; i++) {
    const partition parts = cut(call, call->sequences + i);
    if (parts.parts > job.parts) job.parts = parts.parts;
    blocks += parts.blocks;
  }
  if (!blocks) return 0;
  const int64_t group = call->heads / call->key_heads, rows = call->count * call->key_heads;
  job.part_floats = group * (2 + mpq_padded_width(call->values));
  const size_t results = rows * job.parts * job.part_floats * sizeof(float);
  uint8_t *memory = scratch(SCRATCH_ATTENTION, results + rows * sizeof(atomic_int));
  if (!memory) return -1;
  job.results = (float *)memory, job.done = (atomic_int *)(memory + results);
  for (int64_t i = 0; i < rows; i++) atomic_init(&job.done[i], 0);
  const int few = blocks * call->heads * call->keys->width < 1 << 9; /* a few microseconds */
  share_work(few ? 1 : call->threads, call->parallel, attend_parts, &job, &job.ranges, rows * job.parts, 1);
  return atomic_load(&job.failed) ? -1 : 0;
}
