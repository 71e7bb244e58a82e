// Runs a CUDA kernel's unchanged source on the CPU: included in front of it by host.py.
//
// Blocks run one after the other in an order shuffled by a seed (0: ascending), the threads of a block
// as fibers; a barrier yields. Variables of a kernel live as long as its library is loaded. An atomic
// operation asks that its thread has fenced since the last barrier: what the block wrote would not be
// visible to whom the operation tells that it is there. Shared memory
// is poisoned with NaN before every block, so that reading it too early shows; ORDER of execution
// between two barriers is ascending or descending. A barrier that not all threads reach, or that
// they reach on different lines, is an error.
//
// With LOG, every access is recorded: g++ calls its thread sanitizer's hooks around each, which are
// defined here instead of by the sanitizer (accesses.py builds with it and reads the records).
#include <math.h>  // C headers alone: they halve the time to compile
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
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
inline int g_error = 0;  // see ERRORS in host.py

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
    int x, y;
};
inline thread_local Index threadIdx, blockIdx;

// the kernels' dynamic shared memory, of exactly the size that is launched with
#if SHARED_BYTES
thread_local float4 shared[SHARED_BYTES / 16];
#else
thread_local float4 shared[1];
#endif

struct Copy {
    void* to;
    const void* from;
    int bytes;
};
struct Fiber {
    ucontext_t context;
    int line;  // of the barrier it waits at; -1: finished
    Copy* copies;  // started, not waited for
    int count, capacity;
    int predicate;  // of the barrier it waits at
    bool is_fenced;  // since its last barrier
};
inline ucontext_t g_scheduler;
inline Fiber* g_current;

#ifdef LOG
struct Record {
    uint64_t address;
    uint32_t site;   // of the instruction, in the library
    uint32_t epoch;  // counts the stretches between barriers, over all blocks
    uint16_t thread;
    uint8_t size, is_store;
    uint32_t unused;
};
extern "C" const char __ehdr_start __attribute__((visibility("hidden")));
inline Record* g_records;
inline size_t g_count, g_capacity;
inline uint32_t g_epoch;
inline const char *g_stacks, *g_stacks_end;

__attribute__((no_sanitize("thread"), noinline)) inline void record(const void* p, int size,
                                                                    bool is_store, void* from) {
    const char* at = static_cast<const char*>(p);
    if (at >= g_stacks && at < g_stacks_end) return;  // a register, on the device
    if (g_count == g_capacity) {
        g_capacity = g_capacity ? 2 * g_capacity : 1 << 16;
        g_records = static_cast<Record*>(realloc(g_records, g_capacity * sizeof(Record)));
    }
    const auto site = static_cast<uint32_t>(static_cast<char*>(from) - &__ehdr_start);
    g_records[g_count++] = {reinterpret_cast<uint64_t>(p), site, g_epoch,
                            static_cast<uint16_t>(threadIdx.x), static_cast<uint8_t>(size),
                            is_store, 0};
}
#define RECORD(name, size, is_store)                                                          \
    extern "C" __attribute__((no_sanitize("thread"), visibility("hidden"))) void name(void* p) { \
        record(p, size, is_store, __builtin_return_address(0));                               \
    }
RECORD(__tsan_read1, 1, false)
RECORD(__tsan_read2, 2, false)
RECORD(__tsan_read4, 4, false)
RECORD(__tsan_read8, 8, false)
RECORD(__tsan_read16, 16, false)
RECORD(__tsan_write1, 1, true)
RECORD(__tsan_write2, 2, true)
RECORD(__tsan_write4, 4, true)
RECORD(__tsan_write8, 8, true)
RECORD(__tsan_write16, 16, true)
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
// the records, and where dynamic shared memory is
extern "C" const Record* records(size_t* count, uint64_t* shared_begin, uint64_t* shared_end) {
    *count = g_count;
    *shared_begin = reinterpret_cast<uint64_t>(shared);
    *shared_end = *shared_begin + sizeof(shared);
    return g_records;
}
#endif

// The bytes arrive at the wait and not before; from the start of a copy its target is undefined.
template <int BYTES>
__attribute__((noinline)) void copy_async(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) {
        g_error = 2;
        return;
    }
#ifdef LOG
    record(from, BYTES, false, __builtin_return_address(0));
    record(to, BYTES, true, __builtin_return_address(0));
