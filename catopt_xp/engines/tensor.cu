// A tile's gradient, update and next product on the tensor cores, for uint8 pixels and a float32 network.
//
// A pixel is exact as bf16; the other factor, d or W, is split into three bf16 terms whose sum is the float32 number. So
// the products are those of float32, at the speed of bf16 by three. A warp has 32 features and the group's units, in tiles
// of `mma.m16n8k16`: M the units; N the features (gradient) or the samples (product); K the samples or the features.
//
// Which feature stands for which column of a tile is ours to say: column n of tile j is feature 4n + j. Then a lane's
// pixels lie side by side in memory, so do the 8 features of a unit of which it holds the gradient, and the updated weights
// stay in the registers in which the next product wants them: nothing goes through shared memory but d and the sums.

#define WARPS (THREADS / 32)
#define M_TILES ((GROUP + 15) / 16)
#define D_CHUNK 64                      // samples whose d is split at a time
#define Z_CHUNK 32                      // samples whose products are summed over the warps at a time
#define Z_STRIDE (16 * M_TILES + 4)     // numbers between samples: a warp's stores fall on 32 banks
#define D_WORDS (D_CHUNK / 16 * M_TILES * 3 * 32 * 4)

struct alignas(16) Words {
    unsigned x[4];
};

#ifdef CUDA_ON_CPU
struct Lane {
    Words a;
    unsigned b0, b1;
};

inline double unit(double x, int digits) { return __builtin_ldexp(1.0, __builtin_ilogb(x) - digits); }

// A sum as a tensor core makes it, for a pessimist: of eight products and what is there, each cut off one digit behind the
// last one that a float as large as the largest of them has, and then cut off to a float.
inline float sum_of_eight(float c, const double (&products)[8]) {
    double most = fabs(double(c)), sum = c;
    for (double x : products) most = fabs(x) > most ? fabs(x) : most, sum += x;
    if (!(most > 0 && most < 1e38 && fabs(sum) < 1e38)) return float(sum);  // nothing, infinite, or NaN
    const double last = unit(most, 24);
    sum = last * __builtin_trunc(c / last);
    for (double x : products) sum += last * __builtin_trunc(x / last);
    return sum == 0 ? 0.0f : float(unit(sum, 23) * __builtin_trunc(sum / unit(sum, 23)));
}

// What the PTX ISA says of m16n8k16: lane 4g + t has rows g and g + 8 of A and C, column g of B, and k = 2t, 2t+1, 2t+8, 2t+9.
inline void mma(float (&c)[4], const Words& a, unsigned b0, unsigned b1) {
    const auto lanes = cuda_on_cpu::exchange(Lane{a, b0, b1});
    const int g = cuda_on_cpu::here.lane / 4, t = cuda_on_cpu::here.lane % 4;
    const auto half = [](unsigned word, int k) { return __uint_as_float(k % 2 ? word & 0xFFFF0000u : word << 16); };
    for (int q = 0; q < 4; q++) {
        const int row = g + 8 * (q / 2), column = 2 * t + q % 2;
        for (int first = 0; first < 16; first += 8) {
            double products[8];
            for (int k = 0; k < 8; k++) {
                const Words& from = lanes[row % 8 * 4 + k / 2].a;
                const Lane& other = lanes[column * 4 + k / 2];
                products[k] = double(half(from.x[row / 8 + first / 4], k)) * half(first ? other.b1 : other.b0, k);
            }
            c[q] = sum_of_eight(c[q], products);
        }
    }
}

