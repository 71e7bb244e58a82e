// Storage types and small pieces shared by the kernels. Prepended to each of them.
//
// Set by the host as macros:
//   ELEM   storage type of tensors: 32 float, 16 half, 17 bfloat16. Arithmetic is float throughout.
//   VIO    elements of one vector access; divides C, so a vector never straddles two pixels, and
//          every address is a multiple of its size. 1 where nothing better is aligned.
// Tensors are channels_last: element (b, c, h, w) lies at ((b * H + h) * W + w) * C + c.

#if ELEM == 32
typedef float elem;
#define ELEM_BYTES 4
#else
typedef unsigned short elem;
#define ELEM_BYTES 2
#endif

#if VIO * ELEM_BYTES == 16
typedef uint4 Raw;
#elif VIO * ELEM_BYTES == 8
typedef uint2 Raw;
#elif VIO * ELEM_BYTES == 4
typedef unsigned Raw;
#else
typedef unsigned short Raw;
#endif

// int where that is enough, for addresses that take fewer instructions
template <bool IS_ENOUGH>
struct IntIf {
    typedef int type;
};
template <>
struct IntIf<false> {
    typedef long long type;
};

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float half_to_float(unsigned short h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ unsigned pack_half(float lo, float hi) {
    unsigned packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}
__device__ __forceinline__ unsigned pack_bfloat(float lo, float hi) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}
// Starts a copy of BYTES (4, 8 or 16, both sides aligned to them) from global to shared memory.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES)
                     : "memory");
}
// Returns when the copies that this thread started have arrived; they are visible to it alone.
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
// a * b + c on two channels; one instruction from sm_100 on
__device__ __forceinline__ float2 fma2(float2 a, float2 b, float2 c) {
#if __CUDA_ARCH__ >= 1000
    float2 d;
    asm("fma.rn.f32x2 %0, %1, %2, %3;"
        : "=l"(reinterpret_cast<unsigned long long&>(d))
        : "l"(reinterpret_cast<unsigned long long&>(a)),
          "l"(reinterpret_cast<unsigned long long&>(b)),
          "l"(reinterpret_cast<unsigned long long&>(c)));
    return d;
#else
    return make_float2(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y));
#endif
}
#endif

__device__ __forceinline__ float widen(unsigned short bits) {
#if ELEM == 16
    return half_to_float(bits);
#else
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
#endif
}

__device__ __forceinline__ unsigned pack(float lo, float hi) {
#if ELEM == 16
    return pack_half(lo, hi);
#else
    return pack_bfloat(lo, hi);
#endif
}

__device__ __forceinline__ float load_one(const elem* p) {
#if ELEM == 32
    return __ldg(p);
#else
    return widen(__ldg(p));
#endif
}

// Stores v and returns what was stored, so that sums are those of the tensor itself.
__device__ __forceinline__ float store_one(elem* p, float v) {
#if ELEM == 32
    *p = v;
    return v;
#else
    const unsigned short bits = static_cast<unsigned short>(pack(v, 0.f));
    *p = bits;
    return widen(bits);
#endif
}

// Two adjacent channels as they are stored
#if ELEM == 32
typedef float2 Pair;
#else
typedef unsigned Pair;
#endif

__device__ __forceinline__ float2 widen_pair(Pair bits) {
#if ELEM == 32
    return bits;
#elif ELEM == 17
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
#else
    return make_float2(widen(static_cast<unsigned short>(bits)),
                       widen(static_cast<unsigned short>(bits >> 16)));
#endif
}

// Stores two channels and returns what was stored.
__device__ __forceinline__ float2 store_pair(elem* p, float2 v, bool both) {
#if VIO >= 2
#if ELEM == 32
    const Pair bits = v;
#else
    const Pair bits = pack(v.x, v.y);
#endif
    *reinterpret_cast<Pair*>(p) = bits;
    return widen_pair(bits);
#else
    return make_float2(store_one(p, v.x), both ? store_one(p + 1, v.y) : 0.f);
#endif
}

// Two adjacent channels in shared memory
__device__ __forceinline__ float2 pair(const float* p) {
    return *reinterpret_cast<const float2*>(p);
}

__device__ __forceinline__ Raw load_raw(const elem* p) {
    return __ldg(reinterpret_cast<const Raw*>(p));
}

