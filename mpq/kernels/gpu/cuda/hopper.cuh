// The instructions of sm_90a that the kernels use: mbarriers, bulk and tensor copies, and what surrounds wgmma.
// wgmma.mma_async itself names a register for every sum, so hopper.py writes it for the number of tokens.

struct alignas(64) TensorMap { u64 opaque[16]; };  // what cuTensorMapEncodeTiled fills

__device__ __forceinline__ void barrier_init(u64 *barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the barriers' first values visible to copies, before anyone uses them.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and keeps the phase open until so many bytes of copies have come.
__device__ __forceinline__ void arrive_expecting(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait_phase(u64 *barrier, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// Consecutive bytes, a multiple of 16, from global to shared memory; read once, so first to leave the L2 cache.
__device__ __forceinline__ void bulk_copy(void *to, const void *from, u32 bytes, u64 *barrier) {
    asm volatile(
        "{\n\t.reg .b64 policy;\n\t"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;"
        "\n\t}" ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// A box of the tensor that starts at a column and a row; zeros outside of the tensor, chunks swizzled as its map says.
__device__ __forceinline__ void tensor_copy(void *to, const TensorMap *map, int column, int row, u64 *barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// Between writing registers and the wgmma that read or add to them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups; sums that they wrote are only then read.
template <int COUNT> __device__ __forceinline__ void wgmma_wait(float (&sums)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Dynamic shared memory, aligned to 1,024 bytes: allocate 1,024 bytes more than is used.
__device__ __forceinline__ void *aligned_shared() {
    extern __shared__ u8 shared_memory[];
    return shared_memory + (-shared_address(shared_memory) & 1023);
}
