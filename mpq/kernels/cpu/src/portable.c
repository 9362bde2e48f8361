/* Any machine: plain C, vectorized by the compiler for its baseline. */
#define TARGET
#include "template.h"

#include "multiply.h"
#include "between.h"

const mpq_level mpq_portable = {"portable", 1, 0, 0, quantize, decode, multiply, NULL, NULL, &between};
