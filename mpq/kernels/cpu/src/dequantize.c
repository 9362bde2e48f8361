/* Decode weights to float32: the whole matrix, for another library's product, or single rows, for embeddings. */
#include "level/common.h"
#include "threads.h"

/* Unpack a quad's 256 codes: 4 columns of row 0, of row 1, and so on. */
static void unpack_codes(const mpq_weight *weight, const uint8_t *from, uint8_t *codes) {
  const int bits = weight->bits, mask = (1 << bits) - 1;
  for (int step = 0; step < 4; step++, codes += 64) {
    uint8_t stored[64], *to = weight->kind == MPQ_TABLE_BF16 ? stored : codes;
    if (bits == 8) memcpy(to, from + 64 * step, 64);
    else if (bits == 4)
      for (int i = 0; i < 64; i++) to[i] = from[step / 2 * 64 + i] >> step % 2 * 4 & 15;
    else if (bits == 2)
      for (int i = 0; i < 64; i++) to[i] = from[i] >> 2 * step & 3;
    else
      for (int i = 0; i < 64; i++) { /* reads one byte past the codes: scales or the panel's padding */
        const uint8_t *at = from + step * 8 * bits + (i * bits >> 3);
        to[i] = (at[0] | at[1] << 8) >> (i * bits & 7) & mask;
      }
    if (weight->kind == MPQ_TABLE_BF16)
      for (int i = 0; i < 64; i++) codes[i] = stored[i / 16 * 16 + i % 4 / 2 * 8 + i % 16 / 4 * 2 + i % 2];
  }
}

/* The code at one row of a panel and one column of a quad. */
static int read_code(const mpq_weight *weight, const uint8_t *from, int row, int column) {
  const int bits = weight->bits, step = row / 16;
  int i = row % 16 * 4 + column;
  if (weight->kind == MPQ_TABLE_BF16) i = i / 16 * 16 + i % 4 / 2 * 8 + i % 16 / 4 * 2 + i % 2;
  if (bits == 8) return from[64 * step + i];
  if (bits == 4) return from[step / 2 * 64 + i] >> step % 2 * 4 & 15;
  if (bits == 2) return from[i] >> 2 * step & 3;
  const uint8_t *at = from + step * 8 * bits + (i * bits >> 3);
  return (at[0] | at[1] << 8) >> (i * bits & 7) & ((1 << bits) - 1);
}

/* One segment of a panel. */
typedef struct {
  const uint8_t *codes, *scales, *zeros; /* or NULL */
  int64_t column, columns;
} segment_view;

static segment_view find_segment(const mpq_weight *weight, const uint8_t *panel, int64_t index) {
  const size_t codes = mpq_code_bytes(weight), scales = (size_t)PANEL_ROWS * weight->scale_bytes;
  const size_t zeros = weight->zeros ? PANEL_ROWS : 0, count = weight->row_scales ? 1 : weight->segments;
  const size_t extras = weight->row_scales ? 0 : count * (scales + zeros);
  const uint8_t *tile_codes = panel + index / weight->segments * (extras + codes) + extras;
  const uint8_t *first = weight->row_scales ? panel + weight->tiles * codes : tile_codes - extras;
  const int64_t within = index % weight->segments, which = weight->row_scales ? 0 : within, column = index * weight->group;
  const int64_t columns_left = weight->cols - column;
  return (segment_view){.codes = tile_codes + within * (codes / weight->segments), .scales = first + which * scales,
                   .zeros = zeros ? first + count * scales + which * zeros : NULL, .column = column,
                   .columns = columns_left < weight->group ? columns_left : weight->group};
}

typedef struct {
  const mpq_weight *weight;
  const uint8_t *panels;
  const float *values; /* (2**bits,) by code */
  float tensor_scale;
  float *out; /* (rows, cols) */
  work_ranges ranges;
} dequantize_job;

static void dequantize_segment(const dequantize_job *work, int64_t panel, const segment_view *from) {
  const mpq_weight *weight = work->weight;
  const int64_t row = panel * PANEL_ROWS, left = weight->rows - row, rows = left < PANEL_ROWS ? left : PANEL_ROWS;
  const uint8_t *codes = from->codes, *zeros = from->zeros;
  float scale[PANEL_ROWS], values[256];
  uint8_t quad[256];
  for (int i = 0; i < PANEL_ROWS; i += 16)
    STORE(scale + i, load_scales(weight->scale_kind, from->scales, i) * work->tensor_scale);
  for (int64_t at = 0; at < from->columns; at += 4, codes += 32 * weight->bits) {
    const int count = from->columns - at < 4 ? (int)(from->columns - at) : 4;
    float *out = work->out + row * weight->cols + from->column + at;
    unpack_codes(weight, codes, quad);
    for (int i = 0; i < 256; i++) values[i] = (work->values[quad[i]] - (zeros ? zeros[i / 4] : 0)) * scale[i / 4];
    for (int64_t i = 0; i < rows; i++, out += weight->cols)
      if (count == 4) memcpy(out, values + 4 * i, 16);
      else memcpy(out, values + 4 * i, 4 * count);
  }
}

static void dequantize_panels(void *argument) {
  dequantize_job *work = argument;
  const mpq_weight *weight = work->weight;
  int own = join_range(&work->ranges);
  for (work_item panel; take_item(&work->ranges, &own, &panel);)
    for (int64_t i = 0; i * weight->group < weight->cols; i++) {
      const segment_view from = find_segment(weight, work->panels + panel.start * weight->panel_bytes, i);
      dequantize_segment(work, panel.start, &from);
    }
}

void mpq_dequantize(const mpq_weight *weight, const uint8_t *panels, const float *tensor_scale,
                    const float *values, float *out, int threads, mpq_parallel parallel) {
  dequantize_job work = {.weight = weight, .panels = panels, .values = values, .out = out};
  work.tensor_scale = tensor_scale ? *tensor_scale : 1;
  const int64_t count = (weight->rows + PANEL_ROWS - 1) / PANEL_ROWS;
  share_work(threads, parallel, dequantize_panels, &work, &work.ranges, count, 1);
}

int mpq_embedding(const mpq_weight *weight, const uint8_t *panels, const float *tensor_scale, const float *values,
                  const int64_t *rows, int64_t count, float *out) {
  for (int64_t chosen = 0; chosen < count; chosen++, out += weight->cols) {
    if (rows[chosen] < 0 || rows[chosen] >= weight->rows) return -1;
    const int row = (int)(rows[chosen] % PANEL_ROWS);
    for (int64_t i = 0; i * weight->group < weight->cols; i++) {
      const segment_view from = find_segment(weight, panels + rows[chosen] / PANEL_ROWS * weight->panel_bytes, i);
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
