// EI2's temporal block in one kernel: centering over frames, the projections to q, k and v,
// attention over the frames of each position, the output projection, bias and residual.
//
// A block takes 128 rows, the frames of 4, 8 or 16 positions: centered in float32 and rounded
// once, as operand A in shared memory. The weights pass by in stages of 16 or 32 input channels,
// copied while the stages before them are multiplied. Two warps share 32 rows: each projects every
// other head, 3 x 40 columns at a time, has scores, softmax and the weighted sum of V in the same
// registers, and keeps the result there until the last head is done with the rows. Then all heads
// go where the rows were, as operand A of the output projection, 80 columns of a warp at a time.
//
// By arithmetic, at 64 x 64, C = 320, 16 frames, a batch of 2 (107 GFLOP in the products, 3 in
// attention; 1024 blocks):
//   matrix instructions: a k16 step is 30 of them for 2 + 8 ldmatrix, 162 bytes each; shared
//     memory gives 128 bytes a cycle, an SM of sm_80 takes 2 cycles for one, so these are the
//     limit: 352 us on A100 (312 TFLOP/s); about 180 us on H100, where mma.sync reaches some 62 %
//     of the peak (Luo et al., arXiv 2402.13499), against 139 us of wgmma.
//   weights: 0.82 MB a block, 0.84 GB from the second level of cache: 150 us at 5.5 TB/s, beside
//     the products. 64 rows would double it.
//   z and the result: 168 MB, 50 us at 3.35 TB/s. There is one block on an SM, for its registers,
//     so its own rows, 80 KB, arrive before its products begin: 3 us of about 30.
// Together 220 to 290 us on H100. None of it is measured.
#pragma once

#include <cstdint>

#include "kernels/common/launch.cuh"
#include "kernels/common/numbers.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/rows.cuh"
#include "kernels/common/shares.cuh"

namespace tvk {

struct ShiftRestrictedTemporalAttention {
    enum Weight { Q, K, V, OUT, WEIGHTS };

    const void* z;  // [batches, frames, positions, channels]
    int64_t z_stride[4];
    const void* weight[WEIGHTS];  // [channels, channels], rows of runs of 16 bytes
    int weight_stride[WEIGHTS];   // between rows
    const void* bias;             // [channels] or null
    int64_t bias_stride;
    const float *sigma_v, *sigma_out;
    void* out;  // contiguous
    int batches, frames, positions, channels, heads;
    float scale;  // of the scores
    // Set by the launcher:
    int head_dim;
    uint32_t cells;  // batches * positions, below 2^31
    int log_span;    // rows of a position: 8, 16 or 32
    bool dense;      // 16 bytes of z can be read at a time
};

namespace stam {

constexpr int MOST_FRAMES = 32;
constexpr int MOST_CHANNELS = 320;
constexpr int MOST_HEADS = 8;
constexpr int HEAD = 40;  // head dims up to it run, padded with zeros
constexpr int TILES = HEAD / 8;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 128;
constexpr int TURNS = MOST_HEADS / 2;  // two heads at a time
constexpr int WIDTH = 80;              // columns of a warp in the output projection
constexpr int STAGE_ROWS = 2 * 3 * HEAD;
static_assert(2 * WIDTH <= STAGE_ROWS);

// How a block divides its shared memory. DEPTH: input channels of a stage of weights, of which
// there are STAGES. KEEP: z as it was is there too, for the residual; else it is read once more,
// from the second level of cache.
template <int DEPTH_, int STAGES_, bool KEEP_>
struct Room {
    static constexpr int DEPTH = DEPTH_, STAGES = STAGES_;
    static constexpr bool KEEP = KEEP_;
    static constexpr int STAGE = STAGE_ROWS * DEPTH;  // elements

    // Of a row in shared memory: an odd number of 16 bytes, so that 8 rows lie in all banks.
    __host__ __device__ static constexpr int row(int channels) {
        return (channels + DEPTH - 1) / DEPTH * DEPTH + 8;
    }
    static constexpr int bytes(int channels) {
        return 2 * (ROWS * row(channels) * (KEEP ? 2 : 1) + STAGES * STAGE);
    }
    static constexpr int BYTES = bytes(MOST_CHANNELS);
};

using Small = Room<16, 2, false>;  // sm_86, sm_89
using Large = Room<32, 4, false>;  // sm_80
using Whole = Room<32, 3, true>;   // sm_90, sm_100
static_assert(Small::BYTES <= 99 << 10 && Large::BYTES <= 163 << 10 && Whole::BYTES <= 227 << 10);

using Problem = ShiftRestrictedTemporalAttention;

// 0 where sigma is 0: the block is then z + bias.
__device__ inline float inverse(const float* sigma) { return *sigma > 0 ? 1.0f / *sigma : 0.0f; }

// A row of the block: frame `frame` of a position, which may lie beyond the last one.
struct Cell {
    int frame;
    bool known;
    int64_t z, out;  // where its position begins

