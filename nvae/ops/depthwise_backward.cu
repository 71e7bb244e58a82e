// Depthwise convolution, backward: data and weight gradient in one pass over dy.
//
// With a = x or Swish(BN(x)) and y = conv(a):
//   da[q] = sum_k w[k] dy[(q + PAD - k) / S]      (where S divides)
//   dw[k] = sum_q a[q] dy[(q + PAD - k) / S]
// so one value of dy, read from shared memory, serves both sums. A block stages dy's tile with its
// halo (spread out with zeros for stride 2, so that both strides run the same loops; where a tile
// holds the whole image, the zeros around and between are written once a block). Every thread takes
// two channels, keeps its share of dw in registers, and walks over PH x PW patches of x, which is
// copied to shared memory as it is stored (cp.async) while dy is staged.
// With FUSED, BN and Swish are recomputed from x, and
//   g = da Swish'(BN(x)),   dx = g gamma rstd,   sums of g and of g (x - mean) over the pixels,
// from which the gradients of gamma, beta, mean and rstd follow. dx holds no terms through the
// statistics of x; they are added where those statistics were taken (fold in bn_swish.cu). With
// DSUMS the terms through the statistics of y are added to dy on load: dy + dS1 + 2 dS2 y.
// dw is summed in a fixed order: registers over a thread's pixels, the thread groups in ascending
// order, then the rows of `partial_weight`, by the block that finishes last (common.cu).
//
// Macros: C, H, W (of x), K, S, CB, NB, TH, TW, PH, PW (all in pixels of x), THREADS, MIN_BLOCKS,
// COUNTER_SLOTS, FUSED, DSUMS, NEED_DX, NEED_DW. K above 5 has too many weights for the registers: such kernels
// compute either dx or dw, the latter one row of taps a block.

constexpr int OH = (H + S - 1) / S;
constexpr int OW = (W + S - 1) / S;
constexpr int TILES_H = (H + TH - 1) / TH;
constexpr int TILES_W = (W + TW - 1) / TW;
constexpr int CHANNEL_BLOCKS = (C + CB - 1) / CB;
constexpr bool WHOLE_TILES = H % TH == 0 && W % TW == 0;
constexpr int IH = TH + K - 1;  // staged tile of dy, in pixels of x
constexpr int IW = TW + K - 1;
constexpr int PAD = K / 2;
constexpr int LANES = CB / 2;  // threads side by side, two channels each
constexpr int GROUPS = THREADS / LANES;
constexpr int WEIGHT_PITCH = CB + 2;  // spreads the transposing stores over the banks
constexpr int TILE_FLOATS = NB * IH * IW * CB;
constexpr int WEIGHT_FLOATS = (K * K * WEIGHT_PITCH + 3) / 4 * 4;
constexpr bool ALL_TAPS = K <= 5;
constexpr int TAP_ROWS = ALL_TAPS ? K : 1;  // rows of dw a block holds
constexpr int SLICES = NEED_DW ? K / TAP_ROWS : 1;
constexpr int TAPS = NEED_DW ? TAP_ROWS * K : 0;
constexpr bool HAS_BN_SUMS = FUSED && NEED_DX;
constexpr int VECTORS = CB / VIO;  // of a pixel; a thread's channels stay the same
constexpr int STEP = THREADS / VECTORS;
constexpr bool WHOLE_IMAGE = TILES_H == 1 && TILES_W == 1;
constexpr int LH = WHOLE_IMAGE ? OH : IH;  // what is loaded
constexpr int LW = WHOLE_IMAGE ? OW : IW;
constexpr int PIXELS = NB * LH * LW;
constexpr bool FLIP = VIO == 8 && CB == 32 && IW % 2 == 0 && PW % 2 == 0;
using Offset = IntIf<(static_cast<long long>(NB) * H * W * C < 1LL << 31)>::type;  // in a unit
static_assert(CB <= THREADS);
static_assert(ALL_TAPS || NEED_DX + NEED_DW == 1, "large K: one gradient a kernel");

