/* y = x W^T: quantize the activations once, then decode each panel tile by tile and multiply it while it is in
 * cache. */
#include "level/common.h"
#include "numbers.h"
#include "planner.h"
#include "threads.h"

typedef struct {
  const mpq_weight *weight;
  const mpq_call *call;
  const mpq_images *images; /* NULL: tokens are rows of x */
  const mpq_level *level;
  mpq_activation x; /* shared by all threads; with quantize_per_thread only its sizes are */
  int64_t first;    /* token that the chunk starts with */
  int8_t *skipped;  /* of the chunk */
  mpq_plan plan;
  work_ranges ranges;
  atomic_int failed;
} linear_job;

#define GATHER(type)                                                                                  \
  do {                                                                                                \
    const type *from = (const type *)call->x + at;                                                    \
    type *to = (type *)patch + place;                                                                 \
    for (int64_t channel = 0; channel < images->channels; channel++, from += images->steps[1], to += area)  \
      *to = *from;                                                                                          \
  } while (0)

/* Gather the inputs of one output position, in the order of the weight's columns. */
static void gather_patch(const mpq_call *call, const mpq_images *images, int64_t position, void *patch) {
  const int64_t horizontal = position % images->out[1], vertical = position / images->out[1] % images->out[0];
  const int64_t image = position / images->out[1] / images->out[0], area = images->kernel[0] * images->kernel[1];
  const int64_t top = vertical * images->stride[0] - images->padding[0];
  const int64_t left = horizontal * images->stride[1] - images->padding[1];
  memset(patch, 0, images->channels * area * (call->x_is_bf16 ? 2 : 4));
  for (int64_t place = 0; place < area; place++) {
    const int64_t line = top + place / images->kernel[1] * images->dilation[0];
    const int64_t column = left + place % images->kernel[1] * images->dilation[1];
    if (line < 0 || line >= images->size[0] || column < 0 || column >= images->size[1]) continue;
    const int64_t at = image * images->steps[0] + line * images->steps[2] + column * images->steps[3];
    if (call->x_is_bf16) GATHER(uint16_t);
    else GATHER(float);
  }
}

/* Zero a skipped token's sums and scales, which the products still read. */
static void clear_token(const mpq_weight *weight, mpq_activation *x, int64_t token) {
  const int64_t stride = x->path == PATH_AMX_INT8 ? mpq_padded_tokens(x->tokens) : x->tokens;
  for (int64_t i = 0; i < (int64_t)weight->tiles * weight->segments * x->planes; i++) x->sums[i * stride + token] = 0;
  for (int64_t tile = 0; tile < weight->tiles; tile++) x->scale[tile * stride + token] = 0;
}

static void quantize_token(const linear_job *work, mpq_activation *x, int64_t token, void *patch, int8_t *skipped) {
  const mpq_call *call = work->call;
  const char *rows = (const char *)call->x + work->first * call->stride * (call->x_is_bf16 ? 2 : 4);
  if (patch) gather_patch(call, work->images, work->first + token, patch);
  work->level->quantize(work->weight, x, patch ? patch : rows, call->x_is_bf16, patch ? 0 : call->stride, token, skipped);
  if (skipped[token] && x->sums) clear_token(work->weight, x, token);
}

static void quantize_tokens(void *argument) {
  linear_job *work = argument;
  void *patch = work->images ? scratch(SCRATCH_PATCH, work->weight->cols * 4) : NULL;
  if (work->images && !patch) { atomic_store(&work->failed, 1); return; }
  int own = join_range(&work->ranges);
  for (work_item tokens; take_item(&work->ranges, &own, &tokens);)
    quantize_token(work, &work->x, tokens.start, patch, work->skipped);
}

static const uint8_t *row_scales(const linear_job *work, int64_t panel) {
  const mpq_weight *weight = work->weight;
  if (!weight->row_scales) return NULL;
  return work->call->panels + panel * weight->panel_bytes + weight->tiles * mpq_code_bytes(weight);
}