    __device__ Cell(const Problem& p, int row) {
        const uint32_t cell = blockIdx.x * (ROWS >> p.log_span) + (row >> p.log_span);
        const uint32_t batch = cell / p.positions, position = cell - batch * p.positions;
        frame = row & ((1 << p.log_span) - 1);
        known = cell < p.cells;
        z = batch * p.z_stride[0] + position * p.z_stride[2];
        out = (int64_t{batch} * p.frames * p.positions + position) * p.channels;
    }
    template <class T>
    __device__ Rows<T> read(const Problem& p) const {
        T* at = static_cast<T*>(const_cast<void*>(p.z)) + z;
        return {at, p.z_stride[1], p.z_stride[3], known ? p.frames : 0, p.channels, p.dense};
    }
    template <class T>
    __device__ Rows<T> write(const Problem& p) const {
        const int64_t by_frame = int64_t{p.positions} * p.channels;
        return {static_cast<T*>(p.out) + out, by_frame, 1, known ? p.frames : 0, p.channels, true};
    }
};

template <int R>
__device__ inline void place(const uint32_t (&words)[R], void* to) {
    if constexpr (R == 4) {
        *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        static_assert(R == 2);
        *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    }
}

// The block's rows, centered over frames; rows and columns beyond z's are zero. A thread has all
// frames of 2 R neighbours in registers, 64 of them.
template <class T, int FRAMES, bool KEEP>
__device__ inline void fill(const Problem& p, T* rows, T* kept, int row) {
    constexpr int R = 64 / FRAMES;
    const int runs = (row - 8) / (2 * R), items = (ROWS >> p.log_span) * runs;
    for (int item = threadIdx.x; item < items; item += THREADS) {
        const int first = item / runs << p.log_span, column = item % runs * 2 * R;
        const Rows<T> z = Cell(p, first).read<T>(p);
        uint32_t words[FRAMES][R] = {};
        float mean[2 * R] = {};
        if (z.dense && column < z.columns) {
#pragma unroll
            for (int f = 0; f < FRAMES; ++f) {
                z.template read<R, true>(f, column, words[f]);
            }
        } else {  // one after another to where they belong, which takes little code
#pragma unroll 1
            for (int f = 0; f >> p.log_span == 0; ++f) {
                z.template read<R, false>(f, column, words[0]);
                place(words[0], rows + (first + f) * row + column);
            }
#pragma unroll
            for (int f = 0; f < FRAMES; ++f) {
                if (f < p.frames) {
                    read_words(rows + (first + f) * row + column, words[f]);
                }
            }
        }
#pragma unroll
        for (int f = 0; f < FRAMES; ++f) {
            float found[2 * R];
            unpack<T>(words[f], found);
#pragma unroll
            for (int i = 0; i < 2 * R; ++i) {
                mean[i] += found[i];
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * R; ++i) {
            mean[i] /= p.frames;
        }
#pragma unroll
        for (int f = 0; f < FRAMES; ++f) {
            if (f >> p.log_span != 0) {
                break;
            }
            float found[2 * R];
            unpack<T>(words[f], found);
            uint32_t centered[R];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                centered[i] = f >= p.frames ? 0
                                            : pack(found[2 * i] - mean[2 * i],
                                                   found[2 * i + 1] - mean[2 * i + 1], T());
            }
            place(centered, rows + (first + f) * row + column);
            if constexpr (KEEP) {
                place(words[f], kept + (first + f) * row + column);
            }
        }
    }
}

// Of a signed size: unsigned numbers divide by powers of two in one instruction.
__device__ inline bool below(unsigned x, int end) { return x < static_cast<unsigned>(end); }

// Where an element of a stage lies: runs of 8 in another order in each row, so that the 8 rows of
// an ldmatrix lie in all banks.
template <int DEPTH>
__device__ inline unsigned in_stage(unsigned row, unsigned run) {
    return row * DEPTH + 8 * (run ^ (DEPTH == 16 ? row >> 2 & 1 : row >> 1 & 3));
}

// The stages of all weights in the order in which they are used: a round for every two heads, then
// one for every 160 columns of the result, each over all input channels.
template <class T, class Room>
struct Stages {
    static constexpr int RUNS = Room::DEPTH / 8;  // of 16 bytes, in a row

