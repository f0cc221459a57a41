// Group norm over a clip's frames, with SiLU: x is read twice and written once.
//
// A group of a clip is large and groups are few, so many blocks share one: each leaves count, mean
// and the sum of centred squares of its part, and these merge without losing digits. Frames whose
// positions lie side by side merge them at the start of the second pass (two launches); frames
// whose channels do (channels_last) give parts for each channel, which a small kernel merges.
#pragma once

#include <cstdint>

#include "kernels/common/divisor.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/common/moments.cuh"
#include "kernels/common/numbers.cuh"

namespace tvk {

struct ClipGroupNorm {
    const void* x;       // [batches, frames, channels, height, width]
    int64_t stride[5];   // of x, in elements
    const void* weight;  // [channels], as bias
    const void* bias;
    int64_t weight_stride, bias_stride;
    void* out;  // contiguous
    int batches, frames, channels, height, width, groups;
    float eps;
    bool silu;
    float4* partial;     // [clip_group_norm_partials(...)]: count, mean, squares
    float2* statistics;  // [batches * groups]: mean, 1 / sqrt(var + eps); for channels_last only
};

namespace norm {

constexpr int THREADS = 256;
constexpr int UNROLL = 4;  // runs of a thread whose reads are under way at once
constexpr int WIDTH = 8;   // elements of a run
constexpr int TILE = 64;   // channels and positions of a block that transposes

// What the kernels take: the arguments, and the divisors and counts that follow from them.
struct Shape {
    ClipGroupNorm a;
    int size;             // channels of a group
    int positions;        // height * width
    int parts, per_part;  // blocks that share a group (a clip), runs (rows) of each
    int runs;             // runs of a group
    int columns, lanes;   // channels_last: runs of a row in a block, rows at once
    int slabs;            // channels_last: blocks that share a row
    Divisor by_plane, by_size, by_width, by_positions;
};

__device__ inline float affine(float x, float mean, float scale, float shift, bool silu) {
    const float y = (x - mean) * scale + shift;
    return silu ? __fdividef(y, 1.0f + __expf(-y)) : y;
}

template <class T>
__device__ inline float parameter(const void* values, int64_t stride, int channel) {
    return to_float(static_cast<const T*>(values)[channel * stride]);
}

// Where run i of a group begins: its channel in the group, its plane and its place there.
struct Place {
    int channel;
    int64_t read, write;
};

template <int N>
__device__ inline Place place_of(const Shape& s, int batch, int group, uint32_t run) {
    uint32_t channel = s.by_plane.split(run);  // leaves the run within its plane
    const uint32_t frame = s.by_size.split(channel);
    const int64_t plane = static_cast<int64_t>(batch) * s.a.frames + frame;
    const int of_all = group * s.size + channel;
    int64_t read = batch * s.a.stride[0] + frame * s.a.stride[1] + of_all * s.a.stride[2];
    const int64_t write = (plane * s.a.channels + of_all) * s.positions + run * N;
    if (N > 1) {
        read += run * N;
    } else {
        uint32_t column = run;
        const uint32_t row = s.by_width.split(column);
        read += row * s.a.stride[3] + column * s.a.stride[4];
    }
    return {of_all, read, write};
}

// Where the part that begins here ends. Runs are counted without a sign: in a group of nearly 2^31
// the end before it is cut, and the last turn of UNROLL, exceed the signed numbers.
__device__ inline uint32_t end_of(const Shape& s, uint32_t begin) {
    return min(begin + s.per_part, static_cast<uint32_t>(s.runs));
}

// One part of a group, of any strides; with N > 1 positions lie side by side.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) partial_kernel(const __grid_constant__ Shape s) {
    const int of_batch = blockIdx.x / s.parts, part = blockIdx.x % s.parts;
    const int batch = of_batch / s.a.groups, group = of_batch % s.a.groups;
    const uint32_t begin = part * s.per_part, end = end_of(s, begin);
    const T* x = static_cast<const T*>(s.a.x);
    Moments found = {};
    for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS * UNROLL) {
        float value[UNROLL][N];
        int count = 0;
        float total = 0;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const uint32_t run = i + u * THREADS;
            if (run < end) {
                read_run(x + place_of<N>(s, batch, group, run).read, value[u]);
                count += N;
            } else {
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    value[u][j] = 0;
                }
            }
#pragma unroll
            for (int j = 0; j < N; ++j) {
                total += value[u][j];
            }
        }
        Moments next = {static_cast<float>(count), total / count, 0};
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (u * N < count) {
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const float away = value[u][j] - next.mean;
                    next.squares += away * away;
                }
            }
        }
        found = merge(found, next);
    }
    TVK_SHARED(BlockMoments<THREADS>, scratch);
    found = merge_block(found, scratch);
    if (threadIdx.x == 0) {
        s.a.partial[blockIdx.x] = make_float4(found.count, found.mean, found.squares, 0);
    }
}

