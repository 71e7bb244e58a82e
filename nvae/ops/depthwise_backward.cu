// Depthwise convolution, backward: data and weight gradient in one pass over dy.
//
// With a = x or Swish(BN(x)) and y = conv(a):
//   da[q] = sum_k w[k] dy[(q + PAD - k) / S]      (where S divides)
//   dw[k] = sum_q a[q] dy[(q + PAD - k) / S]
// so one value of dy, read from shared memory, serves both sums. A block stages dy's tile with its
// halo (spread out with zeros for stride 2, so that both strides run the same loops); every thread
// takes one channel, keeps its weights and its share of dw in registers, and walks over PH x PW
// patches of x, of which only the patch itself is read.
// With FUSED, BN and Swish are recomputed from x, and
//   g = da Swish'(BN(x)),   dx = g gamma rstd,   sums of g and of g (x - mean) over the pixels,
// from which the gradients of gamma, beta, mean and rstd follow. dx holds no terms through the
// statistics of x; they are added where those statistics were taken (fold in bn_swish.cu). With
// DSUMS the terms through the statistics of y are added to dy on load: dy + dS1 + 2 dS2 y.
// dw is summed in a fixed order: registers over a thread's pixels, the thread groups in ascending
// order, then the rows of `partial_weight` (sum_rows in vectors.cu). No atomics.
//
// Macros: C, H, W (of x), K, S, CB, NB, TH, TW, PH, PW (all in pixels of x), THREADS, MIN_BLOCKS,
// FUSED, DSUMS, NEED_DX, NEED_DW. K above 5 has too many weights for the registers: such kernels compute either
// dx or dw, the latter one row of taps a block.

constexpr int OH = (H + S - 1) / S;
constexpr int OW = (W + S - 1) / S;
constexpr int TILES_H = (H + TH - 1) / TH;
constexpr int TILES_W = (W + TW - 1) / TW;
constexpr int CHANNEL_BLOCKS = (C + CB - 1) / CB;
constexpr bool WHOLE_TILES = H % TH == 0 && W % TW == 0;
constexpr int IH = TH + K - 1;  // staged tile of dy, in pixels of x
constexpr int IW = TW + K - 1;
constexpr int PAD = K / 2;
constexpr int GROUPS = THREADS / CB;
constexpr int WEIGHT_PITCH = CB + 1;
constexpr int TILE_FLOATS = NB * IH * IW * CB;
constexpr int WEIGHT_FLOATS = (K * K * WEIGHT_PITCH + 3) / 4 * 4;
constexpr bool REGISTER_WEIGHTS = K <= 5;
constexpr int TAP_ROWS = REGISTER_WEIGHTS ? K : 1;  // rows of dw a block holds
constexpr int SLICES = NEED_DW ? K / TAP_ROWS : 1;
static_assert(REGISTER_WEIGHTS || NEED_DX + NEED_DW == 1, "large K: one gradient a kernel");

struct Args {
    const elem* dy;       // (B, OH, OW, C)
    const elem* y;        // (B, OH, OW, C) with DSUMS
    const double* dsums;  // (2, C) with DSUMS
    const elem* x;        // (B, H, W, C)
    const float* weight;  // (C, K, K)
    const float* gamma;   // (C), these four with FUSED
    const float* beta;
    const double* mean;
    const double* rstd;
    elem* dx;               // (B, H, W, C) with NEED_DX
    float* partial_weight;  // (rows, C, K, K) with NEED_DW
    float* partial_sums;    // (rows, 2, C) with FUSED and NEED_DX
    int B;
    int units;  // ceil(B / NB) * TILES_H * TILES_W
    int rows;   // blocks that share the units of one channel block
};

__device__ __forceinline__ void stage_weights(const Args& a, float* weights, int c0) {
    const int live = min(CB, C - c0) * K * K;
    for (int i = threadIdx.x; i < CB * K * K; i += THREADS) {
        const float w = i < live ? a.weight[static_cast<long long>(c0) * (K * K) + i] : 0.f;
        weights[i % (K * K) * WEIGHT_PITCH + i / (K * K)] = w;
    }
}

