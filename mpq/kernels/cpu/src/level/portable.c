/* Any machine: plain C, vectorized by the compiler for its baseline. */
#include "common.h"

#include "multiply.h"
#include "attend.h"

const mpq_decoder_ops mpq_portable_ops = {normalize, activate, attend};
const mpq_level mpq_portable = {"portable", 0, 0, quantize, decode, multiply, NULL, NULL, &mpq_portable_ops};
