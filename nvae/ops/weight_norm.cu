// Weight normalization of many convolutions at once, w_hat = exp(g) w / (||w|| + eps), the norm per
// row: the weights of one output channel, which lie together in memory. One a MODE:
//
//   MODE_FORWARD   w, g -> w_hat in the storage type, and norm and scale = exp(g) / (||w|| + eps)
//   MODE_BACKWARD  gradient of w_hat -> of w and g
//
// A block takes ROWS rows of one tensor, 32 threads each. Macros: MODE, THREADS, and ELEM, VIO of
// common.cu, the storage type of w_hat and its gradient; VIO is not used.

#define MODE_FORWARD 0
#define MODE_BACKWARD 1

constexpr int LANES = 32;
constexpr int ROWS = THREADS / LANES;

struct Args {
    const long long* tensors;  // (T, 8): rows, elements of a row, then addresses:
                               // forward: w, g, w_hat, norm, scale, 0
                               // backward: w, gradient of w_hat, norm, scale, gradients of w, g
    const long long* blocks;   // (blocks, 2): tensor, its first row
    float eps;
};

#ifdef __CUDA_ARCH__  // an address out of a table may be of any memory, and is read more slowly
#define GLOBAL(p) __builtin_assume(__isGlobal(p))
#else
#define GLOBAL(p)
#endif

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Args a) {
    __shared__ float partial[ROWS][LANES + 1];
    const long long* entry = a.tensors + 8 * a.blocks[2 * blockIdx.x];
    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
    const long long row = a.blocks[2 * blockIdx.x + 1] + slot;
    const bool inside = row < entry[0];
    const int n = static_cast<int>(entry[1]);
    const float* w = reinterpret_cast<const float*>(entry[2]) + row * n;
    GLOBAL(w);
#if MODE == MODE_FORWARD
    const float* g = reinterpret_cast<const float*>(entry[3]);
    elem* w_hat = reinterpret_cast<elem*>(entry[4]) + row * n;
    GLOBAL(g);
    GLOBAL(w_hat);
#else
    const elem* dw_hat = reinterpret_cast<const elem*>(entry[3]) + row * n;
    float* dw = reinterpret_cast<float*>(entry[6]) + row * n;
    GLOBAL(dw_hat);
    GLOBAL(dw);
#endif

    float sum = 0;
    if (inside)
#pragma unroll 4
        for (int i = lane; i < n; i += LANES)
#if MODE == MODE_FORWARD
            sum = fmaf(w[i], w[i], sum);
#else
            sum = fmaf(load_one(dw_hat + i), w[i], sum);
#endif
    partial[slot][lane] = sum;
    __syncthreads();  // the row's partial sums are there
    sum = 0;
#pragma unroll
    for (int i = 0; i < LANES; ++i) sum += partial[slot][i];
    if (!inside) return;

#if MODE == MODE_FORWARD
    const float norm = sqrtf(sum);
    const float scale = expf(g[row]) / (norm + a.eps);
    if (lane == 0) {
        reinterpret_cast<float*>(entry[5])[row] = norm;
        reinterpret_cast<float*>(entry[6])[row] = scale;
    }
#pragma unroll 4
    for (int i = lane; i < n; i += LANES) store_one(w_hat + i, w[i] * scale);
#else
    const float norm = reinterpret_cast<const float*>(entry[4])[row];
    const float scale = reinterpret_cast<const float*>(entry[5])[row];
    // d scale / d ||w|| = -scale / (||w|| + eps), d ||w|| / d w = w / ||w||; a row of zeros has none
    const float shrink = sum * scale / ((norm + a.eps) * fmaxf(norm, 1e-38f));
    if (lane == 0) reinterpret_cast<float*>(entry[7])[row] = sum * scale;
#pragma unroll 4
    for (int i = lane; i < n; i += LANES) dw[i] = fmaf(-shrink, w[i], load_one(dw_hat + i) * scale);
#endif
}