#endif
    memset(to, 0xff, BYTES);
    Fiber& f = *g_current;
    if (f.count == f.capacity) {
        f.capacity = f.capacity ? 2 * f.capacity : 16;
        f.copies = static_cast<Copy*>(realloc(f.copies, f.capacity * sizeof(Copy)));
    }
    f.copies[f.count++] = {to, from, BYTES};
}
inline void wait_for_copies() {
    Fiber& f = *g_current;
    for (int i = 0; i < f.count; ++i) memcpy(f.copies[i].to, f.copies[i].from, f.copies[i].bytes);
    f.count = 0;
}

inline int g_any;  // of the predicates at the last barrier
inline int barrier(int line, int predicate = 0) {
    g_current->line = line;
    g_current->predicate = predicate;
    g_current->is_fenced = false;
    swapcontext(&g_current->context, &g_scheduler);
    return g_any;
}
#define __syncthreads() barrier(__LINE__)
#define __syncthreads_or(predicate) barrier(__LINE__, predicate)

// Tensors that must not change between an atomic operation and the next barrier: a thread that still
// writes then may be later than who was told that its block is ready.
struct Watched {
    const char* at;
    size_t size;
    char* then;
};
inline Watched g_watched[16];
inline int g_watching;
inline bool g_told;
extern "C" void watch(const void* at, size_t size) {
    g_watched[g_watching++] = {static_cast<const char*>(at), size, static_cast<char*>(malloc(size))};
}

inline void __threadfence() { g_current->is_fenced = true; }
inline unsigned atomicInc(unsigned* p, unsigned most) {
    if (!g_current->is_fenced) g_error = 4;
    g_current->is_fenced = false;
    for (int i = 0; i < g_watching; ++i)
        memcpy(g_watched[i].then, g_watched[i].at, g_watched[i].size);
    g_told = true;
    const unsigned old = *p;
    *p = old >= most ? 0 : old + 1;
    return old;
}
inline unsigned atomicAdd(unsigned* p, unsigned more) {
    const unsigned old = atomicInc(p, ~0u);
    *p = old + more;
    return old;
}
inline float __ldcg(const float* p) { return *p; }

inline const void* g_arguments;
void start_kernel();  // defined behind the kernel

inline void fiber_main() {
    start_kernel();
    if (g_current->count) g_error = 3;
    g_current->line = -1;
    swapcontext(&g_current->context, &g_scheduler);
}

#ifdef LOG
extern "C" __attribute__((no_sanitize("thread"))) int run(const void*, int, int, int, unsigned);
#endif
extern "C" int run(const void* arguments, int blocks, int threads, int descending, unsigned seed) {
    constexpr size_t STACK = 128 * 1024;
    Fiber* fibers = static_cast<Fiber*>(calloc(threads, sizeof(Fiber)));
    char* stacks = static_cast<char*>(malloc(STACK * threads));
    g_arguments = arguments;
    g_error = 0;
#ifdef LOG
    g_stacks = stacks;
    g_stacks_end = stacks + STACK * threads;
    g_count = g_epoch = 0;
#endif
    int* order = static_cast<int*>(malloc(blocks * sizeof(int)));
    for (int i = 0; i < blocks; ++i) {
        seed = seed * 1664525u + (seed ? 1013904223u : 0u);
        const int j = seed ? (seed >> 8) % (i + 1) : i;
        order[i] = i;
        order[i] = order[j];
        order[j] = i;
    }
    for (int turn = 0; turn < blocks && !g_error; ++turn) {
        const int block = order[turn];
        memset(shared, 0xff, sizeof(shared));
        for (int t = 0; t < threads; ++t) {
            fibers[t].line = fibers[t].count = fibers[t].predicate = 0;
            fibers[t].is_fenced = false;
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
#ifdef LOG
            ++g_epoch;
#endif
            alive = fibers[0].line != -1;
            for (int i = 0; g_told && i < g_watching; ++i)
                if (memcmp(g_watched[i].then, g_watched[i].at, g_watched[i].size)) g_error = 5;
            g_told = false;
            g_any = 0;
            for (int t = 0; t < threads; ++t) {
                if (fibers[t].line != fibers[0].line) g_error = 1;
                g_any |= fibers[t].predicate;
            }
        }
    }
    for (int t = 0; t < threads; ++t) free(fibers[t].copies);
    free(fibers);
    free(order);
    while (g_watching) free(g_watched[--g_watching].then);
    free(stacks);
    return g_error;
}
