/* torch.ops.mpq.linear and linear_parts called by PyTorch's dispatcher without Python: plain calls are computed
 * here, all others are forwarded to mpq::linear_any and linear_parts_any. Uses PyTorch's stable C interface
 * (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h), passed in by address: nothing is linked. */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

typedef uint64_t stable_value; /* StableIValue: a number, or a handle that the callee owns */
typedef void *handle;

typedef struct { /* in the order of dispatch.py; functions return 0 on success unless declared otherwise */
  int32_t (*library)(const char *space, const char *key, const char *file, uint32_t line, handle *);
  int32_t (*implement)(handle library, const char *name, void (*)(stable_value *, uint64_t, uint64_t));
  int32_t (*call)(const char *name, const char *overload, stable_value *);
  void (*check)(bool, const char *function, const char *file, uint32_t line, const char *message);
  const char *(*last_error)(void);
  int32_t (*list_size)(handle, size_t *);
  int32_t (*list_item)(handle, size_t, stable_value *);
  int32_t (*string)(handle, const char **);
  int32_t (*data)(handle, void **);
  int32_t (*dims)(handle, int64_t *);
  int32_t (*sizes)(handle, int64_t **);
  int32_t (*strides)(handle, int64_t **);
  int32_t (*type)(handle, int32_t *);
  int32_t (*empty)(int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t type, int32_t device, int32_t index,
                   handle *);
  int32_t (*threads)(uint32_t *);
  int32_t (*drop_tensor)(handle), (*drop_list)(handle), (*drop_string)(handle), (*drop_optional)(stable_value *);
  int32_t (*float32)(void), (*bfloat16)(void), (*cpu)(void); /* codes of dtypes and of the device type */
} torch_interface;

typedef struct {
  int64_t rows, cols;
  mpq_weight weight;
  char format[];
} weight_entry;

#define WEIGHT_SLOTS 4096 /* slots of the hash table of weights; entries are never freed */
#define MAX_PROBES 16
#define MAX_DIMS 8

static torch_interface torch;
static _Atomic(weight_entry *) weight_table[WEIGHT_SLOTS];
static int32_t torch_level;
static mpq_parallel torch_parallel;

static unsigned hash(const char *format, int64_t rows, int64_t cols) {
  uint64_t mixed = (uint64_t)rows * 31 + (uint64_t)cols;
  for (; *format; format++) mixed = mixed * 31 + (uint8_t)*format;
  return (unsigned)(mixed * 0x9e3779b97f4a7c15 >> 52);
}

static int matches(const weight_entry *entry, const char *format, int64_t rows, int64_t cols) {
  return entry->rows == rows && entry->cols == cols && !strcmp(entry->format, format);
}

static const weight_entry *find_weight(const char *format, int64_t rows, int64_t cols) {
  const unsigned slot = hash(format, rows, cols);
  for (unsigned i = 0; i < MAX_PROBES; i++) {
    const weight_entry *entry = atomic_load(&weight_table[(slot + i) % WEIGHT_SLOTS]);
    if (!entry || matches(entry, format, rows, cols)) return entry;
  }
  return NULL;
}

/* Register a weight's format and shape: from now on C serves it, if the table has a free slot. */
EXPORT void mpq_know(const char *format, const mpq_weight *weight) {
  const unsigned slot = hash(format, weight->rows, weight->cols);
  weight_entry *added = malloc(sizeof *added + strlen(format) + 1);
  if (!added) return;
  added->rows = weight->rows, added->cols = weight->cols, added->weight = *weight;
  strcpy(added->format, format);
  for (unsigned i = 0; i < MAX_PROBES; i++) {
    weight_entry *present = NULL;
    if (atomic_compare_exchange_strong(&weight_table[(slot + i) % WEIGHT_SLOTS], &present, added)) return;
    if (matches(present, format, weight->rows, weight->cols)) break;
  }
  free(added);
}

/* A tensor viewed as rows of `cols` elements, `stride` apart; sizes and strides are those of an output with `rows`
 * columns. */
typedef struct {
  void *data;
  int64_t dims, tokens, stride, sizes[MAX_DIMS], steps[MAX_DIMS];
  int32_t type;
} row_view;

static int view_rows(handle tensor, int64_t rows, int64_t cols, row_view *view) {
  int64_t *sizes, *strides, expected = 0;
  if (torch.dims(tensor, &view->dims) || torch.sizes(tensor, &sizes) || torch.strides(tensor, &strides) ||
      torch.type(tensor, &view->type) || torch.data(tensor, &view->data))
    return 0;
  const int64_t last = view->dims - 1;
  if (last < 0 || last >= MAX_DIMS || sizes[last] != cols || (cols > 1 && strides[last] != 1)) return 0;
  view->tokens = 1, view->stride = cols, view->sizes[last] = rows, view->steps[last] = 1;
  for (int64_t i = last - 1, step = rows; i >= 0; i--) {
    view->sizes[i] = sizes[i], view->tokens *= sizes[i];
    view->steps[i] = step, step *= sizes[i] ? sizes[i] : 1;
    if (sizes[i] == 1) continue;
    if (!expected) view->stride = strides[i];
    else if (strides[i] != expected) return 0;
    expected = strides[i] * sizes[i];
  }
  return view->type == torch.float32() || view->type == torch.bfloat16();
}

