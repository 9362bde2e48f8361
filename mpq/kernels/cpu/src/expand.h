/* Weights as float32: whole, for products that others compute, or single rows, for embeddings. */

/* A quad's 256 codes: 4 columns of row 0, of row 1, and so on. */
static void read_quad(const mpq_weight *weight, const uint8_t *from, uint8_t *codes) {
  const int bits = weight->bits, mask = (1 << bits) - 1;
  for (int step = 0; step < 4; step++, codes += 64) {
    uint8_t stored[64], *to = weight->kind == MPQ_BFLOAT ? stored : codes;
    if (bits == 8) memcpy(to, from + 64 * step, 64);
    else if (bits == 4)
      for (int i = 0; i < 64; i++) to[i] = from[step / 2 * 64 + i] >> step % 2 * 4 & 15;
    else if (bits == 2)
      for (int i = 0; i < 64; i++) to[i] = from[i] >> 2 * step & 3;
    else
      for (int i = 0; i < 64; i++) { /* there is a next byte, of scales or of the panel's end */
        const uint8_t *at = from + step * 8 * bits + (i * bits >> 3);
        to[i] = (at[0] | at[1] << 8) >> (i * bits & 7) & mask;
      }
    if (weight->kind == MPQ_BFLOAT)
      for (int i = 0; i < 64; i++) codes[i] = stored[i / 16 * 16 + i % 4 / 2 * 8 + i % 16 / 4 * 2 + i % 2];
  }
}

/* The code of one of a panel's rows in one of a quad's columns. */
static int read_code(const mpq_weight *weight, const uint8_t *from, int row, int column) {
  const int bits = weight->bits, step = row / 16;
  int i = row % 16 * 4 + column;
  if (weight->kind == MPQ_BFLOAT) i = i / 16 * 16 + i % 4 / 2 * 8 + i % 16 / 4 * 2 + i % 2;
  if (bits == 8) return from[64 * step + i];
  if (bits == 4) return from[step / 2 * 64 + i] >> step % 2 * 4 & 15;
  if (bits == 2) return from[i] >> 2 * step & 3;
  const uint8_t *at = from + step * 8 * bits + (i * bits >> 3);
  return (at[0] | at[1] << 8) >> (i * bits & 7) & ((1 << bits) - 1);
}

/* One of a panel's segments. */
typedef struct {
  const uint8_t *codes, *scales, *zeros; /* or NULL */
  int64_t column, columns;
} stretch;

static stretch find_segment(const mpq_weight *weight, const uint8_t *panel, int64_t index) {
  const size_t codes = code_bytes(weight), scales = (size_t)MPQ_ROWS * weight->scale_bytes;
  const size_t zeros = weight->zeros ? MPQ_ROWS : 0, count = weight->row_scales ? 1 : weight->segments;
  const size_t extras = weight->row_scales ? 0 : count * (scales + zeros);
  const uint8_t *near = panel + index / weight->segments * (extras + codes) + extras;
  const uint8_t *first = weight->row_scales ? panel + weight->tiles * codes : near - extras;
  const int64_t within = index % weight->segments, which = weight->row_scales ? 0 : within, column = index * weight->group;
  const int64_t left = weight->cols - column;
  return (stretch){.codes = near + within * (codes / weight->segments), .scales = first + which * scales,
                   .zeros = zeros ? first + count * scales + which * zeros : NULL, .column = column,
                   .columns = left < weight->group ? left : weight->group};
}

typedef struct {
  const mpq_weight *weight;
  const uint8_t *panels;
  const float *values; /* of the codes */
  float tensor_scale;
  float *out; /* (rows, cols) */
  shares shares;
} expansion;

static void expand_segment(const expansion *work, int64_t panel, const stretch *from) {
  const mpq_weight *weight = work->weight;
  const int64_t row = panel * MPQ_ROWS, left = weight->rows - row, rows = left < MPQ_ROWS ? left : MPQ_ROWS;
  const uint8_t *codes = from->codes, *zeros = from->zeros;
  float scale[MPQ_ROWS], values[256];
  uint8_t quad[256];
  for (int i = 0; i < MPQ_ROWS; i += 16)
    STORE(scale + i, load_scales(weight->scale_kind, from->scales, i) * work->tensor_scale);
  for (int64_t at = 0; at < from->columns; at += 4, codes += 32 * weight->bits) {
    const int count = from->columns - at < 4 ? (int)(from->columns - at) : 4;
    float *out = work->out + row * weight->cols + from->column + at;
    read_quad(weight, codes, quad);
    for (int i = 0; i < 256; i++) values[i] = (work->values[quad[i]] - (zeros ? zeros[i / 4] : 0)) * scale[i / 4];
    for (int64_t i = 0; i < rows; i++, out += weight->cols)
      if (count == 4) memcpy(out, values + 4 * i, 16);
      else memcpy(out, values + 4 * i, 4 * count);
  }
}

static void expand_panels(void *argument) {
  expansion *work = argument;
  const mpq_weight *weight = work->weight;
  int own = arrive(&work->shares);
  for (item panel; take(&work->shares, &own, &panel);)
    for (int64_t i = 0; i * weight->group < weight->cols; i++) {
      const stretch from = find_segment(weight, work->panels + panel.start * weight->panel_bytes, i);
      expand_segment(work, panel.start, &from);
    }
}

/* out (rows, cols) = the weight, each code as the number that `values` has for it. */
EXPORT void mpq_dequantize(const mpq_weight *weight, const uint8_t *panels, const float *tensor_scale,
                           const float *values, float *out, int threads, mpq_parallel parallel) {
  const mpq_call call = {.threads = threads, .parallel = parallel};
  expansion work = {.weight = weight, .panels = panels, .values = values, .out = out};
  work.tensor_scale = tensor_scale ? *tensor_scale : 1;
  run(&call, expand_panels, &work, &work.shares, (weight->rows + MPQ_ROWS - 1) / MPQ_ROWS, 1);
}

/* out (count, cols) = the chosen rows; -1 where there is no such row. */
EXPORT int mpq_embedding(const mpq_weight *weight, const uint8_t *panels, const float *tensor_scale, const float *values,
                         const int64_t *rows, int64_t count, float *out) {
  for (int64_t chosen = 0; chosen < count; chosen++, out += weight->cols) {
    if (rows[chosen] < 0 || rows[chosen] >= weight->rows) return -1;
    const int row = (int)(rows[chosen] % MPQ_ROWS);
    for (int64_t i = 0; i * weight->group < weight->cols; i++) {
      const stretch from = find_segment(weight, panels + rows[chosen] / MPQ_ROWS * weight->panel_bytes, i);
      const float own = load_scales(weight->scale_kind, from.scales, row & ~15)[row & 15];
      const float scale = own * (tensor_scale ? *tensor_scale : 1);
      for (int64_t at = 0; at < from.columns; at++) {
        const int code = read_code(weight, from.codes + at / 4 * 32 * weight->bits, row, (int)(at & 3));
        out[from.column + at] = (values[code] - (from.zeros ? from.zeros[row] : 0)) * scale;
      }
    }
  }
  return 0;
}
