/* torch.ops.mpq.linear as PyTorch's dispatcher calls it, with no Python between: what is plain is computed here, anything
 * else goes on to mpq::linear_any. Through PyTorch's stable C interface (torch/csrc/stable/c/shim.h,
 * torch/csrc/inductor/aoti_torch/c/shim.h), whose functions are handed over by address: nothing is linked. */
#include <stdbool.h>

typedef uint64_t stable; /* StableIValue: a number, or a handle that the callee owns */
typedef void *handle;

typedef struct { /* as dispatch.py names them; all return 0 but where they say otherwise */
  int32_t (*library)(const char *space, const char *key, const char *file, uint32_t line, handle *);
  int32_t (*implement)(handle library, const char *name, void (*)(stable *, uint64_t, uint64_t));
  int32_t (*call)(const char *name, const char *overload, stable *);
  void (*check)(bool, const char *function, const char *file, uint32_t line, const char *message);
  const char *(*what)(void);
  int32_t (*list_size)(handle, size_t *);
  int32_t (*list_item)(handle, size_t, stable *);
  int32_t (*string)(handle, const char **);
  int32_t (*data)(handle, void **);
  int32_t (*dims)(handle, int64_t *);
  int32_t (*sizes)(handle, int64_t **);
  int32_t (*strides)(handle, int64_t **);
  int32_t (*type)(handle, int32_t *);
  int32_t (*empty)(int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t type, int32_t device, int32_t index,
                   handle *);
  int32_t (*threads)(uint32_t *);
  int32_t (*drop_tensor)(handle), (*drop_list)(handle), (*drop_string)(handle), (*drop_optional)(stable *);
  int32_t (*float32)(void), (*bfloat16)(void), (*cpu)(void); /* codes of types and of the device */
} torch_interface;

typedef struct {
  int64_t rows, cols;
  mpq_weight weight;
  char format[];
} known;

#define KNOWN 4096 /* places for weights, found by hash and kept for good */
#define TRIES 16
#define DIMS 8

static torch_interface torch;
static _Atomic(known *) all_known[KNOWN];
static int32_t serving_level;
static mpq_parallel serving_parallel;

static unsigned hash(const char *format, int64_t rows, int64_t cols) {
  uint64_t all = (uint64_t)rows * 31 + (uint64_t)cols;
  for (; *format; format++) all = all * 31 + (uint8_t)*format;
  return (unsigned)(all * 0x9e3779b97f4a7c15 >> 52);
}

static int is_known(const known *one, const char *format, int64_t rows, int64_t cols) {
  return one->rows == rows && one->cols == cols && !strcmp(one->format, format);
}

static const known *find_known(const char *format, int64_t rows, int64_t cols) {
  const unsigned place = hash(format, rows, cols);
  for (unsigned i = 0; i < TRIES; i++) {
    const known *one = atomic_load(&all_known[(place + i) % KNOWN]);
    if (!one || is_known(one, format, rows, cols)) return one;
  }
  return NULL;
}

/* From now on weights of this format and shape are computed without Python, if there is a place for it. */
EXPORT void mpq_know(const char *format, const mpq_weight *weight) {
  const unsigned place = hash(format, weight->rows, weight->cols);
  known *fresh = malloc(sizeof *fresh + strlen(format) + 1);
  if (!fresh) return;
  fresh->rows = weight->rows, fresh->cols = weight->cols, fresh->weight = *weight;
  strcpy(fresh->format, format);
  for (unsigned i = 0; i < TRIES; i++) {
    known *there = NULL;
    if (atomic_compare_exchange_strong(&all_known[(place + i) % KNOWN], &there, fresh)) return;
    if (is_known(there, format, weight->rows, weight->cols)) break;
  }
  free(fresh);
}

/* A tensor as rows of `cols` numbers, `stride` apart; the sizes and strides of an output with `rows` in their place. */
typedef struct {
  void *data;
  int64_t dims, tokens, stride, sizes[DIMS], steps[DIMS];
  int32_t type;
} matrix;

static int as_matrix(handle tensor, int64_t rows, int64_t cols, matrix *found) {
  int64_t *sizes, *strides, expected = 0;
  if (torch.dims(tensor, &found->dims) || torch.sizes(tensor, &sizes) || torch.strides(tensor, &strides) ||
      torch.type(tensor, &found->type) || torch.data(tensor, &found->data))
    return 0;
  const int64_t last = found->dims - 1;
  if (last < 0 || last >= DIMS || sizes[last] != cols || (cols > 1 && strides[last] != 1)) return 0;
  found->tokens = 1, found->stride = cols, found->sizes[last] = rows, found->steps[last] = 1;
  for (int64_t i = last - 1, step = rows; i >= 0; i--) {
    found->sizes[i] = sizes[i], found->tokens *= sizes[i];
    found->steps[i] = step, step *= sizes[i] ? sizes[i] : 1;
    if (sizes[i] == 1) continue;
    if (!expected) found->stride = strides[i];
    else if (strides[i] != expected) return 0;
    expected = strides[i] * sizes[i];
  }
  return found->type == torch.float32() || found->type == torch.bfloat16();
}

