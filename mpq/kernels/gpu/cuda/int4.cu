// out (tokens, rows) = inputs (tokens, columns) times 4-bit weights in the layout "fragments", for small batches.
//
// As in MARLIN (arXiv 2408.11743), a pipeline of cp.async copies runs ahead of mma.sync, codes become 16-bit floats by
// exponent insertion, and weights pass through L2 as read once. Unlike there, the weights are the left operand, each
// lane copies and reads back its own sixteen bytes of codes, group scales meet the float32 sums once a group, and
// programs that share rows write shares that a second kernel adds in a fixed order.
//
// Fixed when compiled: TOKENS (8, 16, 32 or 64) of a block, GROUP (a multiple of 32, or 0 for one scale a row),
// ZEROS (0 or 1), BF16 (0 or 1), STAGES. Columns and the tokens' stride are multiples of 8.

constexpr int WARPS = 4;         // of 16 rows each
constexpr int STEP = 64;         // columns: a block of the layout
constexpr int TILES = TOKENS / 8;

struct Stage {
    Words codes[WARPS][32];
    Words tokens[TOKENS][STEP / 8];  // chunk c of token t lies at c ^ (t % 8): no two lanes of a load share a bank
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
product(const u16 *inputs, const Words *codes, const u16 *scales, const u8 *zeros, const u16 *bias, u16 *out,
        float *shares, int count, int rows, int columns, int padded, int blocks, int stride, int steps_per_share) {
    __shared__ Stage stages[STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int row_tile = blockIdx.x * WARPS + warp, first_token = blockIdx.z * TOKENS;
    const bool stored = row_tile * 16 < padded;
    const int first = blockIdx.y * steps_per_share;
    const int last = first + steps_per_share < blocks ? first + steps_per_share : blocks;
    float sums[TILES][4] = {}, part[TILES][4] = {};
    float scale_even = 1.f, scale_odd = 1.f;
    Offsets offset = offsets(8, 8);

    auto fetch = [&](int step) {
        Stage &stage = stages[step % STAGES];
        const size_t place = stored ? (static_cast<size_t>(row_tile) * blocks + step) * 32 + lane : 0;
        copy_once(&stage.codes[warp][lane], codes + place, stored);
        for (int chunk = threadIdx.x; chunk < TOKENS * (STEP / 8); chunk += 32 * WARPS) {
            const int token = chunk / 8, column = chunk % 8;
            const bool valid = first_token + token < count && step * STEP + column * 8 < columns;
            const size_t at = static_cast<size_t>(first_token + token) * stride + step * STEP + column * 8;
            copy(&stage.tokens[token][column ^ (token % 8)], inputs + (valid ? at : 0), valid);
        }
    };
    auto load_group = [&](int group) {
        const size_t at = static_cast<size_t>(group) * padded + row_tile * 16 + g;
        if (!stored) return;
        scale_even = half_to_float(scales[at]);
        scale_odd = half_to_float(scales[at + 8]);
#if ZEROS
        offset = offsets(zeros[at], zeros[at + 8]);
#endif
    };
    auto finish_group = [&]() {
        for (int tile = 0; tile < TILES; ++tile)
            for (int i = 0; i < 4; ++i) {
                sums[tile][i] += part[tile][i] * (i < 2 ? scale_even : scale_odd);
                part[tile][i] = 0.f;
            }
    };

    for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
        if (first + ahead < last) fetch(first + ahead);
        commit();
    }
    load_group(GROUP ? first * STEP / (GROUP ? GROUP : 1) : 0);
    for (int step = first; step < last; ++step) {
        wait<STAGES - 2>();
        __syncthreads();  // this stage has arrived, and everyone is done with the one before
        if (step + STAGES - 1 < last) fetch(step + STAGES - 1);
        commit();
        const Stage &stage = stages[step % STAGES];
        const Words own = stage.codes[warp][lane];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (GROUP && step * STEP + half * 32 >= columns) break;
            if (GROUP && (step > first || half) && (step * STEP + half * 32) % (GROUP ? GROUP : 1) == 0) {
                finish_group();
                load_group((step * STEP + half * 32) / (GROUP ? GROUP : 1));
            }
            u32 left[2][4];
            decode(left[0], own.word[2 * half], offset);
            decode(left[1], own.word[2 * half + 1], offset);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                u32 right[4];
                const int token = tile * 8 + lane % 8;
                load_matrices(right, &stage.tokens[token][(half * 4 + lane / 8) ^ (token % 8)]);
                multiply(part[tile], left[0], right[0], right[1]);
                multiply(part[tile], left[1], right[2], right[3]);
            }
        }
    }
    finish_group();

    for (int tile = 0; tile < TILES; ++tile)
        for (int i = 0; i < 4; ++i) {
            const int row = row_tile * 16 + g + (i < 2 ? 0 : 8), token = first_token + tile * 8 + 2 * q + i % 2;
            if (row >= rows || token >= count) continue;
            const size_t at = static_cast<size_t>(token) * rows + row;
            if (shares)
                shares[static_cast<size_t>(blockIdx.y) * count * rows + at] = sums[tile][i];
            else
                out[at] = from_float(sums[tile][i] + (bias ? to_float(bias[row]) : 0.f));
        }
}