    const Problem& p;
    T* const at;
    unsigned heads_rounds, rounds;
    unsigned round = 0, column = 0;  // of the next to copy
    unsigned filling = 0;            // the stage to copy to; the next one is the oldest

    __device__ Stages(const Problem& problem, T* memory)
        : p(problem),
          at(memory),
          heads_rounds((p.heads + 1) / 2),
          rounds(heads_rounds + (p.channels + 2 * WIDTH - 1) / (2 * WIDTH)) {
#pragma unroll
        for (int i = 0; i < Room::STAGES - 1; ++i) {
            copy();
        }
    }

    // Begins to copy the next stage, if there is one.
    __device__ void copy() {
        if (round < rounds) {
            // Every use of the thread's number begins anew: kept from stage to stage, what follows
            // from it would not fit beside the sums.
            const unsigned thread = fresh_thread(), run = thread % RUNS;
            const unsigned from = column + 8 * run;
            if (round < heads_rounds) {
                copy_heads(thread / RUNS, run, from);
            } else {
                copy_columns(thread / RUNS, run, from);
            }
            column += Room::DEPTH;
            if (!below(column, p.channels)) {
                column = 0;
                ++round;
            }
        }
        commit_copies();
        filling = filling + 1 == Room::STAGES ? 0 : filling + 1;
    }

    // Rows of two heads, of their q, k and v one after another.
    __device__ void copy_heads(unsigned d, unsigned run, unsigned from) {
        static_assert(HEAD * RUNS <= THREADS);
        if (d >= HEAD) {
            return;
        }
        T* const to = at + filling * Room::STAGE + in_stage<Room::DEPTH>(d, run);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const unsigned head = 2 * round + side, row = head * p.head_dim + d;
            const bool known =
                below(d, p.head_dim) && below(head, p.heads) && below(from, p.channels);
#pragma unroll
            for (int part = 0; part < 3; ++part) {
                const T* w = static_cast<const T*>(p.weight[part]);
                copy_async(to + (3 * side + part) * HEAD * Room::DEPTH,
                           w + (row * p.weight_stride[part] + from), known);
            }
        }
    }

    // Rows of two warps' columns of the result. Lane 4g + t has columns 2t and 2t + 1 of each tile
    // of 8; of four tiles they are 8 neighbours of the result, of the last two 4.
    __device__ void copy_columns(unsigned thread, unsigned run, unsigned from) {
        const T* w = static_cast<const T*>(p.weight[Problem::OUT]);
#pragma unroll
        for (int i = 0; i < WIDTH; i += THREADS / RUNS) {
            const unsigned m = i + thread, tile = m / 8, t = m % 8 / 2;
            if (m >= WIDTH) {
                break;
            }
            const unsigned in_warp = m % 2 + (m < 64 ? tile / 4 * 32 + 8 * t + tile % 4 * 2
                                                     : 64 + 4 * t + tile % 2 * 2);
            T* const to = at + filling * Room::STAGE + in_stage<Room::DEPTH>(m, run);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const unsigned row = (2 * (round - heads_rounds) + side) * WIDTH + in_warp;
                copy_async(to + side * WIDTH * Room::DEPTH,
                           w + (row * p.weight_stride[Problem::OUT] + from),
                           below(row, p.channels) && below(from, p.channels));
            }
        }
    }

    // The next stage to use: what was written to shared memory before is there as well.
    __device__ const T* next() {
        wait_copies<Room::STAGES - 2>();
        __syncthreads();
        copy();  // over the stage that all have just left
        return at + filling * Room::STAGE;
    }
};

// Adds a warp's 32 rows times 8 N rows of the weights from `first` on, over all input channels.
template <class T, class Room, int N>
__device__ inline void multiply(float (&sums)[2][N][4], Stages<T, Room>& stages, const T* rows,
                                int row, int first) {
    const int lane = threadIdx.x % 32;
    // Addresses of ldmatrix: A's rows, then its next 8 columns; a tile's rows, its next 8 columns,
    // the next tile's.
    rows += lane % 16 * row + lane / 16 * 8;
    const int n = first + lane / 16 * 8 + lane % 8, run = lane / 8 % 2;
    for (int column = 0; column < stages.p.channels; column += Room::DEPTH) {
        const T* const stage = stages.next();
#pragma unroll
        for (int step = 0; step < Room::DEPTH / 16; ++step) {
            uint32_t a[2][4];
            load_matrices(rows + column + 16 * step, a[0]);
            load_matrices(rows + column + 16 * step + 16 * row, a[1]);
            const T* const b_at = stage + in_stage<Room::DEPTH>(n, 2 * step + run);
#pragma unroll
            for (int tile = 0; tile < N; tile += 2) {
                if (tile + 1 < N) {
                    uint32_t b[4];
                    load_matrices(b_at + tile * 8 * Room::DEPTH, b);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        mma16<T>(sums[m][tile], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                        mma16<T>(sums[m][tile + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2],
                                 b[3]);
                    }
                } else {
                    uint32_t b[2];  // lanes from 16 on give addresses that nothing reads
                    load_matrices(b_at + tile * 8 * Room::DEPTH, b);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        mma16<T>(sums[m][tile], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                    }
                }
            }
        }
    }
}