static int as_bias(handle tensor, int64_t rows, mpq_call *call) {
  int64_t dims, *sizes, *strides;
  int32_t type;
  void *data;
  if (torch.dims(tensor, &dims) || torch.sizes(tensor, &sizes) || torch.strides(tensor, &strides) ||
      torch.type(tensor, &type) || torch.data(tensor, &data))
    return 0;
  call->bias = data, call->bias_bfloat = type == torch.bfloat16();
  return dims == 1 && sizes[0] == rows && (rows == 1 || strides[0] == 1) && (call->bias_bfloat || type == torch.float32());
}

static int as_weight(handle list, mpq_call *call) {
  void *data[2] = {NULL, NULL};
  size_t count;
  stable tensor;
  if (torch.list_size(list, &count) || !count || count > 2) return 0;
  for (size_t i = 0; i < count; i++)
    if (torch.list_item(list, i, &tensor) || torch.data((handle)tensor, &data[i])) return 0;
  call->panels = data[0], call->tensor_scale = data[1];
  return 1;
}

/* A plain call computed: float32 or bfloat16 rows at one distance, by a known weight in panels; NULL for any other. */
static handle compute(const stable *stack) {
  const char *format, *layout, *activation;
  const int64_t rows = (int64_t)stack[4], cols = (int64_t)stack[5];
  if (torch.string((handle)stack[3], &format) || torch.string((handle)stack[6], &layout) ||
      torch.string((handle)stack[7], &activation) || strcmp(layout, "panels"))
    return NULL;
  const known *plan = find_known(format, rows, cols);
  const int rounds = !strcmp(activation, "int8-channel"); /* to one plane, where the product is of integers */
  matrix x;
  uint32_t threads;
  handle out;
  mpq_call call = {.out_stride = rows, .planes = rounds ? 1 : 2, .level = serving_level, .parallel = serving_parallel};
  if (!plan || (*activation && !(rounds && plan->weight.kind != MPQ_BFLOAT)) || torch.threads(&threads) ||
      !as_matrix((handle)stack[0], rows, cols, &x) || !as_weight((handle)stack[1], &call) ||
      (stack[2] && !as_bias((handle)*(stable *)stack[2], rows, &call)) ||
      torch.empty(x.dims, x.sizes, x.steps, x.type, torch.cpu(), 0, &out))
    return NULL;
  call.x = x.data, call.tokens = x.tokens, call.stride = x.stride, call.threads = (int32_t)threads;
  call.bfloat = call.out_bfloat = x.type == torch.bfloat16();
  if (!torch.data(out, &call.out) && !mpq_linear(&plan->weight, &call)) return out;
  torch.drop_tensor(out); /* no memory, or tokens that no integers stand for */
  return NULL;
}

static void drop(const stable *stack) {
  size_t count = 0;
  stable tensor, *bias = (stable *)stack[2];
  torch.drop_tensor((handle)stack[0]);
  torch.list_size((handle)stack[1], &count);
  for (size_t i = 0; i < count; i++)
    if (!torch.list_item((handle)stack[1], i, &tensor)) torch.drop_tensor((handle)tensor);
  torch.drop_list((handle)stack[1]);
  if (bias) {
    torch.drop_tensor((handle)*bias);
    torch.drop_optional(bias);
  }
  torch.drop_string((handle)stack[3]);
  torch.drop_string((handle)stack[6]);
  torch.drop_string((handle)stack[7]);
}

/* linear(Tensor input, Tensor[] weight, Tensor? bias, str format, int rows, int cols, str layout, str activation) */
static void linear_without_python(stable *stack, uint64_t inputs, uint64_t outputs) {
  (void)inputs, (void)outputs;
  handle out = compute(stack);
  if (!out) {
    if (torch.call("mpq::linear_any", "", stack)) torch.check(false, "linear", "dispatch.h", __LINE__, torch.what());
    return;
  }
  drop(stack);
  stack[0] = (stable)out;
}

/* Serve mpq::linear on CPUs at a level of instructions; called again, at another. Returns 0, or -1 if PyTorch refuses. */
EXPORT int mpq_serve(const torch_interface *interface, int level, mpq_parallel parallel) {
  static handle library;
  serving_level = level, serving_parallel = parallel;
  if (library) return 0;
  torch = *interface;
  if (torch.library("mpq", "CPU", "dispatch.h", __LINE__, &library)) return -1;
  return torch.implement(library, "linear", linear_without_python) ? -1 : 0;
}
