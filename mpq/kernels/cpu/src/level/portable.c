/* Any machine: plain C, vectorized by the compiler for its baseline. */
#include "common.h"

#include "multiply.h"
#include "decoder_ops.h"

const mpq_level mpq_portable = {"portable", 0, 0, quantize, decode, multiply, NULL, NULL, &decoder_ops};
