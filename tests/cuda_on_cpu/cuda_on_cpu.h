// What CUDA C++ needs to be compiled by g++ and executed on a CPU: for tests alone, exact about indices, barriers and the
// order of sums, and slow. A block's threads are fibers that switch where they wait for one another; blocks run one after
// the other. Shared memory is poisoned before every block, so that what was never written shows as NaN.
#pragma once

#define CUDA_ON_CPU 1

#include <math.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __constant__ static const
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

// Where static shared memory begins and ends; the linker knows. Absent where a source has none.
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

#if !defined(__x86_64__)
#error "the fibers of the CUDA shim are written for x86-64"
#endif

// Keeps the registers that a call must not change, and goes on where another fiber stopped.
extern "C" void cuda_on_cpu_switch(void** leave, void* enter);
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace cuda_on_cpu {

struct Index {
    unsigned x, y, z;
};

enum class Wait { none, block, warp, ended };

struct Fiber {
    Index thread;
    int number;
    Wait wait;
    int line;       // of the barrier that it waits at
    unsigned mask;  // the lanes that it waits for
    void* stack_pointer;
    void* fake_stack;
};

constexpr size_t STACK = 64 * 1024;

struct Machine {
    Index grid, block, block_number;
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch
    Fiber* current = nullptr;
    void* scheduler = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    std::function<void()> body;
    std::unique_ptr<unsigned char[]> shared;
    std::vector<unsigned long long> posted;  // what lanes show one another, one place a thread
    std::vector<std::vector<char>> posted_bytes;
    std::string error;
};
inline Machine machine;

inline unsigned char* dynamic_shared() { return machine.shared.get(); }

inline void leave(bool ends = false) {
    Fiber* me = machine.current;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(ends ? nullptr : &me->fake_stack, machine.scheduler_bottom, machine.scheduler_size);
#endif
    cuda_on_cpu_switch(&me->stack_pointer, machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#endif
    (void)ends;
}

inline void wait(Wait kind, int line, unsigned mask) {
    machine.current->wait = kind;
    machine.current->line = line;
    machine.current->mask = mask;
    leave();
}

[[noreturn]] inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
    machine.body();
    machine.current->wait = Wait::ended;
    leave(true);
    abort();
}

inline void enter(Fiber& fiber) {
    machine.current = &fiber;
#ifdef __SANITIZE_ADDRESS__
    char* bottom = machine.stacks[fiber.number].get();
    __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, bottom, STACK);
#endif
    cuda_on_cpu_switch(&machine.scheduler, fiber.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
    machine.current = nullptr;
}

inline void start(Fiber& fiber) {
    char* top = machine.stacks[fiber.number].get() + STACK;
    top -= reinterpret_cast<size_t>(top) % 16;
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;  // where fiber_main would return to; with it the stack is as after a call
    *--at = reinterpret_cast<void*>(fiber_main);
    for (int k = 0; k < 6; k++) *--at = nullptr;
    fiber.stack_pointer = at;
    fiber.wait = Wait::none;
    fiber.fake_stack = nullptr;
}

// Lets go on whoever has nobody left to wait for; false where nobody can.
inline bool release() {
    auto& fibers = machine.fibers;
    bool any = false;
    int at_block = 0, ended = 0, line = 0;
    bool one_line = true;
    for (auto& f : fibers) {
        ended += f.wait == Wait::ended;
        if (f.wait == Wait::block) {
            one_line = one_line && (at_block == 0 || line == f.line);
            line = f.line;
            at_block++;
        }
    }
    if (at_block == int(fibers.size())) {
        if (!one_line) {
            machine.error = "threads of a block wait at different barriers, line " + std::to_string(line) + " and another";
            return false;
        }
        for (auto& f : fibers) f.wait = Wait::none;
        return true;
    }
    for (size_t first = 0; first < fibers.size(); first += 32) {
        const size_t lanes = std::min<size_t>(32, fibers.size() - first);
        for (size_t i = 0; i < lanes; i++) {
            Fiber& f = fibers[first + i];
            if (f.wait != Wait::warp) continue;
            bool all = true;
            for (size_t j = 0; j < lanes; j++) {
                Fiber& other = fibers[first + j];
                if (f.mask >> j & 1) all = all && other.wait == Wait::warp && other.mask == f.mask && other.line == f.line;
            }
            if (!all) continue;
            const unsigned mask = f.mask;
            for (size_t j = 0; j < lanes; j++)
                if (mask >> j & 1) fibers[first + j].wait = Wait::none;
            any = true;
        }
    }
    if (!any && ended < int(fibers.size())) {
        const int at_warp = int(fibers.size()) - at_block - ended;
        machine.error = std::to_string(at_block) + " threads wait at a barrier (line " + std::to_string(line) + "), " +
                        std::to_string(at_warp) + " for lanes of their warp, " + std::to_string(ended) + " have ended";
    }
    return any;
}

inline std::vector<int> ordered(int count, int order, std::mt19937& random) {
    std::vector<int> numbers(count);
    for (int k = 0; k < count; k++) numbers[k] = order == 1 ? count - 1 - k : k;
    if (order == 2) std::shuffle(numbers.begin(), numbers.end(), random);
    return numbers;
}

inline bool run_block(size_t shared_bytes, int thread_order, std::mt19937& random) {
    if (shared_bytes) memset(machine.shared.get(), 0xFF, shared_bytes);
    if (__start_cuda_shared) memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
    for (auto& fiber : machine.fibers) start(fiber);
    const std::vector<int> order = ordered(int(machine.fibers.size()), thread_order, random);
    for (;;) {
        for (int k : order)
            if (machine.fibers[k].wait == Wait::none) enter(machine.fibers[k]);
        if (std::all_of(machine.fibers.begin(), machine.fibers.end(), [](auto& f) { return f.wait == Wait::ended; }))
            return true;
        if (!release()) return false;
    }
}

template <class... Arguments>
std::function<void(void**)> invoker(void (*kernel)(Arguments...)) {
    return [kernel](void** arguments) {
        [&]<size_t... I>(std::index_sequence<I...>) {
            kernel(*reinterpret_cast<std::remove_const_t<Arguments>*>(arguments[I])...);
        }(std::index_sequence_for<Arguments...>());
    };
}

// Orders: 0 forward, 1 backward, 2 shuffled. Returns what went wrong, or null.
inline const char* launch(const std::function<void(void**)>& kernel, const unsigned* grid, const unsigned* block,
                          void** arguments, size_t shared_bytes, int block_order, int thread_order, unsigned seed) {
    machine.grid = {grid[0], grid[1], grid[2]};
    machine.block = {block[0], block[1], block[2]};
    machine.shared.reset(shared_bytes ? new unsigned char[shared_bytes] : nullptr);
    machine.body = [&] { kernel(arguments); };
    machine.fibers.clear();
    for (unsigned z = 0; z < block[2]; z++)
        for (unsigned y = 0; y < block[1]; y++)
            for (unsigned x = 0; x < block[0]; x++)
                machine.fibers.push_back({{x, y, z}, int(machine.fibers.size()), Wait::none, 0, 0, nullptr, nullptr});
    while (machine.stacks.size() < machine.fibers.size()) machine.stacks.emplace_back(new char[STACK]);
    machine.posted_bytes.assign(machine.fibers.size(), {});
    std::mt19937 random(seed);
    for (int number : ordered(int(grid[0] * grid[1] * grid[2]), block_order, random)) {
        const unsigned n = number;
        machine.block_number = {n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]};
        if (!run_block(shared_bytes, thread_order, random)) {
            machine.error = "block (" + std::to_string(machine.block_number.x) + ", " +
                            std::to_string(machine.block_number.y) + "): " + machine.error;
            return machine.error.c_str();
        }
    }
    return nullptr;
}

