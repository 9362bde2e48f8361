/* A block's levels as strips of steps, the operand of integer dot products. */
#ifndef MPQ_STRIPS_H
#define MPQ_STRIPS_H
#include "exponential.h"

/* Strips of `steps` steps of levels, 64 bytes each, `apart` bytes apart; or of nibbles, two steps in 64 bytes.
 * `ahead` is where the stream has the same codes one block later, to be prefetched, or NULL. */
typedef struct {
  const uint8_t *levels, *ahead;
  int64_t apart, steps;
  int64_t ahead_apart, ahead_step; /* of the stream: bytes of a strip and of a step */
  int nibbles;
} level_strips;

INLINE void prefetch_step(const level_strips *from, int strip, int64_t step) {
  if (from->ahead) __builtin_prefetch(from->ahead + strip * from->ahead_apart + step * from->ahead_step, 0, 2);
}
#endif
