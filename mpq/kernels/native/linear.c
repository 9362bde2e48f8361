/* The call: activations once, then panels, each decoded tile by tile and multiplied while it is in cache. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "mpq.h"
#ifdef MPQ_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  int8_t *unfit; /* (tokens,): set for tokens left out, whose activations no integers can stand for */
  mpq_parallel parallel;
} mpq_call;

static const mpq_level *const levels[] = {
    &mpq_portable,
#ifdef MPQ_X86
    &mpq_avx2, &mpq_avx512, &mpq_amx,
#endif
};

static int allow_matrix(void) {
#if defined(MPQ_X86) && defined(__linux__)
  unsigned a = 7, b, c = 0, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if ((d >> 22 & 7) != 7 || !__builtin_cpu_supports("avx512bf16")) return 0; /* amx-bf16, avx512-fp16, amx-tile */
  return (d >> 25 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
#else
  return 0;
#endif
}

/* The best level of this machine: an index for mpq_level_name. */
EXPORT int mpq_best_level(void) {
#ifdef MPQ_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  return allow_matrix() ? 3 : 2;
#else
  return 0;
#endif
}

EXPORT const char *mpq_level_name(int level) { return levels[level]->name; }

typedef struct {
  const mpq_weight *weight;
  const mpq_call *call;
  const mpq_level *level;
  mpq_activation x;
  int64_t first;           /* token that the chunk starts with */
  int64_t panels, splits;  /* work: panels, each for `splits` runs of the chunk's tokens */
  atomic_llong next;
  atomic_int failed;
} job;

/* Scratch memory that a thread keeps until it ends. */
typedef struct {
  void *memory;
  size_t size;
} kept;

static pthread_key_t ending;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void forget(void *all) {
  for (int slot = 0; slot < 3; slot++) free(((kept *)all)[slot].memory);
}

static void make_key(void) { pthread_key_create(&ending, forget); }

static void *scratch(int slot, size_t size) {
  static _Thread_local kept own[3];
  pthread_once(&once, make_key);
  if (own[slot].size < size) {
    pthread_setspecific(ending, own);
    free(own[slot].memory);
    if (posix_memalign(&own[slot].memory, 64, size)) own[slot].memory = NULL;
    own[slot].size = own[slot].memory ? size : 0;
  }
  return own[slot].memory;
}

static void quantize_tokens(void *argument) {
  job *work = argument;
  const mpq_call *call = work->call;
  for (int64_t token; (token = atomic_fetch_add(&work->next, 1)) < work->x.tokens;)
    work->level->quantize(work->weight, &work->x, (const char *)call->x + work->first * call->stride * (call->bfloat ? 2 : 4),
                          call->bfloat, call->stride, token, call->unfit + work->first);
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

static void write_out(const job *work, int64_t panel, int64_t token, int64_t last, float *sums) {
  const mpq_call *call = work->call;
  const int64_t row = panel * MPQ_ROWS, left = work->weight->rows - row, count = left < MPQ_ROWS ? left : MPQ_ROWS;
  float bias[MPQ_ROWS] = {0};
  if (call->bias)
    for (int64_t i = 0; i < count; i++) bias[i] = load_real(call->bias, call->bias_bfloat, row + i);
  for (; token < last; token++) {
    const float *from = sums + token * MPQ_ROWS;
    int64_t at = (work->first + token) * call->out_stride + row;
    if (call->out_bfloat)
      for (int64_t i = 0; i < count; i++) ((uint16_t *)call->out)[at + i] = to_bfloat(from[i] + bias[i]);
    else
      for (int64_t i = 0; i < count; i++) ((float *)call->out)[at + i] = from[i] + bias[i];
  }
}

static void multiply_panels(void *argument) {
  job *work = argument;
  const mpq_weight *weight = work->weight;
  const mpq_level *level = work->level;
  const int64_t width = (int64_t)weight->segment * weight->segments, tokens = work->x.tokens;
  const size_t codes = (size_t)width * 8 * weight->bits, plane = (size_t)width * 64;
  const size_t scales = weight->row_scales ? 0 : (size_t)weight->segments * MPQ_ROWS * weight->scale_bytes;
  const size_t zeros = weight->zeros && !weight->row_scales ? (size_t)weight->segments * MPQ_ROWS : 0;
  uint8_t *decoded = scratch(0, 2 * plane + 64);
  float *sums = scratch(1, tokens * MPQ_ROWS * sizeof(float));
  if (!decoded || !sums) { atomic_store(&work->failed, 1); return; }
  if (level->begin) level->begin();
  for (int64_t item; (item = atomic_fetch_add(&work->next, 1)) < work->panels * work->splits;) {
    const int64_t panel = item % work->panels, split = item / work->panels;
    const int64_t first = tokens * split / work->splits, last = tokens * (split + 1) / work->splits;
    const uint8_t *stream = work->call->panels + panel * weight->panel_bytes;
    memset(sums + first * MPQ_ROWS, 0, (last - first) * MPQ_ROWS * sizeof(float));
    for (int64_t index = 0; index < weight->tiles; index++, stream += codes + scales + zeros) {
      mpq_tile tile = {{0}, stream + codes, weight->zeros ? stream + codes + scales : NULL, index};
      if (weight->row_scales) {
        tile.scales = work->call->panels + panel * weight->panel_bytes + weight->tiles * codes;
        tile.zeros = weight->zeros ? tile.scales + MPQ_ROWS * (size_t)weight->scale_bytes : NULL;
      }
      tile.levels[0] = level->decode(weight, stream, decoded, plane);
      tile.levels[1] = decoded + plane;
      if (weight->kind == MPQ_TABLE16) tile.levels[0] = decoded + plane, tile.levels[1] = decoded;
      level->multiply(weight, &tile, &work->x, first, last, sums);
    }
    write_out(work, panel, first, last, sums);
  }
  if (level->end) level->end();
}

static void *run_alone(void *argument) {
  ((void (**)(void *))argument)[0](((void **)argument)[1]);
  return NULL;
}

static void run(const mpq_call *call, void (*function)(void *), job *work, int64_t items) {
  int threads = call->threads < items ? call->threads : (int)items;
  atomic_store(&work->next, 0);
  if (threads <= 1) { function(work); return; }
  if (call->parallel) { call->parallel(function, work, threads, 0); return; }
  pthread_t helpers[64];
  void *argument[2];
  int started = 0;
  memcpy(argument, &function, sizeof function), argument[1] = work;
  while (started < threads - 1 && started < 64 && !pthread_create(&helpers[started], NULL, run_alone, argument)) started++;
  function(work);
  for (int i = 0; i < started; i++) pthread_join(helpers[i], NULL);
}

/* Room for a chunk's activations in one piece of scratch memory; 0 if there is none. */
static int place(job *work, int64_t tokens) {
  const mpq_weight *weight = work->weight;
  mpq_activation *x = &work->x;
  const size_t elements = (size_t)weight->tiles * weight->segment * weight->segments * tokens;
  const int integers = weight->kind != MPQ_BFLOAT, planes = work->call->planes;
  memset(x, 0, sizeof *x);
  x->tokens = tokens, x->planes = planes;
  const size_t scales = (weight->tiles * tokens * 4 + 63) & ~(size_t)63;
  const size_t sums = (weight->tiles * weight->segments * planes * tokens * 4 + 63) & ~(size_t)63;
  uint8_t *memory = scratch(2, scales + sums + 4 * elements + 64);
  if (!memory) return 0;
  if (integers) x->scale = (float *)memory, x->sums = (int32_t *)(memory + scales);
  memory += scales + sums;
  if (integers) x->q = (int8_t *)memory, x->wide = (int16_t *)memory;
  else if (work->level->brain && tokens >= work->level->brain && weight->segment % 32 == 0)
    x->brain = (uint16_t *)memory, x->planes = work->call->bfloat ? 1 : 2;
  else x->real = (float *)memory;
  return 1;
}

/* y = x W^T + bias. Returns how many tokens were unfit and must be computed otherwise, or -1 without memory. */
EXPORT int64_t mpq_linear(const mpq_weight *given, const mpq_call *call) {
  mpq_weight own = *given;
  const mpq_weight *weight = &own;
  int64_t unfit = 0;
  if (call->tensor_scale) own.factor *= *call->tensor_scale;
  for (int64_t first = 0; first < call->tokens; first += MPQ_CHUNK) {
    const int64_t tokens = call->tokens - first < MPQ_CHUNK ? call->tokens - first : MPQ_CHUNK;
    job work = {.weight = weight, .call = call, .level = levels[call->level], .first = first};
    if (!place(&work, tokens)) return -1;
    run(call, quantize_tokens, &work, tokens < 8 ? 1 : tokens);
    work.panels = (weight->rows + MPQ_ROWS - 1) / MPQ_ROWS;
    work.splits = work.panels >= 4 * call->threads ? 1 : (tokens + 31) / 32;
    run(call, multiply_panels, &work, work.panels * work.splits);
    if (atomic_load(&work.failed)) return -1;
    for (int64_t i = 0; i < tokens; i++) unfit += call->unfit[first + i];
  }
  return unfit;
}

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
    for (int i = 0; i < 1 << 17; i += 8)
      for (int j = 0; j < 8; j++) some[j] |= words[i + j];
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
