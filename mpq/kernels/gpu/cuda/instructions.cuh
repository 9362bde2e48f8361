// The instructions of sm_80 and later that the kernels use. No header is needed, so NVRTC compiles this anywhere.
// Sixteen-bit floats travel as bits: u16, or two in a u32.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(16) Words { u32 word[4]; };

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes from global to shared memory, asynchronously; zeros where not valid.
__device__ __forceinline__ void copy(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0));
}

// The same for bytes that are read once: they leave the L2 cache first.
__device__ __forceinline__ void copy_once(void *to, const void *from, bool valid) {
    asm volatile(
        "{\n\t.reg .b64 policy;\n\t"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
        "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy;\n\t}" ::"r"(shared_address(to)),
        "l"(from), "r"(valid ? 16 : 0));
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }

template <int PENDING> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

// Four 8x8 matrices of 16-bit numbers; lane i names the row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

// sums (16x8) += left (16x16) right (16x8)
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&left)[4], u32 right0, u32 right1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
#endif
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// Both halves: value * factor + addend, rounded once.
__device__ __forceinline__ u32 fused(u32 value, u32 factor, u32 addend) {
    u32 result;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(value), "r"(factor), "r"(addend));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(value), "r"(factor), "r"(addend));
#endif
    return result;
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ float to_float(u16 bits) {
#if BF16
    return __uint_as_float(static_cast<u32>(bits) << 16);
#else
    return half_to_float(bits);
#endif
}

__device__ __forceinline__ u16 from_float(float value) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}
