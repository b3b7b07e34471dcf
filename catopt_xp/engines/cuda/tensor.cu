// A tile's gradient, update and next product on the tensor cores, for uint8 pixels and a float32 network.
//
// A pixel is exact as bf16; the other factor, d or W, is split into three bf16 terms whose sum is the float32 number. So
// the products are those of float32, at the speed of bf16 by three. A warp has 32 features and the group's units, in tiles
// of `mma.m16n8k16`: M the units; N the features (gradient) or the samples (product); K the samples or the features.
//
// Which feature stands for which column of a tile is ours to say: columns 2n and 2n + 1 of tile j are features 4n + j and
// 16 + 4n + j. Then a lane's pixels lie side by side in memory, so do those features of a unit, in two fours, of which it
// holds the gradient, and the updated weights stay in the registers in which the next product wants them: nothing goes
// through shared memory but d and the sums. Four lanes side by side load and store 64 bytes in a row.

#define WARPS (THREADS / 32)
#define M_TILES ((GROUP + 15) / 16)
#define Z_STRIDE (16 * M_TILES + SUMS_APART)
#define GROUPS (UNITS / GROUP + (UNITS % GROUP != 0))
#define STEP_WORDS (M_TILES * 3 * 32)   // of four terms each, d of 16 samples for a group of units

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

inline void copy_later(Words* to, const Words* from) { *to = *from; }
inline void copies_done() {}
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

// Copies to shared memory that go on meanwhile, until this thread waits for all that it has asked for.
__device__ __forceinline__ void copy_later(Words* to, const Words* from) {
    const unsigned at = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
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

// Four pixels, or as many as there are, then zeros.
__device__ __forceinline__ unsigned four_pixels(const SAMPLE* at, int inside) {
#if ALIGNED
    return inside > 0 ? *reinterpret_cast<const unsigned*>(at) : 0u;
#else
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) word |= j < inside ? unsigned(at[j]) << (8 * j) : 0u;
    return word;
#endif
}

struct alignas(16) Starts {
    long long x[2];
};

// Four pixels of each of the samples 0, 1, 8 and 9 from here on: a lane's share of 16. `at`: in the first row; `starts`:
// where the samples' rows begin.
__device__ __forceinline__ void load_samples(const SAMPLE* at, const long long* starts, int inside, unsigned (&x)[4]) {
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const Starts two = *reinterpret_cast<const Starts*>(starts + 8 * q);
        x[2 * q] = four_pixels(at + two.x[0], inside), x[2 * q + 1] = four_pixels(at + two.x[1], inside);
    }
}

// What `middle` leaves of d, of this block's samples: by 16 samples and 16 units the three terms, lane by lane as `mma`
// wants them, and zeros where there is no sample or no unit.
__device__ __forceinline__ void leave_d(const REAL* D, int first, int count, int batch, REAL* __restrict__ d) {
    const int end = first + SAMPLES < batch ? first + SAMPLES : (batch + 15) / 16 * 16;
    unsigned short* halves = reinterpret_cast<unsigned short*>(d);
    for (int e = threadIdx.x; e < (end - first) * GROUPS * 16 * M_TILES; e += blockDim.x) {
        const int u = e % (16 * M_TILES), group = e / (16 * M_TILES) % GROUPS, i = e / (16 * M_TILES) / GROUPS;
        const int unit = group * GROUP + u, sample = first + i;
        const float value = i < count && u < GROUP && unit < UNITS ? D[i * UNITS + unit] * SCALE : 0.0f;
        const int lane = u % 8 * 4 + sample % 8 / 2, r = u % 16 / 8 + 2 * (sample % 16 / 8);
        unsigned terms[3];
        split(value, value, terms[0], terms[1], terms[2]);
        unsigned short* to = halves + (sample / 16 * GROUPS + group) * (8LL * STEP_WORDS) + u / 16 * 768;
#pragma unroll
        for (int k = 0; k < 3; k++) to[256 * k + 8 * lane + 2 * r + sample % 2] = (unsigned short)(terms[k]);
    }
}

