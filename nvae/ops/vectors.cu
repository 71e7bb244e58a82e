// Moments of a layer whose sums were added over several ranks: see put_moments in common.cu.
//
// Macros: THREADS.

struct Args {
    const double* sums;      // (2, C): S1, S2
    const double* elements;  // their number where the device knows it, or null
    double* made;            // (3, C): mean, rstd, var
    float* running_mean;     // (C), or null
    float* running_var;
    double n;                // the number of elements otherwise
    double eps;
    double repeats;          // how often an element counts in the running variance
    float momentum;
    int C;
};

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Args a) {
    const int c = blockIdx.x * THREADS + threadIdx.x;
    if (c < a.C)
        put_moments(a, c, a.C, a.sums[c], a.sums[a.C + c], a.elements ? *a.elements : a.n);
}
