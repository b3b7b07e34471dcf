// Runs kernels on a CPU: a block's threads are fibers that switch where they wait for one another; blocks run one after
// the other. Shared memory is poisoned before every block, so that what was never written shows as NaN.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

#ifdef SANITIZED  // the sanitizer wants to know which stack is in use
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the fibers of the CUDA shim are written for x86-64"
#endif

// Where static shared memory begins and ends; the linker knows. Absent where a source has none.
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

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

Here here;

namespace {

enum class Wait { none, block, warp, ended };

struct Fiber {
    Index thread;
    int number;
    Wait wait = Wait::none;
    int line = 0;       // of the barrier that it waits at
    unsigned mask = 0;  // the lanes that it waits for
    const void* shown = nullptr;
    void* stack_pointer = nullptr;
    void* fake_stack = nullptr;
};

constexpr size_t STACK = 64 * 1024;

using Kernel = void (*)(void**);

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch
    Fiber* current = nullptr;
    void* scheduler = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    Kernel kernel = nullptr;
    void** arguments = nullptr;
    std::string error;
} machine;

void leave(bool ends = false) {
    Fiber* me = machine.current;
#ifdef SANITIZED
    __sanitizer_start_switch_fiber(ends ? nullptr : &me->fake_stack, machine.scheduler_bottom, machine.scheduler_size);
#endif
    cuda_on_cpu_switch(&me->stack_pointer, machine.scheduler);
#ifdef SANITIZED
    __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#endif
    (void)ends;
}

void wait(Wait kind, int line, unsigned mask) {
    machine.current->wait = kind;
    machine.current->line = line;
    machine.current->mask = mask;
    leave();
}

[[noreturn]] void fiber_main() {
#ifdef SANITIZED
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
    machine.kernel(machine.arguments);
    machine.current->wait = Wait::ended;
    leave(true);
    abort();
}

void enter(Fiber& fiber) {
    machine.current = &fiber;
    here.thread = fiber.thread;
    here.lane = fiber.number % 32;
#ifdef SANITIZED
    char* bottom = machine.stacks[fiber.number].get();
    __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, bottom, STACK);
#endif
    cuda_on_cpu_switch(&machine.scheduler, fiber.stack_pointer);
#ifdef SANITIZED
    __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
    machine.current = nullptr;
}

void start(Fiber& fiber) {
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

// Lets a block go on where all of its threads wait at one barrier; false where that is not so.
bool release_block() {
    const auto& first = machine.fibers.front();
    for (auto& f : machine.fibers) {
        if (f.wait != Wait::block) return false;
        if (f.line != first.line) {
            machine.error = "threads of a block wait at different barriers, line " + std::to_string(first.line) +
                            " and line " + std::to_string(f.line);
            return false;
        }
    }
    for (auto& f : machine.fibers) f.wait = Wait::none;
    return true;
}

// Lets go on the lanes of a warp whose whole mask has come to the same place; false where there are none.
bool release_lanes(Fiber* warp, int lanes) {
    bool any = false;
    for (int i = 0; i < lanes; i++) {
        const unsigned mask = warp[i].mask;
        if (warp[i].wait != Wait::warp) continue;
        bool all = true;
        for (int j = 0; j < lanes; j++) {
            const Fiber& other = warp[j];
            const bool here = other.wait == Wait::warp && other.mask == mask && other.line == warp[i].line;
            if (mask >> j & 1) all = all && here;
        }
        if (!all) continue;
        for (int j = 0; j < lanes; j++)
            if (mask >> j & 1) warp[j].wait = Wait::none;
        any = true;
    }
    return any;
}

// Why nobody can go on.
std::string deadlock() {
    int at_block = 0, ended = 0, line = 0;
    for (auto& f : machine.fibers) {
        ended += f.wait == Wait::ended;
        at_block += f.wait == Wait::block;
        if (f.wait == Wait::block) line = f.line;
    }
    const int at_warp = int(machine.fibers.size()) - at_block - ended;
    return std::to_string(at_block) + " threads wait at a barrier (line " + std::to_string(line) + "), " +
           std::to_string(at_warp) + " for lanes of their warp, " + std::to_string(ended) + " have ended";
}

// Orders: 0 forward, 1 backward, 2 shuffled.
std::vector<int> ordered(int count, int order, std::mt19937& random) {
    std::vector<int> numbers(count);
    for (int k = 0; k < count; k++) numbers[k] = order == 1 ? count - 1 - k : k;
    if (order == 2) std::shuffle(numbers.begin(), numbers.end(), random);
    return numbers;
}

// Each warp runs as far ahead of the others as barriers let it: that is where a missing one shows.
bool run_block(size_t shared_bytes, int thread_order, std::mt19937& random) {
    if (shared_bytes) memset(here.shared, 0xFF, shared_bytes);
    if (__start_cuda_shared) memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
    auto& fibers = machine.fibers;
    for (auto& fiber : fibers) start(fiber);
    machine.error.clear();
    const int threads = int(fibers.size());
    for (;;) {
        for (int warp : ordered((threads + 31) / 32, thread_order, random)) {
            const int lanes = std::min(32, threads - 32 * warp);
            const std::vector<int> order = ordered(lanes, thread_order, random);
            do
                for (int lane : order)
                    if (fibers[32 * warp + lane].wait == Wait::none) enter(fibers[32 * warp + lane]);
            while (release_lanes(&fibers[32 * warp], lanes));
        }
        if (std::all_of(fibers.begin(), fibers.end(), [](auto& f) { return f.wait == Wait::ended; })) return true;
        if (!release_block()) {
            if (machine.error.empty()) machine.error = deadlock();
            return false;
        }
    }
}

}  // namespace

