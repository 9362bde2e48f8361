/* Calls by PyTorch's dispatcher, of which a stand-in on the heap shows leaks and double frees to the sanitizers. */
#include "drive.h"

/* What torch_dispatch.c calls of PyTorch, on objects of the heap: the sanitizers see what is lost or dropped twice. */
typedef uint64_t stable_value;
typedef struct {
  void *data;
  int64_t dims, sizes[2], strides[2];
  int32_t type; /* 1: float32; 2: bfloat16 */
} tensor;

static void (*kernel)(stable_value *, uint64_t, uint64_t);
static int forwarded;

static int32_t make_library(const char *space, const char *key, const char *file, uint32_t line, void **out) {
  (void)space, (void)key, (void)file, (void)line;
  *out = &kernel;
  return 0;
}
static int32_t implement(void *library, const char *name, void (*function)(stable_value *, uint64_t, uint64_t)) {
  (void)library;
  if (!strcmp(name, "linear")) kernel = function; /* linear_parts: tests/kernels/cpu/test_dispatch.py */
  return 0;
}
static int32_t drop_tensor(tensor *t) { free(t->data), free(t); return 0; }
static int32_t drop(void *object) { free(object); return 0; }
/* owns its arguments, as any op */
static int32_t forward(const char *name, const char *overload, stable_value *stack) {
  (void)name, (void)overload;
  stable_value *weight = (stable_value *)stack[1], *bias = (stable_value *)stack[2];
  drop_tensor((tensor *)stack[0]), drop_tensor((tensor *)weight[0]), free(weight);
  if (bias) drop_tensor((tensor *)*bias), free(bias);
  free((void *)stack[3]), free((void *)stack[6]), free((void *)stack[7]);
  forwarded++, stack[0] = 0;
  return 0;
}
static void check(_Bool fine, const char *f, const char *file, uint32_t line, const char *text) {
  (void)fine, (void)f, (void)file, (void)line, (void)text;
}
static const char *last_error(void) { return ""; }
static int32_t list_size(stable_value *list, size_t *out) { (void)list; *out = 1; return 0; }
static int32_t list_item(stable_value *list, size_t i, stable_value *out) { *out = list[i]; return 0; }
static int32_t string_of(const char *text, const char **out) { *out = text; return 0; }
static int32_t data_of(tensor *t, void **out) { *out = t->data; return 0; }
static int32_t dims_of(tensor *t, int64_t *out) { *out = t->dims; return 0; }
static int32_t sizes_of(tensor *t, int64_t **out) { *out = t->sizes; return 0; }
static int32_t strides_of(tensor *t, int64_t **out) { *out = t->strides; return 0; }
static int32_t type_of(tensor *t, int32_t *out) { *out = t->type; return 0; }
static int32_t float32_type(void) { return 1; }
static int32_t bfloat16_type(void) { return 2; }
static int32_t cpu_device(void) { return 0; }
static int32_t thread_count(uint32_t *out) { *out = 3; return 0; }

static tensor *new_tensor(int64_t dims, int64_t first, int64_t second, int32_t type) {
  tensor *t = malloc(sizeof *t);
  const int64_t stride = dims > 1 ? second : 1;
  *t = (tensor){malloc(first * stride * (type == 2 ? 2 : 4)), dims, {first, second}, {stride, 1}, type};
  return t;
}
static int32_t new_empty(int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t type, int32_t device,
    int32_t index, tensor **out) {
  (void)strides, (void)device, (void)index;
  *out = new_tensor(dims, sizes[0], sizes[1], type);
  return 0;
}

int mpq_serve(void *const *interface, int level, mpq_parallel parallel);
void mpq_know(const char *format, const mpq_weight *weight);

static stable_value boxed(stable_value value) {
  stable_value *box = malloc(sizeof *box);
  *box = value;
  return (stable_value)box;
}

/* One call of torch.ops.mpq.linear: served as mpq_linear computes it, or forwarded where a token is not finite. */
static int dispatch(const test_case *one, const char *name, int is_bf16, int finite) {
  const int64_t rows = one->weight.rows, cols = one->weight.cols, tokens = 3;
  const size_t size = (rows + PANEL_ROWS - 1) / PANEL_ROWS * one->weight.panel_bytes, bytes = is_bf16 ? 2 : 4;
  tensor *x = new_tensor(2, tokens, cols, 1 + is_bf16), *weight = new_tensor(1, size, 0, 1),
      *bias = new_tensor(1, rows, 0, 1);
  for (int64_t i = 0; i < tokens * cols; i++) put(x->data, i, is_bf16, number(i));
  for (int64_t i = 0; i < rows; i++) put(bias->data, i, 0, number(i));
  if (!finite) put(x->data, 0, is_bf16, 0.0f / 0.0f);
  free(weight->data);
  weight->data = memcpy(malloc(size), one->panels, size);
  uint8_t *expected = filled(tokens * rows * bytes, 0xff);
  const mpq_call call = {.panels = one->panels, .x = x->data, .tokens = tokens, .stride = cols, .bias = bias->data,
      .out = expected,
                         .out_stride = rows, .x_is_bf16 = is_bf16, .out_is_bf16 = is_bf16, .planes = 2, .threads = 3,
                             .level = mpq_best_level(99)};
  const int64_t skipped = mpq_linear(&one->weight, &call);
  stable_value stack[8] = {(stable_value)x, boxed((stable_value)weight), boxed((stable_value)bias),
      (stable_value)strdup(name), rows, cols,
                           (stable_value)strdup("panels"), (stable_value)strdup("")};
  const int before = forwarded;
  kernel(stack, 8, 1);
  if ((forwarded - before) != !finite || (skipped != 0) != !finite) return FAILED;
  if (finite && memcmp(((tensor *)stack[0])->data, expected, tokens * rows * bytes)) return LEVELS_DIFFER;
  if (finite) drop_tensor((tensor *)stack[0]);
  free(expected);
  return 0;
}

static int serve(const test_case *one, const char *name) {
  void *const interface[] = { /* as torch_interface orders them */
      make_library, implement, forward, check, last_error, list_size, list_item, string_of, data_of, dims_of, sizes_of,
          strides_of,
      type_of, new_empty, thread_count, drop_tensor, drop, drop, drop, float32_type, bfloat16_type, cpu_device,
  };
  if (mpq_serve(interface, mpq_best_level(99), NULL)) return FAILED;
  mpq_know(name, &one->weight);
  /* others: tests/kernels/cpu/test_dispatch.py */
  for (int is_bf16 = 0; is_bf16 < 2; is_bf16++) TRY(dispatch(one, name, is_bf16, 1));
  return 0;
}
