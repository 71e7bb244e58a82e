// Depthwise convolution, forward: y = conv(a), a = x or Swish(BN(x)), with sums of y.
//
// A block takes CB channels of NB images' TH x TW output tile. It stages the input tile with its
// halo in shared memory as float (16-byte loads; BN and Swish once per staged pixel; padding is
// zero after them, so it is written here and never loaded). Then every thread keeps the weights of
// two channels in registers and computes PH x PW patches of outputs: a value read from shared memory
// serves all taps of the patch that meet it, which leaves the kernel close to its K * K
// multiply-adds an output. Adjacent lanes hold adjacent channels, so shared memory has no bank conflicts and
// stores are whole lines.
//
// Macros: C, H, W (of x; constants, so that offsets within a patch are immediate), K, S (stride),
// CB, NB, TH, TW, PH, PW, THREADS, MIN_BLOCKS, FUSED (BN + Swish on load),
// SUMS (per-channel sum and sum of squares of y).

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
constexpr bool REGISTER_WEIGHTS = K <= 5;

struct Args {
    const elem* x;        // (B, H, W, C)
    const float* weight;  // (C, K, K)
    const float* gamma;   // (C), these four with FUSED
    const float* beta;
    const double* mean;
    const double* rstd;
    elem* y;         // (B, OH, OW, C)
    float* partial;  // (rows, 2, C) with SUMS
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
    for (int i = threadIdx.x; i < CB; i += THREADS) {
        const int c = c0 + i;
        const bool ok = c < C;
        bn[i] = ok ? static_cast<float>(a.mean[c]) : 0.f;
        bn[CB + i] = ok ? a.gamma[c] * static_cast<float>(a.rstd[c]) : 0.f;
        bn[2 * CB + i] = ok ? a.beta[c] : 0.f;
    }
}
#endif

__device__ __forceinline__ void stage_tile(const Args& a, float* tile, const float* bn, int c0,
                                           int b0, int h0, int w0) {
    constexpr int VECTORS = CB / VIO;  // a thread's channels stay the same
    constexpr int STEP = THREADS / VECTORS;
    constexpr int PIXELS = NB * IH * IW;
    constexpr int BATCH = 4;  // loads in flight
    const int c = c0 + threadIdx.x % VECTORS * VIO;
    const bool channel_ok = c < C;
    const elem* image = a.x + static_cast<long long>(b0) * (static_cast<long long>(H) * W * C) + c;
#if FUSED
    float mean[VIO], scale[VIO], shift[VIO];
#pragma unroll
    for (int i = 0; i < VIO; ++i) {
        mean[i] = bn[c - c0 + i];
        scale[i] = bn[CB + c - c0 + i];
        shift[i] = bn[2 * CB + c - c0 + i];
    }
#endif
    for (int first = threadIdx.x / VECTORS; first < PIXELS; first += STEP * BATCH) {
        Raw raw[BATCH];
        bool inside[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int p = first + u * STEP;
            const int n = NB == 1 ? 0 : p / (IH * IW);
            const int h = h0 + (p - n * (IH * IW)) / IW;
            const int w = w0 + p % IW;
            inside[u] = channel_ok && p < PIXELS && (NB == 1 || b0 + n < a.B) &&
                        static_cast<unsigned>(h) < H && static_cast<unsigned>(w) < W;
            raw[u] = Raw();
            if (inside[u]) {
                const long long pixel = static_cast<long long>(n) * (H * W) + h * W + w;
                raw[u] = load_raw(image + pixel * C);
            }
        }
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int p = first + u * STEP;
            float v[VIO];
            unpack(raw[u], v);
#if FUSED
            if (inside[u]) {
#pragma unroll
                for (int i = 0; i < VIO; ++i) {
                    const float n = fmaf(v[i] - mean[i], scale[i], shift[i]);
                    v[i] = n * sigmoid(n);
                }
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

__device__ __forceinline__ float2 pair(const float* p) {
    return *reinterpret_cast<const float2*>(p);
}

// from points at the patch's first input value; weights at the two channels' first tap
__device__ __forceinline__ void convolve(const float* from, const float* weights,
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
            for (int i = 0; i < SPAN; ++i) v[i] = pair(from + (r * IW + i) * CB);
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
                for (int i = 0; i < SPAN; ++i) v[i] = pair(from + ((ky + o * S) * IW + i) * CB);
#pragma unroll
                for (int kx = 0; kx < K; ++kx)
#pragma unroll
                    for (int q = 0; q < PW; ++q)
                        acc[o][q] = fma2(v[q * S + kx], row[kx], acc[o][q]);
            }
        }
    }
}

// Stores two channels and returns what was stored.
__device__ __forceinline__ float2 store_pair(elem* p, float2 v, bool both) {
#if VIO >= 2
#if ELEM == 32
    *reinterpret_cast<float2*>(p) = v;
    return v;
#else
    const unsigned packed = pack(v.x, v.y);
    *reinterpret_cast<unsigned*>(p) = packed;
    return make_float2(widen(static_cast<unsigned short>(packed)),
                       widen(static_cast<unsigned short>(packed >> 16)));
#endif
#else
    return make_float2(store_one(p, v.x), both ? store_one(p + 1, v.y) : 0.f);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) kernel(const Args a) {
    extern __shared__ float4 shared[];
    float* tile = reinterpret_cast<float*>(shared);
    float* weights = tile + TILE_FLOATS;
    float* bn = weights + WEIGHT_FLOATS;

    const int c0 = blockIdx.x % CHANNEL_BLOCKS * CB;
    const int row = blockIdx.x / CHANNEL_BLOCKS;
    const int lane = threadIdx.x % LANES;
    const int group = threadIdx.x / LANES;
    const int c = c0 + lane * 2;
    float2 sum = make_float2(0.f, 0.f), square = make_float2(0.f, 0.f);

    stage_weights(a, weights, c0);
#if FUSED
    stage_bn(a, bn, c0);
    __syncthreads();  // BN's vectors are staged
#endif
    for (int unit = row; unit < a.units; unit += a.rows) {
        const int oh0 = unit / TILES_W % TILES_H * TH;
        const int ow0 = unit % TILES_W * TW;
        const int b0 = unit / (TILES_W * TILES_H) * NB;
        stage_tile(a, tile, bn, c0, b0, oh0 * S - PAD, ow0 * S - PAD);
        __syncthreads();  // tile and weights are staged

        float2 w[REGISTER_WEIGHTS ? K * K : 1];
        if constexpr (REGISTER_WEIGHTS) {
#pragma unroll
            for (int k = 0; k < K * K; ++k) w[k] = pair(weights + k * WEIGHT_PITCH + lane * 2);
        }
        constexpr int ACROSS = TW / PW, DOWN = TH / PH;
#pragma unroll 1
        for (int patch = group; patch < NB * DOWN * ACROSS; patch += GROUPS) {
            const int n = patch / (DOWN * ACROSS);
            const int ph = patch / ACROSS % DOWN * PH;
            const int pw = patch % ACROSS * PW;
            float2 acc[PH][PW];
            convolve(tile + ((n * IH + ph * S) * IW + pw * S) * CB + lane * 2, weights + lane * 2,
                     w, acc);
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
#endif
}
