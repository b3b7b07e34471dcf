// One training step on a GPU in two launches, `middle` and `stream`; `advance` ends a chunk of steps. No headers.
// `subtotals` and `join` add up products where `middle` does not: of several GPUs, and for an evaluation.
//
// What is compiled in comes before this text (`cuda_plan.py` writes it): REAL, the type of the network; SAMPLE, that of
// the set; UNITS of the first layer, GROUP of them to a block; the rest of the network as tables.
//
//   middle(k): products of batch k  ->  Z0, the rest of the net forward and backward, d = dZ0, gradients of the rest
//   stream(k): d  ->  gradient, update and next product of the first layer, tile by tile; the update of the rest
//
// A block owns its tile of features and its group of units: no sum depends on how many blocks run at a time, and none is
// made by atomics. Step k = *base + ahead, so that one graph of launches serves every chunk of every epoch.

#ifdef CUDA_ON_CPU  // the tests' stand-in for a GPU
#define DYNAMIC_SHARED(name) unsigned char* name = cuda_on_cpu::here.shared
inline void prefetch(const void*) {}
// As far off as a GPU's may be.
inline float reciprocal(float x) { return float(1.00000012 / x); }
inline float reciprocal_root(float x) { return float(1.00000013 / __builtin_sqrt(x)); }
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

struct alignas(16) Four {
    REAL x[4];
};

// For each step where its rows begin, how many they are, and the same of the batch that follows.
struct Place {
    int now, n, next, following;
};

// A float in the optimizer's rule. Its quotients and roots are an approximation and one correction of it, within a little
// more than half a unit in the last place from 1e-30 on; those of the language go a long way round for zeros and very
// small numbers, which dead units have everywhere: half of a step's instructions. Subnormal numbers count as zeros.
struct Quick {
    float x;
    __device__ Quick(float value) : x(value) {}
    __device__ explicit operator bool() const { return x != 0; }
    __device__ void operator+=(Quick other) { x += other.x; }
    __device__ void operator-=(Quick other) { x -= other.x; }
};

__device__ __forceinline__ Quick operator+(Quick a, Quick b) { return a.x + b.x; }
__device__ __forceinline__ Quick operator-(Quick a, Quick b) { return a.x - b.x; }
__device__ __forceinline__ Quick operator*(Quick a, Quick b) { return a.x * b.x; }

__device__ __forceinline__ Quick operator/(Quick a, Quick b) {
    const float y = reciprocal(b.x), quotient = a.x * y, rest = fmaf(-quotient, b.x, a.x);
    return fabs(rest) <= LARGEST ? fmaf(rest, y, quotient) : quotient;
}

__device__ __forceinline__ Quick sqrt(Quick a) {
    const float y = reciprocal_root(a.x), root = a.x * y, rest = fmaf(-root, root, a.x);
    return fabs(a.x) < SMALLEST || a.x > LARGEST ? a.x : fmaf(0.5f * y, rest, root);
}

template <class T>
struct InRule {
    using Number = T;
};
template <>
struct InRule<float> {
    using Number = Quick;
};
using Number = InRule<REAL>::Number;

__device__ __forceinline__ float plain(Quick a) { return a.x; }
__device__ __forceinline__ double plain(double a) { return a; }

RULE  // here comes the optimizer's rule, which `cuda_plan.py` writes

PRODUCTS  // here comes `cores.cu` or `tensor.cu`: what a block does with its tile

// --- stream ---------------------------------------------------------------------------------------------------------

// Asks for the weights of a tile, and for their moments: they are on their way while something else is done.
__device__ __forceinline__ void prefetch_state(const REAL* W, const REAL* moment0, const REAL* moment1, long long n_x,
                                               bool moments, int tile, int first_unit) {
    const int numbers = 128 / sizeof(REAL), lines = TILE / numbers;
    for (int e = threadIdx.x; e < GROUP * lines; e += THREADS) {
        const int unit = first_unit + e / lines, column = tile * TILE + e % lines * numbers;
        if (unit >= UNITS || column >= n_x) continue;
        const long long at = unit * n_x + column;
        prefetch(W + at);
        if (MOMENTS > 0 && moments) prefetch(moment0 + at);
        if (MOMENTS > 1 && moments) prefetch(moment1 + at);
    }
}