// Every lane of the mask shows a value and gets all of them, by lane: what shuffles, votes and warp-wide products are
// made of. Lanes outside the mask show nothing and leave zeros.
template <class T>
std::vector<T> exchange(const T& value, unsigned mask = 0xFFFFFFFFu, int line = 0) {
    Fiber* me = machine.current;
    const int first = me->number / 32 * 32, lanes = std::min(32, int(machine.fibers.size()) - first);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    auto& mine = machine.posted_bytes[me->number];
    mine.resize(sizeof(T));
    memcpy(mine.data(), &value, sizeof(T));
    wait(Wait::warp, line, mask);
    std::vector<T> all(32);
    for (int lane = 0; lane < lanes; lane++)
        if (mask >> lane & 1) memcpy(&all[lane], machine.posted_bytes[first + lane].data(), sizeof(T));
    wait(Wait::warp, line, mask);  // all have read
    return all;
}

inline int lane() { return machine.current->number % 32; }

template <class T>
T shuffle(T value, unsigned mask, int source, int line) {
    return exchange(value, mask, line)[source & 31];
}

inline unsigned ballot(bool vote, unsigned mask, int line) {
    const std::vector<char> votes = exchange(char(vote), mask, line);
    unsigned result = 0;
    for (int k = 0; k < 32; k++) result |= unsigned(votes[k] != 0) << k;
    return result;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::machine.current->thread)
#define blockIdx (cuda_on_cpu::machine.block_number)
#define blockDim (cuda_on_cpu::machine.block)
#define gridDim (cuda_on_cpu::machine.grid)
#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::Wait::block, __LINE__, 0)
#define __syncwarp() (void)cuda_on_cpu::exchange(char(0), 0xFFFFFFFFu, __LINE__)
#define __shfl_sync(mask, value, source) cuda_on_cpu::shuffle(value, mask, source, __LINE__)
#define __shfl_xor_sync(mask, value, bits) cuda_on_cpu::shuffle(value, mask, cuda_on_cpu::lane() ^ (bits), __LINE__)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(vote, mask, __LINE__)
#define __any_sync(mask, vote) (cuda_on_cpu::ballot(vote, mask, __LINE__) != 0)

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
