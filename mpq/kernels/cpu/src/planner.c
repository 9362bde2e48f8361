/* The planner: see planner.h. */
#include "planner.h"

/* Thresholds were measured with two threads on 4096 x 4096 weights, on a Xeon with AMX and AVX-512 VNNI
 * (experiments/benchmarks/bench_cpu_kernels.py). A row is one int8 plane of one token. */
#define FUSED_MAX_TOKENS 4       /* sums that fit registers, with at most one more pass over the tile */
#define FUSED_MAX_ROWS 6         /* in one pass; for the shortest codes AMX is faster than a second one */
#define FUSED_MAX_ROWS_INT16 4   /* 16-bit levels need two sums for each row */
#define FUSED_ALL_ROWS_MIN_BITS 4 /* longer codes: two passes over codes beat decoding for AMX */
#define MANY_TOKENS 64           /* products outweigh decoding: panels share a pass over the activations */
#define BF16_MIN_TOKENS 8        /* fewer tokens do not amortize decoding to bf16 */
#define BF16_MIN_TOKENS_HALF 9   /* groups of 32 fill half a step of the int8 unit: bf16 pays early, for one int8 plane, */
#define BF16_MIN_TOKENS_HALF_2_PLANES 17 /* for two planes, */
#define BF16_MIN_TOKENS_HALF_2_TERMS 65  /* and late when the weight takes two bf16 passes */
#define BF16_MIN_TOKENS_INT16 17 /* 16-bit levels, when one bf16 pass replaces two or three int8 passes */
#define BF16_MIN_TOKENS_STEP 64  /* bf16 activations, one pass against two: scales are per row, or per step of 64 columns */
#define BF16_MIN_TOKENS_LONG 128 /* other group sizes */
#define INT8_MIN_ROWS 17         /* more rows than one tile of activations holds */
#define INT8_MIN_ROWS_8_BITS 11  /* int8 weights, which the signed layout must still copy */
#define SMALL_MIN_ROWS 6         /* fewer rows leave most of an activation tile empty */

/* Conditions of a rule, one bit for each case. */
enum { NEEDS_FUSED = 1, NEEDS_AMX = 2, NEEDS_NO_AMX = 4 };
enum { BF16_MAPPED = 1, BF16_OTHER = 2, BYTES = 4, INT16 = 8 }; /* levels; a mapped bf16 is decodable in registers */
enum { ODD = 1, HALF = 2, STEP = 4, LONG = 8, ROW = 16 };       /* columns of a scale: 32, 64, other multiples of 64, all */
enum { FP32_1_PLANE = 1, FP32_2_PLANES = 2, BF16_1_PLANE = 4, BF16_2_PLANES = 8 }; /* activations */
#define BF16 (BF16_MAPPED | BF16_OTHER)
#define ONE_PLANE (FP32_1_PLANE | BF16_1_PLANE)
#define TWO_PLANES (FP32_2_PLANES | BF16_2_PLANES)
#define NOT_ODD (HALF | STEP | LONG | ROW)

typedef struct {
  int path, needs, levels;
  int columns, activations, bf16_terms, min_bits; /* 0: any */
  int64_t max_tokens, min_tokens, max_rows, min_rows; /* 0: no limit */
} rule;

/* (level, kind, tokens) to a path: the first rule that matches decides. */
static const rule rules[] = {
    {PATH_FUSED, NEEDS_FUSED, BF16_MAPPED, .max_tokens = FUSED_MAX_TOKENS},
    {PATH_FUSED, NEEDS_FUSED, INT16, .max_tokens = FUSED_MAX_TOKENS, .max_rows = FUSED_MAX_ROWS_INT16},
    {PATH_FUSED, NEEDS_FUSED, BYTES, .max_tokens = FUSED_MAX_TOKENS, .max_rows = FUSED_MAX_ROWS},
    {PATH_FUSED, NEEDS_FUSED, BYTES, .max_tokens = FUSED_MAX_TOKENS, .min_bits = FUSED_ALL_ROWS_MIN_BITS},
    {PATH_FUSED, NEEDS_FUSED, BYTES, .max_tokens = FUSED_MAX_TOKENS, .columns = ODD | HALF},
    {PATH_FUSED, NEEDS_FUSED | NEEDS_NO_AMX, BYTES, .max_tokens = FUSED_MAX_TOKENS},

    {PATH_AMX_BF16, NEEDS_AMX, BF16, .min_tokens = BF16_MIN_TOKENS},
    {PATH_AMX_BF16, NEEDS_AMX, BYTES | INT16, .columns = ODD, .min_tokens = BF16_MIN_TOKENS},
    {PATH_AMX_BF16, NEEDS_AMX, BYTES | INT16, .columns = HALF, .activations = ONE_PLANE, .bf16_terms = 1,
     .min_tokens = BF16_MIN_TOKENS_HALF},
    {PATH_AMX_BF16, NEEDS_AMX, BYTES | INT16, .columns = HALF, .activations = TWO_PLANES, .bf16_terms = 1,
     .min_tokens = BF16_MIN_TOKENS_HALF_2_PLANES},
    {PATH_AMX_BF16, NEEDS_AMX, BYTES | INT16, .columns = HALF, .bf16_terms = 2, .min_tokens = BF16_MIN_TOKENS_HALF_2_TERMS},
    {PATH_AMX_BF16, NEEDS_AMX, INT16, .activations = ONE_PLANE | BF16_2_PLANES, .min_tokens = BF16_MIN_TOKENS_INT16},
    {PATH_AMX_BF16, NEEDS_AMX, BYTES, .columns = STEP | ROW, .activations = BF16_2_PLANES, .min_tokens = BF16_MIN_TOKENS_STEP},
    {PATH_AMX_BF16, NEEDS_AMX, BYTES, .columns = LONG, .activations = BF16_2_PLANES, .min_tokens = BF16_MIN_TOKENS_LONG},

    {PATH_AMX_INT8, NEEDS_AMX, BYTES, .columns = NOT_ODD, .min_bits = 8, .min_rows = INT8_MIN_ROWS_8_BITS},
    {PATH_AMX_INT8, NEEDS_AMX, BYTES | INT16, .columns = NOT_ODD, .min_rows = INT8_MIN_ROWS},
    {PATH_AMX_SMALL, NEEDS_AMX, INT16, .columns = NOT_ODD},
    {PATH_AMX_SMALL, NEEDS_AMX, BYTES, .columns = NOT_ODD, .min_rows = SMALL_MIN_ROWS},
    {PATH_VECTORS, 0, BF16 | BYTES | INT16, .columns = 0},
};