// Statistics of a group from its parts: mean and 1 / sqrt(var + eps).
__device__ inline float2 finish(const float4* parts, int count, float eps,
                                BlockMoments<THREADS>& scratch) {
    Moments found = {};
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float4 part = parts[i];
        found = merge(found, {part.x, part.y, part.z});
    }
    found = merge_block(found, scratch);
    return make_float2(found.mean, 1.0f / sqrtf(found.squares / found.count + eps));
}

// The second pass over one part of a group, last part first: the first pass left it in cache.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) normalise_kernel(const __grid_constant__ Shape s) {
    const int block = gridDim.x - 1 - blockIdx.x;
    const int of_batch = block / s.parts, part = block % s.parts;
    const int batch = of_batch / s.a.groups, group = of_batch % s.a.groups;
    const uint32_t begin = part * s.per_part, end = end_of(s, begin);
    TVK_SHARED(BlockMoments<THREADS>, scratch);
    const float4* parts = s.a.partial + static_cast<int64_t>(of_batch) * s.parts;
    const float2 known = finish(parts, s.parts, s.a.eps, scratch);
    const T* x = static_cast<const T*>(s.a.x);
    T* out = static_cast<T*>(s.a.out);
    for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) {
        const Place place = place_of<N>(s, batch, group, i);
        float value[N];
        read_run(x + place.read, value);
        const float scale = known.y * parameter<T>(s.a.weight, s.a.weight_stride, place.channel);
        const float shift = parameter<T>(s.a.bias, s.a.bias_stride, place.channel);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            value[j] = affine(value[j], known.x, scale, shift, s.a.silu);
        }
        write_run(value, out + place.write);
    }
}

// Address of a row of channels: row = frame * positions + position.
__device__ inline int64_t row_at(const Shape& s, int batch, uint32_t row) {
    const uint32_t frame = s.by_positions.split(row);
    const uint32_t down = s.by_width.split(row);
    return batch * s.a.stride[0] + frame * s.a.stride[1] + down * s.a.stride[3] +
           row * s.a.stride[4];
}

template <int N>
struct ChannelMoments {
    float count[THREADS];
    float mean[THREADS * N], squares[THREADS * N];
};

// channels_last: a thread keeps N neighbouring channels and takes every lanes-th row of a part.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    partial_channels_kernel(const __grid_constant__ Shape s) {
    const int slab = blockIdx.x % s.slabs;
    const int batch = blockIdx.x / s.slabs / s.parts, part = blockIdx.x / s.slabs % s.parts;
    const int column = threadIdx.x % s.columns, lane = threadIdx.x / s.columns;
    const int channel = (slab * s.columns + column) * N;
    const int begin = part * s.per_part;
    const int end = min(begin + s.per_part, s.a.frames * s.positions);
    const bool works = lane < s.lanes && channel < s.a.channels;
    const T* x = static_cast<const T*>(s.a.x) + channel;
    float count = 0, mean[N] = {}, squares[N] = {};
    for (int row = begin + lane; works && row < end; row += s.lanes * UNROLL) {
        float value[UNROLL][N];
        int rows = 0;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (row + u * s.lanes < end) {
                read_run(x + row_at(s, batch, row + u * s.lanes), value[u]);
                ++rows;
            } else {
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    value[u][j] = 0;
                }
            }
        }
        const float inverse = 1.0f / rows;
        const float share = rows / (count + rows);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float total = 0, centred = 0;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                total += value[u][j];
            }
            const float middle = total * inverse;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const float away = u < rows ? value[u][j] - middle : 0;
                centred += away * away;
            }
            const float away = middle - mean[j];
            mean[j] += away * share;
            squares[j] += centred + away * away * count * share;
        }
        count += rows;
    }
    TVK_SHARED(ChannelMoments<N>, scratch);
    scratch.count[threadIdx.x] = count;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        scratch.mean[threadIdx.x * N + j] = mean[j];
        scratch.squares[threadIdx.x * N + j] = squares[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < s.columns * N; i += THREADS) {
        const int c = slab * s.columns * N + i;
        if (c >= s.a.channels) {
            break;
        }
        Moments found = {};
        for (int y = 0; y < s.lanes; ++y) {
            const int from = y * s.columns + i / N;
            found = merge(found, {scratch.count[from], scratch.mean[from * N + i % N],
                                  scratch.squares[from * N + i % N]});
        }
        const int64_t to = (static_cast<int64_t>(batch) * s.a.channels + c) * s.parts + part;
        s.a.partial[to] = make_float4(found.count, found.mean, found.squares, 0);
    }
}