struct Args {
    const elem* dy;       // (B, OH, OW, C)
    const elem* y;        // (B, OH, OW, C) with DSUMS
    const double* dsums;  // (2, C) with DSUMS
    const elem* x;        // (B, H, W, C)
    const float* weight;  // (C, K, K)
    const float* gamma;   // (C), these four with FUSED
    const float* beta;
    const double* moments;  // (3, C): mean, rstd, var
    elem* dx;               // (B, H, W, C) with NEED_DX
    float* partial_weight;  // (rows, C, K, K) with NEED_DW
    float* partial_sums;    // (rows, 2, C) with FUSED and NEED_DX
    float* dw;              // (C, K, K) with NEED_DW
    double* sums;           // (2, C) with FUSED and NEED_DX
    float* params;          // (2, C): dgamma, dbeta, with FUSED and NEED_DX
    double* through;        // (2, C): dS1, dS2 of x, or null, with FUSED and NEED_DX
    const double* elements; // that x's sums are over, where the device knows it, or null
    long long slot;         // of the counters
    double n;               // elements that x's sums are over, otherwise
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

#if FUSED
// mean, scale and shift
__device__ __forceinline__ void stage_bn(const Args& a, float* bn, int c0) {
    const int i = threadIdx.x, c = c0 + i;
    if (i < CB) {
        const bool ok = c < C;
        bn[i] = ok ? static_cast<float>(a.moments[c]) : 0.f;
        bn[CB + i] = ok ? a.gamma[c] * static_cast<float>(a.moments[C + c]) : 0.f;
        bn[2 * CB + i] = ok ? a.beta[c] : 0.f;
    }
}
#endif

// One value of every group, added
template <int ROWS>
__device__ __forceinline__ float add_groups(const float* first) {
    float total = *first;
    for (int g = 1; g < GROUPS; ++g) total += first[g * (ROWS * WEIGHT_PITCH)];
    return total;
}

#if DSUMS
// dS1 and 2 dS2 in shared memory: as registers they would live through the whole kernel
__device__ __forceinline__ void stage_dsums(const Args& a, float* dsums, int c0) {
    const int i = threadIdx.x;
    if (i < CB) {
        const bool ok = c0 + i < C;
        dsums[i] = ok ? static_cast<float>(a.dsums[c0 + i]) : 0.f;
        dsums[CB + i] = ok ? static_cast<float>(2 * a.dsums[C + c0 + i]) : 0.f;
    }
}
#endif

// h0, w0: pixel of x under the tile's first value
__device__ __forceinline__ void stage_tile(const Args& a, float* tile, const float* dsums, int c0,
                                           int b0, int h0, int w0) {
    constexpr int BATCH = 4;  // pixels in flight
    const int vector = threadIdx.x % VECTORS;
    const int c = c0 + vector * VIO;
    const bool channel_ok = c < C;
    const long long image = static_cast<long long>(b0) * (static_cast<long long>(OH) * OW * C) + c;
#if DSUMS
    float constant[VIO], slope[VIO];
    load_floats(dsums + vector * VIO, constant);
    load_floats(dsums + CB + vector * VIO, slope);
#endif
#pragma unroll 1
    for (int first = threadIdx.x / VECTORS; first < PIXELS; first += STEP * BATCH) {
        Raw raw[BATCH], raw_y[BATCH];
        bool inside[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int p = first + u * STEP;
            const int n = NB == 1 ? 0 : p / (LH * LW);
            int h = (p - n * (LH * LW)) / LW, w = p % LW;  // in dy
            inside[u] = channel_ok && p < PIXELS && (NB == 1 || b0 + n < a.B);
            if (!WHOLE_IMAGE) {
                h += h0;
                w += w0;
                inside[u] = inside[u] && h % S == 0 && w % S == 0 &&
                            static_cast<unsigned>(h) < OH * S && static_cast<unsigned>(w) < OW * S;
                h /= S;
                w /= S;
            }
            raw[u] = Raw();
            raw_y[u] = Raw();
            if (inside[u]) {
                const long long at = image + static_cast<Offset>((n * OH + h) * OW + w) * C;
                raw[u] = load_raw(a.dy + at);
#if DSUMS
                raw_y[u] = load_raw(a.y + at);
#endif
            }
        }
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int p = first + u * STEP;
            if (p >= PIXELS) break;
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
            const int n = NB == 1 ? 0 : p / (LH * LW);
            const int h = (p - n * (LH * LW)) / LW, w = p % LW;
            const int pixel = WHOLE_IMAGE ? (n * IH + h * S + PAD) * IW + w * S + PAD : p;
            store_tile<CB, FLIP>(tile, pixel, vector, v);
        }
    }
}

