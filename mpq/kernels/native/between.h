/* What a decoder computes for one token between its linear layers, in float32, compiled once for each level. A number
 * that is not finite stays so: the linear layer that reads it finds it. */

#include <math.h>

#define MPQ_HEAD 1024 /* numbers of a head at most */

/* The sum in one order at every level: halves are added until four numbers are left. */
INLINE float sum16(vfloat x) {
  typedef float half __attribute__((vector_size(32)));
  typedef float quarter __attribute__((vector_size(16)));
  half halves[2];
  memcpy(halves, &x, sizeof x);
  halves[0] += halves[1];
  quarter quarters[2];
  memcpy(quarters, halves, sizeof quarters);
  quarters[0] += quarters[1];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

INLINE float dot_of(const float *x, const float *y, int64_t count) {
  vfloat sums = {0};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sums += LOAD(vfloat, x + i) * LOAD(vfloat, y + i);
  float sum = sum16(sums);
  for (; i < count; i++) sum += x[i] * y[i];
  return sum;
}

/* e**x to about 2**-22 of it, between 2**-126 and 2**127; NaN for a number that is not finite. */
INLINE vfloat exponential(vfloat x) {
  const vint below = x < -87.f, above = x > 88.f;
  const vint least = below & (vint)((vfloat){0} - 87.f), most = above & (vint)((vfloat){0} + 88.f);
  const vfloat inside = (vfloat)(((vint)x & ~(below | above)) | least | most);
  const vfloat rounded = inside * 0x1.715476p0f + 0x1.8p23f, whole = rounded - 0x1.8p23f;
  const vfloat rest = inside - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
  vfloat power = rest * (1 / 720.f) + 1 / 120.f;
  power = power * rest + 1 / 24.f;
  power = power * rest + 1 / 6.f;
  power = power * rest + 0.5f;
  power = power * rest * rest + rest + 1;
  return (vfloat)((vint)power + ((vint)rounded << 23)) + (x - x);
}

/* Root mean square normalization (Zhang and Sennrich 2019, arXiv 1910.07467). */
static TARGET void normalize(const float *x, const float *weight, float epsilon, int64_t count, float *out) {
  const float factor = 1 / sqrtf(dot_of(x, x, count) / count + epsilon);
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}

/* gate = silu(gate) * up, for whole vectors. */
static TARGET void activate(float *gate, const float *up, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const vfloat x = LOAD(vfloat, gate + i);
    STORE(gate + i, x / (1 + exponential(-x)) * LOAD(vfloat, up + i));
  }
}

INLINE const float *read_row(const void *rows, int bfloat, int64_t start, int64_t width, float *row) {
  if (!bfloat) return (const float *)rows + start;
  const uint16_t *from = (const uint16_t *)rows + start;
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) STORE(row + i, (vfloat)(__builtin_convertvector(LOAD(vshort, from + i), vuint) << 16));
  for (; i < width; i++) {
    const uint32_t word = (uint32_t)from[i] << 16;
    memcpy(row + i, &word, 4);
  }
  return row;
}

/* Attention of the query heads that share a key head; `scores` has room for one head's, in whole vectors. */
static TARGET void attend(const mpq_attention *all, int64_t key_head, float *scores) {
  const int64_t width = all->width, group = all->heads / all->key_heads, start = key_head * all->capacity * width;
  const float scale = 1 / sqrtf(width);
  float row[MPQ_HEAD] __attribute__((aligned(64)));
  for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
    const float *q = all->q + head * width;
    float *out = all->out + head * width, largest = -INFINITY;
    int64_t length = all->length;
    for (int64_t i = 0; i < length; i++) {
      scores[i] = dot_of(q, read_row(all->keys, all->bfloat, start + i * width, width, row), width) * scale;
      if (scores[i] > largest) largest = scores[i];
    }
    for (; length % 16; length++) scores[length] = largest;
    for (int64_t i = 0; i < length; i += 16) STORE(scores + i, exponential(LOAD(vfloat, scores + i) - largest));
    length = all->length;
    float total = 0;
    memset(out, 0, width * sizeof *out);
    for (int64_t i = 0; i < length; i++) {
      const float *value = read_row(all->values, all->bfloat, start + i * width, width, row);
      total += scores[i];
      for (int64_t j = 0; j < width; j++) out[j] += scores[i] * value[j];
    }
    for (int64_t j = 0; j < width; j++) out[j] /= total;
  }
}

static const mpq_between between = {normalize, activate, attend};
