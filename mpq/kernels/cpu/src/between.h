/* What a decoder computes for one token between its linear layers, in float32, compiled once for each level. A number
 * that is not finite stays so: the linear layer that reads it finds it. */

#include <math.h>

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

INLINE vfloat real16(const void *from, const int bfloat, int64_t i) {
  if (!bfloat) return LOAD(vfloat, (const float *)from + i);
  return (vfloat)(__builtin_convertvector(LOAD(vshort, (const uint16_t *)from + i), vuint) << 16);
}

INLINE float real(const void *from, const int bfloat, int64_t i) {
  if (!bfloat) return ((const float *)from)[i];
  const uint32_t word = (uint32_t)((const uint16_t *)from)[i] << 16;
  return LOAD(float, &word);
}

/* Products of `count` heads with every key: scores (count, room). */
INLINE void score(const mpq_attention *all, const float *q, const int bfloat, int64_t start, const int count,
                  float *scores, int64_t room) {
  const int64_t width = all->width;
  const float scale = 1 / sqrtf(width);
  for (int64_t i = 0; i < all->length; i++, start += width) {
    vfloat sums[4];
    int64_t j = 0;
    for (int head = 0; head < count; head++) sums[head] = (vfloat){0};
    for (; j + 16 <= width; j += 16) {
      const vfloat key = real16(all->keys, bfloat, start + j);
      for (int head = 0; head < count; head++) sums[head] += key * LOAD(vfloat, q + head * width + j);
    }
    for (int head = 0; head < count; head++) {
      float sum = sum16(sums[head]);
      for (int64_t k = j; k < width; k++) sum += real(all->keys, bfloat, start + k) * q[head * width + k];
      scores[head * room + i] = sum * scale;
    }
  }
}

/* Exponentials of one head's scores over the largest, zeros behind them; returns their sum. */
INLINE float soften(float *scores, int64_t length, int64_t room) {
  for (int64_t i = length; i < room; i++) scores[i] = scores[0];
  vfloat largest = LOAD(vfloat, scores), total = {0};
  for (int64_t i = 16; i < room; i += 16) {
    const vfloat x = LOAD(vfloat, scores + i);
    const vint above = x > largest;
    largest = (vfloat)(((vint)x & above) | ((vint)largest & ~above));
  }
  float most = largest[0];
  for (int i = 1; i < 16; i++) most = largest[i] > most ? largest[i] : most;
  for (int64_t i = 0; i < room; i += 16) STORE(scores + i, exponential(LOAD(vfloat, scores + i) - most));
  for (int64_t i = length; i < room; i++) scores[i] = 0;
  for (int64_t i = 0; i < room; i += 16) total += LOAD(vfloat, scores + i);
  return sum16(total);
}

/* `vectors` of sixteen numbers of each of `count` heads' mean values. */
INLINE void blend(const mpq_attention *all, const float *scores, int64_t room, const float *totals, const int bfloat,
                  int64_t start, const int count, const int vectors, float *out) {
  vfloat sums[4][2];
  for (int i = 0; i < count * vectors; i++) sums[i / vectors][i % vectors] = (vfloat){0};
  for (int64_t i = 0; i < all->length; i++, start += all->width)
    for (int vector = 0; vector < vectors; vector++) {
      const vfloat value = real16(all->values, bfloat, start + 16 * vector);
      for (int head = 0; head < count; head++) sums[head][vector] += value * scores[head * room + i];
    }
  for (int head = 0; head < count; head++)
    for (int vector = 0; vector < vectors; vector++)
      STORE(out + head * all->width + 16 * vector, sums[head][vector] / totals[head]);
}

INLINE void attend_some(const mpq_attention *all, int64_t head, int64_t start, const int bfloat, const int count,
                        float *scores) {
  const int64_t width = all->width, room = (all->length + 15) / 16 * 16;
  float totals[4], *out = all->out + head * width;
  score(all, all->q + head * width, bfloat, start, count, scores, room);
  for (int i = 0; i < count; i++) totals[i] = soften(scores + i * room, all->length, room);
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) blend(all, scores, room, totals, bfloat, start + j, count, 2, out + j);
  for (; j + 16 <= width; j += 16) blend(all, scores, room, totals, bfloat, start + j, count, 1, out + j);
  for (; j < width; j++)
    for (int i = 0; i < count; i++) {
      float sum = 0;
      for (int64_t k = 0; k < all->length; k++)
        sum += real(all->values, bfloat, start + k * width + j) * scores[i * room + k];
      out[i * width + j] = sum / totals[i];
    }
}

/* Attention of the query heads that share a key head; `scores` has room for four heads', in whole vectors. */
static TARGET void attend(const mpq_attention *all, int64_t key_head, float *scores) {
  const int64_t group = all->heads / all->key_heads, start = key_head * all->capacity * all->width;
  int64_t head = key_head * group, end = head + group;
  for (; head + 4 <= end; head += 4)
    if (all->bfloat) attend_some(all, head, start, 1, 4, scores);
    else attend_some(all, head, start, 0, 4, scores);
  for (; head < end; head++)
    if (all->bfloat) attend_some(all, head, start, 1, 1, scores);
    else attend_some(all, head, start, 0, 1, scores);
}

static const mpq_between between = {normalize, activate, attend};