// The update of the parameters behind W0, and the batch's loss, from what the blocks of `middle` left.
__device__ __forceinline__ void update_rest(int i, int blocks, const REAL* __restrict__ numbers,
                                            const REAL* __restrict__ gradients, const REAL* __restrict__ block_losses,
                                            REAL* __restrict__ loss, REAL* __restrict__ rest, REAL* __restrict__ moment0,
                                            REAL* __restrict__ moment1) {
    if (i < REST) {
        REAL g = 0;
#pragma unroll 16
        for (int b = 0; b < blocks; b++) g += gradients[(long long)b * REST + i];
        REAL p = rest[i], first = MOMENTS > 0 ? moment0[i] : REAL(0), second = MOMENTS > 1 ? moment1[i] : REAL(0);
        rule(p, g, first, second, numbers, i < REST_WEIGHTS);
        rest[i] = p;
        if (MOMENTS > 0) moment0[i] = first;
        if (MOMENTS > 1) moment1[i] = second;
    } else if (i == REST) {  // the one thread more
        double sum = 0;  // one thread adds them all: in float32, their roundings would add up
        for (int b = 0; b < blocks; b++) sum += block_losses[b];
        *loss = REAL(sum);
    }
}

// Grid: REST_BLOCKS for the rest of the net, then one block a tile; y: the groups of units.
// X (m, n_x); rows: row numbers of the epoch in order; table: the rule's numbers, a row a step; W, moment0, moment1: the
// network's parameters and their moments, whole: W0 (UNITS, n_x) first; d: as `leave_d` left it; part (tiles, batch, UNITS);
// gradients (blocks, REST) and block_losses (blocks): of `middle`; losses: one a step.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    stream(const SAMPLE* __restrict__ X, long long n_x, int batch, const int* __restrict__ rows,
           const Place* __restrict__ places, const REAL* __restrict__ table, const int* __restrict__ base, int ahead,
           const REAL* __restrict__ d, REAL* __restrict__ W, REAL* __restrict__ moment0, REAL* __restrict__ moment1,
           REAL* __restrict__ part, int blocks, const REAL* __restrict__ gradients,
           const REAL* __restrict__ block_losses, REAL* __restrict__ losses) {
    const int k = *base + ahead;
    const Place place = places[k];
    const REAL* numbers = table + (long long)k * NUMBERS;
    if (blockIdx.x < REST_BLOCKS) {
        const long long behind = UNITS * n_x;
        if (blockIdx.y == 0 && place.n)
            update_rest(blockIdx.x * THREADS + threadIdx.x, blocks, numbers, gradients, block_losses, losses + k,
                        W + behind, moment0 + behind, moment1 + behind);
        return;
    }

    DYNAMIC_SHARED(memory);
    const int tiles = gridDim.x - REST_BLOCKS, turn = blockIdx.x - REST_BLOCKS, first_unit = blockIdx.y * GROUP;
    const int tile = k % 2 ? tiles - 1 - turn : turn;  // to and fro: what was touched last is in the cache still
    prefetch_state(W, moment0, moment1, n_x, place.n, tile, first_unit);
    tile_step(X, n_x, batch, rows, place, numbers, d, W, moment0, moment1, part, memory, tile, first_unit);
}

// --- middle ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ REAL activated(int kind, REAL z) {
    if (kind == NONE) return z;
    if (kind == RELU) return z > 0 || z != z ? z : REAL(0);  // a NaN stays one
    if (kind == TANH) return tanh(z);
    const REAL e = exp(-fabs(z));
    return (z >= 0 ? REAL(1) : e) / (1 + e);
}

// The gradient through an activation, given its output.
__device__ __forceinline__ REAL through(int kind, REAL dA, REAL a) {
    if (kind == RELU) return a > 0 ? dA : REAL(0);
    if (kind == TANH) return dA * (1 - a * a);
    return dA * a * (1 - a);
}

// Z (UNITS) of one sample: its products of all tiles, added by a binary tree on tile numbers.
__device__ __forceinline__ void tree_sum(const REAL* __restrict__ part, int tiles, long long stride, REAL* sums) {
    const int subtrees = (tiles + SUBTREE - 1) / SUBTREE;
    for (int e = threadIdx.x; e < subtrees * UNITS; e += blockDim.x) {
        const int first = e / UNITS * SUBTREE, unit = e % UNITS;
        REAL x[SUBTREE];
#pragma unroll
        for (int t = 0; t < SUBTREE; t++) x[t] = first + t < tiles ? part[(first + t) * stride + unit] : REAL(0);
#pragma unroll
        for (int step = 1; step < SUBTREE; step *= 2)
#pragma unroll
            for (int t = 0; t < SUBTREE; t += 2 * step) x[t] += x[t + step];
        sums[e] = x[0];
    }
    for (int step = 1; step < subtrees; step *= 2) {
        __syncthreads();
        const int pairs = (subtrees - step + 2 * step - 1) / (2 * step);
        for (int e = threadIdx.x; e < pairs * UNITS; e += blockDim.x) {
            const int first = e / UNITS * 2 * step, unit = e % UNITS;
            sums[first * UNITS + unit] += sums[(first + step) * UNITS + unit];
        }
    }
    __syncthreads();
}