__device__ __forceinline__ void unpack(const Raw& raw, float (&v)[VIO]) {
#if ELEM == 32
    const unsigned* word = reinterpret_cast<const unsigned*>(&raw);
#pragma unroll
    for (int i = 0; i < VIO; ++i) v[i] = __uint_as_float(word[i]);
#elif VIO == 1
    v[0] = widen(raw);
#else
    const unsigned* word = reinterpret_cast<const unsigned*>(&raw);
#pragma unroll
    for (int i = 0; i < VIO / 2; ++i) {
#if ELEM == 17
        v[2 * i] = __uint_as_float(word[i] << 16);
        v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
#else
        v[2 * i] = widen(static_cast<unsigned short>(word[i]));
        v[2 * i + 1] = widen(static_cast<unsigned short>(word[i] >> 16));
#endif
    }
#endif
}

// A thread's vector of per-channel floats in shared memory.
__device__ __forceinline__ void load_floats(const float* p, float (&v)[VIO]) {
#if VIO % 4 == 0
#pragma unroll
    for (int i = 0; i < VIO; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(p + i);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
#else
#pragma unroll
    for (int i = 0; i < VIO; ++i) v[i] = p[i];
#endif
}

// A tile in shared memory keeps CHANNELS floats a pixel. A vector of eight channels is two 16-byte
// stores, and lanes 32 bytes apart would meet in half of the banks. So a pixel's first halves of
// all vectors come first, then their second halves; and where a pixel has 32 channels, which a
// quarter of a warp fills two pixels of at a time, the other way round in odd pixels (FLIP).

// The channel at a position of an even pixel; groups of four stay together.
template <int CHANNELS>
__device__ __forceinline__ int tile_channel(int position) {
    constexpr int HALF = CHANNELS / 2;
    if constexpr (VIO == 8)
        return position % HALF / 4 * 8 + position / HALF * 4 + position % 4;
    else
        return position;
}

// Stores a thread's vector of a pixel's channels.
template <int CHANNELS, bool FLIP>
__device__ __forceinline__ void store_tile(float* tile, int pixel, int vector,
                                           const float (&v)[VIO]) {
    float* to = tile + pixel * CHANNELS;
#if VIO == 8
    constexpr int HALF = CHANNELS / 2;
    const int first = FLIP && pixel % 2 ? HALF : 0;
    *reinterpret_cast<float4*>(to + vector * 4 + first) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(to + vector * 4 + HALF - first) =
        make_float4(v[4], v[5], v[6], v[7]);
#elif VIO == 4
    *reinterpret_cast<float4*>(to + vector * 4) = make_float4(v[0], v[1], v[2], v[3]);
#elif VIO == 2
    *reinterpret_cast<float2*>(to + vector * 2) = make_float2(v[0], v[1]);
#else
    to[vector] = v[0];
#endif
}

__device__ __forceinline__ void store_vector(elem* p, const float (&v)[VIO]) {
    Raw raw;
#if ELEM == 32
    unsigned* word = reinterpret_cast<unsigned*>(&raw);
#pragma unroll
    for (int i = 0; i < VIO; ++i) word[i] = __float_as_uint(v[i]);
#elif VIO == 1
    raw = static_cast<unsigned short>(pack(v[0], 0.f));
#else
    unsigned* word = reinterpret_cast<unsigned*>(&raw);
#pragma unroll
    for (int i = 0; i < VIO / 2; ++i) word[i] = pack(v[2 * i], v[2 * i + 1]);
#endif
    *reinterpret_cast<Raw*>(p) = raw;
}

// 1 / (1 + exp(-v)), to a few ulp; exp overflows to infinity for v < -88, which gives 0
__device__ __forceinline__ float sigmoid(float v) {
    return __fdividef(1.f, 1.f + __expf(-v));
}
// The derivative of v sigmoid(v)
__device__ __forceinline__ float swish_slope(float v) {
    const float s = sigmoid(v);
    return fmaf(v * s, 1.f - s, s);
}

// What follows from a channel's sums over n elements: mean, rstd = 1 / sqrt(var + eps) and var, each
// (all) in a.made; the running statistics, where there are any, move towards mean and unbiased var.
// Doubles, since S2 / n - mean^2 cancels.
template <class Args>
__device__ __forceinline__ void put_moments(const Args& a, int c, int all, double first, double second,
                                            double n) {
    const double mean = first / n;
    const double raw = second / n - mean * mean;
    const double var = raw > 0 ? raw : 0;  // rounding may leave a constant channel below 0
    a.made[c] = mean;
    a.made[all + c] = 1 / sqrt(var + a.eps);
    a.made[2 * all + c] = var;
    if (!a.running_mean) return;
    const double count = a.repeats * n;  // how often an element counts, times their number
    const float unbiased = static_cast<float>(var * (count / (count - 1)));
    a.running_mean[c] += a.momentum * (static_cast<float>(mean) - a.running_mean[c]);
    a.running_var[c] += a.momentum * (unbiased - a.running_var[c]);
}

#ifdef COUNTER_SLOTS
// Sums over a whole tensor. The blocks of a column (of channels) write a row of partial sums each, and
// the last one to do so adds the rows up. Which block that is differs from launch to launch; the
// order of the rows does not. A kernel keeps the counters in a variable of its own, zero when it is
// loaded and again after every launch. Two launches of a kernel at the same time need counters of
// their own, so every stream has a slot (CudaLauncher in cuda.py).

// Whether this block is the last one of `blocks` that count here; it sees what the others wrote.
__device__ __forceinline__ bool is_last_block(unsigned* counter, int blocks) {
    __syncthreads();  // the block's partial sums are written
    bool is_last = false;
    if (threadIdx.x == 0) {
        __threadfence();  // what is written before is seen by who sees the count
        is_last = atomicInc(counter, blocks - 1) == blocks - 1;  // which starts again from zero
        __threadfence();
    }
    return __syncthreads_or(is_last);
}

// out[to] = the sum over rows of partial[row * pitch + to], to = at(i) where that is not negative,
// i < VALUES; at is copied. Rows are dealt out to SHARES thread groups, added in double, shares in ascending
// order. totals: THREADS doubles in shared memory. A function of its own, since its registers come
// after those of the passes.
template <int VALUES, class T, class At>
__device__ __noinline__ void add_rows(const float* partial, int rows, long long pitch, T* out,
                                         double* totals, At at) {
    constexpr int SHARES = THREADS >= 2 * VALUES ? THREADS / VALUES : 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < SHARES * VALUES; i += THREADS) {
        const long long to = at(i % VALUES);
        double total = 0;
        if (to >= 0) {
#pragma unroll 8
            for (int row = i / VALUES; row < rows; row += SHARES)
                total += __ldcg(partial + row * pitch + to);
        }
        if (SHARES > 1)
            totals[i] = total;
        else if (to >= 0)
            out[to] = static_cast<T>(total);
    }
    if constexpr (SHARES > 1) {
        __syncthreads();  // every share is there
        const int i = threadIdx.x;
        if (i >= VALUES) return;
        const long long to = at(i);
        double total = totals[i];
        for (int share = 1; share < SHARES; ++share) total += totals[share * VALUES + i];
        if (to >= 0) out[to] = static_cast<T>(total);
    }
}

