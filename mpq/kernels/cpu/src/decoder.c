/* One token through a LLaMA-style decoder in one call: float32 between the packed products, keys and values in
 * formats of their own. The thread team starts once for the token and spins between products. */
#include <math.h>

#include "numbers.h"
#include "threads.h"

typedef struct {
  const mpq_decoder *decoder;
  const mpq_token *token;
  int64_t status;
} token_step;

static int64_t round_up16(int64_t count) { return (count + 15) / 16 * 16; }

/* Nonzero ends the step. */
static int linear_layer(token_step *step, const mpq_layer *layer, const float *x, void *out, int is_bf16) {
  const mpq_decoder *decoder = step->decoder;
  const mpq_weight *weights[MPQ_MAX_PARTS];
  mpq_call calls[MPQ_MAX_PARTS];
  for (int i = 0; i < layer->count; i++) {
    const mpq_part *part = layer->parts + i;
    weights[i] = part->weight;
    calls[i] = (mpq_call){
        .panels = part->panels, .tensor_scale = part->tensor_scale, .places = part->places, .x = x, .tokens = 1,
        .stride = part->weight->cols, .bias = layer->bias, .out = out, .bias_is_bf16 = layer->bias_is_bf16,
        .out_is_bf16 = is_bf16, .planes = layer->planes, .threads = (int)step->token->threads, .level = decoder->level,
        .parallel = team_parallel,
    };
  }
  return layer->count && (step->status = mpq_linear_parts(weights, calls, layer->count)) != 0;
}

static void rotate(const token_step *step, float *x, int64_t heads) {
  const int64_t width = step->decoder->head_width, half = width / 2;
  const void *cos = step->token->cos, *sin = step->token->sin;
  const int is_bf16 = step->decoder->is_bf16;
  for (int64_t head = 0; head < heads; head++, x += width)
    for (int64_t i = 0; i < half; i++) {
      const float first = x[i], second = x[i + half];
      x[i] = first * load_float(cos, is_bf16, i) + second * load_float(sin, is_bf16, i);
      x[i + half] = second * load_float(cos, is_bf16, i + half) + first * load_float(sin, is_bf16, i + half);
    }
}

/* Append the token to its block's cache and attend to it. Nonzero ends the step. */
static int attend(token_step *step, int64_t block, float *q, float *k, const float *v, float *out) {
  const mpq_decoder *decoder = step->decoder;
  const mpq_token *token = step->token;
  const mpq_block_cache *cache = token->caches + block;
  const mpq_append key = {.vectors = cache->keys, .slabs = cache->key_slabs, .x = k, .head_stride = decoder->head_width,
                          .heads = decoder->key_heads, .tokens = 1, .position = token->position, .threads = 1};
  mpq_append value = key;
  value.vectors = cache->values, value.slabs = cache->value_slabs, value.x = v, value.values = 1;
  rotate(step, q, decoder->heads);
  rotate(step, k, decoder->key_heads);
  mpq_append_tokens(&key, 1);
  mpq_append_tokens(&value, 1);
  const mpq_sequence sequence = {q, out, cache->key_slabs, cache->value_slabs, token->position + 1};
  const mpq_attention attention = {
      .keys = cache->keys, .values = cache->values, .sequences = &sequence, .count = 1, .heads = decoder->heads,
      .key_heads = decoder->key_heads, .scale = 1 / sqrtf(decoder->head_width), .planes = 2, .threads = (int)token->threads,
      .level = decoder->level, .parallel = team_parallel,
  };
  return (step->status = mpq_attend(&attention)) != 0;
}

static void add_residual(float *x, const float *y, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

static void run_step(void *argument) {
  token_step *step = argument;
  const mpq_decoder *decoder = step->decoder;
  const mpq_decoder_ops *ops = mpq_levels[decoder->level]->decoder_ops;
  const int64_t width = decoder->width, hidden = round_up16(decoder->hidden);
  const int64_t q_rows = decoder->heads * decoder->head_width, k_rows = decoder->key_heads * decoder->head_width;
  const int64_t both = round_up16(q_rows) + round_up16(k_rows), most = hidden > both ? hidden : both;
  float *x = scratch(SCRATCH_DECODER, (2 * round_up16(width) + 3 * most) * sizeof(float));
  if (!x) { step->status = -1; return; }
  float *h = x + round_up16(width), *first = h + round_up16(width);
  float *k = first + round_up16(q_rows), *v = k + round_up16(k_rows);
  float *mixed = first + 2 * most, *second = first + hidden;
  for (int64_t i = 0; i < width; i++) x[i] = load_float(step->token->x, decoder->is_bf16, i);
  for (int64_t i = 0; i < decoder->count; i++) {
    const mpq_block *block = decoder->blocks + i;
    ops->normalize(x, block->attention_norm, decoder->epsilon, width, h);
    if (linear_layer(step, &block->q, h, first, 0) || linear_layer(step, &block->k, h, k, 0) ||
        linear_layer(step, &block->v, h, v, 0))
      return;
    if (attend(step, i, first, k, v, mixed)) return;
    if (linear_layer(step, &block->o, mixed, h, 0)) return;
    add_residual(x, h, width);
    ops->normalize(x, block->mlp_norm, decoder->epsilon, width, h);
    if (linear_layer(step, &block->gate, h, first, 0) || linear_layer(step, &block->up, h, second, 0)) return;
    ops->activate(first, second, hidden);
    if (linear_layer(step, &block->down, first, h, 0)) return;
    add_residual(x, h, width);
  }
  ops->normalize(x, decoder->norm, decoder->epsilon, width, h);
  linear_layer(step, &decoder->head, h, step->token->logits, decoder->is_bf16);
}

int64_t mpq_step(const mpq_decoder *decoder, const mpq_token *token) {
  token_step step = {.decoder = decoder, .token = token};
  run_team(decoder->parallel, run_step, &step, (int)token->threads);
  return step.status;
}