inline unsigned bf16_pair(float low, float high) {
    const auto rounded = [](float x) {
        const unsigned u = __float_as_uint(x);
        return x != x ? 0x7FC0u : (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
}

inline void prefetch(const REAL*) {}
#else
__device__ __forceinline__ void mma(float (&c)[4], const Words& a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void prefetch(const REAL* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

// Two numbers as three pairs of bf16 terms.
__device__ __forceinline__ void split(float low, float high, unsigned& first, unsigned& second, unsigned& third) {
    first = bf16_pair(low, high);
    low -= __uint_as_float(first << 16), high -= __uint_as_float(first & 0xFFFF0000u);
    second = bf16_pair(low, high);
    low -= __uint_as_float(second << 16), high -= __uint_as_float(second & 0xFFFF0000u);
    third = bf16_pair(low, high);
}

// Byte j of either word as a pair of bf16, exactly: 2^23 + x has x in its last byte.
__device__ __forceinline__ unsigned pixels(unsigned low, unsigned high, int j) {
    const float a = __uint_as_float(__byte_perm(low, 0x4B000000u, 0x7440 | j)) - 8388608.0f;
    const float b = __uint_as_float(__byte_perm(high, 0x4B000000u, 0x7440 | j)) - 8388608.0f;
    return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
}

// Four pixels from a column on; zeros beyond the last.
__device__ __forceinline__ unsigned four_pixels(const SAMPLE* __restrict__ X, long long row, long long n_x, int column) {
    const SAMPLE* at = X + row * n_x + column;
#if ALIGNED
    return column < n_x ? *reinterpret_cast<const unsigned*>(at) : 0u;
#else
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) word |= column + j < n_x ? unsigned(at[j]) << (8 * j) : 0u;
    return word;
#endif
}

// Four pixels of each of the rows 0, 1, 8 and 9 from here on: a lane's share of 16 samples.
__device__ __forceinline__ void load_rows(const SAMPLE* __restrict__ X, const int* rows, long long n_x, int column,
                                          unsigned (&x)[4]) {
#pragma unroll
    for (int q = 0; q < 4; q++) x[q] = four_pixels(X, rows[q % 2 + 8 * (q / 2)], n_x, column);
}

// c += d X of this batch: c[mt][j] is a 16 x 8 tile of units and features.
__device__ __forceinline__ void gradient(const SAMPLE* __restrict__ X, long long n_x, const int* __restrict__ rows, int n,
                                         const REAL* __restrict__ d, int first_unit, int warp_start, Words* d_shared,
                                         int* rows_shared, float (&c)[M_TILES][4][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned* words = d_shared->x;
    for (int a = 0; a < n; a += D_CHUNK) {
        const int count = min(D_CHUNK, n - a), steps = (count + 15) / 16;
        __syncthreads();  // the chunk before has been read
        // Beyond the batch d is 0, so any row will do.
        if (threadIdx.x < D_CHUNK) rows_shared[threadIdx.x] = rows[a + min(int(threadIdx.x), count - 1)];
        for (int e = threadIdx.x; e < steps * M_TILES * 128; e += THREADS) {
            const int r = e % 4, its_lane = e / 4 % 32, mt = e / 128 % M_TILES, step = e / 128 / M_TILES;
            const int u = 16 * mt + its_lane / 4 + 8 * (r % 2), k = 16 * step + 2 * (its_lane % 4) + 8 * (r / 2);
            const bool inside = u < GROUP && first_unit + u < UNITS;
            const REAL* at = d + (long long)(a + k) * UNITS + first_unit + u;
            const float low = inside && k < count ? at[0] : 0.0f, high = inside && k + 1 < count ? at[UNITS] : 0.0f;
            unsigned* to = words + (step * M_TILES + mt) * 384 + 4 * its_lane + r;
            split(low, high, to[0], to[128], to[256]);
        }
        __syncthreads();
        unsigned x[4], next[4] = {};  // the next step's pixels are on their way while this one's are used
        load_rows(X, rows_shared + 2 * t, n_x, warp_start + 4 * g, x);
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            if (step + 1 < steps) load_rows(X, rows_shared + 16 * (step + 1) + 2 * t, n_x, warp_start + 4 * g, next);
#pragma unroll
            for (int mt = 0; mt < M_TILES; mt++) {
                Words terms[3];
#pragma unroll
                for (int i = 0; i < 3; i++) terms[i] = d_shared[(step * M_TILES + mt) * 96 + 32 * i + lane];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float sum[4] = {};  // from 0 each time: what a tensor core cuts off would add up beside a large sum
#pragma unroll
                    for (int i = 2; i >= 0; i--)  // the small ones first
                        mma(sum, terms[i], pixels(x[0], x[1], j), pixels(x[2], x[3], j));
#pragma unroll
                    for (int q = 0; q < 4; q++) c[mt][j][q] += sum[q];
                }
            }
#pragma unroll
            for (int q = 0; q < 4; q++) x[q] = next[q];
        }
    }
}

// 8 numbers from a column on, or as many as there are; the others are left as they are.
__device__ __forceinline__ void load8(const REAL* __restrict__ at, int inside, REAL (&x)[8]) {
#if ALIGNED
    const Four low = *reinterpret_cast<const Four*>(at), high = *reinterpret_cast<const Four*>(at + 4);
#pragma unroll
    for (int q = 0; q < 4; q++) x[q] = low.x[q], x[q + 4] = high.x[q];
#else
#pragma unroll
    for (int q = 0; q < 8; q++)
        if (q < inside) x[q] = at[q];
#endif
}

__device__ __forceinline__ void store8(REAL* __restrict__ at, int inside, const REAL (&x)[8]) {
#if ALIGNED
    *reinterpret_cast<Four*>(at) = {x[0], x[1], x[2], x[3]};
    *reinterpret_cast<Four*>(at + 4) = {x[4], x[5], x[6], x[7]};
#else
#pragma unroll
    for (int q = 0; q < 8; q++)
        if (q < inside) at[q] = x[q];
#endif
}

// The rule on what this lane holds; c becomes the fresh weights, 0 where there are none.
__device__ __forceinline__ void update(REAL* __restrict__ W, REAL* __restrict__ moment0, REAL* __restrict__ moment1,
                                       long long n_x, const REAL* __restrict__ numbers, bool updates, int first_unit,
                                       int warp_start, float (&c)[M_TILES][4][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, column = warp_start + 8 * (lane % 4);
    const int inside = column < n_x ? int(n_x - column < 8 ? n_x - column : 8) : 0;
#pragma unroll
    for (int mt = 0; mt < M_TILES; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int u = 16 * mt + 8 * half + g;
            REAL p[8] = {}, first[8] = {}, second[8] = {};
            if (inside && u < GROUP && first_unit + u < UNITS) {
                const long long at = (first_unit + u) * n_x + column;
                load8(W + at, inside, p);
                if (updates) {
                    if (MOMENTS > 0) load8(moment0 + at, inside, first);
                    if (MOMENTS > 1) load8(moment1 + at, inside, second);
#pragma unroll
                    for (int q = 0; q < 8; q++)
                        rule(p[q], c[mt][q % 4][2 * half + q / 4], first[q], second[q], numbers, true);
                    store8(W + at, inside, p);
                    if (MOMENTS > 0) store8(moment0 + at, inside, first);
                    if (MOMENTS > 1) store8(moment1 + at, inside, second);
                }
            }
#pragma unroll
            for (int q = 0; q < 8; q++) c[mt][q % 4][2 * half + q / 4] = q < inside ? p[q] : 0.0f;
        }
}

// part[tile] = X W' of the batch that follows: each warp its own features, then a tree over the warps.
__device__ __forceinline__ void product(const SAMPLE* __restrict__ X, long long n_x, const int* __restrict__ rows, int n,
                                        int first_unit, int warp_start, const float (&c)[M_TILES][4][4], float* sums,
                                        int* rows_shared, REAL* __restrict__ part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Words w[M_TILES][2][3];  // the tiles j = 2s and 2s + 1 side by side are the fragment of K-step s
#pragma unroll
    for (int mt = 0; mt < M_TILES; mt++)
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float(&tile)[4] = c[mt][2 * s + r / 2];
                Words(&to)[3] = w[mt][s];
                split(tile[2 * (r % 2)], tile[2 * (r % 2) + 1], to[0].x[r], to[1].x[r], to[2].x[r]);
            }
    for (int a = 0; a < n; a += Z_CHUNK) {
        const int count = min(Z_CHUNK, n - a);
        __syncthreads();  // what was here before has been read
        if (threadIdx.x < Z_CHUNK) rows_shared[threadIdx.x] = rows[a + min(int(threadIdx.x), count - 1)];
        __syncthreads();
        unsigned low[Z_CHUNK / 8], high[Z_CHUNK / 8];
#pragma unroll
        for (int q = 0; q < Z_CHUNK / 8; q++)
            if (8 * q < count) {
                low[q] = four_pixels(X, rows_shared[8 * q + g], n_x, warp_start + 8 * t);
                high[q] = four_pixels(X, rows_shared[8 * q + g], n_x, warp_start + 8 * t + 4);
            }
#pragma unroll
        for (int q = 0; q < Z_CHUNK / 8; q++)
            if (8 * q < count) {
#pragma unroll
                for (int mt = 0; mt < M_TILES; mt++) {
                    float z[4] = {};
#pragma unroll
                    for (int i = 2; i >= 0; i--)
#pragma unroll
                        for (int s = 0; s < 2; s++)
                            mma(z, w[mt][s][i], pixels(low[q], high[q], 2 * s), pixels(low[q], high[q], 2 * s + 1));
                    float* to = sums + (warp * Z_CHUNK + 8 * q + 2 * t) * Z_STRIDE + 16 * mt + g;
                    to[0] = z[0], to[Z_STRIDE] = z[1], to[8] = z[2], to[Z_STRIDE + 8] = z[3];
                }
            }
        __syncthreads();
        for (int e = threadIdx.x; e < count * 16 * M_TILES; e += THREADS) {
            const int i = e / (16 * M_TILES), u = e % (16 * M_TILES);
            float whole[WARPS];
#pragma unroll
            for (int k = 0; k < WARPS; k++) whole[k] = sums[(k * Z_CHUNK + i) * Z_STRIDE + u];
#pragma unroll
            for (int step = 1; step < WARPS; step *= 2)
#pragma unroll
                for (int k = 0; k + step < WARPS; k += 2 * step) whole[k] += whole[k + step];
            if (u < GROUP && first_unit + u < UNITS) part[(long long)(a + i) * UNITS + first_unit + u] = whole[0];
        }
    }
}

__device__ __forceinline__ void tile_step(const SAMPLE* __restrict__ X, long long n_x, int batch,
                                          const int* __restrict__ rows, Place place, const REAL* __restrict__ numbers,
                                          const REAL* __restrict__ d, REAL* __restrict__ W, REAL* __restrict__ moment0,
                                          REAL* __restrict__ moment1, REAL* __restrict__ part, unsigned char* memory,
                                          int tile, int first_unit) {
    float* sums = reinterpret_cast<float*>(memory);            // d's terms and the sums use one room in turn
    int* rows_shared = reinterpret_cast<int*>(memory + WORK_SHARED);
    const int warp_start = tile * TILE + threadIdx.x / 32 * 32;

    // The state is on its way from memory while the gradient is made.
    if (place.n && threadIdx.x % 4 == 0 && warp_start < n_x)
        for (int u = threadIdx.x % 32 / 4; u < GROUP && first_unit + u < UNITS; u += 8) {
            const long long at = (first_unit + u) * n_x + warp_start;
            prefetch(W + at);
            if (MOMENTS > 0) prefetch(moment0 + at);
            if (MOMENTS > 1) prefetch(moment1 + at);
        }

    float c[M_TILES][4][4] = {};
    gradient(X, n_x, rows + place.now, place.n, d, first_unit, warp_start, reinterpret_cast<Words*>(memory), rows_shared, c);
    update(W, moment0, moment1, n_x, numbers, place.n > 0, first_unit, warp_start, c);
    product(X, n_x, rows + place.next, place.following, first_unit, warp_start, c, sums, rows_shared,
            part + (long long)tile * batch * UNITS);
}