// A head's result for 32 rows: [16 rows][8 columns][rows g and g + 8].
using Held = uint32_t[2][TILES][2];

// Attention of 16 M rows, of which u is the first 16: projected holds q, k and v side by side.
template <class T, int M>
__device__ inline void attend(const float (&projected)[2][3 * TILES][4], int u, const Problem& p,
                              float norm, Held& held) {
    const auto pair = [&](int part, int m, int tile, int half) {
        const auto& x = projected[u + m][part * TILES + tile];
        return pack(x[2 * half], x[2 * half + 1], T());
    };
    Scores<M> scores = {};
#pragma unroll
    for (int tile = 0; tile < TILES; tile += 2) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < 2 * M; ++n) {
                const uint32_t top = pair(Problem::Q, m, tile, 0),
                               low = pair(Problem::Q, m, tile, 1);
                const uint32_t key = pair(Problem::K, n / 2, tile, n % 2);
                if (tile + 1 < TILES) {
                    mma16<T>(scores[m][n], top, low, pair(Problem::Q, m, tile + 1, 0),
                             pair(Problem::Q, m, tile + 1, 1), key,
                             pair(Problem::K, n / 2, tile + 1, n % 2));
                } else {
                    mma8<T>(scores[m][n], top, low, key);
                }
            }
        }
    }
    Shares<M> shares;
    softmax<T, M>(scores, p.frames, p.scale * LOG2_E, shares, M == 1 && p.log_span == 3);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        uint32_t values[2 * M];
#pragma unroll
        for (int n = 0; n < 2 * M; ++n) {
            const auto& x = projected[u + n / 2][Problem::V * TILES + tile];
            values[n] = pack(x[n % 2 * 2] * norm, x[n % 2 * 2 + 1] * norm, T());
        }
        float sums[M][4] = {};
        add_shared<T, M>(sums, shares, values);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            held[u + m][tile][0] = pack(sums[m][0], sums[m][1], T());
            held[u + m][tile][1] = pack(sums[m][2], sums[m][3], T());
        }
    }
}

// Writes a head's result beside the other heads'.
template <class T>
__device__ inline void store(const Held& held, T* rows, int row, int head_dim) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int d = 8 * tile + 2 * t;
                T* const to = rows + (16 * m + 8 * half + g) * row + d;
                const uint32_t word = held[m][tile][half];
                if (head_dim % 2 == 0) {
                    if (d < head_dim) {
                        *reinterpret_cast<uint32_t*>(to) = word;
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (d + i < head_dim) {
                            reinterpret_cast<uint16_t*>(to)[i] =
                                static_cast<uint16_t>(word >> 16 * i);
                        }
                    }
                }
            }
        }
    }
}

// Writes 2 R neighbours of the result in each of a lane's four rows: the product of R tiles from
// `tile` on, scaled, bias and residual.
template <class T, bool KEEP, int R, int N>
__device__ inline void finish(const Problem& p, const float (&sums)[2][N][4], int tile, int column,
                              float norm, int first, const T* kept, int row) {
    if (column >= p.channels) {
        return;
    }
    const int g = threadIdx.x % 32 / 4;
    float bias[2 * R];
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
        bias[i] = p.bias == nullptr
                      ? 0.0f
                      : to_float(static_cast<const T*>(p.bias)[(column + i) * p.bias_stride]);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = first + 16 * m + 8 * half + g;
            const Cell cell(p, at);
            uint32_t words[R];
            if constexpr (KEEP) {
                read_words(kept + at * row + column, words);
            } else if (p.dense) {
                cell.read<T>(p).template read<R, true>(cell.frame, column, words);
            } else {
                cell.read<T>(p).template read<R, false>(cell.frame, column, words);
            }
            float found[2 * R];
            unpack<T>(words, found);
#pragma unroll
            for (int i = 0; i < 2 * R; ++i) {
                found[i] += sums[m][tile + i / 2][2 * half + i % 2] * norm + bias[i];
            }
            cell.write<T>(p).template write<R, true>(cell.frame, column, found);
        }
    }
}

