/* Inner loops of rounding: GPTQ's columns and the search for scales. mpq/rounding/compiled.py calls them by ctypes;
 * mpq/rounding/gptq.py and clip_search.py hold the same arithmetic in PyTorch, the reference that tests compare
 * with. */
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

enum { LANES = 16 }; /* thresholds that are compared at once; compiled.LANES */

enum { INTEGER = 0, FLOATING = 1, CODEBOOK = 2 };

/* A grid as numbers: compiled.Grid in Python has the same fields. */
typedef struct {
    int64_t kind;
    float lowest, highest;       /* smallest and largest value */
    int64_t offset;              /* code of zero in an integer grid */
    float smallest_power, steps; /* floating: the smallest normal number, and steps of a power of two, 2^mantissa */
    int64_t count;               /* sorted values of the other grids */
    const float *values;         /* (count) */
    const float *thresholds;     /* (count - 1), smallest number that is rounded to the value above, and infinities up to
                                  * a multiple of LANES */
    const uint8_t *codes;        /* (count), code of each value */
} grid_t;

_Static_assert(sizeof(grid_t) == 64, "compiled.GridStruct mirrors this struct");

/* Of finite numbers; comparisons, unlike fminf, are compiled to vector instructions. */
static inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* Index of the nearest value in a sorted grid: how many thresholds are reached. Every one is compared, in vector
 * instructions; a search by halves would wait for each comparison. */
static inline __attribute__((always_inline)) int64_t nearest(const grid_t *grid, float x) {
    int32_t reached = 0;
    for (int64_t part = 0; part < grid->count; part += LANES) {
        const float *thresholds = grid->thresholds + part;
        for (int i = 0; i < LANES; i++) reached += x >= thresholds[i];
    }
    return reached < grid->count ? reached : grid->count - 1; /* an infinity reaches the padding */
}

enum { TOGETHER = 4 }; /* rows of GPTQ that hide each other's latency: a column needs the one before it */

/* GPTQ over one block of columns: each element is rounded, and the columns of the block still to come take over its
 * error. Rows are independent. pending, scales, lowest, errors: (rows, width) with the strides given; codes: (rows,
 * width); inverse: (width, width), upper factor of the inverse second moment. */
EVERY_LEVEL EXPORTED void mpq_gptq_block(float *pending, const float *scales, const float *lowest, uint8_t *codes,
                                         float *errors, const float *inverse, int64_t rows, int64_t width,
                                         int64_t stride, int64_t code_stride, int64_t inverse_stride,
                                         const grid_t *grid) {
    for (int64_t first = 0; first < rows; first += TOGETHER) {
        const int64_t last = first + TOGETHER < rows ? first + TOGETHER : rows;
        for (int64_t column = 0; column < width; column++) {
            const float *restrict factors = inverse + column * inverse_stride;
            for (int64_t row = first; row < last; row++) {
                const int64_t at = row * stride + column;
                const float scale = scales[at], wanted = pending[at] - lowest[at];
                const float units = wanted / (scale == 0 ? 1.0f : scale);
                float value;
                if (grid->kind == INTEGER) {
                    value = clamp(rintf(units), grid->lowest, grid->highest);
                    codes[row * code_stride + column] = (uint8_t)((int64_t)value + grid->offset);
                } else {
                    const int64_t index = nearest(grid, units);
                    value = grid->values[index];
                    codes[row * code_stride + column] = grid->codes[index];
                }
                errors[row * width + column] = (wanted - value * scale) / factors[column];
            }
            for (int64_t row = first; row < last; row++) {
                float *restrict line = pending + row * stride;
                const float error = errors[row * width + column];
                for (int64_t next = column + 1; next < width; next++) line[next] -= error * factors[next];
            }
        }
    }
}

enum { CHUNK = 64 };

/* Values of the grid nearest to elements / factor, of at most CHUNK elements; with a zero point, of a grid from 0
 * up. Good enough to compare scales: a product with 1 / factor stands for the quotient, and a codebook's values are
 * sums of steps. */
