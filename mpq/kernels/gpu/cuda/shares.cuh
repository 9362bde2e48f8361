// out (count, rows) = shares (number, count, rows) added in order + bias
extern "C" __global__ void add_shares(const float *shares, const u16 *bias, u16 *out, int number, int size, int rows) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= size) return;
    float total = 0.f;
    for (int share = 0; share < number; ++share) total += shares[static_cast<size_t>(share) * size + at];
    out[at] = from_float(total + (bias ? to_float(bias[at % rows]) : 0.f));
}