static void write_output(const linear_job *work, const mpq_activation *x, int64_t panel, int64_t token, int64_t last,
                         float *sums) {
  const mpq_call *call = work->call;
  const mpq_weight *weight = work->weight;
  const int64_t row = panel * PANEL_ROWS, left = weight->rows - row, count = left < PANEL_ROWS ? left : PANEL_ROWS;
  float bias[PANEL_ROWS] = {0}, scale[PANEL_ROWS];
  const int64_t *places = call->places ? call->places + row : NULL;
  if (call->bias)
    for (int64_t i = 0; i < count; i++) bias[i] = load_float(call->bias, call->bias_is_bf16, places ? places[i] : row + i);
  const uint8_t *scales = row_scales(work, panel);
  for (int i = 0; i < PANEL_ROWS; i += 16)
    STORE(scale + i, scales ? load_scales(weight->scale_kind, scales, i) * weight->factor : (vfloat){0} + weight->factor);
  for (; token < last; token++) {
    float *from = sums + token * PANEL_ROWS;
    const int64_t start = (work->first + token) * call->out_stride, at = start + row;
    if (x->bf16) { /* row scales and token scales are applied here */
      const float own = x->scale ? x->scale[token] : 1;
      for (int i = 0; i < PANEL_ROWS; i++) from[i] *= scale[i] * own;
    }
    if (places)
      for (int64_t i = 0; i < count; i++) store_float(call->out, call->out_is_bf16, start + places[i], from[i] + bias[i]);
    else if (call->out_is_bf16)
      for (int64_t i = 0; i < count; i++) ((uint16_t *)call->out)[at + i] = to_bf16(from[i] + bias[i]);
    else
      for (int64_t i = 0; i < count; i++) ((float *)call->out)[at + i] = from[i] + bias[i];
  }
}

/* Decode tile `index` of a panel into `out`. */
static void decode_tile(const linear_job *work, int64_t panel, int64_t index, mpq_tile *tile, uint8_t *out) {
  const mpq_weight *weight = work->weight;
  const size_t codes = mpq_code_bytes(weight), scales = (size_t)weight->segments * PANEL_ROWS * weight->scale_bytes;
  const size_t zeros = weight->zeros ? (size_t)weight->segments * PANEL_ROWS : 0;
  const size_t bytes = codes + (weight->row_scales ? 0 : scales + zeros);
  const uint8_t *stream = work->call->panels + panel * weight->panel_bytes + index * bytes;
  tile->index = index, tile->bytes = bytes, tile->prefetch = stream + work->plan.run * bytes;
  tile->scales = weight->row_scales ? row_scales(work, panel) : stream;
  tile->zeros = weight->zeros ? tile->scales + scales : NULL;
  if (!weight->row_scales) stream += scales + zeros;
  work->level->decode(weight, stream, work->plan.form, tile, out);
}

/* Allocate a chunk's activations in one scratch buffer; 0 if out of memory. */
static int allocate_activations(const linear_job *work, mpq_activation *x) {
  const mpq_weight *weight = work->weight;
  const int64_t tokens = x->tokens;
  const int planes = work->call->planes, bf16 = work->plan.path == PATH_AMX_BF16;
  const int integers = weight->kind != MPQ_TABLE_BF16 && (!bf16 || planes == 1);
  const int64_t padded = mpq_padded_tokens(tokens);
  const size_t elements = weight->tiles * mpq_bf16_columns(weight) * padded;
  const size_t scales = (weight->tiles * padded * 4 + 63) & ~(size_t)63;
  const size_t sums = (weight->tiles * weight->segments * planes * padded * 4 + 63) & ~(size_t)63;
  uint8_t *memory = scratch(SCRATCH_ACTIVATIONS, scales + sums + 4 * elements + 64);
  if (!memory) return 0;
  x->planes = planes;
  if (integers) x->scale = (float *)memory, x->sums = (int32_t *)(memory + scales);
  memory += scales + sums;
  if (bf16) x->bf16 = (uint16_t *)memory, x->planes = integers || work->call->x_is_bf16 ? 1 : 2;
  else if (integers) x->q = (int8_t *)memory, x->q16 = (int16_t *)memory;
  else x->fp32 = (float *)memory;
  for (int64_t tile = 0; x->path == PATH_AMX_INT8 && tile < weight->tiles; tile++)
    memset(x->scale + tile * padded + tokens, 0, (padded - tokens) * 4); /* padding tokens contribute nothing */
  return 1;
}

/* Quantize per thread; cheaper than a barrier. */
static int quantize_per_thread(const linear_job *work, mpq_activation *x, int first) {
  int8_t skipped[SHARED_QUANTIZE_MIN_TOKENS];
  if (!allocate_activations(work, x)) return 0;
  for (int64_t token = 0; token < x->tokens; token++) quantize_token(work, x, token, NULL, skipped);
  if (first) memcpy(work->skipped, skipped, x->tokens);
  return 1;
}

