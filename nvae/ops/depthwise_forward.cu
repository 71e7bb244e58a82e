// Depthwise convolution, forward: y = conv(a), a = x or Swish(BN(x)), with sums of y.
//
// A block walks over units of NB images' TH x TW output tile, CB channels of them. While one unit
// is computed, the next one's raw input tile with its halo is copied to shared memory
// (cp.async: 16 bytes at a time where C allows), each thread its own vectors. Then the thread that
// copied a vector turns it into floats in the tile, BN and Swish once a staged pixel; padding is zero
// after them, so it is written and never loaded. Where a tile holds the whole image, its padding is
// written once a block. Every thread keeps the weights of two channels in registers and computes
// PH x PW patches of outputs: a value read from shared memory serves all taps of the patch that
// meet it, which leaves the kernel close to its K * K multiply-adds an output.
// The lanes of a warp store tiles (tile_channel in common.cu) and read them without bank conflicts, and
// write whole sectors of y.
//
// Macros: C, H, W (of x; constants, so that offsets within a patch are immediate), K, S (stride),
// CB, NB, TH, TW, PH, PW, THREADS, MIN_BLOCKS, COUNTER_SLOTS, FUSED (BN + Swish on load),
// SUMS (per-channel sum and sum of squares of y), MOMENTS (what follows from the sums: put_moments).

constexpr int OH = (H + S - 1) / S;
constexpr int OW = (W + S - 1) / S;
constexpr int TILES_H = (OH + TH - 1) / TH;
constexpr int TILES_W = (OW + TW - 1) / TW;
constexpr int CHANNEL_BLOCKS = (C + CB - 1) / CB;
constexpr bool WHOLE_TILES = OH % TH == 0 && OW % TW == 0;
constexpr int IH = (TH - 1) * S + K;  // staged tile
constexpr int IW = (TW - 1) * S + K;
constexpr int PAD = K / 2;
constexpr int LANES = CB / 2;         // threads side by side, two channels each
constexpr int GROUPS = THREADS / LANES;
constexpr int WEIGHT_PITCH = CB + 2;  // spreads the transposing stores over the banks
constexpr int TILE_FLOATS = NB * IH * IW * CB;
constexpr int WEIGHT_FLOATS = (K * K * WEIGHT_PITCH + 3) / 4 * 4;
// element-wise accesses of 16 bits leave no registers for them (C odd)
constexpr bool REGISTER_WEIGHTS = K <= 5 && VIO * ELEM_BYTES >= 4;
constexpr int VECTORS = CB / VIO;  // of a pixel; a thread's channels stay the same
constexpr int STEP = THREADS / VECTORS;
constexpr bool WHOLE_IMAGE = TILES_H == 1 && TILES_W == 1;
constexpr int BORDER = WHOLE_IMAGE ? PAD : 0;  // around what is copied
constexpr int LH = WHOLE_IMAGE && H < IH - PAD ? H : IH - BORDER;
constexpr int LW = WHOLE_IMAGE && W < IW - PAD ? W : IW - BORDER;
constexpr int PIXELS = NB * LH * LW;
constexpr int SLOTS = (PIXELS + STEP - 1) / STEP;  // vectors of a thread
using Offset = IntIf<(static_cast<long long>(NB) * H * W * C < 1LL << 31)>::type;  // in a unit
constexpr int UNROLL = SLOTS <= 8 ? SLOTS : 4;
constexpr bool FLIP = VIO == 8 && CB == 32 && IW % 2 == 0 && PW * S % 2 == 0;

