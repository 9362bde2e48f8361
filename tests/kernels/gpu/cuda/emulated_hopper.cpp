// usage: g++ -std=c++20 -DTOKENS=... emulated_hopper.cpp -I FOLDER_OF_HOPPER_CU: launch(product), launch(add_shares)
#include "emulated_hopper.h"

#include "decode.cuh"
#include "hopper.cu"
#include "shares.cuh"

extern "C" void run_product(int x, int y, int z, const u16 *inputs, const Words *codes, const u16 *scales,
                            const u8 *zeros, const u16 *bias, u16 *out, float *shares, int count, int rows,
                            int columns, int padded, int blocks, int steps_per_share, int stride) {
    const TensorMap map{inputs, columns, count, stride};
    for (int at_z = 0; at_z < z; ++at_z)
        for (int at_y = 0; at_y < y; ++at_y)
            for (int at_x = 0; at_x < x; ++at_x) {
                std::memset(pool, 0xff, sizeof pool);  // NaN in both types
                for (auto &group : warpgroups) group = std::make_unique<Warpgroup>();
                launch({1, 1, 1}, 288, [=] {
                    blockIdx = {at_x, at_y, at_z};
                    product(map, codes, scales, zeros, bias, out, shares, count, rows, columns, padded, blocks,
                            steps_per_share);
                });
            }
}

extern "C" void run_add_shares(int x, const float *shares, const u16 *bias, u16 *out, int number, int size, int rows) {
    launch({x, 1, 1}, 256, [=] { add_shares(shares, bias, out, number, size, rows); });
}