/* Compute this thread's share, with activations that it has quantized before, or NULL. Returns those it used. */
static mpq_activation multiply_share(linear_job *work, const mpq_activation *quantized) {
  const mpq_level *level = work->level;
  const mpq_plan *plan = &work->plan;
  const int64_t tokens = work->x.tokens, tiles = work->weight->tiles;
  uint8_t *decoded = scratch(SCRATCH_DECODED, plan->block * plan->run * plan->tile_bytes + 64);
  const int64_t padded = mpq_padded_tokens(tokens);
  float *sums = scratch(SCRATCH_SUMS, plan->block * padded * PANEL_ROWS * sizeof(float));
  mpq_tile decoded_tiles[BLOCK_PANELS * RUN_TILES];
  mpq_activation x = quantized ? *quantized : work->x;
  int own = join_range(&work->ranges);
  const int quantizes = plan->quantize_per_thread && !quantized;
  if (!decoded || !sums || (quantizes && !quantize_per_thread(work, &x, own == 0))) {
    atomic_store(&work->failed, 1);
    return x;
  }
  if (level->begin) level->begin();
  for (work_item units; take_item(&work->ranges, &own, &units);) {
    const int64_t split = units.start / plan->panels, before = split * plan->panels;
    const int64_t first = plan->splits > 1 ? split * BLOCK_TOKENS : 0;
    const int64_t last = plan->splits > 1 && first + BLOCK_TOKENS < tokens ? first + BLOCK_TOKENS : tokens;
    int panels = 0;
    for (int64_t unit = units.start; unit < units.end && panels < plan->block; unit += units.step, panels++)
      memset(sums + (panels * padded + first) * PANEL_ROWS, 0, (mpq_padded_tokens(last) - first) * PANEL_ROWS * sizeof(float));
    for (int64_t index = 0; index < tiles; index += plan->run) {
      const int run = tiles - index < plan->run ? (int)(tiles - index) : plan->run;
      for (int panel = 0; panel < panels; panel++)
        for (int i = 0; i < run; i++) {
          const int64_t slot = panel * plan->run + i;
          decode_tile(work, units.start - before + panel * units.step, index + i, &decoded_tiles[slot],
                      decoded + slot * plan->tile_bytes);
        }
      for (int panel = 0; panel < panels; panel++)
        level->multiply(work->weight, decoded_tiles + panel * plan->run, run, &x, first, last,
                        sums + panel * padded * PANEL_ROWS);
    }
    for (int panel = 0; panel < panels; panel++)
      write_output(work, &x, units.start - before + panel * units.step, first, last, sums + panel * padded * PANEL_ROWS);
  }
  if (level->end) level->end();
  return x;
}

static void multiply_panels(void *argument) { multiply_share(argument, NULL); }

/* A weight as a call computes with it. */
static mpq_weight weight_of(const mpq_weight *given, const mpq_call *call) {
  mpq_weight own = *given;
  if (call->tensor_scale) own.factor *= *call->tensor_scale;
  if (call->x_is_bf16 && call->planes == 2) own.bf16_terms = 1; /* activations have bf16 precision: weights need no more */
  return own;
}

static void begin_chunk(linear_job *work, const mpq_weight *weight, const mpq_call *call, const mpq_images *images,
                        int64_t first, int64_t tokens, int8_t *skipped) {
  work->weight = weight, work->call = call, work->images = images, work->level = mpq_levels[call->level];
  work->first = first, work->skipped = skipped;
  work->plan = mpq_plan_chunk(weight, call, tokens, images != NULL);
  work->x = (mpq_activation){.tokens = tokens, .path = work->plan.path};
  atomic_store(&work->failed, 0);
}

static int64_t count_skipped(const linear_job *work) {
  int64_t skipped = 0;
  for (int64_t i = 0; i < work->x.tokens; i++) skipped += work->skipped[i];
  return skipped;
}

/* Whether two parts' activations of the same tokens are the same numbers in the same order. */
static int same_activations(const linear_job *one, const linear_job *other) {
  const mpq_weight *a = one->weight, *b = other->weight;
  return one->plan.path == other->plan.path && a->tiles == b->tiles && a->segments == b->segments && a->segment == b->segment &&
         (a->kind == MPQ_TABLE_BF16) == (b->kind == MPQ_TABLE_BF16);
}