// even and odd point at the patch's first value of dy (its top left neighbor), in the two orders of
// a pixel's channels; weights at the two channels' first tap. Row r of dy meets output row o at tap
// ky = o + K - 1 - r, and likewise across.
__device__ __forceinline__ void correlate(const float* even, const float* odd, const float* weights,
                                          const float2 (&act)[PH][PW], int first_row,
                                          float2 (&da)[PH][PW], float2 (&dw)[TAP_ROWS * K]) {
    constexpr int SPAN = PW + K - 1;
#pragma unroll
    for (int o = 0; o < PH; ++o)
#pragma unroll
        for (int q = 0; q < PW; ++q) da[o][q] = make_float2(0.f, 0.f);
    if constexpr (ALL_TAPS) {
#pragma unroll
        for (int r = 0; r < PH + K - 1; ++r) {
            float2 v[SPAN];
#pragma unroll
            for (int i = 0; i < SPAN; ++i) v[i] = pair((i % 2 ? odd : even) + (r * IW + i) * CB);
#pragma unroll
            for (int o = 0; o < PH; ++o) {
                const int ky = o + K - 1 - r;
                if (ky < 0 || ky >= K) continue;
#pragma unroll
                for (int kx = 0; kx < K; ++kx) {
                    const float2 tap = pair(weights + (ky * K + kx) * WEIGHT_PITCH);
#pragma unroll
                    for (int q = 0; q < PW; ++q) {
                        const float2 value = v[q + K - 1 - kx];
                        if (NEED_DX) da[o][q] = fma2(value, tap, da[o][q]);
                        if (NEED_DW) dw[ky * K + kx] = fma2(value, act[o][q], dw[ky * K + kx]);
                    }
                }
            }
        }
    } else {
        const int last_row = NEED_DX ? K : first_row + 1;
#pragma unroll 1
        for (int ky = NEED_DX ? 0 : first_row; ky < last_row; ++ky) {
#pragma unroll
            for (int o = 0; o < PH; ++o) {
                float2 v[SPAN];
#pragma unroll
                for (int i = 0; i < SPAN; ++i)
                    v[i] = pair((i % 2 ? odd : even) + ((o + K - 1 - ky) * IW + i) * CB);
#pragma unroll
                for (int kx = 0; kx < K; ++kx) {
                    const float2 tap = pair(weights + (ky * K + kx) * WEIGHT_PITCH);
#pragma unroll
                    for (int q = 0; q < PW; ++q) {
                        const float2 value = v[q + K - 1 - kx];
                        if (NEED_DX) da[o][q] = fma2(value, tap, da[o][q]);
                        if (NEED_DW) dw[kx] = fma2(value, act[o][q], dw[kx]);
                    }
                }
            }
        }
    }
}

constexpr int ACROSS = TW / PW, DOWN = TH / PH;

// Where the tile of x has a pixel. In odd patches neighbors change places: the two patches of a warp
// would meet in half of the banks where a pixel takes only half of them.
__device__ __forceinline__ int x_pixel(int n, int h, int w) {
    const int patch = (n * DOWN + h / PH) * ACROSS + w / PW;
    return ((n * TH + h) * TW + w) ^ (PW % 2 == 0 ? patch & 1 : 0);
}

// A value of a patch; p at its first, swap what x_pixel makes of it: 0 or CB
__device__ __forceinline__ float2 x_at(const elem* p, int swap, int o, int q) {
    return widen_pair(
        *reinterpret_cast<const Pair*>(p + (o * TW + q) * CB + (q % 2 ? -swap : swap)));
}

// Starts to copy this thread's vectors of x.
__device__ __forceinline__ void fetch_x(const Args& a, elem* x, int c0, int b0, int h0, int w0) {
    constexpr int WANTED = NB * TH * TW;
    const int vector = threadIdx.x % VECTORS;
    const elem* image = a.x + static_cast<long long>(b0) * (static_cast<long long>(H) * W * C) +
                        c0 + vector * VIO;
    const bool channel_ok = c0 + vector * VIO < C;
#pragma unroll 4
    for (int p = threadIdx.x / VECTORS; p < WANTED; p += STEP) {
        const int n = NB == 1 ? 0 : p / (TH * TW);
        const int h = (p - n * (TH * TW)) / TW, w = p % TW;
        if (channel_ok && (NB == 1 || b0 + n < a.B) && (WHOLE_TILES || (h0 + h < H && w0 + w < W))) {
            const elem* from = image + static_cast<Offset>((n * H + h0 + h) * W + w0 + w) * C;
            elem* to = x + x_pixel(n, h, w) * CB + vector * VIO;
#if VIO * ELEM_BYTES >= 4
            copy_async<VIO * ELEM_BYTES>(to, from);
#else
            *to = *from;
#endif
        }
    }
}

