// normalize: raw uint8 images through one 256-entry table per channel, to any layout and dtype.
//
//   output[n, c, p] = table[c][images[row(n), c, p]],  row(n) = rows ? rows[n] : n,  p = h * W + w
//
// The table holds what torchvision itself makes of each level, so no arithmetic happens here and
// the bits are torchvision's.
//
// images    uint8, [rows, H*W, C] interleaved (NHWC) or [rows, C, H*W] planar (NCHW); any address
// rows      int64 [count] or null; the caller has checked the range
// outputs   up to 64 allocations; image n is image n % images_per_output of allocation
//           n / images_per_output; [.., C, H*W] planar (contiguous_format) or [.., H*W, C]
//           interleaved (channels_last); aligned to sizeof(T), no more is assumed
// table     T [C, 256]
// T         unsigned int, unsigned short or unsigned char: the results' bits, whatever they mean
// C         1, 3 or 4; 0 takes `channels` at run time. With C == 1 the layouts coincide.
//
// Tiles     A tile is up to `tile_pixels` consecutive pixels of one image, never of two; of one
//           plane when source and output are both planar. Blocks stride over the tiles, so that the
//           table is copied to shared memory once per block and `rows`, addresses and the one
//           division are uniform in a block. Offsets between tiles are 64-bit, in a tile 32-bit.
// Threads   One thread makes 16 bytes of a plane or row of the output (4, 8 or 16 elements), its
//           neighbour the next 16 bytes; several loads are in flight before the first look-up.
//             same layout            copy_run: source and output are one run each
//             interleaved -> planar  deinterleave: 16 bytes of each of the C planes per thread
//             planar -> interleaved  the raw bytes are interleaved in shared memory, then copy_run
//             C == 0, not planar -> planar: one element per thread
// Loads     As many bytes as 16 bytes of output need (C times that in deinterleave), in accesses of
//           4, 8 or 16 bytes; single bytes where the source address does not allow it.
// Stores    16 bytes. Before the output's first 16-byte boundary and after its last one, elements
//           are stored one by one; so is all of a deinterleaved tile whose planes are not aligned.
// Traffic   1 + sizeof(T) bytes per element; the table stays in shared memory (in the L1 cache when
//           C is 0 and it exceeds 16 KB).
//
// Launched by gpupipe/cuda_ops.py `normalize`: 256 threads, as many blocks as the device holds at a
// time (at most one per tile), no dynamic shared memory, tile_pixels <= max_tile_pixels<T>.
#include "common.cuh"

constexpr int UNROLL = 4;                   // vectors, and their loads, in flight per thread
constexpr int ANY_TABLE_BYTES = 16 * 1024;  // largest table that C == 0 keeps in shared memory

// Two vectors per thread and plane; also bounds the staged bytes.
template <typename T>
constexpr int max_tile_pixels = 2 * THREADS * Vector<T>::SIZE;

// Maps `vectors` vectors from an address aligned as ALIGNED says to an aligned output.
// Element i takes channel (phase + i) % C; the table holds channels 0..C-1, 0..C-2.
template <typename T, int C, bool ALIGNED>
__device__ __forceinline__ void copy_vectors(const u8* __restrict__ source, T* __restrict__ output,
                                             int vectors, int phase, const T* table) {
    constexpr int V = Vector<T>::SIZE;
    for (int first = threadIdx.x; first < vectors; first += UNROLL * blockDim.x) {
        Bytes<V> raw[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int at = first + u * blockDim.x;
            raw[u] = at < vectors ? load_bytes<V, ALIGNED>(source + at * V) : Bytes<V>{};
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int at = first + u * blockDim.x;
            if (at >= vectors) break;
            const T* lookup = table + (phase + at * V) % C * LEVELS;
            Vector<T> results;
#pragma unroll
            for (int k = 0; k < V; ++k) results.set(k, lookup[k % C * LEVELS + raw[u][k]]);
            results.store(output + at * V);
        }
    }
}

