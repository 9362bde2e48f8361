/* Scalar float32 and bf16. */
#ifndef MPQ_NUMBERS_H
#define MPQ_NUMBERS_H
#include <string.h>

#include "tile.h"

static inline float load_float(const void *from, int is_bf16, int64_t index) {
  if (!is_bf16) return ((const float *)from)[index];
  uint32_t word = (uint32_t)((const uint16_t *)from)[index] << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

static inline uint16_t to_bf16(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if (value != value) return (uint16_t)(word >> 16 | 64);
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static inline void store_float(void *to, int is_bf16, int64_t index, float value) {
  if (is_bf16) ((uint16_t *)to)[index] = to_bf16(value);
  else ((float *)to)[index] = value;
}
#endif
