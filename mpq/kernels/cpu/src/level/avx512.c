/* AVX-512 VNNI: int8 dot products. */
#include "../tile.h"
#ifdef MPQ_X86
#include "avx512_multiply.h"
#include "avx512_integers.h"
#include "attend.h"

const mpq_decoder_ops mpq_avx512_ops = {normalize, activate, attend};
const mpq_level mpq_avx512 = {"avx512", 0, 1, quantize, decode, multiply_vectors, NULL, NULL, &mpq_avx512_ops};
#endif
