// out (tokens, rows) = inputs (tokens, columns) times 4-bit weights in the layout "fragments", for 16 tokens and more on
// sm_90a.
//
// One warp copies ahead: a step's tokens by one tensor copy with 128-byte swizzle, its codes by bulk copies, both counted
// by an mbarrier. Two warpgroups multiply: the weights are wgmma's left operand, straight from registers, since the
// layout's tiles are its fragments; the next codes are decoded while a wgmma runs. Group scales meet the float32 sums
// once a group. Programs that share rows write shares that a second kernel adds in a fixed order.
//
// Fixed when compiled: TOKENS (16 to 128, a multiple of 8) of a block, GROUP (a multiple of 32, or 0 for one scale a
// row), ZEROS (0 or 1), BF16 (0 or 1), STAGES. The tensor map's box is TOKENS rows of 64 columns.

constexpr int TILES = 8;                          // of 16 rows: one for each multiplying warp
constexpr int STEP = 64;                          // columns: a block of the layout, and 128 bytes of tokens
constexpr int CHUNK = GROUP % STEP == 0 ? 4 : 2;  // column tiles between two groups' ends, at most a step
constexpr int SUMS = TOKENS / 2;                  // of a lane

struct alignas(1024) Stage {
    u16 tokens[TOKENS][STEP];  // 16-byte chunk c of token t lies at c ^ (t % 8): the swizzle's pattern
    Words codes[TILES][32];
};

// PTX ISA, matrix descriptor: rows of 128 bytes, eight of them a pattern of 1,024, 128-byte swizzle.
__device__ __forceinline__ u64 describe(const void *matrix) {
    return static_cast<u64>((shared_address(matrix) & 0x3ffff) >> 4) | static_cast<u64>(1) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(1) << 62;
}

extern "C" __global__ void __launch_bounds__(32 * (TILES + 1), 1)
product(const __grid_constant__ TensorMap inputs, const Words *codes, const u16 *scales, const u8 *zeros,
        const u16 *bias, u16 *out, float *shares, int count, int rows, int columns, int padded, int blocks,
        int steps_per_share) {
    Stage *stages = reinterpret_cast<Stage *>(aligned_shared());
    __shared__ u64 full[STAGES], empty[STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_tile = blockIdx.x * TILES, first_token = blockIdx.z * TOKENS;
    const int first = blockIdx.y * steps_per_share;
    const int last = first + steps_per_share < blocks ? first + steps_per_share : blocks;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], TILES);
        }
        barriers_ready();
    }
    __syncthreads();

    if (warp == TILES) {
        if (lane) return;
        const int left = padded / 16 - first_tile, stored = left < TILES ? left : TILES;
        for (int step = first; step < last; ++step) {
            const int turn = (step - first) / STAGES, slot = (step - first) % STAGES;
            if (turn) wait_phase(&empty[slot], (turn - 1) & 1);
            arrive_expecting(&full[slot], sizeof(Stage::tokens) + stored * sizeof(Stage::codes[0]));
            tensor_copy(stages[slot].tokens, &inputs, step * STEP, first_token, &full[slot]);
            for (int tile = 0; tile < stored; ++tile) {
                const size_t place = (static_cast<size_t>(first_tile + tile) * blocks + step) * 32;
                bulk_copy(stages[slot].codes[tile], codes + place, sizeof(Stage::codes[0]), &full[slot]);
            }
        }
        return;
    }

    const int row = (first_tile + warp) * 16 + lane / 4;  // and row + 8
    const bool stored = (first_tile + warp) * 16 < padded;
    float sums[SUMS] = {}, part[SUMS];
    float scale_even = 0.f, scale_odd = 0.f;
    Offsets offset = offsets(8, 8);
    u32 left[CHUNK][4], ahead[CHUNK][4];
    constexpr int CHUNKS = STEP / 16 / CHUNK;  // of a step
    constexpr int RUN = GROUP ? GROUP / 16 / CHUNK : 1;  // chunks of a group

    auto at_group = [&](int chunk) { return stored ? static_cast<size_t>(GROUP ? chunk / RUN : 0) * padded + row : 0; };
    auto prepare = [&](int chunk, u32(&to)[CHUNK][4]) {
        const int step = chunk / CHUNKS - first;
        if (chunk % CHUNKS == 0) wait_phase(&full[step % STAGES], step / STAGES & 1);
#if ZEROS
        if (chunk == first * CHUNKS || (GROUP && chunk % RUN == 0))
            offset = offsets(zeros[at_group(chunk)], zeros[at_group(chunk) + 8]);
#endif
        const Words &own = stages[step % STAGES].codes[warp][lane];
#pragma unroll
        for (int tile = 0; tile < CHUNK; ++tile) decode(to[tile], own.word[chunk % CHUNKS * CHUNK + tile], offset);
    };

    const int real = (columns + 16 * CHUNK - 1) / (16 * CHUNK);  // no group has scales beyond them
    const int end = last * CHUNKS < real ? last * CHUNKS : real;
    bool fresh = true;  // the sums of a group start from nothing
    prepare(first * CHUNKS, left);
    for (int chunk = first * CHUNKS; chunk < end; ++chunk) {
        const int slot = (chunk / CHUNKS - first) % STAGES;
        const u64 tokens = describe(stages[slot].tokens) + chunk % CHUNKS * CHUNK * 2;  // a tile is 32 bytes
        if (fresh) {
            scale_even = half_to_float(scales[at_group(chunk)]);
            scale_odd = half_to_float(scales[at_group(chunk) + 8]);
        }
        wgmma_fence();
#pragma unroll
        for (int tile = 0; tile < CHUNK; ++tile) multiply_async(part, left[tile], tokens + 2 * tile, tile || !fresh);
        wgmma_commit();
        if (chunk + 1 < end) prepare(chunk + 1, ahead);
        wgmma_wait(part);
        if (chunk % CHUNKS == CHUNKS - 1 && lane == 0) arrive(&empty[slot]);
        fresh = chunk + 1 == end || (GROUP && (chunk + 1) % RUN == 0);
        if (fresh)
#pragma unroll
            for (int i = 0; i < SUMS; ++i) sums[i] += part[i] * (i % 4 < 2 ? scale_even : scale_odd);
#pragma unroll
        for (int tile = 0; tile < CHUNK; ++tile)
            for (int i = 0; i < 4; ++i) left[tile][i] = ahead[tile][i];
    }

#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const int own_row = row + (i % 4 < 2 ? 0 : 8), token = first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (own_row >= rows || token >= count) continue;
        const size_t at = static_cast<size_t>(token) * rows + own_row;
        if (shares)
            shares[static_cast<size_t>(blockIdx.y) * count * rows + at] = sums[i];
        else
            out[at] = from_float(sums[i] + (bias ? to_float(bias[own_row]) : 0.f));
    }
}