#if NEED_DW || (FUSED && NEED_DX)
__device__ unsigned counters[COUNTER_SLOTS * CHANNEL_BLOCKS * SLICES];
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) kernel(const Args a) {
    extern __shared__ float4 shared[];
    float* tile = reinterpret_cast<float*>(shared);
    float* weights = tile + TILE_FLOATS;
    float* dsums = weights + WEIGHT_FLOATS;
    float* bn = dsums + 2 * CB;
    elem* x = reinterpret_cast<elem*>(bn + 3 * CB);

    const int c0 = blockIdx.x % CHANNEL_BLOCKS * CB;
    const int row = blockIdx.x / CHANNEL_BLOCKS / SLICES;
    const int first_row = blockIdx.x / CHANNEL_BLOCKS % SLICES * TAP_ROWS;
    const int lane = threadIdx.x % LANES;
    const int group = threadIdx.x / LANES;
    const int channel = tile_channel<CB>(lane * 2);
    const int c = c0 + channel;
    const bool both = VIO >= 2 || c + 1 < C;
    const int odd = FLIP ? (lane * 2 ^ CB / 2) - lane * 2 : 0;
#if FUSED
    float2 sum = make_float2(0.f, 0.f), moment = sum;
#endif
    float2 dw[TAP_ROWS * K];
#pragma unroll
    for (int k = 0; k < TAP_ROWS * K; ++k) dw[k] = make_float2(0.f, 0.f);

    stage_weights(a, weights, c0);
#if DSUMS
    stage_dsums(a, dsums, c0);
#endif
#if FUSED
    stage_bn(a, bn, c0);
#endif
    if (WHOLE_IMAGE)
        for (int i = threadIdx.x; i < TILE_FLOATS / 4; i += THREADS)
            shared[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    __syncthreads();  // dsums and the zeros are staged
    for (int unit = row; unit < a.units; unit += a.rows) {
        const int h0 = unit / TILES_W % TILES_H * TH;
        const int w0 = unit % TILES_W * TW;
        const int b0 = unit / (TILES_W * TILES_H) * NB;
        if (FUSED || NEED_DW) fetch_x(a, x, c0, b0, h0, w0);
        stage_tile(a, tile, dsums, c0, b0, h0 - PAD, w0 - PAD);
        wait_for_copies();
        __syncthreads();  // tiles and weights are staged

#pragma unroll 1
        for (int patch = group; patch < NB * DOWN * ACROSS; patch += GROUPS) {
            const int n = patch / (DOWN * ACROSS);
            const int ph = patch / ACROSS % DOWN * PH;
            const int pw = patch % ACROSS * PW;
            const int b = b0 + n, h = h0 + ph, w = w0 + pw;
            if (b >= a.B || c >= C) continue;
            const elem* xs = x + ((n * TH + ph) * TW + pw) * CB + channel;
            const int swap = PW % 2 == 0 ? patch % 2 * CB : 0;  // x_pixel's
            const auto is_inside = [&](int o, int q) {
                return WHOLE_TILES || (h + o < H && w + q < W);
            };

            float2 act[PH][PW];    // Swish(BN(x)), or x; zero outside the image
            float2 slope[PH][PW];  // Swish'(BN(x))
#if FUSED
            float2 mean = pair(bn + channel), scale = pair(bn + CB + channel);
            const float2 shift = pair(bn + 2 * CB + channel);
#endif
#pragma unroll
            for (int o = 0; o < PH; ++o)
#pragma unroll
                for (int q = 0; q < PW; ++q) {
                    act[o][q] = make_float2(0.f, 0.f);
                    if (!(FUSED || NEED_DW) || !is_inside(o, q)) continue;
                    act[o][q] = x_at(xs, swap, o, q);
#if FUSED
                    const float vx = fmaf(act[o][q].x - mean.x, scale.x, shift.x);
                    const float vy = fmaf(act[o][q].y - mean.y, scale.y, shift.y);
                    const float sx = sigmoid(vx), sy = sigmoid(vy);
                    act[o][q] = make_float2(vx * sx, vy * sy);
                    slope[o][q] = make_float2(fmaf(act[o][q].x, 1.f - sx, sx),
                                              fmaf(act[o][q].y, 1.f - sy, sy));
#endif
                }
            float2 da[PH][PW];
            const float* from = tile + ((n * IH + ph) * IW + pw) * CB + lane * 2;
            correlate(from, from + odd, weights + channel, act, first_row, da, dw);
#if NEED_DX
#if FUSED
            // Read and worked out again, since as registers they would live through the sums; the
            // compiler does not know that blockIdx.y is 0.
            const int zero = blockIdx.y;
            mean = pair(bn + zero + channel);
            scale = pair(bn + zero + CB + channel);
            xs = x + ((n * TH + ph) * TW + pw) * CB + channel + zero;
#endif
            elem* dx = a.dx + ((static_cast<long long>(b) * H + h) * W + w) * C + c;
#pragma unroll
            for (int o = 0; o < PH; ++o)
#pragma unroll
                for (int q = 0; q < PW; ++q) {
                    if (!is_inside(o, q)) continue;
                    elem* to = dx + static_cast<long long>(o * W + q) * C;
#if FUSED
                    const float2 x = x_at(xs, swap, o, q);
                    const float2 centered = make_float2(x.x - mean.x, x.y - mean.y);
                    const float2 g =
                        make_float2(da[o][q].x * slope[o][q].x, da[o][q].y * slope[o][q].y);
                    sum = make_float2(sum.x + g.x, sum.y + g.y);
                    moment = fma2(g, centered, moment);
                    store_pair(to, make_float2(g.x * scale.x, g.y * scale.y), both);
#else
                    store_pair(to, da[o][q], both);
#endif
                }
#endif
        }
        __syncthreads();  // the tile may be overwritten
    }

    // fixed order: groups ascending, so that equal inputs give equal bits
    constexpr int PITCH = WEIGHT_PITCH, ROWS = TAPS + 2 * HAS_BN_SUMS;
    float* own = tile + group * (ROWS * PITCH) + channel;
#if NEED_DW
#pragma unroll
    for (int k = 0; k < TAPS; ++k) *reinterpret_cast<float2*>(own + k * PITCH) = dw[k];
#endif
#if FUSED && NEED_DX
    *reinterpret_cast<float2*>(own + TAPS * PITCH) = sum;
    *reinterpret_cast<float2*>(own + (TAPS + 1) * PITCH) = moment;
#endif
    __syncthreads();  // every group's sums are there
    const int live = min(CB, C - c0);
#if NEED_DW
    float* to = a.partial_weight + (static_cast<long long>(row) * C + c0) * (K * K);
#pragma unroll 1
    for (int i = threadIdx.x; i < live * TAPS; i += THREADS)
        to[i / TAPS * (K * K) + first_row * K + i % TAPS] =
            add_groups<ROWS>(tile + i % TAPS * WEIGHT_PITCH + i / TAPS);
#endif
#if FUSED && NEED_DX
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * CB; i += THREADS)
        if (i % CB < live)
            a.partial_sums[(static_cast<long long>(row) * 2 + i / CB) * C + c0 + i % CB] =
                add_groups<ROWS>(tile + (TAPS + i / CB) * PITCH + i % CB);
#endif
#if NEED_DW || (FUSED && NEED_DX)
    constexpr int COLUMNS = CHANNEL_BLOCKS * SLICES;
    if (!is_last_block(counters + a.slot * COLUMNS + blockIdx.x % COLUMNS, a.rows)) return;
    double* totals = reinterpret_cast<double*>(shared);
#endif
#if NEED_DW
    add_rows<CB * TAPS>(a.partial_weight, a.rows, static_cast<long long>(C) * K * K, a.dw, totals,
                        [=](int i) -> long long {
                            const int tap = first_row * K + i % TAPS;
                            return i / TAPS < live ? (c0 + i / TAPS) * (K * K) + tap : -1;
                        });
#endif
#if FUSED && NEED_DX
    add_rows<2 * CB>(a.partial_sums, a.rows, 2 * C, a.sums, totals + THREADS,
                     [=](int i) { return i % CB < live ? i / CB * C + c0 + i % CB : -1; });
    finish_gradients<CB>(a.sums, a.gamma, a.moments, a.params, a.through, a.elements, a.n, c0, C);
#endif
}
