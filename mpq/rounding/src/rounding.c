/* Inner loops of rounding: GPTQ's columns and the search for scales. mpq/rounding/compiled.py calls them by ctypes;
 * mpq/rounding/gptq.py and clip_search.py hold the same arithmetic in PyTorch, the reference that tests compare with. */
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_LEVEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_LEVEL
#endif
#if defined(__GNUC__)
#define EXPORTED __attribute__((visibility("default")))
#else
#define EXPORTED __declspec(dllexport)
#endif

enum { INTEGER = 0, FLOATING = 1, CODEBOOK = 2 };

/* A grid as numbers: compiled.Grid in Python has the same fields. */
typedef struct {
    int64_t kind;
    float lowest, highest;       /* smallest and largest value */
    int64_t offset;              /* code of zero in an integer grid */
    float smallest_power, steps; /* floating: the smallest normal number, and steps of a power of two, 2^mantissa */
    int64_t count;               /* sorted values of the other grids */
    const float *values;         /* (count) */
    const double *boundaries;    /* (count - 1), half way between neighbours */
    const uint8_t *codes;        /* (count), code of each value */
    const uint8_t *ties_up;      /* (count - 1), whether a boundary itself belongs to the value above it */
} grid_t;

_Static_assert(sizeof(grid_t) == 72, "compiled.Grid mirrors this struct");

/* Of finite numbers; comparisons, unlike fminf, are compiled to vector instructions. */
static inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* Index of the nearest value in a sorted grid. */
static inline int64_t nearest(const grid_t *grid, float x) {
    int64_t low = 0, high = grid->count - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        double boundary = grid->boundaries[middle];
        if ((double)x > boundary || ((double)x == boundary && grid->ties_up[middle])) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* GPTQ over one block of columns: each element is rounded, and the columns of the block still to come take over its
 * error. Rows are independent. pending, scales, lowest, errors: (rows, width) with the strides given; codes: (rows,
 * width); inverse: (width, width), upper factor of the inverse second moment. */
EVERY_LEVEL EXPORTED void mpq_gptq_block(float *pending, const float *scales, const float *lowest, uint8_t *codes,
                                         float *errors, const float *inverse, int64_t rows, int64_t width,
                                         int64_t stride, int64_t code_stride, int64_t inverse_stride,
                                         const grid_t *grid) {
    for (int64_t row = 0; row < rows; row++) {
        float *restrict line = pending + row * stride;
        const float *scale_line = scales + row * stride, *lowest_line = lowest + row * stride;
        for (int64_t column = 0; column < width; column++) {
            const float *restrict factors = inverse + column * inverse_stride;
            float scale = scale_line[column], wanted = line[column] - lowest_line[column];
            float units = wanted / (scale == 0 ? 1.0f : scale), value;
            if (grid->kind == INTEGER) {
                value = clamp(rintf(units), grid->lowest, grid->highest);
                codes[row * code_stride + column] = (uint8_t)((int64_t)value + grid->offset);
            } else {
                int64_t index = nearest(grid, units);
                value = grid->values[index];
                codes[row * code_stride + column] = grid->codes[index];
            }
            float error = (wanted - value * scale) / factors[column];
            errors[row * width + column] = error;
            for (int64_t next = column + 1; next < width; next++) line[next] -= error * factors[next];
        }
    }
}

/* Value of the grid nearest to x; good enough to compare scales: a codebook's values are sums of steps. */
static inline __attribute__((always_inline)) float snap(float x, const grid_t *grid, int kind) {
    if (kind == INTEGER) return clamp(rintf(x), grid->lowest, grid->highest);
    float inside = clamp(x, grid->lowest, grid->highest);
    if (kind == FLOATING) {
        uint32_t bits;
        float power;
        memcpy(&bits, &inside, 4);
        bits &= 0x7F800000u;
        memcpy(&power, &bits, 4);
        float step = (power > grid->smallest_power ? power : grid->smallest_power) / grid->steps; /* a power of two: exact */
        return rintf(inside / step) * step;
    }
    float value = grid->values[0];
    for (int64_t i = 0; i + 1 < grid->count; i++)
        value += inside > (float)grid->boundaries[i] ? grid->values[i + 1] - grid->values[i] : 0.0f;
    return value;
}

static inline __attribute__((always_inline)) float group_error(const float *restrict elements,
                                                               const float *restrict weights, int64_t size,
                                                               float factor, const float *zero, const grid_t *grid,
                                                               int kind) {
    float sum = 0;
    if (zero) {
        float offset = *zero;
        for (int64_t i = 0; i < size; i++) {
            float units = clamp(rintf(elements[i] / factor) + offset, 0.0f, grid->highest) - offset;
            float error = units * factor - elements[i];
            sum += error * error * weights[i];
        }
    } else {
        for (int64_t i = 0; i < size; i++) {
            float error = snap(elements[i] / factor, grid, kind) * factor - elements[i];
            sum += error * error * weights[i];
        }
    }
    return sum;
}

/* For each group the candidate of least weighted squared error. elements, weights: (groups, size); factors, and zeros
 * where the format has zero points: (candidates, groups); out: best int64 (groups), error float (groups). */
EVERY_LEVEL EXPORTED void mpq_best_scales(const float *elements, const float *weights, int64_t groups, int64_t size,
                                          const float *factors, const float *zeros, int64_t candidates,
                                          int64_t *best, float *least, const grid_t *grid) {
    for (int64_t group = 0; group < groups; group++) {
        const float *line = elements + group * size, *shares = weights + group * size;
        float smallest = INFINITY;
        int64_t chosen = 0;
        for (int64_t candidate = 0; candidate < candidates; candidate++) {
            int64_t at = candidate * groups + group;
            const float *zero = zeros ? zeros + at : 0;
            float error;
            if (grid->kind == INTEGER) error = group_error(line, shares, size, factors[at], zero, grid, INTEGER);
            else if (grid->kind == FLOATING) error = group_error(line, shares, size, factors[at], 0, grid, FLOATING);
            else error = group_error(line, shares, size, factors[at], 0, grid, CODEBOOK);
            if (error < smallest) smallest = error, chosen = candidate;
        }
        best[group] = chosen;
        least[group] = smallest;
    }
}

/* An empty Python module: importing it says where the library is; ctypes calls it. */
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Inner loops of rounding.", -1, NULL,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