// Moments of the CHANNELS from c0 on, whose sums this block has just put into a.sums.
template <int CHANNELS, class Args>
__device__ __forceinline__ void finish_moments(const Args& a, int c0, int all, double n) {
    __syncthreads();  // the column's sums are there
    for (int c = c0 + threadIdx.x; c < min(c0 + CHANNELS, all); c += THREADS)
        put_moments(a, c, all, a.sums[c], a.sums[all + c], n);
}

// What follows from the sums of g and of g (x - mean), which this block has just put into `sums`, for
// the CHANNELS from c0 on: gradients of gamma and beta and, unless `through` is null, of the sums of x
// over n (or *elements) elements. A function of its own, as add_rows.
template <int CHANNELS>
__device__ __noinline__ void finish_gradients(const double* sums, const float* gamma,
                                              const double* moments, float* params, double* through,
                                              const double* elements, double n, int c0, int all) {
    __syncthreads();  // the column's sums of g are there
    for (int c = c0 + threadIdx.x; c < min(c0 + CHANNELS, all); c += THREADS) {
        // v = (x - mean) rstd gamma + beta
        const double first = sums[c], second = sums[all + c];
        const double mean = moments[c], rstd = moments[all + c], var = moments[2 * all + c];
        params[c] = static_cast<float>(rstd * second);
        params[all + c] = static_cast<float>(first);
        if (!through) continue;
        // mean = S1 / n, var = S2 / n - mean^2 where that is not negative, rstd = (var + eps)^(-1/2)
        const double share = 1 / (elements ? *elements : n);
        const double dvar = var > 0 ? -0.5 * rstd * rstd * rstd * gamma[c] * second : 0;
        through[c] = (-gamma[c] * rstd * first - 2 * mean * dvar) * share;
        through[all + c] = dvar * share;
    }
}
#endif
