// Runs a CUDA kernel's unchanged source on the CPU: included in front of it by host.py.
//
// Blocks run one after the other, the threads of a block as fibers; a barrier yields. Shared memory
// is poisoned with NaN before every block, so that reading it too early shows; ORDER of execution
// between two barriers is ascending or descending. A barrier that not all threads reach, or that
// they reach on different lines, is an error.
#include <math.h>  // C headers alone: they halve the time to compile
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline unsigned __float_as_uint(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}
inline float __uint_as_float(unsigned u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    exit(3);
}
inline int g_error = 0;  // 1: divergent barrier, 2: misaligned access

template <class T>
inline T __ldg(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) {
        g_error = 2;
        return T();
    }
    return *p;
}

inline unsigned pack_bfloat(float lo, float hi) {
    auto round = [](float f) -> unsigned {
        const unsigned u = __float_as_uint(f);
        if (f != f) return 0x7fffu;
        return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    };
    return round(hi) << 16 | round(lo);
}
inline float half_to_float(unsigned short h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    float v;
    if (exponent == 31)
        v = mantissa ? NAN : INFINITY;
    else if (exponent == 0)
        v = ldexpf(static_cast<float>(mantissa), -24);
    else
        v = ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
    return h & 0x8000 ? -v : v;
}
inline unsigned to_half(float f) {
    const unsigned sign = signbit(f) ? 0x8000u : 0u;
    if (f != f) return 0x7fffu;
    const float a = fabsf(f);
    if (a == 0) return sign;
    if (a >= 65520.f) return sign | 0x7c00u;
    int exponent;
    frexpf(a, &exponent);
    const int scale = exponent < -13 ? -24 : exponent - 11;  // of the last bit
    const unsigned mantissa = static_cast<unsigned>(nearbyintf(ldexpf(a, -scale)));
    return sign | (scale == -24 ? mantissa : mantissa + (static_cast<unsigned>(exponent + 13) << 10));
}
inline unsigned pack_half(float lo, float hi) { return to_half(hi) << 16 | to_half(lo); }
inline float2 fma2(float2 a, float2 b, float2 c) {
    return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
}

struct Index {
    int x;
};
inline thread_local Index threadIdx, blockIdx;

// the kernels' dynamic shared memory, of exactly the size that is launched with
#if SHARED_BYTES
thread_local float4 shared[SHARED_BYTES / 16];
#else
thread_local float4 shared[1];
#endif

struct Fiber {
    ucontext_t context;
    int line;  // of the barrier it waits at; -1: finished
};
inline ucontext_t g_scheduler;
inline Fiber* g_current;

inline void barrier(int line) {
    g_current->line = line;
    swapcontext(&g_current->context, &g_scheduler);
}
#define __syncthreads() barrier(__LINE__)

inline const void* g_arguments;
void start_kernel();  // defined behind the kernel

inline void fiber_main() {
    start_kernel();
    g_current->line = -1;
    swapcontext(&g_current->context, &g_scheduler);
}

extern "C" int run(const void* arguments, int blocks, int threads, int descending) {
    constexpr size_t STACK = 128 * 1024;
    Fiber* fibers = static_cast<Fiber*>(calloc(threads, sizeof(Fiber)));
    char* stacks = static_cast<char*>(malloc(STACK * threads));
    g_arguments = arguments;
    g_error = 0;
    for (int block = 0; block < blocks && !g_error; ++block) {
        memset(shared, 0xff, sizeof(shared));
        for (int t = 0; t < threads; ++t) {
            fibers[t].line = 0;
            getcontext(&fibers[t].context);
            fibers[t].context.uc_stack.ss_sp = &stacks[STACK * t];
            fibers[t].context.uc_stack.ss_size = STACK;
            fibers[t].context.uc_link = nullptr;
            makecontext(&fibers[t].context, fiber_main, 0);
        }
        for (bool alive = true; alive && !g_error;) {
            for (int i = 0; i < threads; ++i) {
                const int t = descending ? threads - 1 - i : i;
                threadIdx.x = t;
                blockIdx.x = block;
                g_current = &fibers[t];
                swapcontext(&g_scheduler, &fibers[t].context);
            }
            alive = fibers[0].line != -1;
            for (int t = 0; t < threads; ++t)
                if (fibers[t].line != fibers[0].line) g_error = 1;
        }
    }
    free(fibers);
    free(stacks);
    return g_error;
}
