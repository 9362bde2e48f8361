/* Threads: see threads.h. */
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define HUGE_PAGE ((size_t)2 << 20) /* bytes of a huge page */

int take_item(work_ranges *all, int *own, work_item *item) {
  for (int tries = 0; tries < all->ranges; tries++, *own = (*own + 1) % all->ranges) {
    const int64_t start = all->units * *own / all->ranges, end = all->units * (*own + 1) / all->ranges;
    const int64_t single = all->block > 1 && end - start > TAIL_UNITS ? TAIL_UNITS : 0, blocks_end = end - single;
    const int64_t blocks = (blocks_end - start + all->block - 1) / all->block, items = blocks + single;
    const int64_t index = atomic_load_explicit(&all->range[*own].taken, memory_order_relaxed) < items
                              ? atomic_fetch_add(&all->range[*own].taken, 1) : items;
    if (index < items) {
      if (index < blocks) *item = (work_item){start + index, blocks, blocks_end};
      else *item = (work_item){blocks_end + index - blocks, 1, blocks_end + index - blocks + 1};
      return 1;
    }
  }
  return 0;
}

static void *run_on_thread(void *argument) {
  ((void (**)(void *))argument)[0](((void **)argument)[1]);
  return NULL;
}

void run_on_threads(mpq_parallel parallel, void (*function)(void *), void *work, int threads) {
  if (threads <= 1) { function(work); return; }
  if (parallel) { parallel(function, work, threads, 0); return; }
  pthread_t helpers[MAX_THREADS];
  void *argument[2];
  int started = 0;
  memcpy(argument, &function, sizeof function), argument[1] = work;
  while (started < threads - 1 && started < MAX_THREADS &&
         !pthread_create(&helpers[started], NULL, run_on_thread, argument))
    started++;
  function(work);
  for (int i = 0; i < started; i++) pthread_join(helpers[i], NULL);
}

void open_work(work_ranges *all, int ranges, int64_t units, int block) {
  all->units = units, all->block = block, all->ranges = ranges;
  atomic_store(&all->arrived, 0);
  for (int i = 0; i < ranges; i++) atomic_store(&all->range[i].taken, 0);
}

void share_work(int threads, mpq_parallel parallel, void (*function)(void *), void *work, work_ranges *all, int64_t units,
                int block) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads > units) threads = units ? (int)units : 1;
  open_work(all, threads, units, block);
  run_on_threads(parallel, function, work, threads);
}

typedef struct {
  atomic_int state; /* odd while a job is open; -1 at the end */
  atomic_int inside, arrived;
  unsigned threads;
  void (*function)(void *);
  void *work;
  void (*program)(void *); /* run by the first thread */
  void *argument;
} team;

static _Thread_local team *own_team;

static void spin(int *turns) {
#ifdef MPQ_X86
  __builtin_ia32_pause();
#endif
  if (++*turns % 4096 == 0) sched_yield(); /* threads may outnumber processors */
}

/* mpq_parallel for a job of the team: late threads are not waited for. */
void team_parallel(void (*function)(void *), void *work, unsigned threads, unsigned flags) {
  team *all = own_team;
  int turns = 0;
  (void)flags;
  all->function = function, all->work = work, all->threads = threads;
  atomic_fetch_add(&all->state, 1);
  function(work);
  atomic_fetch_add(&all->state, 1);
  while (atomic_load(&all->inside)) spin(&turns);
}

static void join_team(void *argument) {
  team *all = argument;
  if (own_team == all) { /* the calling thread */
    all->program(all->argument);
    atomic_store(&all->state, -1);
    return;
  }
  const unsigned index = 1 + atomic_fetch_add(&all->arrived, 1);
  int turns = 0;
  for (int state, last = 0; (state = atomic_load(&all->state)) >= 0; ) {
    if (state % 2 == 0 || state == last) { spin(&turns); continue; }
    atomic_fetch_add(&all->inside, 1);
    if (atomic_load(&all->state) == state && index < all->threads) all->function(all->work);
    atomic_fetch_sub(&all->inside, 1);
    last = state, turns = 0;
  }
}

void run_team(mpq_parallel parallel, void (*program)(void *), void *argument, int threads) {
  team all = {.program = program, .argument = argument};
  own_team = &all;
  run_on_threads(parallel, join_team, &all, threads);
  own_team = NULL;
}

typedef struct {
  void *memory;
  size_t size;
} scratch_buffer;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_scratch(void *all) {
  for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(((scratch_buffer *)all)[slot].memory);
}

static void create_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

void *scratch(int slot, size_t size) {
  static _Thread_local scratch_buffer own[SCRATCH_SLOTS];
  pthread_once(&scratch_once, create_scratch_key);
  if (own[slot].size < size) {
    pthread_setspecific(scratch_key, own);
    free(own[slot].memory);
    if (posix_memalign(&own[slot].memory, size >> 17 ? HUGE_PAGE : 64, size)) own[slot].memory = NULL;
#ifdef __linux__
    else if (size >> 17) madvise(own[slot].memory, size, MADV_HUGEPAGE);
#endif
    own[slot].size = own[slot].memory ? size : 0;
  }
  return own[slot].memory;
}
