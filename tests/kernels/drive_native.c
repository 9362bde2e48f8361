/* Runs each case, a file of an mpq_weight and its panels, at every level, for several batches, on exact allocations. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mpq.h"

typedef struct { /* as linear.c has it */
  const uint8_t *panels;
  const float *tensor_scale;
  const void *x;
  int64_t tokens, stride;
  const void *bias;
  void *out;
  int64_t out_stride;
  int32_t bfloat, bias_bfloat, out_bfloat, planes, threads, level;
  int8_t *unfit;
  void *parallel;
} call;

int64_t mpq_linear(const mpq_weight *, const call *);
int mpq_best_level(void);

static int drive(int count, char **names) {
  const int batches[] = {1, 2, 3, 4, 9, 40, 257};
  for (int i = 1; i < count; i++) {
    FILE *file = fopen(names[i], "rb");
    mpq_weight weight;
    if (!file || fread(&weight, sizeof weight, 1, file) != 1) return 1;
    size_t size = (weight.rows + MPQ_ROWS - 1) / MPQ_ROWS * weight.panel_bytes;
    uint8_t *panels = malloc(size);
    if (fread(panels, 1, size, file) != size || fgetc(file) != EOF) return 2;
    fclose(file);
    for (int level = 0; level <= mpq_best_level(); level++)
      for (size_t batch = 0; batch < sizeof batches / sizeof *batches; batch++)
        for (int variant = 0; variant < 4; variant++) {
          const int bfloat = variant & 1, element = bfloat ? 2 : 4;
          const int64_t tokens = batches[batch], inputs = tokens * weight.cols, outputs = tokens * weight.rows;
          uint8_t *x = malloc(inputs * element), *out = malloc(outputs * element), *bias = calloc(weight.rows, element);
          int8_t *unfit = malloc(tokens);
          memset(out, 0xff, outputs * element); /* NaN */
          for (int64_t j = 0; j < inputs; j++) {
            float value = (float)((j * 37) % 101) / 50 - 1;
            memcpy(x + j * element, (uint8_t *)&value + 4 - element, element);
          }
          const call one = {panels, NULL, x, tokens, weight.cols, bias, out, weight.rows, bfloat, bfloat, bfloat,
                            1 + (variant >> 1), 3, level, unfit, NULL};
          if (mpq_linear(&weight, &one) != 0) return 3;
          for (int64_t j = 0; j < outputs; j++) {
            float value = 0;
            memcpy((uint8_t *)&value + 4 - element, out + j * element, element);
            if (value != value) return 4;
          }
          free(x), free(out), free(bias), free(unfit);
        }
    free(panels);
    puts("done");
  }
  return 0;
}

static int count;
static char **names;
static int result;

static void *in_a_thread(void *none) { /* so that its memory is seen to be given back */
  result = drive(count, names);
  return none;
}

int main(int argument_count, char **arguments) {
  pthread_t thread;
  count = argument_count, names = arguments;
  pthread_create(&thread, NULL, in_a_thread, NULL);
  pthread_join(thread, NULL);
  return result;
}