// Asks for the d of D_CHUNK samples from `a` on.
__device__ __forceinline__ void copy_d(const Words* __restrict__ d, int n, int a, Words* d_shared) {
    const int steps = (min(D_CHUNK, n - a) + 15) / 16;
    for (int e = threadIdx.x; e < steps * STEP_WORDS; e += THREADS)
        copy_later(d_shared + a / D_CHUNK % 2 * (D_CHUNK / 16 * STEP_WORDS) + e,
                   d + (a / 16 + e / STEP_WORDS) * (GROUPS * STEP_WORDS) + e % STEP_WORDS);
}

// c += d X of this batch: c[mt][j] is a 16 x 8 tile of units and features. The pixels and the d of D_CHUNK samples are on
// their way while those before are used; of the first ones `copy_d` has been called.
__device__ __forceinline__ void gradient(const SAMPLE* __restrict__ X, long long n_x, const long long* starts, int n,
                                         const Words* __restrict__ d, int warp_start, Words* d_shared,
                                         float (&c)[M_TILES][4][4]) {
    const int lane = threadIdx.x % 32, column = warp_start + 4 * (lane / 8) + 16 * (lane / 4 % 2);
    const int inside = int(n_x - column < 4 ? n_x - column : 4);
    const SAMPLE* at = X + column;
    starts += lane % 4 * 2;
    unsigned x[D_CHUNK / 16][4];
#pragma unroll
    for (int step = 0; step < D_CHUNK / 16; step++)
        if (16 * step < n) load_samples(at, starts + 16 * step, inside, x[step]);
    for (int a = 0; a < n; a += D_CHUNK) {
        copies_done();
        __syncthreads();  // this chunk's d is there, and that of the one before has been read
        if (a + D_CHUNK < n) copy_d(d, n, a + D_CHUNK, d_shared);
        const Words* terms_here = d_shared + a / D_CHUNK % 2 * (D_CHUNK / 16 * STEP_WORDS) + lane;
#pragma unroll
        for (int step = 0; step < D_CHUNK / 16; step++) {
            if (a + 16 * step >= n) break;
#pragma unroll
            for (int mt = 0; mt < M_TILES; mt++) {
                Words terms[3];
#pragma unroll
                for (int i = 0; i < 3; i++) terms[i] = terms_here[(step * M_TILES + mt) * 96 + 32 * i];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float sum[4] = {};  // from 0 each time: what a tensor core cuts off would add up beside a large sum
#pragma unroll
                    for (int i = 2; i >= 0; i--)  // the small ones first
                        mma(sum, terms[i], pixels(x[step][0], x[step][1], j), pixels(x[step][2], x[step][3], j));
#pragma unroll
                    for (int q = 0; q < 4; q++) c[mt][j][q] += sum[q];
                }
            }
            const int ahead = a + D_CHUNK + 16 * step;
            if (ahead < n) load_samples(at, starts + ahead, inside, x[step]);
        }
    }
}

// What a lane holds of one unit: two fours of the weights and of their moments.
struct State {
    REAL p[8], first[8], second[8];
};

// The state of a tile: rows of W and its moments, where this lane's part of a row begins, and how many numbers of either
// four there are.
struct Rows {
    REAL *W, *moment0, *moment1;
    long long n_x;
    int first_unit, column, inside[2];

    __device__ __forceinline__ bool has(int u) const { return u < GROUP && first_unit + u < UNITS; }

    __device__ __forceinline__ bool has(int u, int q) const {
        return has(u) && (ALIGNED ? inside[q / 4] > 0 : inside[q / 4] > q % 4);
    }

    // Where there is nothing, 0 or any number.
    __device__ __forceinline__ void load8(const REAL* from, int u, REAL (&x)[8]) const {
        const long long at = has(u) ? (first_unit + u) * n_x + column : 0;
#pragma unroll
        for (int f = 0; f < 2; f++) {
#if ALIGNED
            const Four four = *reinterpret_cast<const Four*>(from + (inside[f] > 0 ? at + 16 * f : 0));
#pragma unroll
            for (int q = 0; q < 4; q++) x[4 * f + q] = four.x[q];
#else
#pragma unroll
            for (int q = 0; q < 4; q++) x[4 * f + q] = has(u, 4 * f + q) ? from[at + 16 * f + q] : REAL(0);
#endif
        }
    }

