/* Whole weights as float32, for products that others compute. */

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
      for (int i = 0; i < 64; i++) { /* scales follow: there is a next byte */
        const uint8_t *at = from + step * 8 * bits + (i * bits >> 3);
        to[i] = (at[0] | at[1] << 8) >> (i * bits & 7) & mask;
      }
    if (weight->kind == MPQ_BFLOAT)
      for (int i = 0; i < 64; i++) codes[i] = stored[i / 16 * 16 + i % 4 / 2 * 8 + i % 16 / 4 * 2 + i % 2];
  }
}

typedef struct {
  const mpq_weight *weight;
  const uint8_t *panels;
  const float *values; /* of the codes */
  float tensor_scale;
  float *out; /* (rows, cols) */
  shares shares;
} expansion;

static void expand_segment(const expansion *work, int64_t panel, const uint8_t *codes, const uint8_t *scales,
                           const uint8_t *zeros, int64_t column) {
  const mpq_weight *weight = work->weight;
  const int64_t row = panel * MPQ_ROWS, left = weight->rows - row, rows = left < MPQ_ROWS ? left : MPQ_ROWS;
  float scale[MPQ_ROWS], values[256];
  uint8_t quad[256];
  for (int i = 0; i < MPQ_ROWS; i += 16)
    STORE(scale + i, load_scales(weight->scale_kind, scales, i) * work->tensor_scale);
  const int64_t all = weight->cols - column, end = all < weight->group ? all : weight->group;
  for (int64_t at = 0; at < end; at += 4, codes += 32 * weight->bits) {
    const int count = end - at < 4 ? (int)(end - at) : 4;
    float *out = work->out + row * weight->cols + column + at;
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
  const size_t codes = code_bytes(weight), scales = (size_t)MPQ_ROWS * weight->scale_bytes;
  const size_t zeros = weight->zeros ? MPQ_ROWS : 0;
  const size_t bytes = codes + (weight->row_scales ? 0 : weight->segments * (scales + zeros));
  int own = arrive(&work->shares);
  for (item panel; take(&work->shares, &own, &panel);) {
    const uint8_t *start = work->panels + panel.start * weight->panel_bytes;
    for (int64_t tile = 0; tile < weight->tiles; tile++)
      for (int segment = 0; segment < weight->segments; segment++) {
        const int64_t column = (tile * weight->segments + segment) * weight->group;
        if (column >= weight->cols) break;
        const uint8_t *near = start + tile * bytes, *first = weight->row_scales ? start + weight->tiles * codes : near + codes;
        const int which = weight->row_scales ? 0 : segment;
        const uint8_t *zero = zeros ? first + (weight->row_scales ? 1 : weight->segments) * scales + which * zeros : NULL;
        expand_segment(work, panel.start, near + segment * (codes / weight->segments), first + which * scales, zero, column);
      }
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
