// Runs kernels/normalize.cu on the CPU: cases on stdin, results on stdout, both binary.
//
// A case is a Case (int64 fields), then the source bytes, the rows (if any) and the table. A result
// is the bytes of each output allocation. Every buffer is a heap block of its own that ends where
// the data end, so that AddressSanitizer sees one byte too many; the bytes in front of a shifted
// buffer are checked here. Outputs are filled with 0xA5 first.
//
// With a `probe`, the arrays are too large for memory: source and output are sparse mappings, and
// only the blocks that hold the probed tile run, of a grid with one block per tile. The source then
// has `payload` bytes at `probe_source`, the result is `payload_out` bytes at `probe_output`.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#define GPUPIPE_EMULATOR
#include "normalize.cu"

struct Case {
    i64 element_size, c, source_planar, output_planar;  // the instantiation
    i64 channels, count, pixels, stored, has_rows, allocations, images_per_output;
    i64 tile_pixels, threads, blocks, source_shift, output_shift;  // shifts in elements
    i64 probe, probe_block, source_bytes, output_bytes, probe_source, payload, probe_output,
        payload_out;
};

static void fail(const char* message) {
    std::fprintf(stderr, "emulator: %s\n", message);
    std::exit(2);
}

static void get(void* to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, stdin) != bytes) fail("truncated case");
}

static void put(const void* from, size_t bytes) {
    if (bytes && std::fwrite(from, 1, bytes, stdout) != bytes) fail("cannot write the result");
}

// A heap block of `bytes` after `shift` guarded bytes.
struct Buffer {
    std::unique_ptr<u8[]> memory;
    size_t shift;

    Buffer(size_t bytes, size_t shift_bytes) : memory(new u8[shift_bytes + bytes]), shift(shift_bytes) {
        std::memset(memory.get(), 0xA5, shift_bytes + bytes);
    }
    u8* data() const { return memory.get() + shift; }
    void check() const {
        for (size_t i = 0; i < shift; ++i) {
            if (memory[i] != 0xA5) fail("bytes in front of a buffer were overwritten");
        }
    }
};

static u8* sparse(i64 bytes) {
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) fail("cannot map sparse memory");
    return static_cast<u8*>(address);
}

template <typename T, int C, bool SOURCE_PLANAR, bool OUTPUT_PLANAR>
static void launch(const Case& k, const u8* images, const i64* rows, const Outputs& outputs,
                   const void* table) {
    const unsigned int first = k.probe ? k.probe_block : 0;
    const unsigned int last = k.probe ? k.probe_block + 1 : k.blocks;
    emulator::launch(
        [&] {
            normalize<T, C, SOURCE_PLANAR, OUTPUT_PLANAR>(
                images, rows, outputs, k.images_per_output, k.count, k.pixels, k.channels,
                k.tile_pixels, static_cast<const T*>(table));
        },
        k.blocks, first, last, k.threads);
}

template <typename T, int C>
static void pick_layout(const Case& k, const u8* images, const i64* rows, const Outputs& outputs,
                        const void* table) {
    if constexpr (C == 1) {
        launch<T, 1, true, true>(k, images, rows, outputs, table);
    } else if (k.source_planar && k.output_planar) {
        launch<T, C, true, true>(k, images, rows, outputs, table);
    } else if (k.source_planar) {
        launch<T, C, true, false>(k, images, rows, outputs, table);
    } else if (k.output_planar) {
        launch<T, C, false, true>(k, images, rows, outputs, table);
    } else {
        launch<T, C, false, false>(k, images, rows, outputs, table);
    }
}

template <typename T>
static void pick_channels(const Case& k, const u8* images, const i64* rows, const Outputs& outputs,
                          const void* table) {
    if (k.c == 3) return pick_layout<T, 3>(k, images, rows, outputs, table);
#ifndef ONLY_RGB_FLOAT  // the planted bugs need one instantiation and a short compilation
    if (k.c == 0) return pick_layout<T, 0>(k, images, rows, outputs, table);
    if (k.c == 1) return pick_layout<T, 1>(k, images, rows, outputs, table);
    if (k.c == 4) return pick_layout<T, 4>(k, images, rows, outputs, table);
#endif
    fail("no such instantiation");
}

static void pick(const Case& k, const u8* images, const i64* rows, const Outputs& outputs,
                 const void* table) {
    if (k.element_size == 4) return pick_channels<unsigned int>(k, images, rows, outputs, table);
#ifndef ONLY_RGB_FLOAT
    if (k.element_size == 2) return pick_channels<unsigned short>(k, images, rows, outputs, table);
    if (k.element_size == 1) return pick_channels<unsigned char>(k, images, rows, outputs, table);
#endif
    fail("no such instantiation");
}

static void run(const Case& k) {
    const size_t table_bytes = k.channels * LEVELS * k.element_size;
    std::unique_ptr<i64[]> rows(new i64[k.has_rows ? k.count : 0]);
    // operator new aligns to 16 bytes, as far as T needs.
    std::unique_ptr<u8[]> table(new u8[table_bytes]);
    Outputs outputs{};

    if (k.probe) {
        u8* source = sparse(k.source_bytes);
        u8* output = sparse(k.output_bytes);
        get(source + k.probe_source, k.payload);
        get(rows.get(), k.has_rows * k.count * sizeof(i64));
        get(table.get(), table_bytes);
        outputs.pointer[0] = output;
        pick(k, source, k.has_rows ? rows.get() : nullptr, outputs, table.get());
        put(output + k.probe_output, k.payload_out);
        munmap(source, k.source_bytes);
        munmap(output, k.output_bytes);
        return;
    }

    const size_t image = k.channels * k.pixels;
    Buffer source(k.stored * image, k.source_shift);
    get(source.data(), k.stored * image);
    get(rows.get(), k.has_rows * k.count * sizeof(i64));
    get(table.get(), table_bytes);
    std::vector<Buffer> results;
    std::vector<size_t> sizes;
    for (i64 i = 0; i < k.allocations; ++i) {
        const i64 images = min(k.images_per_output, k.count - i * k.images_per_output);
        sizes.push_back(images * image * k.element_size);
        results.emplace_back(sizes.back(), k.output_shift * k.element_size);
        outputs.pointer[i] = results.back().data();
    }
    pick(k, source.data(), k.has_rows ? rows.get() : nullptr, outputs, table.get());
    source.check();
    for (size_t i = 0; i < results.size(); ++i) {
        results[i].check();
        put(results[i].data(), sizes[i]);
    }
}

int main() {
    i64 cases = 0;
    get(&cases, sizeof cases);
    for (i64 i = 0; i < cases; ++i) {
        Case k;
        get(&k, sizeof k);
        run(k);
    }
    std::fprintf(stderr, "emulator: %lld cases\n", cases);
    return 0;
}