    __device__ __forceinline__ void store8(REAL* to, int u, const REAL (&x)[8]) const {
        if (!has(u)) return;
        REAL* at = to + (first_unit + u) * n_x + column;
#pragma unroll
        for (int f = 0; f < 2; f++) {
#if ALIGNED
            const REAL* four = x + 4 * f;
            if (inside[f] > 0) *reinterpret_cast<Four*>(at + 16 * f) = {four[0], four[1], four[2], four[3]};
#else
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (q < inside[f]) at[16 * f + q] = x[4 * f + q];
#endif
        }
    }

    __device__ __forceinline__ void load(int u, bool moments, State& state) const {
        load8(W, u, state.p);
        if (MOMENTS > 0 && moments) load8(moment0, u, state.first);
        if (MOMENTS > 1 && moments) load8(moment1, u, state.second);
    }

    __device__ __forceinline__ void store(int u, const State& state) const {
        store8(W, u, state.p);
        if (MOMENTS > 0) store8(moment0, u, state.first);
        if (MOMENTS > 1) store8(moment1, u, state.second);
    }
};

// The rule on what this lane holds; c becomes the fresh weights, 0 where there are none. `next`: the state of the first
// unit, which is on its way; of each further one it is while the one before is updated.
__device__ __forceinline__ void update(const Rows& rows, const REAL* __restrict__ numbers, bool updates, State& next,
                                       float (&c)[M_TILES][4][4]) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int k = 0; k < 2 * M_TILES; k++) {
        const int mt = k / 2, half = k % 2, u = 8 * k + g;
        State state = next;
        if (k + 1 < 2 * M_TILES) rows.load(u + 8, updates, next);
        if (updates) {
#pragma unroll
            for (int q = 0; q < 8; q++)
                rule(state.p[q], c[mt][q % 4][2 * half + q / 4], state.first[q], state.second[q], numbers, true);
            rows.store(u, state);
        }
#pragma unroll
        for (int q = 0; q < 8; q++)
            c[mt][q % 4][2 * half + q / 4] = rows.has(u, q) ? state.p[q] : 0.0f;
    }
}

// The pixels of 16 samples: of samples g and g + 8 this lane's two fours.
__device__ __forceinline__ void load_pair(const SAMPLE* at, const long long* starts, const int (&inside)[2],
                                          unsigned (&x)[2][2]) {
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
        for (int f = 0; f < 2; f++) x[q][f] = four_pixels(at + starts[8 * q] + 16 * f, inside[f]);
}