static inline __attribute__((always_inline)) void units_of(const float *restrict elements, int64_t count, float factor,
                                                           const float *zero, const grid_t *grid, int kind,
                                                           float *restrict units) {
    const float inverse = 1.0f / factor, low = grid->lowest, high = grid->highest, steps = grid->steps;
    const float smallest = grid->smallest_power, offset = zero ? *zero : 0.0f;
    if (kind == INTEGER && zero) {
        for (int64_t i = 0; i < count; i++) units[i] = clamp(rintf(elements[i] * inverse) + offset, 0.0f, high) - offset;
    } else if (kind == INTEGER) {
        for (int64_t i = 0; i < count; i++) units[i] = clamp(rintf(elements[i] * inverse), low, high);
    } else if (kind == FLOATING) {
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            float power, inside = clamp(elements[i] * inverse, low, high);
            memcpy(&bits, &inside, 4);
            bits &= 0x7F800000u;
            memcpy(&power, &bits, 4);
            float step = (power > smallest ? power : smallest) / steps; /* a power of two: exact */
            units[i] = rintf(inside / step) * step;
        }
    } else {
        float inside[CHUNK];
        for (int64_t i = 0; i < count; i++) inside[i] = elements[i] * inverse, units[i] = grid->values[0];
        for (int64_t value = 0; value + 1 < grid->count; value++) {
            const float threshold = grid->thresholds[value], step = grid->values[value + 1] - grid->values[value];
            for (int64_t i = 0; i < count; i++) units[i] += inside[i] >= threshold ? step : 0.0f;
        }
    }
}

static inline __attribute__((always_inline)) float group_error(const float *restrict elements,
                                                               const float *restrict weights, int64_t size,
                                                               float factor, const float *zero, const grid_t *grid,
                                                               int kind) {
    float sum = 0, units[CHUNK];
    for (int64_t first = 0; first < size; first += CHUNK) {
        const int64_t count = size - first < CHUNK ? size - first : CHUNK;
        units_of(elements + first, count, factor, zero, grid, kind, units);
        for (int64_t i = 0; i < count; i++) {
            float error = units[i] * factor - elements[first + i];
            sum += error * error * weights[first + i];
        }
    }
    return sum;
}

/* The scale of least weighted squared error for the units that `factor` gives; 0 where any scale is as good. */
static inline __attribute__((always_inline)) float group_fit(const float *restrict elements,
                                                             const float *restrict weights, int64_t size, float factor,
                                                             const float *zero, const grid_t *grid, int kind) {
    float power = 0, product = 0, units[CHUNK];
    for (int64_t first = 0; first < size; first += CHUNK) {
        const int64_t count = size - first < CHUNK ? size - first : CHUNK;
        units_of(elements + first, count, factor, zero, grid, kind, units);
        for (int64_t i = 0; i < count; i++) {
            float weighted = units[i] * weights[first + i];
            power += weighted * units[i];
            product += weighted * elements[first + i];
        }
    }
    return power > 0 ? product / (power < 1.17549435e-38f ? 1.17549435e-38f : power) : 0.0f;
}

#define BY_KIND(function, zero)                                                                           \
    (grid->kind == INTEGER && (zero) ? function(line, shares, size, factor, zero, grid, INTEGER)          \
     : grid->kind == INTEGER         ? function(line, shares, size, factor, NULL, grid, INTEGER)          \
     : grid->kind == FLOATING        ? function(line, shares, size, factor, NULL, grid, FLOATING)         \
                                     : function(line, shares, size, factor, NULL, grid, CODEBOOK))

/* For each group the candidate of least weighted squared error. elements, weights: (groups, size); factors, and zeros
 * where the format has zero points: (candidates, groups), candidates `stride` apart; out: best int64 (groups), error
 * float (groups). */
EVERY_LEVEL EXPORTED void mpq_best_scales(const float *elements, const float *weights, int64_t groups, int64_t size,
                                          const float *factors, const float *zeros, int64_t candidates,
                                          int64_t stride, int64_t *best, float *least, const grid_t *grid) {
    for (int64_t group = 0; group < groups; group++) {
        const float *line = elements + group * size, *shares = weights + group * size;
        float smallest = INFINITY;
        int64_t chosen = 0;
        for (int64_t candidate = 0; candidate < candidates; candidate++) {
            int64_t at = candidate * stride + group;
            const float *zero = zeros ? zeros + at : NULL;
            const float factor = factors[at];
            float error = BY_KIND(group_error, zero);
            if (error < smallest) smallest = error, chosen = candidate;
        }
        best[group] = chosen;
        least[group] = smallest;
    }
}

/* For each group the scale of least weighted squared error for the units that its factor gives: `group_fit`. */
EVERY_LEVEL EXPORTED void mpq_refit(const float *elements, const float *weights, int64_t groups, int64_t size,
                                    const float *factors, const float *zeros, float *fits, const grid_t *grid) {
    for (int64_t group = 0; group < groups; group++) {
        const float *line = elements + group * size, *shares = weights + group * size;
        const float *zero = zeros ? zeros + group : NULL;
        const float factor = factors[group];
        fits[group] = BY_KIND(group_fit, zero);
    }
}

/* An empty Python module: importing it says where the library is; ctypes calls it. */
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Inner loops of rounding.", -1, NULL,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
