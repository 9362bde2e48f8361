/* AVX-512 VNNI: int8 dot products. */
#include "../tile.h"
#ifdef MPQ_X86
#include "avx512_multiply.h"
#include "decoder_ops.h"

const mpq_level mpq_avx512 = {"avx512", 0, 1, quantize, decode, multiply_vectors, NULL, NULL, &decoder_ops};
#endif
