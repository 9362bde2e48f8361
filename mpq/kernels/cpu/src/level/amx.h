/* The matrix unit's configuration and prefetching, for the int8 and bf16 products of the amx level. */
#ifndef MPQ_AMX_H
#define MPQ_AMX_H
#include "avx512.h"


#define AMX_TARGET                                                                                    \
  __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni," \
                        "avx512vbmi,gfni,fma,f16c,avx2")))
#define AMX_INLINE static inline __attribute__((always_inline)) AMX_TARGET

static _Thread_local int configured; /* tile configuration loaded on this thread */

/* Configure tiles: 0 and 1 activations of `first` and `second` tokens, `columns` bytes each; 2 and 3 weights; 4 to 7
 * sums, (first, second) tokens by (tile 2, tile 3) rows. */
AMX_INLINE void configure_tiles(int first, int second, int columns) {
  const int wanted = (first * 32 + second) * 128 + columns;
  if (configured == wanted) return;
  configured = wanted;
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config __attribute__((aligned(64))) = {0};
  const int rows[8] = {first, second, columns / 4, columns / 4, first, first, second, second};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.bytes[i] = rows[i] ? i < 2 ? columns : 64 : 0, config.rows[i] = rows[i];
  __asm__ volatile("" : : "r"(&config) : "memory"); /* the intrinsic declares only the first bytes as read */
  _tile_loadconfig(&config);
}

/* Prefetch `bytes` of the following tile into L2, stopping at `end`; returns where to continue. */
AMX_INLINE const uint8_t *prefetch_range(const uint8_t *next, int64_t bytes, const uint8_t *end) {
  for (const uint8_t *line = next; line < next + bytes && line < end; line += 64)
    _mm_prefetch((const char *)line, _MM_HINT_T1);
  return next + bytes;
}
#endif
