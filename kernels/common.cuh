// What every kernel shares: integer names, raw bytes in registers, 16-byte vectors of results.
//
// NVRTC compiles this file without any system header; g++ compiles it for the emulator. The #ifdef
// below is the only place where the two differ.
#pragma once

#ifdef GPUPIPE_EMULATOR
#include "cuda_emulator.hpp"
#endif

using u8 = unsigned char;
using i64 = long long;

constexpr int THREADS = 256;      // the most threads a block is launched with
constexpr int VECTOR_BYTES = 16;  // the widest access of one thread
constexpr int LEVELS = 256;       // values of a uint8

// Output allocations of one launch, passed by value: no device table that a later launch could
// overwrite while this one still reads it.
constexpr int MAX_OUTPUTS = 64;
struct Outputs {
    void* pointer[MAX_OUTPUTS];
};

__device__ __forceinline__ bool is_aligned(const void* address, int bytes) {
    return reinterpret_cast<size_t>(address) % bytes == 0;
}

__device__ __forceinline__ i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// The widest load, at most 16 bytes, that divides N bytes evenly.
constexpr int load_width(int n) { return n % 16 == 0 ? 16 : n % 8 == 0 ? 8 : 4; }

// N raw bytes in registers; N is a multiple of 4.
template <int N>
struct alignas(load_width(N)) Bytes {
    unsigned int word[N / 4];

    __device__ __forceinline__ unsigned int operator[](int k) const {
        return word[k / 4] >> (8 * (k % 4)) & 255u;
    }
};

// Loads N bytes: in accesses of load_width(N) where ALIGNED says that the address allows it, else
// one by one.
template <int N, bool ALIGNED>
__device__ __forceinline__ Bytes<N> load_bytes(const u8* source) {
    if constexpr (ALIGNED) {
        return *reinterpret_cast<const Bytes<N>*>(source);
    } else {
        Bytes<N> bytes{};
#pragma unroll
        for (int k = 0; k < N; ++k) {
            bytes.word[k / 4] |= static_cast<unsigned int>(source[k]) << (8 * (k % 4));
        }
        return bytes;
    }
}

// 16 bytes of results, built in registers and stored at a 16-byte boundary in one access. __stcg
// keeps it one: plain assignments were split into four in some instantiations. Nothing is lost by
// passing over the L1 cache, which does not keep written lines for other blocks.
template <typename T>
struct Vector {
    static constexpr int SIZE = VECTOR_BYTES / sizeof(T);
    unsigned int word[VECTOR_BYTES / 4] = {};

    __device__ __forceinline__ void set(int k, T bits) {
        const int byte = k * static_cast<int>(sizeof(T));
        word[byte / 4] |= static_cast<unsigned int>(bits) << (8 * (byte % 4));
    }

    __device__ __forceinline__ void store(T* output) const {
        __stcg(reinterpret_cast<uint4*>(output), make_uint4(word[0], word[1], word[2], word[3]));
    }
};
