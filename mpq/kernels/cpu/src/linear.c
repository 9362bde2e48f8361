/* The call: activations once, then panels, each decoded tile by tile and multiplied while it is in cache. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define TARGET
#include "template.h"
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef MPQ_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(MPQ_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

#define LARGE ((size_t)2 << 20) /* bytes of a large page */

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef void (*mpq_parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct {
  const uint8_t *panels;
  const float *tensor_scale; /* or NULL */
  const void *x; /* (tokens, cols), rows `stride` elements apart */
  int64_t tokens, stride;
  const void *bias; /* (rows,) or NULL */
  void *out;        /* (tokens, rows), rows `out_stride` elements apart */
  int64_t out_stride;
  int32_t bfloat, bias_bfloat, out_bfloat; /* bfloat16 instead of float32 */
  int32_t planes;                          /* 2: nearly exact; 1: int8 with a float16 scale for each token */
  int32_t threads, level;
  int8_t *unfit; /* (tokens,), or NULL: set for tokens left out, whose activations no integers can stand for */
  mpq_parallel parallel;
} mpq_call;

static const mpq_level *const levels[] = {
    &mpq_portable,
#ifdef MPQ_X86
    &mpq_avx2, &mpq_avxvnni, &mpq_avx512, &mpq_amx,
#elif defined(MPQ_ARM)
    &mpq_neon,
#endif
};

#ifdef MPQ_X86
static int allow_matrix(void) {
#ifdef __linux__
  unsigned a = 7, b, c = 0, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if ((d >> 22 & 7) != 7 || !__builtin_cpu_supports("avx512bf16")) return 0; /* amx-bf16, avx512-fp16, amx-tile */
  return (d >> 25 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
#else
  return 0;
#endif
}
#endif

#ifdef MPQ_X86
static int has_vnni(void) { /* of 32 bytes, without AVX-512 */
  unsigned a = 7, b, c = 1, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return a >> 4 & 1;
}
#endif

static int runs_here(int level) {
#ifdef MPQ_X86
  __builtin_cpu_init();
  if (level && (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))) return 0;
  if (level == 2) return has_vnni();
  if (level > 2 && (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("gfni") || !__builtin_cpu_supports("avx512vbmi") ||
                    !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
                    !__builtin_cpu_supports("avx512dq")))
    return 0;
  return level < 4 || allow_matrix();
#elif defined(MPQ_ARM) && defined(__linux__)
  return !level || (getauxval(AT_HWCAP) >> 20 & 1); /* HWCAP_ASIMDDP */
#elif defined(MPQ_ARM) && defined(__APPLE__)
  return 1;
#else
  return !level;
#endif
}

/* The best level of this machine that is none above `most`: an index for mpq_level_name. */
EXPORT int mpq_best_level(int most) {
  const int last = (int)(sizeof levels / sizeof *levels) - 1;
  int level = most < last ? most : last;
  while (level > 0 && !runs_here(level)) level--;
  return level;
}

EXPORT const char *mpq_level_name(int level) { return levels[level]->name; }

/* Tokens of a convolution: the patches of a batch of images, gathered one at a time. Spatial pairs are (down, along). */
typedef struct {
  int64_t channels, size[2], kernel[2], out[2], stride[2], padding[2], dilation[2];
  int64_t steps[4]; /* elements between images, channels, lines and columns */
} mpq_images;

/* Units of work in one range for each thread, so that it reads on where it was; who has done its own helps the others. */
typedef struct {
  int64_t units;
  int block, ranges; /* a range is taken in items of `block` units, the last MPQ_SINGLE one by one: threads end together */
  atomic_int arrived;
  struct {
    atomic_llong taken;
    char apart[56]; /* one cache line each */
  } range[MPQ_THREADS];
} shares;

/* An item: units start, start + step and so on below `end`, at most `block` of them. */
typedef struct {
  int64_t start, step, end;
} item;

static int arrive(shares *all) { return atomic_fetch_add(&all->arrived, 1) % all->ranges; }

/* The next item, of the range `own` as long as it has one. */
static int take(shares *all, int *own, item *found) {
  for (int tries = 0; tries < all->ranges; tries++, *own = (*own + 1) % all->ranges) {
    const int64_t start = all->units * *own / all->ranges, end = all->units * (*own + 1) / all->ranges;
    const int64_t single = all->block > 1 && end - start > MPQ_SINGLE ? MPQ_SINGLE : 0, blocks_end = end - single;
    const int64_t blocks = (blocks_end - start + all->block - 1) / all->block, items = blocks + single;
    const int64_t index = atomic_load_explicit(&all->range[*own].taken, memory_order_relaxed) < items
                              ? atomic_fetch_add(&all->range[*own].taken, 1) : items;
    if (index < items) {
      if (index < blocks) *found = (item){start + index, blocks, blocks_end};
      else *found = (item){blocks_end + index - blocks, 1, blocks_end + index - blocks + 1};
      return 1;
    }
  }
  return 0;
}

typedef struct {
  const mpq_weight *weight;
  const mpq_call *call;
  const mpq_images *images; /* or NULL: tokens are rows of x */
  const mpq_level *level;
  mpq_activation x;       /* of all threads, or the sizes of what each makes for itself */
  int64_t first;          /* token that the chunk starts with */
  int8_t *unfit;          /* of the chunk */
  int64_t panels, splits; /* work: `block` panels at a time, each for `splits` pieces of the chunk's tokens */
  int block, run;         /* tiles of `run` columns' worth are decoded before they are multiplied */
  int brain, matrix, alone; /* activations are bfloat16, or in tiles of bytes; each thread makes them for itself */
  int form;                 /* of decoded tiles: MPQ_*, or how many bfloat16 */
  size_t room;            /* bytes of a decoded tile */
  shares shares;
  atomic_int failed;
} job;

#define SLOTS 7
/* Scratch memory that a thread keeps until it ends. */
typedef struct {
  void *memory;
  size_t size;
} kept;

static pthread_key_t ending;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void forget(void *all) {
  for (int slot = 0; slot < SLOTS; slot++) free(((kept *)all)[slot].memory);
}

static void make_key(void) { pthread_key_create(&ending, forget); }

static void *scratch(int slot, size_t size) {
  static _Thread_local kept own[SLOTS];
  pthread_once(&once, make_key);
  if (own[slot].size < size) {
    pthread_setspecific(ending, own);
    free(own[slot].memory);
    if (posix_memalign(&own[slot].memory, size >> 17 ? LARGE : 64, size)) own[slot].memory = NULL;
#ifdef __linux__
    else if (size >> 17) madvise(own[slot].memory, size, MADV_HUGEPAGE);
#endif
    own[slot].size = own[slot].memory ? size : 0;
  }
  return own[slot].memory;
}

#define GATHER(type)                                                                                  \
  do {                                                                                                \
    const type *from = (const type *)call->x + at;                                                    \
    type *to = (type *)patch + place;                                                                 \
    for (int64_t channel = 0; channel < images->channels; channel++, from += images->steps[1], to += area) *to = *from; \
  } while (0)

/* What the kernel covers at one position of the output, in the order of the weight's columns. */
static void gather_patch(const mpq_call *call, const mpq_images *images, int64_t position, void *patch) {
  const int64_t along = position % images->out[1], down = position / images->out[1] % images->out[0];
  const int64_t image = position / images->out[1] / images->out[0], area = images->kernel[0] * images->kernel[1];
  const int64_t top = down * images->stride[0] - images->padding[0], left = along * images->stride[1] - images->padding[1];
  memset(patch, 0, images->channels * area * (call->bfloat ? 2 : 4));
  for (int64_t place = 0; place < area; place++) {
    const int64_t line = top + place / images->kernel[1] * images->dilation[0];
    const int64_t column = left + place % images->kernel[1] * images->dilation[1];
    if (line < 0 || line >= images->size[0] || column < 0 || column >= images->size[1]) continue;
    const int64_t at = image * images->steps[0] + line * images->steps[2] + column * images->steps[3];
    if (call->bfloat) GATHER(uint16_t);
    else GATHER(float);
  }
}

static void quantize_token(const job *work, mpq_activation *x, int64_t token, void *patch, int8_t *unfit) {
  const mpq_call *call = work->call;
  const char *rows = (const char *)call->x + work->first * call->stride * (call->bfloat ? 2 : 4);
  if (patch) gather_patch(call, work->images, work->first + token, patch);
  work->level->quantize(work->weight, x, patch ? patch : rows, call->bfloat, patch ? 0 : call->stride, token, unfit);
}

static void quantize_tokens(void *argument) {
  job *work = argument;
  void *patch = work->images ? scratch(3, work->weight->cols * 4) : NULL;
  if (work->images && !patch) { atomic_store(&work->failed, 1); return; }
  int own = arrive(&work->shares);
  for (item tokens; take(&work->shares, &own, &tokens);)
    quantize_token(work, &work->x, tokens.start, patch, work->unfit);
}

static inline float load_real(const void *from, int bfloat, int64_t index) {
  if (!bfloat) return ((const float *)from)[index];
  uint32_t word = (uint32_t)((const uint16_t *)from)[index] << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

static inline uint16_t to_bfloat(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if (value != value) return (uint16_t)(word >> 16 | 64);
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static size_t code_bytes(const mpq_weight *weight) { return (size_t)weight->segment * weight->segments * 8 * weight->bits; }

static const uint8_t *row_scales(const job *work, int64_t panel) {
  const mpq_weight *weight = work->weight;
  if (!weight->row_scales) return NULL;
  return work->call->panels + panel * weight->panel_bytes + weight->tiles * code_bytes(weight);
}

static void write_out(const job *work, const mpq_activation *x, int64_t panel, int64_t token, int64_t last, float *sums) {
  const mpq_call *call = work->call;
  const mpq_weight *weight = work->weight;
  const int64_t row = panel * MPQ_ROWS, left = weight->rows - row, count = left < MPQ_ROWS ? left : MPQ_ROWS;
  float bias[MPQ_ROWS] = {0}, scale[MPQ_ROWS];
  if (call->bias)
    for (int64_t i = 0; i < count; i++) bias[i] = load_real(call->bias, call->bias_bfloat, row + i);
  const uint8_t *scales = row_scales(work, panel);
  for (int i = 0; i < MPQ_ROWS; i += 16)
    STORE(scale + i, scales ? load_scales(weight->scale_kind, scales, i) * weight->factor : (vfloat){0} + weight->factor);
  for (; token < last; token++) {
    float *from = sums + token * MPQ_ROWS;
    int64_t at = (work->first + token) * call->out_stride + row;
    if (x->brain) { /* what was left for the end */
      const float own = x->scale ? x->scale[token] : 1;
      for (int i = 0; i < MPQ_ROWS; i++) from[i] *= scale[i] * own;
    }
    if (call->out_bfloat)
      for (int64_t i = 0; i < count; i++) ((uint16_t *)call->out)[at + i] = to_bfloat(from[i] + bias[i]);
    else
      for (int64_t i = 0; i < count; i++) ((float *)call->out)[at + i] = from[i] + bias[i];
  }
}

/* Tile `index` of a panel, decoded into `out`. */
static void decode_tile(const job *work, int64_t panel, int64_t index, mpq_tile *tile, uint8_t *out) {
  const mpq_weight *weight = work->weight;
  const size_t codes = code_bytes(weight), scales = (size_t)weight->segments * MPQ_ROWS * weight->scale_bytes;
  const size_t zeros = weight->zeros ? (size_t)weight->segments * MPQ_ROWS : 0;
  const size_t bytes = codes + (weight->row_scales ? 0 : scales + zeros);
  const uint8_t *stream = work->call->panels + panel * weight->panel_bytes + index * bytes;
  tile->index = index, tile->bytes = bytes, tile->ahead = stream + work->run * bytes;
  tile->scales = weight->row_scales ? row_scales(work, panel) : stream;
  tile->zeros = weight->zeros ? tile->scales + scales : NULL;
  if (!weight->row_scales) stream += scales + zeros;
  work->level->decode(weight, stream, work->form, tile, out);
}

/* Room for a chunk's activations in one piece of scratch memory, and how it is cut; 0 if there is none. */
static int place(const job *work, mpq_activation *x) {
  const mpq_weight *weight = work->weight;
  const int64_t tokens = x->tokens;
  const int planes = work->call->planes, integers = weight->kind != MPQ_BFLOAT && (!work->brain || planes == 1);
  const int64_t padded = mpq_padded(tokens);
  const size_t elements = weight->tiles * mpq_filled(weight) * padded;
  const size_t scales = (weight->tiles * padded * 4 + 63) & ~(size_t)63;
  const size_t sums = (weight->tiles * weight->segments * planes * padded * 4 + 63) & ~(size_t)63;
  uint8_t *memory = scratch(2, scales + sums + 4 * elements + 64);
  if (!memory) return 0;
  x->planes = planes, x->matrix = work->matrix;
  if (integers) x->scale = (float *)memory, x->sums = (int32_t *)(memory + scales);
  memory += scales + sums;
  if (work->brain) x->brain = (uint16_t *)memory, x->planes = integers || work->call->bfloat ? 1 : 2;
  else if (integers) x->q = (int8_t *)memory, x->wide = (int16_t *)memory;
  else x->real = (float *)memory;
  for (int64_t tile = 0; x->matrix && tile < weight->tiles; tile++)
    memset(x->scale + tile * padded + tokens, 0, (padded - tokens) * 4); /* nothing comes of what fills up */
  return 1;
}

/* The thread's own activations, sooner made than waited for. */
static int quantize_alone(const job *work, mpq_activation *x, int first) {
  int8_t unfit[MPQ_ALONE];
  if (!place(work, x)) return 0;
  for (int64_t token = 0; token < x->tokens; token++) quantize_token(work, x, token, NULL, unfit);
  if (first) memcpy(work->unfit, unfit, x->tokens);
  return 1;
}

static void multiply_panels(void *argument) {
  job *work = argument;
  const mpq_level *level = work->level;
  const int64_t tokens = work->x.tokens, tiles = work->weight->tiles;
  uint8_t *decoded = scratch(0, (work->x.fused ? 0 : work->block * work->run * work->room) + 64);
  const int64_t padded = mpq_padded(tokens);
  float *sums = scratch(1, work->block * padded * MPQ_ROWS * sizeof(float));
  mpq_tile some[MPQ_PANELS * MPQ_RUN];
  mpq_activation x = work->x;
  int own = arrive(&work->shares);
  if (!decoded || !sums || (work->alone && !quantize_alone(work, &x, own == 0))) { atomic_store(&work->failed, 1); return; }
  if (level->begin) level->begin();
  for (item units; take(&work->shares, &own, &units);) {
    const int64_t split = units.start / work->panels, before = split * work->panels;
    const int64_t first = work->splits > 1 ? split * MPQ_BLOCK : 0;
    const int64_t last = work->splits > 1 && first + MPQ_BLOCK < tokens ? first + MPQ_BLOCK : tokens;
    int panels = 0;
    for (int64_t unit = units.start; unit < units.end && panels < work->block; unit += units.step, panels++)
      memset(sums + (panels * padded + first) * MPQ_ROWS, 0, (mpq_padded(last) - first) * MPQ_ROWS * sizeof(float));
    for (int64_t index = 0; index < tiles; index += work->run) {
      const int run = tiles - index < work->run ? (int)(tiles - index) : work->run;
      for (int panel = 0; panel < panels; panel++)
        for (int i = 0; i < run; i++) {
          const int64_t slot = panel * work->run + i;
          decode_tile(work, units.start - before + panel * units.step, index + i, &some[slot], decoded + (work->x.fused ? 0 : slot * work->room));
        }
      for (int panel = 0; panel < panels; panel++)
        level->multiply(work->weight, some + panel * work->run, run, &x, first, last, sums + panel * padded * MPQ_ROWS);
    }
    for (int panel = 0; panel < panels; panel++)
      write_out(work, &x, units.start - before + panel * units.step, first, last, sums + panel * padded * MPQ_ROWS);
  }
  if (level->end) level->end();
}

static void *run_alone(void *argument) {
  ((void (**)(void *))argument)[0](((void **)argument)[1]);
  return NULL;
}

/* The function on several threads at once, one of them the caller's. */
static void together(mpq_parallel parallel, void (*function)(void *), void *work, int threads) {
  if (threads <= 1) { function(work); return; }
  if (parallel) { parallel(function, work, threads, 0); return; }
  pthread_t helpers[MPQ_THREADS];
  void *argument[2];
  int started = 0;
  memcpy(argument, &function, sizeof function), argument[1] = work;
  while (started < threads - 1 && started < MPQ_THREADS && !pthread_create(&helpers[started], NULL, run_alone, argument)) started++;
  function(work);
  for (int i = 0; i < started; i++) pthread_join(helpers[i], NULL);
}

/* Threads share units of work, `block` at a time. */
static void run(const mpq_call *call, void (*function)(void *), void *work, shares *all, int64_t units, int block) {
  int threads = call->threads < MPQ_THREADS ? call->threads : MPQ_THREADS;
  if (threads > units) threads = units ? (int)units : 1;
  all->units = units, all->block = block, all->ranges = threads;
  atomic_store(&all->arrived, 0);
  for (int i = 0; i < threads; i++) atomic_store(&all->range[i].taken, 0);
  together(call->parallel, function, work, threads);
}

#include "expand.h"

/* Whether a chunk is computed in bfloat16, which takes a pass for each part of activations and weights (4096 x 4096,
 * measured with AMX). Groups below 32 always: scales would change too often for the byte unit. Groups of 32, whose sums
 * are scaled after half a step of it, where tokens are so many that decoding pays: the sooner, the fewer passes. Levels
 * of 16 bits where one pass does. Other bfloat16 activations take one pass, of weights that are rounded to it, against
 * two of bytes: from 128 tokens on, from 64 where scales need no stage of their own or one for each step of the unit. */
static int in_brain(const job *work, int64_t tokens) {
  const mpq_weight *weight = work->weight;
  const int planes = work->call->planes, half = weight->segment == 32;
  if (!work->level->brain || tokens < 8) return 0;
  if (weight->kind == MPQ_BFLOAT || !mpq_in_steps(weight)) return 1;
  if (half && tokens > (weight->brain == 2 ? 64 : 8 * planes)) return 1;
  if (weight->kind == MPQ_TABLE16 && tokens * planes > 16) return planes == 1 || (work->call->bfloat && tokens > 16);
  if (!work->call->bfloat || planes == 1) return 0;
  return tokens >= (weight->row_scales || weight->segment == 64 ? 64 : 128);
}

/* Whether few tokens are multiplied by codes decoded in registers. Where there are more sums than registers, it takes two
 * passages of each tile, which the matrix unit can do better for the shortest codes (measured). */
static int is_fused(const job *work, int64_t tokens) {
  const mpq_weight *weight = work->weight;
  const int64_t lines = tokens * work->call->planes;
  if (!work->level->fused || tokens > 4) return 0;
  if (weight->kind == MPQ_BFLOAT) return weight->normal != 0;
  if (weight->kind == MPQ_TABLE16) return lines <= 4;
  return lines <= 6 || !work->level->brain || weight->segment % 64 || weight->bits > 3;
}

/* How a chunk's work is cut. */
static void plan(job *work, int64_t tokens) {
  const mpq_weight *weight = work->weight;
  const int threads = work->call->threads, planes = work->call->planes;
  work->x.tokens = tokens;
  work->brain = in_brain(work, tokens);
  work->x.fused = is_fused(work, tokens);
  const int bytes = work->level->brain && !work->brain && !work->x.fused && mpq_in_steps(weight) && weight->kind != MPQ_BFLOAT;
  work->matrix = bytes && tokens * planes > (weight->bits == 8 ? 10 : 16); /* measured */
  work->form = work->brain ? weight->brain : work->x.fused ? MPQ_CODES : MPQ_LEVELS;
  if (work->matrix || (bytes && weight->kind == MPQ_TABLE16)) work->form = MPQ_SIGNED;
  work->alone = tokens < MPQ_ALONE && !work->images;
  work->room = 128 * mpq_filled(weight) * (work->brain ? weight->brain : 1);
  work->panels = (weight->rows + MPQ_ROWS - 1) / MPQ_ROWS;
  work->splits = work->panels >= 4 * threads ? 1 : (tokens + MPQ_BLOCK - 1) / MPQ_BLOCK;
  work->run = work->brain && tokens >= 64 ? MPQ_RUN : 1;
  work->block = work->splits > 1 ? 1 : tokens >= 64 ? MPQ_PANELS : work->x.fused ? (weight->bits < 4 ? 2 : 1) * MPQ_STREAMS : 1;
  while (work->block > 1 && work->block * (work->x.fused ? 1 : 2) * threads > work->panels) work->block /= 2;
}

static int64_t multiply(const mpq_weight *given, const mpq_call *call, const mpq_images *images) {
  mpq_weight own = *given;
  const mpq_weight *weight = &own;
  int64_t unfit = 0;
  if (call->tensor_scale) own.factor *= *call->tensor_scale;
  if (call->bfloat && call->planes == 2) own.brain = 1; /* rounded, as the activations are */
  for (int64_t first = 0; first < call->tokens; first += MPQ_CHUNK) {
    const int64_t tokens = call->tokens - first < MPQ_CHUNK ? call->tokens - first : MPQ_CHUNK;
    job work = {.weight = weight, .call = call, .images = images, .level = levels[call->level], .first = first};
    plan(&work, tokens);
    work.unfit = call->unfit ? call->unfit + first : scratch(6, MPQ_CHUNK);
    if (!work.unfit) return -1;
    if (!work.alone) {
      if (!place(&work, &work.x)) return -1;
      run(call, quantize_tokens, &work, &work.shares, tokens, 1);
      if (atomic_load(&work.failed)) return -1;
    }
    run(call, multiply_panels, &work, &work.shares, work.panels * work.splits, work.block);
    if (atomic_load(&work.failed)) return -1;
    for (int64_t i = 0; i < tokens; i++) unfit += work.unfit[i];
  }
  return unfit;
}

/* y = x W^T + bias. Returns how many tokens were unfit and must be computed otherwise, or -1 without memory. */
EXPORT int64_t mpq_linear(const mpq_weight *weight, const mpq_call *call) { return multiply(weight, call, NULL); }

/* The same for patches of images: `x` of the call is their first element, and `tokens` counts positions of the output. */
EXPORT int64_t mpq_conv(const mpq_weight *weight, const mpq_call *call, const mpq_images *images) {
  return multiply(weight, call, images);
}

#include "step.h"

#include "dispatch.h"

typedef struct {
  const uint8_t *data;
  int64_t blocks;
  atomic_llong next, found;
} reading;

static void read_blocks(void *argument) {
  reading *work = argument;
  uint64_t all = 0;
  for (int64_t block; (block = atomic_fetch_add(&work->next, 1)) < work->blocks;) {
    const uint64_t *words = (const uint64_t *)(work->data + (block << 20));
    uint64_t some[8] = {0};
    for (int i = 0; i < 1 << 17; i += 8) {
      __builtin_prefetch(words + i + MPQ_AHEAD / 8, 0, 2);
      __builtin_prefetch(words + i + MPQ_NEAR / 8);
      for (int j = 0; j < 8; j++) some[j] |= words[i + j];
    }
    for (int j = 0; j < 8; j++) all |= some[j];
  }
  atomic_fetch_or(&work->found, (long long)all);
}

/* Read whole megabytes, for the machine's bandwidth; returns whether any bit was set. */
EXPORT int mpq_read(const uint8_t *data, int64_t size, int threads, mpq_parallel parallel) {
  reading work = {.data = data, .blocks = size >> 20};
  if (threads > 1 && parallel) parallel(read_blocks, &work, threads, 0);
  else read_blocks(&work);
  return atomic_load(&work.found) != 0;
}
