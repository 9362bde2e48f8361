/* One token through a decoder of LLaMA's kind in one call: float32 between the packed products, keys and values in the
 * model's own type. A team of threads is woken once for the token and waits for each product in a loop of its own. */
#include <sched.h>

typedef struct {
  atomic_int state; /* odd while a job is open, -1 at the end */
  atomic_int inside, arrived;
  unsigned wanted;
  void (*function)(void *);
  void *work;
  void (*program)(void *); /* what the first thread runs */
  void *argument;
} team;

static _Thread_local team *own_team;

static void wait_a_little(int *turns) {
#ifdef MPQ_X86
  __builtin_ia32_pause();
#endif
  if (++*turns % 4096 == 0) sched_yield(); /* there may be fewer processors than threads */
}

/* mpq_parallel for a job of the team: who comes too late is not waited for. */
static void share_job(void (*function)(void *), void *work, unsigned threads, unsigned flags) {
  team *all = own_team;
  int turns = 0;
  (void)flags;
  all->function = function, all->work = work, all->wanted = threads;
  atomic_fetch_add(&all->state, 1);
  function(work);
  atomic_fetch_add(&all->state, 1);
  while (atomic_load(&all->inside)) wait_a_little(&turns);
}

static void join_team(void *argument) {
  team *all = argument;
  if (own_team == all) { /* who called */
    all->program(all->argument);
    atomic_store(&all->state, -1);
    return;
  }
  const unsigned index = 1 + atomic_fetch_add(&all->arrived, 1);
  int turns = 0;
  for (int state, last = 0; (state = atomic_load(&all->state)) >= 0; ) {
    if (state % 2 == 0 || state == last) { wait_a_little(&turns); continue; }
    atomic_fetch_add(&all->inside, 1);
    if (atomic_load(&all->state) == state && index < all->wanted) all->function(all->work);
    atomic_fetch_sub(&all->inside, 1);
    last = state, turns = 0;
  }
}

typedef struct {
  const mpq_weight *weight; /* NULL: its rows are computed with those of the layer before */
  const uint8_t *panels;
  const float *tensor_scale; /* or NULL */
  const void *bias;          /* or NULL */
  int32_t bias_bfloat, planes;
} mpq_layer;

typedef struct {
  mpq_layer q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm;
} mpq_block;

typedef struct {
  const mpq_block *blocks;
  int64_t count, width, hidden, heads, key_heads, head_width; /* blocks; numbers */
  float epsilon;
  int32_t bfloat, level; /* whether the model's type is bfloat16 and not float32 */
  mpq_parallel parallel;
  mpq_layer head;
  const float *norm;
} mpq_decoder;

/* A token and the ones before it, all in the model's type. */
typedef struct {
  const void *x;         /* (width,) its embedding */
  const void *cos, *sin; /* (head width,) of its position; the first half of the sines is negative */
  void *logits;          /* (rows of the head,) */
  void *const *past;     /* (key heads, capacity, head width) keys of each block, then values of each */
  int64_t position, capacity;
  int64_t threads;
} mpq_token;

typedef struct {
  const mpq_decoder *decoder;
  const mpq_token *token;
  mpq_attention attention;
  shares shares;
  atomic_int failed;
  int64_t status;
} token_step;

static int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

/* Anything but 0 ends the step. */
static int apply(token_step *step, const mpq_layer *layer, const float *x, void *out, int bfloat) {
  const mpq_decoder *decoder = step->decoder;
  int8_t unfit;
  if (!layer->weight) return 0;
  const mpq_call call = {
      .panels = layer->panels, .tensor_scale = layer->tensor_scale, .x = x, .tokens = 1, .stride = layer->weight->cols,
      .bias = layer->bias, .out = out, .out_stride = layer->weight->rows, .bias_bfloat = layer->bias_bfloat,
      .out_bfloat = bfloat, .planes = layer->planes, .threads = (int)step->token->threads, .level = decoder->level,
      .unfit = &unfit, .parallel = share_job,
  };
  return (step->status = multiply(layer->weight, &call, NULL)) != 0;
}

static void attend_heads(void *argument) {
  token_step *step = argument;
  float *scores = scratch(5, 4 * whole(step->attention.length) * sizeof(float));
  if (!scores) { atomic_store(&step->failed, 1); return; }
  int own = arrive(&step->shares);
  for (item head; take(&step->shares, &own, &head);)
    levels[step->decoder->level]->between->attend(&step->attention, head.start, scores);
}

