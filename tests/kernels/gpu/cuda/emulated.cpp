// usage: g++ -std=c++20 -DTOKENS=... emulated.cpp -I FOLDER_OF_INT4_CU: launch(product), launch(add_shares) for ctypes
#include "emulated.h"

#include "decode.cuh"
#include "int4.cu"
#include "shares.cuh"

extern "C" void run_product(int x, int y, int z, const u16 *inputs, const Words *codes, const u16 *scales,
                            const u8 *zeros, const u16 *bias, u16 *out, float *shares, int count, int rows,
                            int columns, int padded, int blocks, int stride, int steps_per_share) {
    launch({x, y, z}, 128, [=] {
        product(inputs, codes, scales, zeros, bias, out, shares, count, rows, columns, padded, blocks, stride,
                steps_per_share);
    });
}

extern "C" void run_add_shares(int x, const float *shares, const u16 *bias, u16 *out, int number, int size, int rows) {
    launch({x, 1, 1}, 256, [=] { add_shares(shares, bias, out, number, size, rows); });
}