#if DSUMS
// dS1 and 2 dS2 in shared memory: as registers they would live through the whole kernel
__device__ __forceinline__ void stage_dsums(const Args& a, float* dsums, int c0) {
    for (int i = threadIdx.x; i < CB; i += THREADS) {
        const bool ok = c0 + i < C;
        dsums[i] = ok ? static_cast<float>(a.dsums[c0 + i]) : 0.f;
        dsums[CB + i] = ok ? static_cast<float>(2 * a.dsums[C + c0 + i]) : 0.f;
    }
}
#endif

// h0, w0: pixel of x under the tile's first value
__device__ __forceinline__ void stage_tile(const Args& a, float* tile, const float* dsums, int c0,
                                           int b0, int h0, int w0) {
    constexpr int VECTORS = CB / VIO;  // a thread's channels stay the same
    constexpr int STEP = THREADS / VECTORS;
    constexpr int PIXELS = NB * IH * IW;
    constexpr int BATCH = DSUMS ? 2 : 4;  // pixels in flight
    const int c = c0 + threadIdx.x % VECTORS * VIO;
    const bool channel_ok = c < C;
    const long long image = static_cast<long long>(b0) * (static_cast<long long>(OH) * OW * C) + c;
#if DSUMS
    float constant[VIO], slope[VIO];
#pragma unroll
    for (int i = 0; i < VIO; ++i) {
        constant[i] = dsums[c - c0 + i];
        slope[i] = dsums[CB + c - c0 + i];
    }
#endif
    for (int first = threadIdx.x / VECTORS; first < PIXELS; first += STEP * BATCH) {
        Raw raw[BATCH], raw_y[BATCH];
        bool inside[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int p = first + u * STEP;
            const int n = NB == 1 ? 0 : p / (IH * IW);
            const int h = h0 + (p - n * (IH * IW)) / IW;
            const int w = w0 + p % IW;
            inside[u] = channel_ok && p < PIXELS && (NB == 1 || b0 + n < a.B) && h % S == 0 &&
                        w % S == 0 && static_cast<unsigned>(h) < OH * S &&
                        static_cast<unsigned>(w) < OW * S;
            raw[u] = Raw();
            raw_y[u] = Raw();
            if (inside[u]) {
                const long long at =
                    image + (static_cast<long long>(n) * (OH * OW) + h / S * OW + w / S) * C;
                raw[u] = load_raw(a.dy + at);
#if DSUMS
                raw_y[u] = load_raw(a.y + at);
#endif
            }
        }
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int p = first + u * STEP;
            float v[VIO];
            unpack(raw[u], v);
#if DSUMS
            if (inside[u]) {
                float y[VIO];
                unpack(raw_y[u], y);
#pragma unroll
                for (int i = 0; i < VIO; ++i) v[i] += fmaf(slope[i], y[i], constant[i]);
            }
#endif
            if (p < PIXELS) {
                float* to = tile + p * CB + threadIdx.x % VECTORS * VIO;
#if VIO % 4 == 0
#pragma unroll
                for (int i = 0; i < VIO; i += 4)
                    *reinterpret_cast<float4*>(to + i) =
                        make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
#else
#pragma unroll
                for (int i = 0; i < VIO; ++i) to[i] = v[i];
#endif
            }
        }
    }
}