// A softmax or sigmoid output of one sample: its loss, and dZ = (A - Y)/n in place of Z.
__device__ __forceinline__ REAL output(REAL* Z, const TARGET* __restrict__ targets, long long m, int row, int n) {
    REAL loss = 0;
#if SOFTMAX
    REAL most = Z[0], sum = 0;
    for (int o = 1; o < OUTPUTS; o++) most = Z[o] > most || Z[o] != Z[o] ? Z[o] : most;
    for (int o = 0; o < OUTPUTS; o++) sum += exp(Z[o] - most);
    const int label = int(targets[row]);
    loss = log(sum) - (Z[label] - most);
    for (int o = 0; o < OUTPUTS; o++) Z[o] = (exp(Z[o] - most) / sum - (o == label ? REAL(1) : REAL(0))) / n;
#else
    for (int o = 0; o < OUTPUTS; o++) {
        const REAL z = Z[o], y = targets[o * m + row], e = exp(-fabs(z));
        loss += (z > 0 || z != z ? z : REAL(0)) - y * z + log1p(e);
        Z[o] = ((z >= 0 ? REAL(1) : e) / (1 + e) - y) / n;
    }
#endif
    return loss / n;
}

// Grid: blocks of SAMPLES samples each. part, d, gradients, block_losses as for `stream`; rest: the parameters behind W0;
// targets (outputs, m) of 0 and 1, or class numbers (m). There are few blocks, one to a multiprocessor: with registers
// for the loads of a whole subtree at a time.
extern "C" __global__ void __launch_bounds__(MIDDLE_THREADS, 1)
    middle(const REAL* __restrict__ part, int tiles, int batch, const int* __restrict__ rows,
           const Place* __restrict__ places, const int* __restrict__ base, int ahead, const REAL* __restrict__ rest,
           const TARGET* __restrict__ targets, long long m, REAL* __restrict__ d, REAL* __restrict__ gradients,
           REAL* __restrict__ block_losses) {
    DYNAMIC_SHARED(memory);
    REAL* parameters = reinterpret_cast<REAL*>(memory);  // REST
    REAL* A = parameters + REST;                         // the layers' outputs, and from the back their dZ: LEVELS each
    REAL* D = A + SAMPLES * LEVELS;
    REAL* sample_losses = D + SAMPLES * LEVELS;  // SAMPLES
    REAL* sums = sample_losses + SAMPLES;        // subtrees of UNITS

    const Place place = places[*base + ahead];
    const int first = blockIdx.x * SAMPLES, count = max(0, min(SAMPLES, place.n - first));
    for (int i = threadIdx.x; i < REST; i += blockDim.x) parameters[i] = rest[i];
    for (int s = 0; s < count; s++) {
        tree_sum(part + (long long)(first + s) * UNITS, tiles, (long long)batch * UNITS, sums);
        for (int u = threadIdx.x; u < UNITS; u += blockDim.x)
            A[s * UNITS + u] = activated(ACTIVATION[0], sums[u] * SCALE + parameters[B_AT[0] + u]);
        __syncthreads();
    }

#pragma unroll
    for (int k = 1; k < LAYERS; k++) {
        const int width = WIDTH[k], inputs = WIDTH[k - 1];
        const REAL* before = A + SAMPLES * LEVEL_AT[k - 1];
        for (int e = threadIdx.x; e < count * width; e += blockDim.x) {
            const int s = e / width, o = e % width;
            const REAL* weights = parameters + W_AT[k] + o * inputs;
            REAL z = 0;
#pragma unroll 32
            for (int i = 0; i < inputs; i++) z += weights[i] * before[s * inputs + i];
            A[SAMPLES * LEVEL_AT[k] + e] = activated(ACTIVATION[k], z + parameters[B_AT[k] + o]);
        }
        __syncthreads();
    }
    // The last layer's activation is NONE: its logits, and from here on its dZ.
    REAL* logits = A + SAMPLES * LEVEL_AT[LAYERS - 1];
    if (threadIdx.x < count)
        sample_losses[threadIdx.x] =
            output(logits + threadIdx.x * OUTPUTS, targets, m, rows[place.now + first + threadIdx.x], place.n);
    __syncthreads();
    for (int e = threadIdx.x; e < count * OUTPUTS; e += blockDim.x) D[SAMPLES * LEVEL_AT[LAYERS - 1] + e] = logits[e];
    __syncthreads();
#pragma unroll
    for (int k = LAYERS - 1; k > 0; k--) {
        const int width = WIDTH[k], inputs = WIDTH[k - 1];
        const REAL* after = D + SAMPLES * LEVEL_AT[k];
        for (int e = threadIdx.x; e < count * inputs; e += blockDim.x) {
            const int s = e / inputs, i = e % inputs;
            REAL dA = 0;
#pragma unroll 32
            for (int o = 0; o < width; o++) dA += parameters[W_AT[k] + o * inputs + i] * after[s * width + o];
            const int at = SAMPLES * LEVEL_AT[k - 1] + e;
            D[at] = through(ACTIVATION[k - 1], dA, A[at]);
        }
        __syncthreads();
    }

    // What other blocks need: d, the first layer's dZ times the pixels' scale; this block's share of the rest's gradient.
    leave_d(D, first, count, batch, d);
    REAL* gradient = gradients + (long long)blockIdx.x * REST;
#pragma unroll
    for (int k = 0; k < LAYERS; k++) {
        const int width = WIDTH[k], inputs = k ? WIDTH[k - 1] : 0;
        const REAL* dZ = D + SAMPLES * LEVEL_AT[k];
        const REAL* before = k ? A + SAMPLES * LEVEL_AT[k - 1] : A;
        for (int e = threadIdx.x; e < width * (inputs + 1); e += blockDim.x) {
            const int o = e % width, i = e / width;  // i == inputs: the bias
            REAL g = 0;
            for (int s = 0; s < count; s++) g += dZ[s * width + o] * (i < inputs ? before[s * inputs + i] : REAL(1));
            gradient[i < inputs ? W_AT[k] + o * inputs + i : B_AT[k] + o] = g;
        }
    }
    if (threadIdx.x == 0) {
        double loss = 0;
        for (int s = 0; s < count; s++) loss += sample_losses[s];
        block_losses[blockIdx.x] = REAL(loss);
    }
}

