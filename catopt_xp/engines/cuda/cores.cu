// A tile's gradient, update and next product on the ordinary cores, for every type: a thread has COLUMNS features and, of
// the group of units, all.

#define WARPS (THREADS / 32)
#define COLUMNS (TILE / THREADS)
#define GROUP_BLOCKS ((GROUP + 7) / 8)  // units of a group, by eights: a lane makes one of each eight
#define GROUP_PADDED (8 * GROUP_BLOCKS)
#define TILE_STRIDE (TILE + 4)  // rows in shared memory start four banks apart
#define SUMMED 128  // samples that are summed in one go: over a large batch, the roundings would add up

// What `middle` leaves of d, (batch, UNITS), of this block's samples.
__device__ __forceinline__ void leave_d(const REAL* D, int first, int count, int batch, REAL* __restrict__ d) {
    for (int e = threadIdx.x; e < count * UNITS; e += blockDim.x) d[(long long)first * UNITS + e] = D[e] * SCALE;
}

// g += whole, if that has begun; then the sum goes there and g begins anew, or it stays in g.
__device__ __forceinline__ void add_up(REAL* whole, bool begun, bool goes_on, REAL (&g)[COLUMNS][GROUP]) {
#pragma unroll
    for (int u = 0; u < GROUP; u++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            REAL& sum = whole[u * TILE_STRIDE + threadIdx.x + c * THREADS];
            if (begun) g[c][u] += sum;
            if (goes_on) sum = g[c][u], g[c][u] = 0;
        }
}

// g += d x over the samples of this batch, for this thread's columns and all units of the group. What each SUMMED samples
// make is added up in `whole`, where the weights will be: a thread has its own columns there.
__device__ __forceinline__ void gradient(const SAMPLE* __restrict__ X, long long n_x, const int* __restrict__ rows, int n,
                                         const REAL* __restrict__ d, int first_unit, int first_column,
                                         REAL* d_shared, int* rows_shared, REAL* whole, REAL (&g)[COLUMNS][GROUP]) {
    for (int a = 0; a < n; a += CHUNK) {
        if (a % SUMMED == 0 && a > 0) add_up(whole, a > SUMMED, true, g);
        const int count = min(CHUNK, n - a);
        __syncthreads();  // the chunk before has been read
        for (int e = threadIdx.x; e < count * GROUP_PADDED; e += THREADS) {
            const int u = e % GROUP_PADDED, unit = first_unit + u;
            const bool inside = u < GROUP && unit < UNITS;
            d_shared[e] = inside ? d[(a + e / GROUP_PADDED) * UNITS + unit] : REAL(0);
        }
        if (threadIdx.x < count) rows_shared[threadIdx.x] = rows[a + threadIdx.x];
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const SAMPLE* sample = X + rows_shared[i] * n_x + first_column;
            REAL x[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                x[c] = first_column + c * THREADS < n_x ? REAL(sample[c * THREADS]) : REAL(0);
            const Four* fours = reinterpret_cast<const Four*>(d_shared + i * GROUP_PADDED);
#pragma unroll
            for (int u = 0; u < GROUP; u++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) g[c][u] += fours[u / 4].x[u % 4] * x[c];
        }
    }
    if (n > SUMMED) add_up(whole, true, false, g);
}

// The rule on this thread's columns; the fresh weights stay in shared memory, zeros where there are none.
__device__ __forceinline__ void update(REAL* __restrict__ W, REAL* __restrict__ moment0, REAL* __restrict__ moment1,
                                       long long n_x, const REAL* __restrict__ numbers, bool updates, int first_unit,
                                       int first_column, const REAL (&g)[COLUMNS][GROUP], REAL* W_shared) {
#pragma unroll
    for (int u = 0; u < GROUP; u++) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int column = first_column + c * THREADS;
            REAL p = 0;
            if (column < n_x && first_unit + u < UNITS) {
                const long long at = (first_unit + u) * n_x + column;
                p = W[at];
                if (updates) {
                    REAL first = MOMENTS > 0 ? moment0[at] : REAL(0), second = MOMENTS > 1 ? moment1[at] : REAL(0);
                    rule(p, g[c][u], first, second, numbers, true);
                    W[at] = p;
                    if (MOMENTS > 0) moment0[at] = first;
                    if (MOMENTS > 1) moment1[at] = second;
                }
            }
            W_shared[u * TILE_STRIDE + threadIdx.x + c * THREADS] = p;
        }
    }