// from points at the patch's first value of dy (its top left neighbor). Row r of dy meets output
// row o at tap ky = o + K - 1 - r, and likewise across.
__device__ __forceinline__ void correlate(const float* from, const float* weights,
                                          const float (&w)[REGISTER_WEIGHTS ? K * K : 1],
                                          const float (&act)[PH][PW], int first_row,
                                          float (&da)[PH][PW], float (&dw)[TAP_ROWS * K]) {
    constexpr int SPAN = PW + K - 1;
#pragma unroll
    for (int o = 0; o < PH; ++o)
#pragma unroll
        for (int q = 0; q < PW; ++q) da[o][q] = 0.f;
    if constexpr (REGISTER_WEIGHTS) {
#pragma unroll
        for (int r = 0; r < PH + K - 1; ++r) {
            float v[SPAN];
#pragma unroll
            for (int i = 0; i < SPAN; ++i) v[i] = from[(r * IW + i) * CB];
#pragma unroll
            for (int o = 0; o < PH; ++o) {
                const int ky = o + K - 1 - r;
                if (ky < 0 || ky >= K) continue;
#pragma unroll
                for (int kx = 0; kx < K; ++kx)
#pragma unroll
                    for (int q = 0; q < PW; ++q) {
                        const float value = v[q + K - 1 - kx];
                        if (NEED_DX) da[o][q] = fmaf(value, w[ky * K + kx], da[o][q]);
                        if (NEED_DW) dw[ky * K + kx] = fmaf(value, act[o][q], dw[ky * K + kx]);
                    }
            }
        }
    } else {
        const int last_row = NEED_DX ? K : first_row + 1;
#pragma unroll 1
        for (int ky = NEED_DX ? 0 : first_row; ky < last_row; ++ky) {
#pragma unroll
            for (int o = 0; o < PH; ++o) {
                float v[SPAN];
#pragma unroll
                for (int i = 0; i < SPAN; ++i) v[i] = from[((o + K - 1 - ky) * IW + i) * CB];
#pragma unroll
                for (int kx = 0; kx < K; ++kx) {
                    const float tap = weights[(ky * K + kx) * WEIGHT_PITCH];
#pragma unroll
                    for (int q = 0; q < PW; ++q) {
                        const float value = v[q + K - 1 - kx];
                        if (NEED_DX) da[o][q] = fmaf(value, tap, da[o][q]);
                        if (NEED_DW) dw[kx] = fmaf(value, act[o][q], dw[kx]);
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) kernel(const Args a) {
    extern __shared__ float4 shared[];
    float* tile = reinterpret_cast<float*>(shared);
    float* weights = tile + TILE_FLOATS;
    float* dsums = weights + WEIGHT_FLOATS;

    const int c0 = blockIdx.x % CHANNEL_BLOCKS * CB;
    const int row = blockIdx.x / CHANNEL_BLOCKS / SLICES;
    const int first_row = blockIdx.x / CHANNEL_BLOCKS % SLICES * TAP_ROWS;
    const int lane = threadIdx.x % CB;
    const int group = threadIdx.x / CB;
    const int c = c0 + lane;
    const bool channel_ok = c < C;
#if FUSED
    const float mean = channel_ok ? static_cast<float>(a.mean[c]) : 0.f;
    const float scale = channel_ok ? a.gamma[c] * static_cast<float>(a.rstd[c]) : 0.f;
    const float shift = channel_ok ? a.beta[c] : 0.f;
    float sum = 0.f, moment = 0.f;
#endif
    float dw[TAP_ROWS * K];
#pragma unroll
    for (int k = 0; k < TAP_ROWS * K; ++k) dw[k] = 0.f;

    stage_weights(a, weights, c0);
#if DSUMS
    stage_dsums(a, dsums, c0);
    __syncthreads();  // dsums are staged
#endif
    for (int unit = row; unit < a.units; unit += a.rows) {
        const int h0 = unit / TILES_W % TILES_H * TH;
        const int w0 = unit % TILES_W * TW;
        const int b0 = unit / (TILES_W * TILES_H) * NB;
        stage_tile(a, tile, dsums, c0, b0, h0 - PAD, w0 - PAD);
        __syncthreads();  // tile and weights are staged

        float w[REGISTER_WEIGHTS ? K * K : 1];
        if constexpr (REGISTER_WEIGHTS) {
#pragma unroll
            for (int k = 0; k < K * K; ++k) w[k] = weights[k * WEIGHT_PITCH + lane];
        }
        constexpr int ACROSS = TW / PW, DOWN = TH / PH;
#pragma unroll 1
        for (int patch = group; patch < NB * DOWN * ACROSS; patch += GROUPS) {
            const int n = patch / (DOWN * ACROSS);
            const int ph = patch / ACROSS % DOWN * PH;
            const int pw = patch % ACROSS * PW;
            const int b = b0 + n, h = h0 + ph, w_ = w0 + pw;
            if (b >= a.B || !channel_ok) continue;
            const long long at = ((static_cast<long long>(b) * H + h) * W + w_) * C + c;

            float act[PH][PW];  // Swish(BN(x)), or x; zero outside the image
            float x[PH][PW];    // kept for what FUSED needs after the sums
#pragma unroll
            for (int o = 0; o < PH; ++o)
#pragma unroll
                for (int q = 0; q < PW; ++q) {
                    x[o][q] = 0.f;
                    if ((FUSED || NEED_DW) && (WHOLE_TILES || (h + o < H && w_ + q < W)))
                        x[o][q] = load_one(a.x + at + static_cast<long long>(o * W + q) * C);
                }
#pragma unroll
            for (int o = 0; o < PH; ++o)
#pragma unroll
                for (int q = 0; q < PW; ++q) {
#if FUSED
                    const bool inside = WHOLE_TILES || (h + o < H && w_ + q < W);
                    const float v = fmaf(x[o][q] - mean, scale, shift);
                    act[o][q] = inside ? v * sigmoid(v) : 0.f;
#else
                    act[o][q] = x[o][q];
#endif
                }
            float da[PH][PW];
            correlate(tile + ((n * IH + ph) * IW + pw) * CB + lane, weights + lane, w, act,
                      first_row, da, dw);
#if NEED_DX
#pragma unroll
            for (int o = 0; o < PH; ++o)
#pragma unroll
                for (int q = 0; q < PW; ++q) {
                    if (!WHOLE_TILES && (h + o >= H || w_ + q >= W)) continue;
                    elem* to = a.dx + at + static_cast<long long>(o * W + q) * C;
#if FUSED
                    const float centered = x[o][q] - mean;
                    const float v = fmaf(centered, scale, shift);
                    const float s = sigmoid(v);
                    const float g = da[o][q] * fmaf(v * s, 1.f - s, s);  // Swish' = s + v s (1 - s)
                    sum += g;
                    moment = fmaf(g, centered, moment);
                    store_one(to, g * scale);
#else
                    store_one(to, da[o][q]);
#endif
                }
#endif
        }
        __syncthreads();  // the tile may be overwritten
    }

    // fixed order: groups one after the other, so that equal inputs give equal bits
    float* total = tile;
    constexpr int TAPS = NEED_DW ? TAP_ROWS * K : 0;
#pragma unroll 1
    for (int g = 0; g < GROUPS; ++g) {
        if (group == g) {
#if NEED_DW
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                total[k * WEIGHT_PITCH + lane] =
                    dw[k] + (g == 0 ? 0.f : total[k * WEIGHT_PITCH + lane]);
#endif
#if FUSED && NEED_DX
            float* sums = total + TAPS * WEIGHT_PITCH + lane;
            sums[0] = sum + (g == 0 ? 0.f : sums[0]);
            sums[CB] = moment + (g == 0 ? 0.f : sums[CB]);
#endif
        }
        __syncthreads();  // the next group adds to it
    }
#if NEED_DW
    float* to = a.partial_weight + (static_cast<long long>(row) * C + c0) * (K * K);
    const int live = min(CB, C - c0) * TAPS;
    for (int i = threadIdx.x; i < live; i += THREADS)
        to[i / TAPS * (K * K) + first_row * K + i % TAPS] =
            total[i % TAPS * WEIGHT_PITCH + i / TAPS];
#endif
#if FUSED && NEED_DX
    if (group == 0 && channel_ok) {
        float* sums = a.partial_sums + static_cast<long long>(row) * 2 * C + c;
        sums[0] = total[TAPS * WEIGHT_PITCH + lane];
        sums[C] = total[TAPS * WEIGHT_PITCH + CB + lane];
    }
#endif
}
