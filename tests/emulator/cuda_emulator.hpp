// CUDA on CPU threads: enough of the language to run kernels/*.cu unchanged under sanitizers.
//
// One std::thread is one CUDA thread of a block, a std::barrier is __syncthreads, static storage is
// shared memory. Blocks run one after another, so nothing here can show a race between blocks.
#pragma once

#include <barrier>
#include <cstddef>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static
#define __syncthreads() emulator::barrier->arrive_and_wait()

struct dim3 {
    unsigned int x = 1;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};

inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
    return {x, y, z, w};
}
inline void __stcg(uint4* address, uint4 value) { *address = value; }
inline int min(int a, int b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }

namespace emulator {
inline thread_local dim3 thread_index, block_index, block_size, grid_size;
inline std::barrier<>* barrier = nullptr;

// Runs blocks [first_block, last_block) of a grid of `blocks`, each of `threads` threads.
template <typename Kernel>
void launch(Kernel kernel, unsigned int blocks, unsigned int first_block, unsigned int last_block,
            unsigned int threads) {
    std::barrier<> all(threads);
    barrier = &all;
    std::vector<std::thread> workers;
    for (unsigned int t = 0; t < threads; ++t) {
        workers.emplace_back([=, &all] {
            thread_index.x = t;
            block_size.x = threads;
            grid_size.x = blocks;
            for (unsigned int b = first_block; b < last_block; ++b) {
                block_index.x = b;
                kernel();
                all.arrive_and_wait();  // shared memory is reused by the next block
            }
        });
    }
    for (std::thread& worker : workers) worker.join();
}
}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