static void rotate(const token_step *step, float *x, int64_t heads) {
  const int64_t width = step->decoder->head_width, half = width / 2;
  const void *cos = step->token->cos, *sin = step->token->sin;
  const int bfloat = step->decoder->bfloat;
  for (int64_t head = 0; head < heads; head++, x += width)
    for (int64_t i = 0; i < half; i++) {
      const float first = x[i], second = x[i + half];
      x[i] = first * load_real(cos, bfloat, i) + second * load_real(sin, bfloat, i);
      x[i + half] = second * load_real(cos, bfloat, i + half) + first * load_real(sin, bfloat, i + half);
    }
}

/* The token's keys or values to their place among the others. */
static void keep(const token_step *step, const float *x, void *past) {
  const mpq_decoder *decoder = step->decoder;
  for (int64_t head = 0; head < decoder->key_heads; head++)
    for (int64_t i = 0; i < decoder->head_width; i++, x++) {
      const int64_t at = (head * step->token->capacity + step->token->position) * decoder->head_width + i;
      if (decoder->bfloat) ((uint16_t *)past)[at] = to_bfloat(*x);
      else ((float *)past)[at] = *x;
    }
}

static void mix(token_step *step, int64_t block, float *q, float *k, float *v, float *out) {
  const mpq_decoder *decoder = step->decoder;
  const mpq_token *token = step->token;
  void *keys = token->past[block], *values = token->past[decoder->count + block];
  rotate(step, q, decoder->heads);
  rotate(step, k, decoder->key_heads);
  keep(step, k, keys);
  keep(step, v, values);
  step->attention = (mpq_attention){
      .q = q, .keys = keys, .values = values, .out = out, .heads = decoder->heads, .key_heads = decoder->key_heads,
      .width = decoder->head_width, .capacity = token->capacity, .length = token->position + 1, .bfloat = decoder->bfloat,
  };
  const int few = step->attention.length * decoder->heads * decoder->head_width < 1 << 15;
  const mpq_call call = {.threads = few ? 1 : (int)token->threads, .parallel = share_job};
  run(&call, attend_heads, step, &step->shares, decoder->key_heads, 1);
}

static void add(float *x, const float *y, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

static void run_step(void *argument) {
  token_step *step = argument;
  const mpq_decoder *decoder = step->decoder;
  const mpq_between *between = levels[decoder->level]->between;
  const int64_t width = decoder->width, hidden = whole(decoder->hidden);
  const int64_t q_rows = decoder->heads * decoder->head_width, k_rows = decoder->key_heads * decoder->head_width;
  const int64_t most = hidden > whole(q_rows) + whole(k_rows) ? hidden : whole(q_rows) + whole(k_rows);
  float *x = scratch(4, (2 * whole(width) + 3 * most) * sizeof(float));
  if (!x) { step->status = -1; return; }
  float *h = x + whole(width), *first = h + whole(width), *k = first + whole(q_rows), *v = k + whole(k_rows);
  float *mixed = first + 2 * most, *second = first + hidden;
  for (int64_t i = 0; i < width; i++) x[i] = load_real(step->token->x, decoder->bfloat, i);
  for (int64_t i = 0; i < decoder->count; i++) {
    const mpq_block *block = decoder->blocks + i;
    between->normalize(x, block->attention_norm, decoder->epsilon, width, h);
    if (apply(step, &block->q, h, first, 0) || apply(step, &block->k, h, k, 0) || apply(step, &block->v, h, v, 0)) return;
    mix(step, i, first, k, v, mixed);
    if (atomic_load(&step->failed)) { step->status = -1; return; }
    if (apply(step, &block->o, mixed, h, 0)) return;
    add(x, h, width);
    between->normalize(x, block->mlp_norm, decoder->epsilon, width, h);
    if (apply(step, &block->gate, h, first, 0) || apply(step, &block->up, h, second, 0)) return;
    between->activate(first, second, hidden);
    if (apply(step, &block->down, first, h, 0)) return;
    add(x, h, width);
  }
  between->normalize(x, decoder->norm, decoder->epsilon, width, h);
  apply(step, &decoder->head, h, step->token->logits, decoder->bfloat);
}

/* The logits after a token. Returns 0; 1 when a product met numbers that it cannot take: the step is to be computed
 * otherwise, nothing but the token's own place in keys and values was changed; or -1 without memory. */
EXPORT int64_t mpq_step(const mpq_decoder *decoder, const mpq_token *token) {
  token_step step = {.decoder = decoder, .token = token};
  team all = {.program = run_step, .argument = &step};
  own_team = &all;
  together(decoder->parallel, join_team, &all, (int)token->threads);
  own_team = NULL;
  return step.status;
}
