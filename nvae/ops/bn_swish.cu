// Passes over one tensor that a BN layer makes, alone or with Swish. One kernel a MODE:
//
//   MODE_APPLY     y  = v or, with SWISH, Swish(v);  v = (x - mean) scale + beta,
//                  scale = gamma rstd
//   MODE_BACKWARD  dx = g scale,   g = dy or, with SWISH, dy Swish'(v), recomputed from x;
//                  sums of g and of g (x - mean), and what follows from them (finish_gradients)
//   MODE_SUMS      sums of x and of x^2 and, with MOMENTS, what follows from them (put_moments)
//   MODE_FOLD      y  = dx + dS1 + 2 dS2 x: adds the gradient through the sums of x
//
// Pixels are rows of C channels. A block takes CB channels of a run of pixels; a thread keeps one
// vector of channels, so that the layer's parameters sit in registers, and steps over pixels.
//
// Macros: MODE, SWISH, MOMENTS, CB, THREADS, MIN_BLOCKS, COUNTER_SLOTS, COLUMNS (at least the blocks
// side by side).

#define MODE_APPLY 0
#define MODE_BACKWARD 1
#define MODE_SUMS 2
#define MODE_FOLD 3
#define HAS_BN (MODE == MODE_APPLY || MODE == MODE_BACKWARD)
#define HAS_SUMS (MODE == MODE_BACKWARD || MODE == MODE_SUMS)

constexpr int VECTORS = CB / VIO;
constexpr int GROUPS = THREADS / VECTORS;  // pixels side by side
constexpr int BATCH = MODE == MODE_APPLY || MODE == MODE_SUMS ? 4 : 2;  // loads in flight

struct Args {
    const elem* x;        // (P, C)
    const elem* dy;       // (P, C), dy or dx, with BACKWARD and FOLD
    const float* gamma;      // (C), these three with APPLY and BACKWARD
    const float* beta;
    const double* moments;   // (3, C): mean, rstd, var
    const double* dsums;     // (2, C) with FOLD
    elem* out;               // (P, C), not with SUMS
    float* partial;          // (rows, 2, C) with BACKWARD and SUMS
    double* sums;            // (2, C) with BACKWARD and SUMS
    double* made;            // (3, C): mean, rstd, var of x, with MOMENTS
    float* running_mean;     // (C), or null, with MOMENTS
    float* running_var;
    float* params;           // (2, C): dgamma, dbeta, with BACKWARD
    double* through;         // (2, C): dS1, dS2, or null, with BACKWARD
    const double* elements;  // that the sums are over, where the device knows it, or null
    long long slot;          // of the counters
    long long P;             // pixels
    long long run;           // pixels a block; times C, below 2^31
    double n;                // elements that the sums are over, otherwise
    double eps;              // these three with MOMENTS
    double repeats;          // how often an element counts in the running variance
    float momentum;
    int C;
    int rows;  // blocks that share the pixels
};