static int view_bias(handle tensor, int64_t rows, mpq_call *call) {
  int64_t dims, *sizes, *strides;
  int32_t type;
  void *data;
  if (torch.dims(tensor, &dims) || torch.sizes(tensor, &sizes) || torch.strides(tensor, &strides) ||
      torch.type(tensor, &type) || torch.data(tensor, &data))
    return 0;
  call->bias = data, call->bias_is_bf16 = type == torch.bfloat16();
  return dims == 1 && sizes[0] == rows && (rows == 1 || strides[0] == 1) && (call->bias_is_bf16 || type == torch.float32());
}

static int view_weight(handle list, mpq_call *call) {
  void *data[2] = {NULL, NULL};
  size_t count;
  stable_value tensor;
  if (torch.list_size(list, &count) || !count || count > 2) return 0;
  for (size_t i = 0; i < count; i++)
    if (torch.list_item(list, i, &tensor) || torch.data((handle)tensor, &data[i])) return 0;
  call->panels = data[0], call->tensor_scale = data[1];
  return 1;
}

/* What both ops share: the input's rows, the output, the activation's planes. */
typedef struct {
  row_view x;
  handle out;
  mpq_call call;
  int one_plane; /* int8 activations of one scale for each token */
} product;

/* 0 for a call that C does not compute: not in panels, an activation format or an input of another kind. */
static int begin_product(product *one, stable_value input, stable_value layout, stable_value activation, int64_t rows,
                         int64_t cols) {
  const char *layout_name, *activation_name;
  uint32_t threads;
  if (torch.string((handle)layout, &layout_name) || torch.string((handle)activation, &activation_name) ||
      strcmp(layout_name, "panels") || torch.threads(&threads) || !view_rows((handle)input, rows, cols, &one->x))
    return 0;
  one->one_plane = !strcmp(activation_name, "int8-channel");
  one->call = (mpq_call){.x = one->x.data, .tokens = one->x.tokens, .stride = one->x.stride, .out_stride = rows,
                         .planes = one->one_plane ? 1 : 2, .threads = (int32_t)threads, .level = torch_level,
                         .parallel = torch_parallel};
  one->call.x_is_bf16 = one->call.out_is_bf16 = one->x.type == torch.bfloat16();
  return !*activation_name || one->one_plane;
}

static int serves(const weight_entry *plan, const product *one) {
  return plan && !(one->one_plane && plan->weight.kind == MPQ_TABLE_BF16);
}

static int allocate_output(product *one) {
  return !torch.empty(one->x.dims, one->x.sizes, one->x.steps, one->x.type, torch.cpu(), 0, &one->out);
}

/* The output, or NULL after what could not be computed: out of memory, or tokens that integers cannot represent. */
static handle end_product(product *one, int failed) {
  if (!failed) return one->out;
  torch.drop_tensor(one->out);
  return NULL;
}

/* Compute a plain call: float32 or bf16 rows at a constant distance and a registered weight in panels; NULL for any
 * other. */
static handle compute(const stable_value *stack) {
  const char *format;
  const int64_t rows = (int64_t)stack[4], cols = (int64_t)stack[5];
  product one;
  if (torch.string((handle)stack[3], &format) || !begin_product(&one, stack[0], stack[6], stack[7], rows, cols)) return NULL;
  const weight_entry *plan = find_weight(format, rows, cols);
  if (!serves(plan, &one) || !view_weight((handle)stack[1], &one.call) ||
      (stack[2] && !view_bias((handle)*(stable_value *)stack[2], rows, &one.call)) || !allocate_output(&one))
    return NULL;
  return end_product(&one, torch.data(one.out, &one.call.out) || mpq_linear(&plan->weight, &one.call));
}

/* Split names at slashes, in place; returns how many, or 0 if more than MPQ_MAX_PARTS. */
static size_t split_names(char *names, const char **name) {
  size_t count = 0;
  for (char *rest = names; rest; rest = strchr(rest, '/'), rest = rest ? (*rest = 0, rest + 1) : NULL) {
    if (count == MPQ_MAX_PARTS) return 0;
    name[count++] = rest;
  }
  return count;
}