// Maps a run of `length` elements whose first has channel 0.
template <typename T, int C>
__device__ __forceinline__ void copy_run(const u8* source, T* output, int length, const T* table) {
    constexpr int V = Vector<T>::SIZE;
    const int past = reinterpret_cast<size_t>(output) % VECTOR_BYTES / sizeof(T);
    const int head = min((V - past) % V, length);
    const int vectors = (length - head) / V;
    const int tail = head + vectors * V;
    for (int i = threadIdx.x; i < head; i += blockDim.x) {
        output[i] = table[i % C * LEVELS + source[i]];
    }
    for (int i = tail + threadIdx.x; i < length; i += blockDim.x) {
        output[i] = table[i % C * LEVELS + source[i]];
    }
    if (is_aligned(source + head, V)) {
        copy_vectors<T, C, true>(source + head, output + head, vectors, head % C, table);
    } else {
        copy_vectors<T, C, false>(source + head, output + head, vectors, head % C, table);
    }
}

// Maps pixels [begin, end) element by element, for any strides: of the source, of the output.
template <typename T, int C>
__device__ __forceinline__ void copy_pixels(const u8* __restrict__ source, i64 source_pixel,
                                            i64 source_channel, T* __restrict__ output,
                                            i64 output_pixel, i64 output_channel, int begin,
                                            int end, int channels, const T* table) {
    for (int p = begin + threadIdx.x; p < end; p += blockDim.x) {
#pragma unroll(C ? C : 1)
        for (int c = 0; c < (C ? C : channels); ++c) {
            output[p * output_pixel + c * output_channel] =
                table[c * LEVELS + source[p * source_pixel + c * source_channel]];
        }
    }
}

// Interleaved pixels into C planes that all start on 16-byte boundaries.
template <typename T, int C>
__device__ __forceinline__ void deinterleave(const u8* __restrict__ source, T* __restrict__ output,
                                             i64 plane, int groups, const T* table) {
    constexpr int V = Vector<T>::SIZE;
    constexpr int GROUPS = C * V > 32 ? 1 : 2;  // in flight per thread: C * V bytes each
    for (int first = threadIdx.x; first < groups; first += GROUPS * blockDim.x) {
        Bytes<C * V> raw[GROUPS];
#pragma unroll
        for (int u = 0; u < GROUPS; ++u) {
            const int at = first + u * blockDim.x;
            raw[u] = at < groups ? load_bytes<C * V, true>(source + at * C * V) : Bytes<C * V>{};
        }
#pragma unroll
        for (int u = 0; u < GROUPS; ++u) {
            const int at = first + u * blockDim.x;
            if (at >= groups) break;
#pragma unroll
            for (int c = 0; c < C; ++c) {
                Vector<T> results;
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    results.set(k, table[c * LEVELS + raw[u][k * C + c]]);
                }
                results.store(output + c * plane + at * V);
            }
        }
    }
}

// Copies C planes of `length` raw bytes into shared memory, interleaved, 4 pixels per thread.
template <int C>
__device__ __forceinline__ void interleave(const u8* __restrict__ source, i64 plane, u8* staged,
                                           int length) {
    for (int p = 4 * threadIdx.x; p < length; p += 4 * blockDim.x) {
        const int pixels = min(4, length - p);
        Bytes<4> raw[C];
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const u8* from = source + c * plane + p;
            if (pixels == 4 && is_aligned(from, 4)) {
                raw[c] = load_bytes<4, true>(from);
            } else {
                raw[c] = Bytes<4>{};
                for (int k = 0; k < pixels; ++k) {
                    raw[c].word[0] |= static_cast<unsigned int>(from[k]) << (8 * k);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k >= pixels) break;
#pragma unroll
            for (int c = 0; c < C; ++c) staged[(p + k) * C + c] = raw[c][k];
        }
    }
}