extern "C" __global__ void advance(int* base, int steps) { *base += steps; }

// --- sums of products ----------------------------------------------------------------------------------------------

// A whole subtree of the tiles here: its first one, and how many there are.
struct Node {
    int first, count;
};

// Grid: the batch's samples; y: nodes. own (nodes, batch, UNITS): for each node the sum of part (tiles, batch, UNITS) over
// its tiles. Shared: a number for each unit and subtree of the longest.
extern "C" __global__ void subtotals(const REAL* __restrict__ part, int batch, const Node* __restrict__ nodes,
                                     REAL* __restrict__ own) {
    DYNAMIC_SHARED(memory);
    REAL* sums = reinterpret_cast<REAL*>(memory);
    const Node node = nodes[blockIdx.y];
    const long long stride = (long long)batch * UNITS;
    tree_sum(part + node.first * stride + blockIdx.x * UNITS, node.count, stride, sums);
    for (int u = threadIdx.x; u < UNITS; u += blockDim.x) own[blockIdx.y * stride + blockIdx.x * UNITS + u] = sums[u];
}

// Where the sum of a subtree lies among everyone's, and how many sums come together once it is there.
struct Join {
    int at, merges;
};

// Grid: the numbers of a batch. joined (batch, UNITS), `size` numbers: the tree above the subtrees whose sums `everyone`
// (·, batch, UNITS) holds.
extern "C" __global__ void join(const REAL* __restrict__ everyone, int size, const Join* __restrict__ joins, int count,
                                REAL* __restrict__ joined) {
    const int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= size) return;
    REAL waiting[WAITING];
    int top = 0;
    for (int k = 0; k < count; k++) {
        waiting[top] = everyone[(long long)joins[k].at * size + e];
        for (int merge = 0; merge < joins[k].merges; merge++, top--) waiting[top - 1] += waiting[top];
        top++;
    }
    joined[e] = waiting[0];
}