/* As `compute`, for a matrix in several registered weights of one tensor each. */
static handle compute_parts(const stable_value *stack) {
  const char *formats, *name[MPQ_MAX_PARTS];
  char names[256];
  const int64_t cols = (int64_t)stack[6];
  const mpq_weight *weights[MPQ_MAX_PARTS];
  mpq_call calls[MPQ_MAX_PARTS];
  int64_t part_rows[MPQ_MAX_PARTS], rows = 0;
  size_t count, tensors, lengths;
  void *places;
  stable_value item;
  product one;
  if (torch.string((handle)stack[4], &formats) || strlen(formats) >= sizeof names) return NULL;
  count = split_names(strcpy(names, formats), name);
  if (torch.list_size((handle)stack[1], &tensors) || torch.list_size((handle)stack[5], &lengths) || !count ||
      tensors != count || lengths != count || torch.data((handle)stack[2], &places))
    return NULL;
  for (size_t i = 0; i < count; i++) {
    if (torch.list_item((handle)stack[5], i, &item)) return NULL;
    rows += part_rows[i] = (int64_t)item;
  }
  if (!begin_product(&one, stack[0], stack[7], stack[8], rows, cols) ||
      (stack[3] && !view_bias((handle)*(stable_value *)stack[3], rows, &one.call)))
    return NULL;
  const int64_t *place = places;
  for (size_t i = 0; i < count; place += part_rows[i++]) {
    const weight_entry *plan = find_weight(name[i], part_rows[i], cols);
    void *panels;
    if (!serves(plan, &one) || torch.list_item((handle)stack[1], i, &item) || torch.data((handle)item, &panels)) return NULL;
    weights[i] = &plan->weight, calls[i] = one.call, calls[i].panels = panels, calls[i].places = place;
  }
  if (!allocate_output(&one)) return NULL;
  if (torch.data(one.out, &one.call.out)) return end_product(&one, 1);
  for (size_t i = 0; i < count; i++) calls[i].out = one.call.out;
  return end_product(&one, mpq_linear_parts(weights, calls, (int64_t)count) != 0);
}

static void release_tensors(stable_value list) {
  size_t count = 0;
  stable_value tensor;
  torch.list_size((handle)list, &count);
  for (size_t i = 0; i < count; i++)
    if (!torch.list_item((handle)list, i, &tensor)) torch.drop_tensor((handle)tensor);
  torch.drop_list((handle)list);
}

static void release_bias(stable_value optional) {
  stable_value *bias = (stable_value *)optional;
  if (!bias) return;
  torch.drop_tensor((handle)*bias);
  torch.drop_optional(bias);
}

/* Put the output on the stack, or let Python compute: `computed` is NULL then, and the arguments go on. */
static int forwarded(stable_value *stack, handle computed, const char *name) {
  if (computed) return 0;
  if (torch.call(name, "", stack)) torch.check(false, name, "torch_dispatch.c", __LINE__, torch.last_error());
  return 1;
}

/* linear(Tensor input, Tensor[] weight, Tensor? bias, str format, int rows, int cols, str layout, str activation) */
static void linear_from_dispatcher(stable_value *stack, uint64_t inputs, uint64_t outputs) {
  (void)inputs, (void)outputs;
  const handle out = compute(stack);
  if (forwarded(stack, out, "mpq::linear_any")) return;
  torch.drop_tensor((handle)stack[0]);
  release_tensors(stack[1]);
  release_bias(stack[2]);
  torch.drop_string((handle)stack[3]);
  torch.drop_string((handle)stack[6]);
  torch.drop_string((handle)stack[7]);
  stack[0] = (stable_value)out;
}

/* linear_parts(Tensor input, Tensor[] weight, Tensor places, Tensor? bias, str formats, int[] rows, int cols, str
 * layout, str activation) */
static void parts_from_dispatcher(stable_value *stack, uint64_t inputs, uint64_t outputs) {
  (void)inputs, (void)outputs;
  const handle out = compute_parts(stack);
  if (forwarded(stack, out, "mpq::linear_parts_any")) return;
  torch.drop_tensor((handle)stack[0]);
  release_tensors(stack[1]);
  torch.drop_tensor((handle)stack[2]);
  release_bias(stack[3]);
  torch.drop_string((handle)stack[4]);
  torch.drop_list((handle)stack[5]);
  torch.drop_string((handle)stack[7]);
  torch.drop_string((handle)stack[8]);
  stack[0] = (stable_value)out;
}

/* Register as the CPU kernels of mpq::linear and mpq::linear_parts, at one instruction level; call again to change
 * the level. Returns 0, or -1 if PyTorch refuses. */
EXPORT int mpq_serve(const torch_interface *interface, int level, mpq_parallel parallel) {
  static handle library;
  torch_level = level, torch_parallel = parallel;
  if (library) return 0;
  torch = *interface;
  if (torch.library("mpq", "CPU", "torch_dispatch.c", __LINE__, &library)) return -1;
  if (torch.implement(library, "linear", linear_from_dispatcher)) return -1;
  return torch.implement(library, "linear_parts", parts_from_dispatcher) ? -1 : 0;
}