/* Calls of the same tokens, chunk by chunk; parts that cut their columns alike share the quantized activations. */
static int64_t multiply(const mpq_weight *weights, const mpq_call *calls, int64_t count, const mpq_images *images) {
  int64_t skipped = 0;
  linear_job jobs[2], *work = &jobs[0], *last = &jobs[1];
  for (int64_t first = 0; first < calls->tokens; first += CHUNK_TOKENS) {
    const int64_t tokens = calls->tokens - first < CHUNK_TOKENS ? calls->tokens - first : CHUNK_TOKENS;
    int8_t *skips = calls->skipped ? calls->skipped + first : scratch(SCRATCH_SKIPPED, CHUNK_TOKENS);
    if (!skips) return -1;
    for (int64_t i = 0; i < count; i++) {
      begin_chunk(work, &weights[i], &calls[i], images, first, tokens, skips);
      if (i && !work->plan.quantize_per_thread && same_activations(work, last)) work->x = last->x;
      else if (!work->plan.quantize_per_thread) {
        if (!allocate_activations(work, &work->x)) return -1;
        share_work(calls->threads, calls->parallel, quantize_tokens, work, &work->ranges, tokens, 1);
        if (atomic_load(&work->failed)) return -1;
      }
      share_work(calls->threads, calls->parallel, multiply_panels, work, &work->ranges,
                 work->plan.panels * work->plan.splits, work->plan.block);
      if (atomic_load(&work->failed)) return -1;
      linear_job *done = work;
      work = last, last = done;
    }
    skipped += count_skipped(last);
  }
  return skipped;
}

static int64_t multiply_one(const mpq_weight *given, const mpq_call *call, const mpq_images *images) {
  const mpq_weight weight = weight_of(given, call);
  return multiply(&weight, call, 1, images);
}

int64_t mpq_linear(const mpq_weight *weight, const mpq_call *call) { return multiply_one(weight, call, NULL); }

int64_t mpq_conv(const mpq_weight *weight, const mpq_call *call, const mpq_images *images) {
  return multiply_one(weight, call, images);
}

typedef struct {
  linear_job *jobs;
  int64_t count, threads;
  atomic_int arrived;
} parts_job;

/* Threads begin with different parts: short codes keep the arithmetic busy, long ones the memory. */
static void multiply_parts(void *argument) {
  parts_job *all = argument;
  const int64_t start = atomic_fetch_add(&all->arrived, 1) % all->threads * all->count / all->threads;
  const linear_job *last = NULL;
  mpq_activation x;
  for (int64_t i = 0; i < all->count; i++) {
    linear_job *job = &all->jobs[(start + i) % all->count];
    if (last && atomic_load(&last->failed)) return;
    x = multiply_share(job, last && same_activations(job, last) ? &x : NULL);
    last = job;
  }
}

int64_t mpq_linear_parts(const mpq_weight *const *given, const mpq_call *calls, int64_t count) {
  int64_t skipped = 0, units = 0;
  mpq_weight weights[MPQ_MAX_PARTS];
  if (count > MPQ_MAX_PARTS) return -1;
  for (int64_t i = 0; i < count; i++) weights[i] = weight_of(given[i], &calls[i]);
  if (calls->skipped || calls->tokens >= SHARED_QUANTIZE_MIN_TOKENS) return multiply(weights, calls, count, NULL);
  int8_t *skips = scratch(SCRATCH_SKIPPED, CHUNK_TOKENS);
  const int threads = calls->threads < MAX_THREADS ? calls->threads : MAX_THREADS;
  parts_job all = {.jobs = scratch(SCRATCH_PARTS, count * sizeof(linear_job)), .count = count, .threads = threads};
  if (!skips || !all.jobs) return -1;
  for (int64_t i = 0; i < count; i++) {
    linear_job *job = &all.jobs[i];
    begin_chunk(job, &weights[i], &calls[i], NULL, 0, calls->tokens, skips + i * SHARED_QUANTIZE_MIN_TOKENS);
    if (i && same_activations(job, job - 1)) job->skipped = job[-1].skipped;
    open_work(&job->ranges, threads, job->plan.panels * job->plan.splits, job->plan.block);
    units += job->plan.panels * job->plan.splits;
  }
  run_on_threads(calls->parallel, multiply_parts, &all, threads < units ? threads : (int)units);
  for (int64_t i = 0; i < count; i++) {
    const int64_t own = count_skipped(&all.jobs[i]);
    if (atomic_load(&all.jobs[i].failed)) return -1;
    if (own > skipped) skipped = own;
  }
  return skipped;
}