#pragma unroll
    for (int u = GROUP; u < GROUP_PADDED; u++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) W_shared[u * TILE_STRIDE + threadIdx.x + c * THREADS] = 0;
}

// part[tile] = X W' for a chunk of the batch that follows: each warp takes a share of the tile's columns.
__device__ __forceinline__ void product(const SAMPLE* __restrict__ X, long long n_x, const int* __restrict__ rows,
                                        int count, int first_unit, int tile_start, const REAL* W_shared,
                                        REAL* x_shared, int* rows_shared, REAL* __restrict__ part) {
    __syncthreads();  // what was read here before has been read; the fresh weights are written
    if (threadIdx.x < CHUNK) rows_shared[threadIdx.x] = threadIdx.x < count ? rows[threadIdx.x] : 0;
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < CHUNK; i++) {
        const SAMPLE* sample = X + rows_shared[i] * n_x + tile_start;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int j = threadIdx.x + c * THREADS;
            const bool inside = i < count && tile_start + j < n_x;
            x_shared[i * TILE_STRIDE + j] = inside ? REAL(sample[j]) : REAL(0);
        }
    }
    __syncthreads();

    const int warp = threadIdx.x / 32, unit8 = threadIdx.x % 8, sample4 = threadIdx.x % 32 / 8;
    REAL sum[CHUNK / 4][GROUP_BLOCKS] = {};
    for (int j = warp * (TILE / WARPS); j < (warp + 1) * (TILE / WARPS); j += 4) {
        Four w[GROUP_BLOCKS];
#pragma unroll
        for (int u = 0; u < GROUP_BLOCKS; u++)
            w[u] = *reinterpret_cast<const Four*>(W_shared + (unit8 + 8 * u) * TILE_STRIDE + j);
#pragma unroll
        for (int s = 0; s < CHUNK / 4; s++) {
            const Four x = *reinterpret_cast<const Four*>(x_shared + (sample4 + 4 * s) * TILE_STRIDE + j);
#pragma unroll
            for (int u = 0; u < GROUP_BLOCKS; u++)
#pragma unroll
                for (int q = 0; q < 4; q++) sum[s][u] += x.x[q] * w[u].x[q];
        }
    }

    __syncthreads();  // all have read x: its place takes the warps' sums
#pragma unroll
    for (int s = 0; s < CHUNK / 4; s++)
#pragma unroll
        for (int u = 0; u < GROUP_BLOCKS; u++)
            x_shared[(warp * CHUNK + sample4 + 4 * s) * GROUP_PADDED + unit8 + 8 * u] = sum[s][u];
    __syncthreads();
    for (int e = threadIdx.x; e < CHUNK * GROUP_PADDED; e += THREADS) {
        const int i = e / GROUP_PADDED, u = e % GROUP_PADDED;
        REAL whole[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) whole[w] = x_shared[w * CHUNK * GROUP_PADDED + e];
#pragma unroll
        for (int step = 1; step < WARPS; step *= 2)
#pragma unroll
            for (int w = 0; w + step < WARPS; w += 2 * step) whole[w] += whole[w + step];
        if (i < count && u < GROUP && first_unit + u < UNITS) part[i * UNITS + first_unit + u] = whole[0];
    }
}

__device__ __forceinline__ void tile_step(const SAMPLE* __restrict__ X, long long n_x, int batch,
                                          const int* __restrict__ rows, Place place, const REAL* __restrict__ numbers,
                                          const REAL* __restrict__ d, REAL* __restrict__ W, REAL* __restrict__ moment0,
                                          REAL* __restrict__ moment1, REAL* __restrict__ part, unsigned char* memory,
                                          int tile, int first_unit) {
    REAL* W_shared = reinterpret_cast<REAL*>(memory);
    REAL* x_shared = W_shared + GROUP_PADDED * TILE_STRIDE;
    int* rows_shared = reinterpret_cast<int*>(x_shared + X_SHARED);
    const int tile_start = tile * TILE, first_column = tile_start + threadIdx.x;

    REAL g[COLUMNS][GROUP] = {};
    gradient(X, n_x, rows + place.now, place.n, d, first_unit, first_column, x_shared, rows_shared, W_shared, g);
    update(W, moment0, moment1, n_x, numbers, place.n > 0, first_unit, first_column, g, W_shared);
    for (int a = 0; a < place.following; a += CHUNK)
        product(X, n_x, rows + place.next + a, min(CHUNK, place.following - a), first_unit, tile_start, W_shared,
                x_shared, rows_shared, part + ((long long)tile * batch + a) * UNITS);
}
