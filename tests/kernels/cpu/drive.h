/* Cases, inputs and checks of the driver's parts. */
#ifndef DRIVE_H
#define DRIVE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

typedef struct {
  mpq_weight weight;
  float values[256], *matrix;
  uint8_t *panels;
} test_case;

enum {
  FAILED = 1, NOT_A_NUMBER, GAP_WRITTEN, LEVELS_DIFFER, PATCHES_DIFFER, WEIGHTS_DIFFER, THREADS_DIFFER, NO_CASE,
      NOT_SKIPPED
};
#define TRY(call) do { const int failed_ = (call); if (failed_) return failed_; } while (0)

static uint64_t hash;

static void *filled(size_t size, int byte) { return memset(malloc(size), byte, size); }

static void remember(const uint8_t *bytes, size_t size) {
  for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
}

static void put(void *to, int64_t index, int is_bf16, float value) {
  const int element = is_bf16 ? 2 : 4;
  memcpy((uint8_t *)to + index * element, (uint8_t *)&value + 4 - element, element);
}

static float number(int64_t index) { return (float)((index * 37) % 101) / 50 - 1; }

static void *numbers(int64_t count, int is_bf16) {
  void *made = malloc(count * (is_bf16 ? 2 : 4));
  for (int64_t i = 0; i < count; i++) put(made, i, is_bf16, number(i + count));
  return made;
}

/* Every element of rows `stride` apart is a number, and what stands between them is as it was. */
static int look(const uint8_t *out, int64_t tokens, int64_t rows, int64_t stride, int element) {
  for (int64_t at = 0; at < tokens * stride; at++) {
    float value = 0;
    memcpy((uint8_t *)&value + 4 - element, out + at * element, element);
    if (at % stride < rows && value != value) return NOT_A_NUMBER;
    for (int i = 0; i < element && at % stride >= rows; i++)
      if (out[at * element + i] != 0xff) return GAP_WRITTEN;
  }
  return 0;
}

static int alike(int level) {
  const char *name = mpq_level_name(level);
  return !strcmp(name, "avx2") || !strcmp(name, "avxvnni") || !strcmp(name, "neon");
}

#endif
