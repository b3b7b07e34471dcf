// What CUDA C++ needs to be compiled by g++ and executed on a CPU (`machine.cpp` runs it): for tests alone, exact about
// indices, barriers and the order of sums, and slow. Two small headers are all, so that a source compiles in no time.
#pragma once

#define CUDA_ON_CPU 1

#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __constant__ static const
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

namespace cuda_on_cpu {

struct Index {
    unsigned x, y, z;
};

// Where the thread that runs is.
struct Here {
    Index thread, block, block_size, grid_size;
    int lane;
    unsigned char* shared;  // the block's dynamic shared memory
};
extern Here here;

// Goes on when all threads of the block wait here.
void wait_for_block(int line);

// Every lane of the mask shows some bytes and gets those of all, by lane, zeros for lanes outside the mask.
void exchange_bytes(const void* mine, void* all, unsigned size, unsigned mask, int line);

template <class T>
struct Lanes {
    T of[32];
    const T& operator[](int lane) const { return of[lane]; }
};

// The same for a value: what shuffles, votes and warp-wide products are made of.
template <class T>
Lanes<T> exchange(const T& value, unsigned mask = 0xFFFFFFFFu, int line = 0) {
    Lanes<T> all;
    exchange_bytes(&value, &all, sizeof(T), mask, line);
    return all;
}

inline unsigned ballot(bool vote, unsigned mask, int line) {
    const Lanes<char> votes = exchange(char(vote), mask, line);
    unsigned result = 0;
    for (int k = 0; k < 32; k++) result |= unsigned(votes[k] != 0) << k;
    return result;
}

// Calls a kernel with arguments that lie at these places.
template <auto kernel>
struct Call;

template <class... Arguments, void (*kernel)(Arguments...)>
struct Call<kernel> {
    template <std::size_t... I>
    static void with(void** arguments, std::index_sequence<I...>) {
        kernel(*reinterpret_cast<std::remove_const_t<Arguments>*>(arguments[I])...);
    }
    static void of(void** arguments) { with(arguments, std::index_sequence_for<Arguments...>()); }
};

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::here.thread)
#define blockIdx (cuda_on_cpu::here.block)
#define blockDim (cuda_on_cpu::here.block_size)
#define gridDim (cuda_on_cpu::here.grid_size)
#define __syncthreads() cuda_on_cpu::wait_for_block(__LINE__)
#define __syncwarp() (void)cuda_on_cpu::exchange(char(0), 0xFFFFFFFFu, __LINE__)
#define __shfl_sync(mask, value, source) cuda_on_cpu::exchange(value, mask, __LINE__)[(source) & 31]
#define __shfl_xor_sync(mask, value, bits) cuda_on_cpu::exchange(value, mask, __LINE__)[cuda_on_cpu::here.lane ^ (bits)]
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(vote, mask, __LINE__)
#define __any_sync(mask, vote) (cuda_on_cpu::ballot(vote, mask, __LINE__) != 0)

// CUDA's functions for either type, without the weight of <cmath>.
#define FLOAT_AND_DOUBLE(name)                                    \
    inline float name(float x) { return __builtin_##name##f(x); } \
    inline double name(double x) { return __builtin_##name(x); }
FLOAT_AND_DOUBLE(exp)
FLOAT_AND_DOUBLE(fabs)
FLOAT_AND_DOUBLE(log)
FLOAT_AND_DOUBLE(log1p)
FLOAT_AND_DOUBLE(sqrt)
FLOAT_AND_DOUBLE(tanh)
#undef FLOAT_AND_DOUBLE

inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }

// Four bytes out of the eight of x and y, chosen by the nibbles of `selector`.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int k = 0; k < 4; k++) result |= unsigned(both >> (8 * (selector >> 4 * k & 7)) & 0xFF) << 8 * k;
    return result;
}
