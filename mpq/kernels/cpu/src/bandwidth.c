/* Read memory as fast as the kernels stream it. */
#include "threads.h"

typedef struct {
  const uint8_t *data;
  int64_t blocks;
  atomic_llong next, found;
} read_job;

static void read_blocks(void *argument) {
  read_job *work = argument;
  uint64_t all = 0;
  for (int64_t block; (block = atomic_fetch_add(&work->next, 1)) < work->blocks;) {
    const uint64_t *words = (const uint64_t *)(work->data + (block << 20));
    uint64_t some[8] = {0};
    for (int i = 0; i < 1 << 17; i += 8) {
      __builtin_prefetch(words + i + PREFETCH_L2_BYTES / 8, 0, 2);
      __builtin_prefetch(words + i + PREFETCH_L1_BYTES / 8);
      for (int j = 0; j < 8; j++) some[j] |= words[i + j];
    }
    for (int j = 0; j < 8; j++) all |= some[j];
  }
  atomic_fetch_or(&work->found, (long long)all);
}

int mpq_read(const uint8_t *data, int64_t size, int threads, mpq_parallel parallel) {
  read_job work = {.data = data, .blocks = size >> 20};
  run_on_threads(parallel, read_blocks, &work, parallel ? threads : 1);
  return atomic_load(&work.found) != 0;
}