// part[tile] = X W' of the batch that follows: each warp its own features, then a tree over the warps. `x`: the pixels of
// the first Z_CHUNK samples; `at` and `starts`: where this lane finds those of the others.
__device__ __forceinline__ void product(const SAMPLE* at, const long long* starts, const int (&inside)[2], int n,
                                        int first_unit, const float (&c)[M_TILES][4][4], float* sums,
                                        unsigned (&x)[Z_CHUNK / 16][2][2], REAL* __restrict__ part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* mine = sums + (warp * Z_CHUNK + lane % 4 * 2) * Z_STRIDE + lane / 4;
    const int u = threadIdx.x % (16 * M_TILES), first = threadIdx.x / (16 * M_TILES), apart = THREADS / (16 * M_TILES);
    const bool there = u < GROUP && first_unit + u < UNITS;
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
        __syncthreads();  // what was here before has been read
#pragma unroll
        for (int p = 0; p < Z_CHUNK / 16; p++) {
            if (a + 16 * p >= n) break;
            float z[2][M_TILES][4] = {};
#pragma unroll
            for (int i = 2; i >= 0; i--)
#pragma unroll
                for (int s = 0; s < 2; s++)
#pragma unroll
                    for (int q = 0; q < 2; q++)
#pragma unroll
                        for (int mt = 0; mt < M_TILES; mt++)
                            mma(z[q][mt], w[mt][s][i], pixels(x[p][q][0], x[p][q][1], 2 * s),
                                pixels(x[p][q][0], x[p][q][1], 2 * s + 1));
#pragma unroll
            for (int q = 0; q < 2; q++)
#pragma unroll
                for (int mt = 0; mt < M_TILES; mt++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        mine[(16 * p + 8 * q + k % 2) * Z_STRIDE + 16 * mt + 8 * (k / 2)] = z[q][mt][k];
            const int ahead = a + Z_CHUNK + 16 * p;
            if (ahead < n) load_pair(at, starts + ahead, inside, x[p]);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < Z_CHUNK / apart; k++) {
            const int i = first + k * apart;
            if (a + i >= n) break;
            float whole[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; w++) whole[w] = sums[(w * Z_CHUNK + i) * Z_STRIDE + u];
#pragma unroll
            for (int step = 1; step < WARPS; step *= 2)
#pragma unroll
                for (int w = 0; w + step < WARPS; w += 2 * step) whole[w] += whole[w + step];
            if (there) part[(long long)(a + i) * UNITS + first_unit + u] = whole[0];
        }
    }
}

__device__ __forceinline__ void tile_step(const SAMPLE* __restrict__ X, long long n_x, int batch,
                                          const int* __restrict__ rows, Place place, const REAL* __restrict__ numbers,
                                          const REAL* __restrict__ d, REAL* __restrict__ W, REAL* __restrict__ moment0,
                                          REAL* __restrict__ moment1, REAL* __restrict__ part, unsigned char* memory,
                                          int tile, int first_unit) {
    Words* d_shared = reinterpret_cast<Words*>(memory);  // d's terms and the sums use one room in turn
    float* sums = reinterpret_cast<float*>(memory);
    long long* starts_now = reinterpret_cast<long long*>(memory + WORK_SHARED);
    long long* starts_next = starts_now + ROWS_SHARED;
    const int lane = threadIdx.x % 32, warp_start = tile * TILE + threadIdx.x / 32 * 32;
    const bool updates = place.n > 0;

    const Words* terms = reinterpret_cast<const Words*>(d) + first_unit / GROUP * STEP_WORDS;
    if (updates) copy_d(terms, place.n, 0, d_shared);
    // Beyond a batch, d is 0 or nobody looks at the product, so any row will do.
#pragma unroll 1
    for (int e = threadIdx.x; e < (place.n + 15) / 16 * 16; e += THREADS)
        starts_now[e] = rows[place.now + min(e, place.n - 1)] * n_x;
#pragma unroll 1
    for (int e = threadIdx.x; e < (place.following + 15) / 16 * 16; e += THREADS)
        starts_next[e] = rows[place.next + min(e, place.following - 1)] * n_x;
    __syncthreads();

    float c[M_TILES][4][4] = {};
    gradient(X, n_x, starts_now, place.n, terms, warp_start, d_shared, c);
    Rows state{W, moment0, moment1, n_x, first_unit, warp_start + 4 * (lane % 4), {}};
#pragma unroll
    for (int f = 0; f < 2; f++) {
        const long long left = n_x - state.column - 16 * f;
        state.inside[f] = int(left < 4 ? left : 4);
    }
    State first;
    state.load(lane / 4, updates, first);
    const SAMPLE* at = X + state.column;
    starts_next += lane / 4;
    unsigned x[Z_CHUNK / 16][2][2];
#pragma unroll
    for (int p = 0; p < Z_CHUNK / 16; p++)
        if (16 * p < place.following) load_pair(at, starts_next + 16 * p, state.inside, x[p]);
    update(state, numbers, updates, first, c);
    product(at, starts_next, state.inside, place.following, first_unit, c, sums, x, part + (long long)tile * batch * UNITS);
}
