// Small kernels over vectors, the statistics. One a MODE:
//
//   MODE_MOMENTS   sums (2, C) -> mean, rstd = 1 / sqrt(var + eps), var = S2 / n - mean^2 >= 0
//   MODE_MOMENTS_BACKWARD  gradients of mean and rstd -> of sums
//   MODE_BN_GRADS  sums of g and g (x - mean) -> gradients of gamma, beta, mean, rstd
//   MODE_TRACK     moves running statistics towards a batch's
// Statistics are double: there are few of them, and S2 / n - mean^2 cancels.
//
// Macros: MODE, THREADS.

#define MODE_MOMENTS 0
#define MODE_MOMENTS_BACKWARD 1
#define MODE_BN_GRADS 2
#define MODE_TRACK 3

#if MODE == MODE_TRACK

struct Args {
    const double* mean;      // (C)
    const double* var;       // (C), biased
    const double* elements;  // the number of elements where the device knows it, or null
    float* running_mean;     // (C)
    float* running_var;      // (C), unbiased
    double n;                // the number of elements otherwise
    double repeats;          // how often each of them counts
    float momentum;
    int C;
};

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Args a) {
    const int c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= a.C) return;
    const double n = a.repeats * (a.elements ? *a.elements : a.n);
    const float mean = static_cast<float>(a.mean[c]);
    const float var = static_cast<float>(a.var[c] * (n / (n - 1)));
    a.running_mean[c] += a.momentum * (mean - a.running_mean[c]);
    a.running_var[c] += a.momentum * (var - a.running_var[c]);
}

#else

struct Args {
    const double* sums;      // (2, C): S1, S2; BN_GRADS: sums of g and of g (x - mean)
    const double* elements;  // the number of elements where the device knows it, or null
    const double* first;     // MOMENTS_BACKWARD: gradient of mean
    const double* second;    // MOMENTS_BACKWARD: gradient of rstd. BN_GRADS: rstd
    const float* gamma;      // BN_GRADS
    double* out;             // MOMENTS (3, C): mean, rstd, var
                             // MOMENTS_BACKWARD (2, C): dS1, dS2. BN_GRADS (2, C): dmean, drstd
    float* params;           // BN_GRADS (2, C): dgamma, dbeta
    double n;                // the number of elements otherwise
    double eps;
    int C;
};

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Args a) {
    const int c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= a.C) return;
    const double first = a.sums[c], second = a.sums[a.C + c];
#if MODE == MODE_BN_GRADS
    // v = (x - mean) rstd gamma + beta
    a.params[c] = static_cast<float>(a.second[c] * second);
    a.params[a.C + c] = static_cast<float>(first);
    a.out[c] = -a.gamma[c] * a.second[c] * first;
    a.out[a.C + c] = a.gamma[c] * second;
#else
    const double n = a.elements ? *a.elements : a.n;
    const double mean = first / n;
    const double raw = second / n - mean * mean;
    const double var = raw > 0 ? raw : 0;  // rounding may leave a constant channel below 0
    const double rstd = 1 / sqrt(var + a.eps);
#if MODE == MODE_MOMENTS
    a.out[c] = mean;
    a.out[a.C + c] = rstd;
    a.out[2 * a.C + c] = var;
#else
    // mean = S1 / n, var = S2 / n - mean^2, rstd = (var + eps)^(-1/2)
    const double dvar = raw > 0 ? -0.5 * rstd * rstd * rstd * a.second[c] : 0;
    a.out[c] = (a.first[c] - 2 * mean * dvar) / n;
    a.out[a.C + c] = dvar / n;
#endif
#endif
}
#endif
