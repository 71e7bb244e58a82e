// Adamax (Kingma & Ba 2015, algorithm 2) over all parameters of a model. One a MODE:
//
//   MODE_COEFFICIENTS  one thread: counts the step, unless it is left out, and works out its size
//   MODE_UPDATE        a block takes CHUNK elements of one tensor: reads weight, gradient, average
//                      and norm once, writes weight, average and norm once; with MOVING the
//                      weights' moving average too, which goes towards the new weight
//
// Macros: MODE, MOVING (0 or 1), THREADS, CHUNK. Tensors are float; common.cu is compiled with
// ELEM 32, VIO 4.

#define MODE_COEFFICIENTS 0
#define MODE_UPDATE 1

#if MODE == MODE_COEFFICIENTS

struct Args {
    double* step;           // steps taken
    const double* rate;     // learning rate
    const float* switched;  // 1: leave this step out; or null
    float* coefficients;    // out (2): 1 if the step is taken, -rate / (1 - beta1^step)
    double beta1;
};

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Args a) {
    if (threadIdx.x) return;
    const bool is_taken = !a.switched || *a.switched == 0.f;
    const double step = *a.step + (is_taken ? 1 : 0);
    *a.step = step;
    a.coefficients[0] = is_taken ? 1.f : 0.f;
    a.coefficients[1] = is_taken ? static_cast<float>(-*a.rate / (1 - pow(a.beta1, step))) : 0.f;
}

#else

struct Args {
    const long long* tensors;   // (T, 5 + MOVING): addresses of weight, gradient, average, norm;
                                // elements; address of the moving average
    const long long* chunks;    // (blocks, 2): tensor, first of its elements
    const float* coefficients;  // (2), of MODE_COEFFICIENTS
    const double* share;        // that a moving average goes of its way to the weight; MOVING
    float rate1;                // 1 - beta1
    float beta2;
    float eps;
    float weight_decay;
};

struct Element {
    float weight, average, norm, moving;
};

__device__ __forceinline__ Element updated(const Args& a, float size, float share, Element e,
                                           float gradient) {
    gradient += a.weight_decay * e.weight;
    e.average += a.rate1 * (gradient - e.average);
    e.norm = fmaxf(a.beta2 * e.norm, fabsf(gradient) + a.eps);
    e.weight += size * (e.average / fmaxf(e.norm, 1e-30f));  // 0 only if eps and gradients are
    e.moving += share * (e.weight - e.moving);
    return e;
}

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Args a) {
    if (a.coefficients[0] == 0.f) return;
    const float size = a.coefficients[1];
    const float share = MOVING ? static_cast<float>(*a.share) : 0.f;
    const long long* entry = a.tensors + (5 + MOVING) * a.chunks[2 * blockIdx.x];
    const long long begin = a.chunks[2 * blockIdx.x + 1];
    const int n = static_cast<int>(min(entry[4] - begin, static_cast<long long>(CHUNK)));
    float* weight = reinterpret_cast<float*>(entry[0]) + begin;
    const float* gradient = reinterpret_cast<const float*>(entry[1]) + begin;
    float* average = reinterpret_cast<float*>(entry[2]) + begin;
    float* norm = reinterpret_cast<float*>(entry[3]) + begin;
    long long addresses = entry[0] | entry[1] | entry[2] | entry[3];
#if MOVING
    float* moving = reinterpret_cast<float*>(entry[5]) + begin;
    addresses |= entry[5];
#endif
#ifdef __CUDA_ARCH__  // an address out of a table may be of any memory, and is read more slowly
    __builtin_assume(__isGlobal(weight));
    __builtin_assume(__isGlobal(gradient));
    __builtin_assume(__isGlobal(average));
    __builtin_assume(__isGlobal(norm));
#if MOVING
    __builtin_assume(__isGlobal(moving));
#endif
#endif

    int done = 0;
    // CHUNK is a multiple of 4: only where a tensor begins decides; a bucket's view may be odd
    if ((addresses & 15) == 0) {
        done = n / VIO * VIO;
#pragma unroll 2
        for (int i = threadIdx.x * VIO; i < done; i += THREADS * VIO) {
            float w[VIO], g[VIO], m[VIO], u[VIO], v[VIO] = {};
            const uint4 weights = *reinterpret_cast<const uint4*>(weight + i);
            const uint4 averages = *reinterpret_cast<const uint4*>(average + i);
            const uint4 norms = *reinterpret_cast<const uint4*>(norm + i);
            unpack(load_raw(gradient + i), g);
            unpack(weights, w);
            unpack(averages, m);
            unpack(norms, u);
#if MOVING
            unpack(*reinterpret_cast<const uint4*>(moving + i), v);
#endif
#pragma unroll
            for (int k = 0; k < VIO; ++k) {
                const Element e = updated(a, size, share, {w[k], m[k], u[k], v[k]}, g[k]);
                w[k] = e.weight;
                m[k] = e.average;
                u[k] = e.norm;
                v[k] = e.moving;
            }
            store_vector(weight + i, w);
            store_vector(average + i, m);
            store_vector(norm + i, u);
#if MOVING
            store_vector(moving + i, v);
#endif
        }
    }
    for (int i = done + threadIdx.x; i < n; i += THREADS) {
        Element e = {weight[i], average[i], norm[i], 0.f};
#if MOVING
        e.moving = moving[i];
#endif
        e = updated(a, size, share, e, __ldg(gradient + i));
        weight[i] = e.weight;
        average[i] = e.average;
        norm[i] = e.norm;
#if MOVING
        moving[i] = e.moving;
#endif
    }
}
#endif
