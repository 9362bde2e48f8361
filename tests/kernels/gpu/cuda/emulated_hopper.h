// mbarriers, bulk and tensor copies and wgmma on a CPU, from the PTX ISA's words: the source of hopper.cu runs as it is.
// Sums in flight hold NaN and the right operand is read as late as the wait allows, so that a missing wait shows.
#include "emulated.h"

#include <cassert>
#include <condition_variable>
#include <map>
#include <mutex>

#define __grid_constant__
typedef unsigned long long u64;

struct TensorMap {
    const u16 *base;
    long columns, rows, stride;
};

alignas(1024) static unsigned char pool[227 * 1024];
static void *aligned_shared() { return pool; }
static u32 shared_address(const void *pointer) { return static_cast<const unsigned char *>(pointer) - pool; }

struct Phase {
    int arrivals, pending, bytes, number;
};
static std::mutex phases_lock;
static std::condition_variable phases_change;
static std::map<const u64 *, Phase> phases;

static void settle(Phase &phase) {
    if (phase.pending || phase.bytes) return;
    ++phase.number;
    phase.pending = phase.arrivals;
    phases_change.notify_all();
}
static void barrier_init(u64 *barrier, u32 arrivals) {
    std::lock_guard lock(phases_lock);
    phases[barrier] = {int(arrivals), int(arrivals), 0, 0};
}
static void barriers_ready() {}
static void arrive_expecting(u64 *barrier, u32 bytes) {
    std::lock_guard lock(phases_lock);
    Phase &phase = phases.at(barrier);
    phase.bytes += bytes;
    --phase.pending;
    settle(phase);
}
static void arrive(u64 *barrier) { arrive_expecting(barrier, 0); }
static void arrived(u64 *barrier, u32 bytes) {
    std::lock_guard lock(phases_lock);
    Phase &phase = phases.at(barrier);
    phase.bytes -= bytes;
    settle(phase);
}
static void wait_phase(u64 *barrier, u32 parity) {
    std::unique_lock lock(phases_lock);
    phases_change.wait(lock, [=] { return u32(phases.at(barrier).number & 1) != parity; });
}

static void bulk_copy(void *to, const void *from, u32 bytes, u64 *barrier) {
    assert(shared_address(to) % 16 == 0 && bytes % 16 == 0);
    std::memcpy(to, from, bytes);
    arrived(barrier, bytes);
}

// CUDA programming guide, 128-byte swizzle: 16-byte chunk c of row r of a box lies at c ^ (r % 8).
static void tensor_copy(void *to, const TensorMap *map, int column, int row, u64 *barrier) {
    assert(shared_address(to) % 1024 == 0);
    for (int r = 0; r < TOKENS; ++r)
        for (int c = 0; c < 64; ++c) {
            const bool inside = row + r < map->rows && column + c < map->columns;
            const u16 value = inside ? map->base[(row + r) * map->stride + column + c] : 0;
            static_cast<u16 *>(to)[r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8] = value;
        }
    arrived(barrier, TOKENS * 128);
}

struct Warpgroup {
    std::barrier<> gate{128};
    u32 left[128][4];
};
static std::unique_ptr<Warpgroup> warpgroups[2];
struct Flight {
    u32 left[4];
    u64 right;
    bool add;
};
static thread_local std::vector<Flight> flights;
static thread_local std::vector<float> landed;
static thread_local bool fenced, committed;

static void wgmma_fence() { fenced = true; }
static void wgmma_commit() { committed = true; }

template <int COUNT> static void multiply_async(float (&sums)[COUNT], const u32 (&left)[4], u64 right, bool add) {
    assert(fenced);
    if (flights.empty()) landed.assign(sums, sums + COUNT);
    for (float &sum : sums) sum = NAN;
    flights.push_back({{left[0], left[1], left[2], left[3]}, right, add});
    committed = false;
}

// PTX ISA, matrix descriptor and K-major layout with 128-byte swizzle: which address bits an element's row and column
// make, and bits 4 to 6 changed by bits 7 to 9.
static u16 right_element(u64 descriptor, int column, int k) {
    assert(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0);
    const u32 start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const u32 address = start + column / 8 * stride + column % 8 * 128 + 2 * k;
    u16 value;
    std::memcpy(&value, pool + (address ^ (address >> 7 & 7) << 4), 2);
    return value;
}

// PTX ISA, fragments of wgmma.m64nNk16: as mma.m16n8k16's, a warp for every sixteen rows.
template <int COUNT> static void wgmma_wait(float (&sums)[COUNT]) {
    assert(committed);
    const int thread = threadIdx.x % 128, lane = thread % 32, g = lane / 4, q = lane % 4;
    Warpgroup &group = *warpgroups[threadIdx.x / 128];
    for (const Flight &flight : flights) {
        std::memcpy(group.left[thread], flight.left, 16);
        group.gate.arrive_and_wait();
        for (int i = 0; i < COUNT; ++i) {
            const int row = thread / 32 * 16 + g + (i % 4 < 2 ? 0 : 8), column = i / 4 * 8 + 2 * q + i % 2;
            float sum = flight.add ? landed[i] : 0.f;
            for (int k = 0; k < 16; ++k) {
                const u32 a = group.left[row / 16 * 32 + row % 8 * 4 + k % 8 / 2][(row % 16 >= 8) + 2 * (k >= 8)];
                sum += to_float(u16(a >> 16 * (k % 2))) * to_float(right_element(flight.right, column, k));
            }
            landed[i] = sum;
        }
        group.gate.arrive_and_wait();
    }
    flights.clear();
    fenced = false;
    for (int i = 0; i < COUNT; ++i) sums[i] = landed[i];
}