struct Args {
    const elem* x;        // (B, H, W, C)
    const float* weight;  // (C, K, K)
    const float* gamma;   // (C), these three with FUSED
    const float* beta;
    const double* moments;  // (3, C): mean, rstd, var
    elem* y;                // (B, OH, OW, C)
    float* partial;         // (rows, 2, C) with SUMS
    double* sums;           // (2, C) with SUMS
    double* made;           // (3, C): mean, rstd, var of y, with MOMENTS
    float* running_mean;    // (C), or null, with MOMENTS
    float* running_var;
    long long slot;  // of the counters
    double eps;      // these three with MOMENTS
    double repeats;  // how often an element counts in the running variance
    float momentum;
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
// mean, scale and shift in shared memory: as registers they would live through the whole kernel
__device__ __forceinline__ void stage_bn(const Args& a, float* bn, int c0) {
    static_assert(CB <= THREADS);
    const int i = threadIdx.x, c = c0 + i;
    if (i < CB) {
        const bool ok = c < C;
        bn[i] = ok ? static_cast<float>(a.moments[c]) : 0.f;
        bn[CB + i] = ok ? a.gamma[c] * static_cast<float>(a.moments[C + c]) : 0.f;
        bn[2 * CB + i] = ok ? a.beta[c] : 0.f;
    }
}
#endif

// A unit's place: its first image, and the pixel of x under the tile's first value
struct Place {
    int b, h, w;
};

__device__ __forceinline__ Place place(int unit) {
    return {unit / (TILES_W * TILES_H) * NB, unit / TILES_W % TILES_H * (TH * S) - PAD,
            unit % TILES_W * (TW * S) - PAD};
}

// Starts to copy this thread's vectors of a unit; bit u of the result: vector u lies in the image.
__device__ __forceinline__ unsigned fetch(const Args& a, Raw* raw, Place at, int c) {
    const elem* image = a.x + static_cast<long long>(at.b) * (static_cast<long long>(H) * W * C) + c;
    unsigned inside = 0;
#pragma unroll UNROLL
    for (int u = 0; u < SLOTS; ++u) {
        const int p = threadIdx.x / VECTORS + u * STEP;
        const int n = NB == 1 ? 0 : p / (LH * LW);
        const int h = at.h + BORDER + (p - n * (LH * LW)) / LW;
        const int w = at.w + BORDER + p % LW;
        if (c < C && p < PIXELS && (NB == 1 || at.b + n < a.B) &&
            (WHOLE_IMAGE || (static_cast<unsigned>(h) < H && static_cast<unsigned>(w) < W))) {
            const elem* from = image + static_cast<Offset>((n * H + h) * W + w) * C;
            Raw* to = raw + threadIdx.x + u * THREADS;
#if VIO * ELEM_BYTES >= 4
            copy_async<VIO * ELEM_BYTES>(to, from);
#else
            *to = load_raw(from);
#endif
            if (SLOTS <= 32) inside |= 1u << u;
        }
    }
    return inside;
}

// Turns this thread's vectors into floats of the tile.
__device__ __forceinline__ void activate(const Args& a, const Raw* raw, float* tile,
                                         const float* bn, unsigned inside, Place at, int c) {
    const int vector = threadIdx.x % VECTORS;
#if FUSED
    float mean[VIO], scale[VIO], shift[VIO];
    load_floats(bn + vector * VIO, mean);
    load_floats(bn + CB + vector * VIO, scale);
    load_floats(bn + 2 * CB + vector * VIO, shift);
#endif
#pragma unroll UNROLL
    for (int u = 0; u < SLOTS; ++u) {
        const int p = threadIdx.x / VECTORS + u * STEP;
        const int n = NB == 1 ? 0 : p / (LH * LW);
        const int h = (p - n * (LH * LW)) / LW, w = p % LW;
        bool is_inside = inside >> (u & 31) & 1;
        if (SLOTS > 32)
            is_inside = c < C && p < PIXELS && (NB == 1 || at.b + n < a.B) &&
                        static_cast<unsigned>(at.h + BORDER + h) < H &&
                        static_cast<unsigned>(at.w + BORDER + w) < W;
        if (p >= PIXELS || (WHOLE_IMAGE && !is_inside)) continue;
        float v[VIO];
#pragma unroll
        for (int i = 0; i < VIO; ++i) v[i] = 0.f;
        if (WHOLE_IMAGE || is_inside) {
            const Raw bits = raw[threadIdx.x + u * THREADS];
            unpack(bits, v);
#if FUSED
#pragma unroll
            for (int i = 0; i < VIO; ++i) {
                const float n = fmaf(v[i] - mean[i], scale[i], shift[i]);
                v[i] = n * sigmoid(n);
            }
#endif
        }
        const int pixel = WHOLE_IMAGE ? (n * IH + h + PAD) * IW + w + PAD : p;
        store_tile<CB, FLIP>(tile, pixel, vector, v);
    }
}

// even and odd point at the patch's first input value, in the two orders of a pixel's channels;
// weights at the two channels' first tap
__device__ __forceinline__ void convolve(const float* even, const float* odd, const float* weights,
                                         const float2 (&w)[REGISTER_WEIGHTS ? K * K : 1],
                                         float2 (&acc)[PH][PW]) {
    constexpr int SPAN = (PW - 1) * S + K;
#pragma unroll
    for (int o = 0; o < PH; ++o)
#pragma unroll
        for (int q = 0; q < PW; ++q) acc[o][q] = make_float2(0.f, 0.f);
    if constexpr (REGISTER_WEIGHTS) {
#pragma unroll
        for (int r = 0; r < (PH - 1) * S + K; ++r) {
            float2 v[SPAN];
#pragma unroll
            for (int i = 0; i < SPAN; ++i) v[i] = pair((i % 2 ? odd : even) + (r * IW + i) * CB);
#pragma unroll
            for (int o = 0; o < PH; ++o) {
                const int ky = r - o * S;
                if (ky < 0 || ky >= K) continue;
#pragma unroll
                for (int kx = 0; kx < K; ++kx)
#pragma unroll
                    for (int q = 0; q < PW; ++q)
                        acc[o][q] = fma2(v[q * S + kx], w[ky * K + kx], acc[o][q]);
            }
        }
    } else {
#pragma unroll 1
        for (int ky = 0; ky < K; ++ky) {
            float2 row[K];
#pragma unroll
            for (int kx = 0; kx < K; ++kx) row[kx] = pair(weights + (ky * K + kx) * WEIGHT_PITCH);
#pragma unroll
            for (int o = 0; o < PH; ++o) {
                float2 v[SPAN];
#pragma unroll
                for (int i = 0; i < SPAN; ++i)
                    v[i] = pair((i % 2 ? odd : even) + ((ky + o * S) * IW + i) * CB);
#pragma unroll
                for (int kx = 0; kx < K; ++kx)
#pragma unroll
                    for (int q = 0; q < PW; ++q)
                        acc[o][q] = fma2(v[q * S + kx], row[kx], acc[o][q]);
            }
        }
    }
}

#if SUMS
__device__ unsigned counters[COUNTER_SLOTS * CHANNEL_BLOCKS];
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) kernel(const Args a) {
    extern __shared__ float4 shared[];
    float* tile = reinterpret_cast<float*>(shared);
    float* weights = tile + TILE_FLOATS;
    float* bn = weights + WEIGHT_FLOATS;
    Raw* raw = reinterpret_cast<Raw*>(bn + 3 * CB);

    const int c0 = blockIdx.x % CHANNEL_BLOCKS * CB;
    const int row = blockIdx.x / CHANNEL_BLOCKS;
    const int lane = threadIdx.x % LANES;
    const int group = threadIdx.x / LANES;
    const int channel = tile_channel<CB>(lane * 2);
    const int c = c0 + channel;
    const int own = c0 + threadIdx.x % VECTORS * VIO;  // first channel this thread copies
    const int odd = FLIP ? (lane * 2 ^ CB / 2) - lane * 2 : 0;
    float2 sum = make_float2(0.f, 0.f), square = make_float2(0.f, 0.f);

    unsigned inside = fetch(a, raw, place(row), own);
    stage_weights(a, weights, c0);
#if FUSED
    stage_bn(a, bn, c0);
#endif
    if (WHOLE_IMAGE)
        for (int i = threadIdx.x; i < TILE_FLOATS / 4; i += THREADS)
            shared[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    __syncthreads();  // BN's vectors and the padding are staged
    for (int unit = row; unit < a.units; unit += a.rows) {
        wait_for_copies();
        activate(a, raw, tile, bn, inside, place(unit), own);
        __syncthreads();  // tile and weights are staged
        if (unit + a.rows < a.units) inside = fetch(a, raw, place(unit + a.rows), own);

        const int oh0 = unit / TILES_W % TILES_H * TH;
        const int ow0 = unit % TILES_W * TW;
        const int b0 = unit / (TILES_W * TILES_H) * NB;
        float2 w[REGISTER_WEIGHTS ? K * K : 1];
        if constexpr (REGISTER_WEIGHTS) {
#pragma unroll
            for (int k = 0; k < K * K; ++k) w[k] = pair(weights + k * WEIGHT_PITCH + channel);
        }
        constexpr int ACROSS = TW / PW, DOWN = TH / PH;
#pragma unroll 1
        for (int patch = group; patch < NB * DOWN * ACROSS; patch += GROUPS) {
            const int n = patch / (DOWN * ACROSS);
            const int ph = patch / ACROSS % DOWN * PH;
            const int pw = patch % ACROSS * PW;
            float2 acc[PH][PW];
            const float* from = tile + ((n * IH + ph * S) * IW + pw * S) * CB + lane * 2;
            convolve(from, from + odd, weights + channel, w, acc);
            const int b = b0 + n, oh = oh0 + ph, ow = ow0 + pw;
            if (b >= a.B || c >= C) continue;
            elem* to = a.y + ((static_cast<long long>(b) * OH + oh) * OW + ow) * C + c;
#pragma unroll
            for (int o = 0; o < PH; ++o) {
#pragma unroll
                for (int q = 0; q < PW; ++q) {
                    if (WHOLE_TILES || (oh + o < OH && ow + q < OW)) {
                        const float2 y = store_pair(
                            to + static_cast<long long>(o * OW + q) * C, acc[o][q], c + 1 < C);
#if SUMS
                        sum.x += y.x;
                        sum.y += y.y;
                        square.x = fmaf(y.x, y.x, square.x);
                        square.y = fmaf(y.y, y.y, square.y);
#endif
                    }
                }
            }
        }
        __syncthreads();  // the tile may be overwritten
    }

#if SUMS
    // fixed order: groups ascending, so that equal inputs give equal bits
    float4* partial = shared;
    partial[threadIdx.x] = make_float4(sum.x, sum.y, square.x, square.y);
    __syncthreads();  // every group's sums are there
    if (group == 0 && c < C) {
        float4 total = partial[lane];
        for (int g = 1; g < GROUPS; ++g) {
            const float4 more = partial[g * LANES + lane];
            total.x += more.x;
            total.y += more.y;
            total.z += more.z;
            total.w += more.w;
        }
        float* to = a.partial + static_cast<long long>(row) * 2 * C + c;
        to[0] = total.x;
        to[C] = total.z;
        if (c + 1 < C) {
            to[1] = total.y;
            to[C + 1] = total.w;
        }
    }
    const int column = blockIdx.x % CHANNEL_BLOCKS;
    if (!is_last_block(counters + a.slot * CHANNEL_BLOCKS + column, a.rows)) return;
    add_rows<2 * CB>(a.partial, a.rows, 2 * C, a.sums, reinterpret_cast<double*>(shared),
                     [=](int i) { return c0 + i % CB < C ? i / CB * C + c0 + i % CB : -1; });
#if MOMENTS
    finish_moments<CB>(a, c0, C, static_cast<double>(a.B) * (OH * OW));
#endif
#endif
}
