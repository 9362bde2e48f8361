// The kernels' instructions on a CPU, one std::thread for each lane: the same source runs without a device.
// Copies happen as late as the waits allow, so that a missing wait shows.
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
struct alignas(16) Words { u32 word[4]; };
struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx, blockDim;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Warp {
    std::barrier<> gate{32};
    u32 left[32][4], right[32][2];
    const void *row[32];
};
static std::unique_ptr<std::barrier<>> block_gate;
static std::vector<std::unique_ptr<Warp>> warps;
static Warp &warp_of() { return *warps[threadIdx.x / 32]; }
static int lane_of() { return threadIdx.x % 32; }
static void __syncthreads() { block_gate->arrive_and_wait(); }

static thread_local std::deque<std::vector<std::function<void()>>> groups;
static thread_local std::vector<std::function<void()>> open_group;
static void copy(void *to, const void *from, bool valid) {
    open_group.push_back([=] { valid ? (void)std::memcpy(to, from, 16) : (void)std::memset(to, 0, 16); });
}
static void copy_once(void *to, const void *from, bool valid) { copy(to, from, valid); }
static void commit() {
    groups.push_back(std::move(open_group));
    open_group.clear();
}
template <int PENDING> static void wait() {
    for (; groups.size() > PENDING; groups.pop_front())
        for (auto &action : groups.front()) action();
}

static float bits_to_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static float half_to_float(u16 bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
    return bits >> 15 ? -size : size;
}
static float to_float(u16 bits) {
#if BF16
    return bits_to_float(u32(bits) << 16);
#else
    return half_to_float(bits);
#endif
}
static u16 from_float(float value) {  // ties to even; no number here overflows
    u32 bits;
    std::memcpy(&bits, &value, 4);
#if BF16
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
    const u16 sign = bits >> 16 & 0x8000;
    const float size = std::fabs(value);
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return sign | (size < 0x1p-14f ? units : ((exponent + 14) << 10) + units);
#endif
}
static u32 fused(u32 value, u32 factor, u32 addend) {
    const auto one = [&](int shift) {
        return u32(from_float(std::fma(to_float(u16(value >> shift)), to_float(u16(factor >> shift)),
            to_float(u16(addend >> shift)))));
    };
    return one(0) | one(16) << 16;
}

// PTX ISA, ldmatrix: lane l receives elements 2 (l % 4) and the next of row l / 4 of each matrix.
static void load_matrices(u32 (&to)[4], const void *row) {
    Warp &warp = warp_of();
    const int lane = lane_of();
    warp.row[lane] = row;
    warp.gate.arrive_and_wait();
    for (int matrix = 0; matrix < 4; ++matrix)
        to[matrix] = static_cast<const u32 *>(warp.row[matrix * 8 + lane / 4])[lane % 4];
    warp.gate.arrive_and_wait();
}

// PTX ISA, fragments of mma.m16n8k16: where each element of the three matrices is held.
static void multiply(float (&sums)[4], const u32 (&left)[4], u32 right0, u32 right1) {
    Warp &warp = warp_of();
    const int lane = lane_of(), g = lane / 4, q = lane % 4;
    std::memcpy(warp.left[lane], left, 16);
    warp.right[lane][0] = right0;
    warp.right[lane][1] = right1;
    warp.gate.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i < 2 ? 0 : 8), column = 2 * q + i % 2;
        float sum = sums[i];
        for (int k = 0; k < 16; ++k) {
            const u32 a = warp.left[row % 8 * 4 + k % 8 / 2][(row >= 8) + 2 * (k >= 8)];
            const u32 b = warp.right[column * 4 + k % 8 / 2][k >= 8];
            sum += to_float(u16(a >> 16 * (k % 2))) * to_float(u16(b >> 16 * (k % 2)));
        }
        sums[i] = sum;
    }
    warp.gate.arrive_and_wait();
}

static void launch(Index grid, int threads, const std::function<void()> &kernel) {
    for (int z = 0; z < grid.z; ++z)
        for (int y = 0; y < grid.y; ++y)
            for (int x = 0; x < grid.x; ++x) {
                block_gate = std::make_unique<std::barrier<>>(threads);
                warps.clear();
                for (int warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<Warp>());
                std::vector<std::thread> lanes;
                for (int thread = 0; thread < threads; ++thread)
                    lanes.emplace_back([=, &kernel] {
                        threadIdx = {thread, 0, 0};
                        blockIdx = {x, y, z};
                        blockDim = {threads, 1, 1};
                        kernel();
                    });
                for (auto &lane : lanes) lane.join();
            }
}
