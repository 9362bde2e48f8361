/* The planner: which path computes a chunk of tokens, and how its work is divided between threads. */
#ifndef MPQ_PLANNER_H
#define MPQ_PLANNER_H
#include "tile.h"

typedef struct {
  int path;               /* PATH_* */
  int form;               /* TILE_* of decoded tiles */
  size_t tile_bytes;      /* of a decoded tile */
  int64_t panels, splits; /* work units: `block` panels at a time, for each of `splits` parts of the chunk's tokens */
  int block;
  int run;                /* tiles decoded before they are multiplied */
  int quantize_per_thread; /* each thread quantizes all tokens for itself; otherwise they share the work */
} mpq_plan;

/* The plan of `tokens` of a call; image patches are always quantized by all threads together. */
mpq_plan mpq_plan_chunk(const mpq_weight *, const mpq_call *, int64_t tokens, int is_images);
#endif