static int matches(const rule *one, const rule *given) {
  return !(one->needs & ~given->needs) && one->levels & given->levels &&
         (!one->columns || one->columns & given->columns) &&
         (!one->activations || one->activations & given->activations) &&
         (!one->bf16_terms || one->bf16_terms == given->bf16_terms) && given->min_bits >= one->min_bits &&
         (!one->max_tokens || given->max_tokens <= one->max_tokens) && given->max_tokens >= one->min_tokens &&
         (!one->max_rows || given->max_rows <= one->max_rows) && given->max_rows >= one->min_rows;
}

static int find_path(const mpq_weight *weight, const mpq_level *level, int64_t tokens, int planes, int x_is_bf16) {
  const rule given = {
      .needs = (level->has_fused ? NEEDS_FUSED : 0) | (level->has_bf16 ? NEEDS_AMX : NEEDS_NO_AMX),
      .levels = weight->kind == MPQ_TABLE_BF16 ? (weight->normal_mask ? BF16_MAPPED : BF16_OTHER)
                : weight->kind == MPQ_TABLE16  ? INT16
                                               : BYTES,
      .columns = weight->row_scales            ? ROW
                 : weight->segment == 32       ? HALF
                 : weight->segment % 64        ? ODD
                 : weight->segment == 64       ? STEP
                                               : LONG,
      .activations = x_is_bf16 ? (planes == 1 ? BF16_1_PLANE : BF16_2_PLANES)
                               : (planes == 1 ? FP32_1_PLANE : FP32_2_PLANES),
      .bf16_terms = weight->bf16_terms, .min_bits = weight->bits, .max_tokens = tokens, .max_rows = tokens * planes,
  };
  const rule *one = rules;
  while (!matches(one, &given)) one++;
  return one->path;
}

/* The form that a path's tiles are decoded to. The matrix unit multiplies signed by signed bytes, or signed by
 * unsigned: 16-bit levels are always two planes of signed bytes there, 8-bit ones where a signed tile is multiplied
 * often enough. */
static int form_of(int path, int kind) {
  switch (path) {
    case PATH_FUSED: return TILE_CODES;
    case PATH_AMX_BF16: return TILE_BF16;
    case PATH_AMX_INT8: return TILE_SIGNED;
    case PATH_AMX_SMALL: return kind == MPQ_TABLE16 ? TILE_SIGNED : TILE_LEVELS;
    default: return TILE_LEVELS;
  }
}

mpq_plan mpq_plan_chunk(const mpq_weight *weight, const mpq_call *call, int64_t tokens, int is_images) {
  const int path = find_path(weight, mpq_levels[call->level], tokens, call->planes, call->x_is_bf16), threads = call->threads;
  const int bf16 = path == PATH_AMX_BF16, fused = path == PATH_FUSED, many = tokens >= MANY_TOKENS;
  mpq_plan plan = {.path = path, .form = form_of(path, weight->kind)};
  plan.tile_bytes = fused ? 0 : 128 * (size_t)mpq_bf16_columns(weight) * (bf16 ? weight->bf16_terms : 1);
  plan.quantize_per_thread = tokens < SHARED_QUANTIZE_MIN_TOKENS && !is_images;
  plan.panels = (weight->rows + PANEL_ROWS - 1) / PANEL_ROWS;
  plan.splits = plan.panels >= 4 * threads ? 1 : (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
  plan.run = bf16 && many ? RUN_TILES : 1;
  plan.block = plan.splits > 1 ? 1 : many ? BLOCK_PANELS : fused ? (weight->bits < 4 ? 2 : 1) * PANEL_STREAMS : 1;
  while (plan.block > 1 && plan.block * (fused ? 1 : 2) * threads > plan.panels) plan.block /= 2;
  return plan;
}

int mpq_path(const mpq_weight *weight, int level, int64_t tokens, int planes, int x_is_bf16) {
  return find_path(weight, mpq_levels[level], tokens, planes, x_is_bf16);
}