void wait_for_block(int line) { wait(Wait::block, line, 0); }

void exchange_bytes(const void* mine, void* all, unsigned size, unsigned mask, int line) {
    Fiber* me = machine.current;
    const int first = me->number / 32 * 32, lanes = std::min(32, int(machine.fibers.size()) - first);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    me->shown = mine;
    wait(Wait::warp, line, mask);
    memset(all, 0, 32 * size);
    for (int lane = 0; lane < lanes; lane++)
        if (mask >> lane & 1) memcpy(static_cast<char*>(all) + lane * size, machine.fibers[first + lane].shown, size);
    wait(Wait::warp, line, mask);  // all have read
}

}  // namespace cuda_on_cpu

// Runs a kernel to its end. Returns what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_launch(
    cuda_on_cpu::Kernel kernel, const unsigned* grid, const unsigned* block, void** arguments, size_t shared_bytes,
    int block_order, int thread_order, unsigned seed) {
    using namespace cuda_on_cpu;
    // Of exactly this size, so that a sanitizer sees an index that is one too large.
    const std::unique_ptr<unsigned char[]> shared(shared_bytes ? new unsigned char[shared_bytes] : nullptr);
    here.shared = shared.get();
    here.grid_size = {grid[0], grid[1], grid[2]};
    here.block_size = {block[0], block[1], block[2]};
    machine.kernel = kernel;
    machine.arguments = arguments;
    machine.fibers.clear();
    for (unsigned z = 0; z < block[2]; z++)
        for (unsigned y = 0; y < block[1]; y++)
            for (unsigned x = 0; x < block[0]; x++) {
                Fiber fiber;
                fiber.thread = {x, y, z};
                fiber.number = int(machine.fibers.size());
                machine.fibers.push_back(fiber);
            }
    while (machine.stacks.size() < machine.fibers.size()) machine.stacks.emplace_back(new char[STACK]);
    std::mt19937 random(seed);
    for (int number : ordered(int(grid[0] * grid[1] * grid[2]), block_order, random)) {
        const unsigned n = number;
        here.block = {n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]};
        if (!run_block(shared_bytes, thread_order, random)) {
            machine.error =
                "block (" + std::to_string(here.block.x) + ", " + std::to_string(here.block.y) + "): " + machine.error;
            return machine.error.c_str();
        }
    }
    return nullptr;
}
