/* The instruction-set levels, in the order of native.py's LEVELS, and which of them this machine runs. */
#include "tile.h"
#ifdef MPQ_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(MPQ_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

const mpq_level *const mpq_levels[] = {
    &mpq_portable,
#ifdef MPQ_X86
    &mpq_avx2, &mpq_avxvnni, &mpq_avx512, &mpq_amx,
#elif defined(MPQ_ARM)
    &mpq_neon,
#endif
};

#ifdef MPQ_X86
static int has_amx(void) {
#ifdef __linux__
  unsigned a = 7, b, c = 0, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if ((d >> 22 & 7) != 7 || !__builtin_cpu_supports("avx512bf16")) return 0; /* amx-bf16, avx512-fp16, amx-tile */
  return (d >> 25 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
#else
  return 0;
#endif
}

static int has_vnni(void) { /* VEX-encoded, on CPUs without AVX-512 */
  unsigned a = 7, b, c = 1, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return a >> 4 & 1;
}
#endif

static int runs_here(int level) {
#ifdef MPQ_X86
  __builtin_cpu_init();
  if (level && (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))) return 0;
  if (level == 2) return has_vnni();
  if (level > 2 && (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("gfni") ||
                    !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512bw") ||
                    !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")))
    return 0;
  return level < 4 || has_amx();
#elif defined(MPQ_ARM) && defined(__linux__)
  return !level || (getauxval(AT_HWCAP) >> 20 & 1); /* HWCAP_ASIMDDP */
#elif defined(MPQ_ARM) && defined(__APPLE__)
  return 1;
#else
  return !level;
#endif
}

EXPORT int mpq_best_level(int most) {
  const int last = (int)(sizeof mpq_levels / sizeof *mpq_levels) - 1;
  int level = most < last ? most : last;
  while (level > 0 && !runs_here(level)) level--;
  return level;
}

EXPORT const char *mpq_level_name(int level) { return mpq_levels[level]->name; }
