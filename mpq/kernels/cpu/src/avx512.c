/* AVX-512 VNNI: byte dot products. */
#include "mpq.h"
#ifdef MPQ_X86
#include "avx512.h"

const mpq_level mpq_avx512 = {"avx512", 0, 0, 1, quantize, decode, multiply_vectors, NULL, NULL, &between};
#endif