template <typename T, int C, bool SOURCE_PLANAR, bool OUTPUT_PLANAR>
__global__ void __launch_bounds__(THREADS)
    normalize(const u8* __restrict__ images, const i64* __restrict__ rows,
              const __grid_constant__ Outputs outputs, i64 images_per_output, i64 count, i64 pixels,
              i64 channels, i64 tile_pixels, const T* __restrict__ table) {
    constexpr int V = Vector<T>::SIZE;
    constexpr bool PLANES = SOURCE_PLANAR && OUTPUT_PLANAR;      // a tile lies in one plane
    constexpr bool STAGED = C > 1 && SOURCE_PLANAR && !OUTPUT_PLANAR;
    constexpr bool CYCLIC = C > 1 && !OUTPUT_PLANAR;             // copy_run over C channels
    constexpr int TABLE = C ? (CYCLIC ? 2 * C - 1 : C) * LEVELS : ANY_TABLE_BYTES / sizeof(T);
    constexpr int STAGED_BYTES = STAGED ? max_tile_pixels<T> * C + V : 1;

    alignas(VECTOR_BYTES) __shared__ T shared_table[TABLE];
    alignas(VECTOR_BYTES) __shared__ u8 staged_bytes[STAGED_BYTES];

    if constexpr (C != 0) channels = C;
    const int entries = static_cast<int>(channels) * LEVELS;
    const bool fits = C != 0 || entries <= TABLE;
    if (fits) {
        const int filled = C ? TABLE : entries;
        for (int i = threadIdx.x; i < filled; i += blockDim.x) shared_table[i] = table[i % entries];
    }
    __syncthreads();
    const T* lookup = fits ? shared_table : table;

    const i64 planes = PLANES ? channels : 1;
    const i64 tiles_per_plane = ceil_div(pixels, tile_pixels);
    const i64 tiles = count * planes * tiles_per_plane;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 item = tile / tiles_per_plane;
        const i64 begin = (tile - item * tiles_per_plane) * tile_pixels;
        const int length = static_cast<int>(min(tile_pixels, pixels - begin));
        const i64 n = PLANES ? item / planes : item;
        const int channel = PLANES ? static_cast<int>(item - n * planes) : 0;

        const i64 allocation = n / images_per_output;
        const i64 slot = n - allocation * images_per_output;
        const i64 source_start = (rows ? rows[n] : n) * channels * pixels;
        const u8* source = images + source_start + (SOURCE_PLANAR ? begin : begin * channels);
        T* output = static_cast<T*>(outputs.pointer[allocation]) + slot * channels * pixels +
                    (OUTPUT_PLANAR ? begin : begin * channels);

        if constexpr (PLANES) {
            copy_run<T, 1>(source + channel * pixels, output + channel * pixels, length,
                           lookup + channel * LEVELS);
        } else if constexpr (C == 0 && !SOURCE_PLANAR && !OUTPUT_PLANAR) {
            const int period = static_cast<int>(channels);
            for (int i = threadIdx.x; i < length * period; i += blockDim.x) {
                output[i] = lookup[i % period * LEVELS + source[i]];
            }
        } else if constexpr (C == 0) {
            copy_pixels<T, 0>(source, SOURCE_PLANAR ? 1 : channels, SOURCE_PLANAR ? pixels : 1,
                              output, OUTPUT_PLANAR ? 1 : channels, OUTPUT_PLANAR ? pixels : 1, 0,
                              length, static_cast<int>(channels), lookup);
        } else if constexpr (OUTPUT_PLANAR) {
            const bool aligned = is_aligned(source, load_width(C * V)) &&
                                 is_aligned(output, VECTOR_BYTES) &&
                                 pixels * sizeof(T) % VECTOR_BYTES == 0;
            const int groups = aligned ? length / V : 0;
            deinterleave<T, C>(source, output, pixels, groups, lookup);
            copy_pixels<T, C>(source, C, 1, output, 1, pixels, groups * V, length, C, lookup);
        } else if constexpr (SOURCE_PLANAR) {
            // copy_run starts its vectors `head` elements in; those bytes shall be aligned too.
            const int past = reinterpret_cast<size_t>(output) % VECTOR_BYTES / sizeof(T);
            u8* staged = staged_bytes + past;
            interleave<C>(source, pixels, staged, length);
            __syncthreads();
            copy_run<T, C>(staged, output, length * C, lookup);
            __syncthreads();  // before the next tile overwrites what slower threads still read
        } else {
            copy_run<T, C>(source, output, length * C, lookup);
        }
    }
}
