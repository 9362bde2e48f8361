/* Threads: work divided into ranges, a team that spins between jobs, and memory that each thread keeps. */
#ifndef MPQ_THREADS_H
#define MPQ_THREADS_H
#include <stdatomic.h>

#include "tile.h"

/* Work divided into one range for each thread, so that a thread reads contiguous memory; a thread that has finished its
 * range takes items from the others. */
typedef struct {
  int64_t units;
  int block, ranges; /* an item has `block` units; a range's last TAIL_UNITS go one by one, so that threads end together */
  atomic_int arrived;
  struct {
    atomic_llong taken;
    char apart[56]; /* one cache line each */
  } range[MAX_THREADS];
} work_ranges;

/* Units start, start + step, ... below `end`; at most `block` of them. */
typedef struct {
  int64_t start, step, end;
} work_item;

/* Join as a thread of the work; returns its range. */
static inline int join_range(work_ranges *all) { return atomic_fetch_add(&all->arrived, 1) % all->ranges; }

/* Take the next item, from range `own` while it has one; 0 when none is left. */
int take_item(work_ranges *, int *own, work_item *);

/* Divide `units` into so many ranges, at most MAX_THREADS, from which threads take `block` at a time. */
void open_work(work_ranges *, int ranges, int64_t units, int block);

/* Run the function on several threads at once, one of them the caller's; with `parallel`, on its threads. */
void run_on_threads(mpq_parallel parallel, void (*function)(void *), void *work, int threads);

/* Divide `units` between threads, `block` at a time; the function takes items until none is left. */
void share_work(int threads, mpq_parallel parallel, void (*function)(void *), void *work, work_ranges *, int64_t units,
                int block);

/* Run a program on the calling thread while the others spin, waiting for jobs: `team_parallel` gives them one. */
void run_team(mpq_parallel parallel, void (*program)(void *), void *argument, int threads);
void team_parallel(void (*function)(void *), void *work, unsigned threads, unsigned flags);

/* Memory of at least `size` bytes, aligned to 64, that the thread keeps until it exits; NULL if out of memory. */
enum { SCRATCH_DECODED, SCRATCH_SUMS, SCRATCH_ACTIVATIONS, SCRATCH_PATCH, SCRATCH_DECODER, SCRATCH_SCORES, SCRATCH_SKIPPED, SCRATCH_ATTENTION,
       SCRATCH_PARTS, SCRATCH_SLOTS };
void *scratch(int slot, size_t size);
#endif
