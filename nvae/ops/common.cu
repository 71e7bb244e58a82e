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