static __global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ Shape s) {
    TVK_SHARED(BlockMoments<THREADS>, scratch);
    const int count = s.size * s.parts;
    const float4* parts = s.a.partial + static_cast<int64_t>(blockIdx.x) * count;
    const float2 known = finish(parts, count, s.a.eps, scratch);
    if (threadIdx.x == 0) {
        s.a.statistics[blockIdx.x] = known;
    }
}

struct Tile {
    float at[TILE][TILE + 1];  // [channel][position]; one more, so that columns miss no bank
};

// channels_last: a tile is read along channels and written along positions.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    normalise_channels_kernel(const __grid_constant__ Shape s) {
    TVK_SHARED(Tile, tile);
    constexpr int ACROSS = TILE / N;
    const int blocks_c = (s.a.channels + TILE - 1) / TILE;
    const int blocks_p = (s.positions + TILE - 1) / TILE;
    int block = gridDim.x - 1 - blockIdx.x;  // last first: the first pass left it in cache
    const int first_c = block % blocks_c * TILE;
    block /= blocks_c;
    const int first_p = block % blocks_p * TILE;
    const int image = block / blocks_p, batch = image / s.a.frames, frame = image % s.a.frames;
    const T* x = static_cast<const T*>(s.a.x);

    const int channel = first_c + threadIdx.x % ACROSS * N;
    float mean[N], scale[N], shift[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const int c = min(channel + j, s.a.channels - 1);
        const float2 known = s.a.statistics[batch * s.a.groups + c / s.size];
        mean[j] = known.x;
        scale[j] = known.y * parameter<T>(s.a.weight, s.a.weight_stride, c);
        shift[j] = parameter<T>(s.a.bias, s.a.bias_stride, c);
    }
    const int last_p = min(first_p + TILE, s.positions);
    for (int p = first_p + threadIdx.x / ACROSS; p < last_p; p += THREADS / ACROSS) {
        if (channel < s.a.channels) {
            float value[N];
            read_run(x + row_at(s, batch, frame * s.positions + p) + channel, value);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                tile.at[channel - first_c + j][p - first_p] =
                    affine(value[j], mean[j], scale[j], shift[j], s.a.silu);
            }
        }
    }
    __syncthreads();
    T* out = static_cast<T*>(s.a.out) +
             (static_cast<int64_t>(image) * s.a.channels + first_c) * s.positions + first_p;
    const int rows = min(TILE, s.a.channels - first_c), width = last_p - first_p;
    const bool runs = s.positions % WIDTH == 0;  // then every row begins on 16 bytes
    const int step = runs ? WIDTH : 1;
    for (int i = threadIdx.x; i < rows * (TILE / step); i += THREADS) {
        const int c = i / (TILE / step), p = i % (TILE / step) * step;
        if (p >= width) {
            continue;
        }
        T* to = out + static_cast<int64_t>(c) * s.positions + p;
        if (runs) {
            float value[WIDTH];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                value[j] = tile.at[c][p + j];
            }
            write_run(value, to);
        } else {
            from_float(tile.at[c][p], *to);
        }
    }
}

inline bool channels_last(const ClipGroupNorm& a) { return a.stride[2] == 1 && a.channels > 1; }

// Whether WIDTH neighbours can be read at once: along the channels of channels_last frames,
// along the positions of others.
inline bool in_runs(const ClipGroupNorm& a, int element_size) {
    const int sizes[] = {a.batches, a.frames, a.channels, a.height, a.width};
    const auto steps = [&](int d) { return sizes[d] == 1 || a.stride[d] % WIDTH == 0; };
    bool fits = aligned(a.x, element_size * WIDTH < 16 ? element_size * WIDTH : 16);
    if (channels_last(a)) {
        fits = fits && a.channels % WIDTH == 0;
        return fits && steps(0) && steps(1) && steps(3) && steps(4);
    }
    fits = fits && a.stride[4] == 1 && (a.height == 1 || a.stride[3] == a.width);
    fits = fits && a.height * a.width % WIDTH == 0;
    return fits && steps(0) && steps(1) && steps(2);
}