// T: a 16-bit type. M: 1 to 16 frames, 2 to 32.
template <class T, int M, class Room, class = Dynamic<Room::BYTES>>
__global__ void __launch_bounds__(THREADS, 1)
    project_attend_kernel(const __grid_constant__ Problem p) {
    TVK_DYNAMIC_SHARED(memory);
    const int row = Room::row(p.channels);
    T* const rows = reinterpret_cast<T*>(memory);
    T* const kept = rows + ROWS * row;
    Stages<T, Room> stages(p, rows + ROWS * row * (Room::KEEP ? 2 : 1));
    fill<T, 16 * M, Room::KEEP>(p, rows, kept, row);

    const int warp = threadIdx.x / 32, side = warp / (WARPS / 2), first = warp % (WARPS / 2) * 32;
    const float norm_v = inverse(p.sigma_v);
    Held held[TURNS];
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        if (2 * turn < p.heads) {
            float projected[2][3 * TILES][4] = {};
            multiply(projected, stages, rows + first * row, row, side * 3 * HEAD);
#pragma unroll
            for (int u = 0; u < 2; u += M) {
                attend<T, M>(projected, u, p, norm_v, held[turn]);
            }
        }
    }
    __syncthreads();  // all are done with the rows
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int head = 2 * turn + side;
        if (head < p.heads) {
            store(held[turn], rows + first * row + head * p.head_dim, row, p.head_dim);
        }
    }
    const float norm_out = inverse(p.sigma_out);
    const int t = threadIdx.x % 4;
    for (int from = side * WIDTH; from - side * WIDTH < p.channels; from += 2 * WIDTH) {
        float sums[2][WIDTH / 8][4] = {};
        multiply(sums, stages, rows + first * row, row, side * WIDTH);
#pragma unroll
        for (int tile = 0; tile < 8; tile += 4) {
            finish<T, Room::KEEP, 4>(p, sums, tile, from + 8 * tile + 8 * t, norm_out, first, kept,
                                     row);
        }
        finish<T, Room::KEEP, 2>(p, sums, 8, from + 64 + 4 * t, norm_out, first, kept, row);
    }
}

// Whether runs of 16 bytes of z lie at such addresses.
inline bool dense(const Problem& p) {
    const int sizes[] = {p.batches, p.frames, p.positions};
    bool fits = aligned(p.z, 16) && p.z_stride[3] == 1;
    for (int d = 0; d < 3; ++d) {
        fits = fits && (sizes[d] == 1 || p.z_stride[d] % 8 == 0);
    }
    return fits;
}

template <class T, class Room>
cudaError_t launch_in(const Problem& p, cudaStream_t stream) {
    const auto kernel =
        p.log_span <= 4 ? project_attend_kernel<T, 1, Room> : project_attend_kernel<T, 2, Room>;
    const int64_t blocks = ceil_div(p.cells, ROWS >> p.log_span);
    return launch_with(Room::bytes(p.channels), kernel, blocks, THREADS, stream, p);
}

}  // namespace stam

// T: a 16-bit storage type of all but the sigmas. No size is 0; rows of the weights begin on 16
// bytes, channels are a multiple of 8.
template <class T>
cudaError_t launch_shift_restricted_temporal_attention(ShiftRestrictedTemporalAttention p,
                                                       cudaStream_t stream) {
    using namespace stam;
    static_assert(sizeof(T) == 2);
    p.head_dim = p.channels / p.heads;
    const int64_t cells = static_cast<int64_t>(p.batches) * p.positions;
    if (p.frames > MOST_FRAMES || p.channels > MOST_CHANNELS || p.channels % 8 != 0 ||
        p.heads > MOST_HEADS || p.head_dim > HEAD || cells > INT32_MAX) {
        return cudaErrorInvalidValue;
    }
    p.cells = static_cast<uint32_t>(cells);
    p.log_span = p.frames <= 8 ? 3 : p.frames <= 16 ? 4 : 5;
    p.dense = dense(p);
    int most = 0;
    const cudaError_t error = most_shared(most);
    if (error != cudaSuccess) {
        return error;
    }
    return most >= Whole::BYTES   ? launch_in<T, Whole>(p, stream)
           : most >= Large::BYTES ? launch_in<T, Large>(p, stream)
                                  : launch_in<T, Small>(p, stream);
}

}  // namespace tvk