#if HAS_SUMS
__device__ unsigned counters[COUNTER_SLOTS * COLUMNS];
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) kernel(const Args a) {
    const int channel_blocks = (a.C + CB - 1) / CB;
    const int c = blockIdx.x % channel_blocks * CB + threadIdx.x % VECTORS * VIO;
    const long long row = blockIdx.x / channel_blocks;
    const int group = threadIdx.x / VECTORS;
    const bool channel_ok = c < a.C;

#if HAS_BN
    float mean[VIO], scale[VIO], shift[VIO];
#pragma unroll
    for (int i = 0; i < VIO; ++i) {
        mean[i] = channel_ok ? static_cast<float>(a.moments[c + i]) : 0.f;
        scale[i] = channel_ok ? a.gamma[c + i] * static_cast<float>(a.moments[a.C + c + i]) : 0.f;
        shift[i] = channel_ok ? a.beta[c + i] : 0.f;
    }
#endif
#if MODE == MODE_FOLD
    float constant[VIO], slope[VIO];
#pragma unroll
    for (int i = 0; i < VIO; ++i) {
        constant[i] = channel_ok ? static_cast<float>(a.dsums[c + i]) : 0.f;
        slope[i] = channel_ok ? static_cast<float>(2 * a.dsums[a.C + c + i]) : 0.f;
    }
#endif
#if HAS_SUMS
    float sum[VIO], moment[VIO];
#pragma unroll
    for (int i = 0; i < VIO; ++i) sum[i] = moment[i] = 0.f;
#endif

    const long long start = row * a.run * a.C + c;
    const int end = static_cast<int>(min(a.run, a.P - row * a.run));
    for (int p = group; channel_ok && p < end; p += GROUPS * BATCH) {
        Raw raw[BATCH], raw_dy[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const long long at = start + (p + u * GROUPS) * a.C;
            const bool inside = p + u * GROUPS < end;
            raw[u] = raw_dy[u] = Raw();
            if (inside) raw[u] = load_raw(a.x + at);
#if MODE == MODE_BACKWARD || MODE == MODE_FOLD
            if (inside) raw_dy[u] = load_raw(a.dy + at);
#endif
        }
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            if (p + u * GROUPS >= end) break;
            float x[VIO], dy[VIO], out[VIO];
            unpack(raw[u], x);
            unpack(raw_dy[u], dy);
#pragma unroll
            for (int i = 0; i < VIO; ++i) {
#if HAS_BN
                const float centered = x[i] - mean[i];
                const float v = fmaf(centered, scale[i], shift[i]);
#endif
#if MODE == MODE_APPLY
#if SWISH
                out[i] = v * sigmoid(v);
#else
                out[i] = v;
#endif
#elif MODE == MODE_BACKWARD
#if SWISH
                const float g = dy[i] * swish_slope(v);
#else
                const float g = dy[i];
#endif
                out[i] = g * scale[i];
                sum[i] += g;
                moment[i] = fmaf(g, centered, moment[i]);
#elif MODE == MODE_SUMS
                sum[i] += x[i];
                moment[i] = fmaf(x[i], x[i], moment[i]);
#else
                out[i] = dy[i] + fmaf(slope[i], x[i], constant[i]);
#endif
            }
#if MODE != MODE_SUMS
            store_vector(a.out + start + (p + u * GROUPS) * a.C, out);
#endif
        }
    }

#if HAS_SUMS
    // fixed order: groups ascending, so that equal inputs give equal bits
    alignas(8) __shared__ float sums[2][GROUPS][CB];
#pragma unroll
    for (int i = 0; i < VIO; ++i) {
        sums[0][group][threadIdx.x % VECTORS * VIO + i] = sum[i];
        sums[1][group][threadIdx.x % VECTORS * VIO + i] = moment[i];
    }
    __syncthreads();  // every group's sums are there
    // Its place is worked out again, since as registers it would live through the sums; the compiler
    // does not know that blockIdx.y is 0.
    const int block = blockIdx.x + blockIdx.y;
    const int columns = (a.C + CB - 1) / CB, column = block % columns;
    const int all = a.C;
    const auto place = [=](int i) {  // of a column's sum in a row, or -1
        const int channel = column * CB + i % CB;
        return channel < all ? i / CB * all + channel : -1;
    };
    for (int i = threadIdx.x; i < 2 * CB; i += THREADS) {
        float total = 0.f;
        for (int g = 0; g < GROUPS; ++g) total += sums[i / CB][g][i % CB];
        if (place(i) >= 0) a.partial[block / columns * 2LL * a.C + place(i)] = total;
    }
    if (!is_last_block(counters + a.slot * COLUMNS + column, a.rows)) return;
    add_rows<2 * CB>(a.partial, a.rows, 2 * a.C, a.sums, reinterpret_cast<double*>(sums), place);
#if MODE == MODE_BACKWARD
    finish_gradients<CB>(a.sums, a.gamma, a.moments, a.params, a.through, a.elements, a.n, column * CB,
                         a.C);
#elif MOMENTS
    finish_moments<CB>(a, column * CB, a.C, static_cast<double>(a.P));
#endif
#endif
}