// Blocks that share `items`, each a multiple of `step` of them, so that about `wanted` blocks of
// all groups fill the chip; at most `most` of one group.
inline void share(Shape& s, int64_t items, int64_t step, int64_t wanted, int64_t most) {
    const int64_t steps = ceil_div(items, step);
    const int64_t parts = wanted < 1 ? 1 : wanted > most ? most : wanted;
    const int64_t each = ceil_div(steps, parts < steps ? parts : steps);
    s.per_part = static_cast<int>(each * step);
    s.parts = static_cast<int>(ceil_div(steps, each));
}

// Eight blocks of 256 threads are on each of a GPU's 64 to 148 multiprocessors; twice that many
// blocks level out their ends. Reasoned, not measured.
constexpr int64_t BLOCKS = 2048;

inline Shape shape_of(const ClipGroupNorm& a, int element_size) {
    Shape s = {};
    s.a = a;
    s.size = a.channels / a.groups;
    s.positions = a.height * a.width;
    s.by_width = Divisor(a.width);
    s.by_positions = Divisor(s.positions);
    const int width = in_runs(a, element_size) ? WIDTH : 1;
    if (channels_last(a)) {
        const int columns = a.channels / width;
        s.columns = columns < THREADS ? columns : THREADS;
        s.lanes = THREADS / s.columns;
        s.slabs = static_cast<int>(ceil_div(columns, s.columns));
        // The merging kernel reads size * parts of them for a group.
        share(s, static_cast<int64_t>(a.frames) * s.positions, s.lanes * UNROLL,
              BLOCKS / 8 / (a.batches * s.slabs), 256);
        return s;
    }
    s.by_plane = Divisor(s.positions / width);
    s.by_size = Divisor(s.size);
    s.runs = static_cast<int>(static_cast<int64_t>(a.frames) * s.size * s.positions / width);
    // Each block of the second pass reads all parts of its group.
    share(s, s.runs, THREADS * UNROLL, 2 * BLOCKS / (a.batches * a.groups), 512);
    return s;
}

template <class T, int N>
cudaError_t launch_both(const Shape& s, cudaStream_t stream) {
    const ClipGroupNorm& a = s.a;
    const int64_t groups = static_cast<int64_t>(a.batches) * a.groups;
    cudaError_t error;
    if (!channels_last(a)) {
        error = launch(partial_kernel<T, N>, groups * s.parts, THREADS, stream, s);
        return error ? error
                     : launch(normalise_kernel<T, N>, groups * s.parts, THREADS, stream, s);
    }
    const int64_t blocks = static_cast<int64_t>(a.batches) * s.parts * s.slabs;
    error = launch(partial_channels_kernel<T, N>, blocks, THREADS, stream, s);
    if (error == cudaSuccess) {
        error = launch(merge_kernel, groups, THREADS, stream, s);
    }
    const int64_t tiles = ceil_div(a.channels, TILE) * ceil_div(s.positions, TILE);
    return error ? error
                 : launch(normalise_channels_kernel<T, N>,
                          static_cast<int64_t>(a.batches) * a.frames * tiles, THREADS, stream, s);
}

}  // namespace norm

// Elements of `partial` that a call needs.
inline int64_t clip_group_norm_partials(const ClipGroupNorm& a, int element_size) {
    const norm::Shape s = norm::shape_of(a, element_size);
    return static_cast<int64_t>(a.batches) * s.parts *
           (norm::channels_last(a) ? a.channels : a.groups);
}

// T: storage type of x, weight, bias and result. No size is 0; a group is below 2^31 elements.
template <class T>
cudaError_t launch_clip_group_norm(const ClipGroupNorm& a, cudaStream_t stream) {
    const norm::Shape s = norm::shape_of(a, sizeof(T));
    return norm::in_runs(a, sizeof(T)) ? norm::launch_both<T, norm::WIDTH>(s, stream)
                                       : norm::launch_both<T, 1>(s, stream);
}

}  // namespace tvk
