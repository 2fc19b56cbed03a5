/* Recurrent layers: all steps of a window in one call, forward and backward. Each thread takes some lanes. */

#include "rnn.h"

#include "cells.h"
#include "linear.h"
#include "threads.h"

/* Sets the sums of those of `count` lanes from `row` on to zero whose state before the step is. */
INLINE void clear_starts(const RnnArgs *a, float *sums, index_t row, index_t count) {
    for (index_t lane = 0; a->starts && lane < count; lane++)
        if (a->starts[row + lane]) memset(sums + lane * PANEL, 0, PANEL * sizeof *sums);
}

INLINE void forward(enum cell cell, int is_bf16, const rnn_task *task, index_t first, index_t count) {
    const RnnArgs local = *task->args, *a = &local; /* a copy, which no store can alias */
    const uint32_t *packed = task->packed;
    float sums[4][BLOCK_ROWS * PANEL] __attribute__((aligned(64)));
    index_t H = a->units, depth = is_bf16 ? H / 2 : H;
    for (index_t t = 0; t < a->steps; t++)
        for (index_t j = 0; j < H; j += PANEL) {
            index_t row = t * a->lanes + first;
            const void *previous = offset_ptr(is_bf16, a->hidden, row * H);
            for (index_t gate = 0; gate < num_gates(cell); gate++) {
                gemm_panel(is_bf16, count, PANEL, previous, depth, 1, packed + (gate * H + j) * depth, depth,
                           sums[gate], PANEL, 0, NULL);
                clear_starts(a, sums[gate], row, count);
            }
            for (index_t lane = 0; lane < count; lane++)
                for (index_t v = 0; v < PANEL; v += WIDTH)
                    cell_forward(cell, is_bf16, a, row + lane, j + v, sums[0] + lane * PANEL + v, BLOCK_ROWS * PANEL);
        }
}

/* Prefetches what cell_backward will read; its stride is too long for the hardware prefetcher. */
INLINE void prefetch_backward(enum cell cell, int is_bf16, const RnnArgs *a, index_t row, index_t count, index_t j) {
    index_t H = a->units, line = is_bf16 ? PANEL : WIDTH;
    for (index_t lane = row; lane < row + count; lane++)
        for (index_t v = j; v < j + PANEL; v += line) {
            __builtin_prefetch(offset_ptr(is_bf16, a->dhidden, lane * H + v));
            if (cell == RNN) __builtin_prefetch(offset_ptr(is_bf16, a->hidden, (lane + a->lanes) * H + v));
            for (index_t gate = 0; cell != RNN && gate < 4; gate++)
                __builtin_prefetch(offset_ptr(is_bf16, a->gates, (lane * 4 + gate) * H + v));
        }
}

INLINE void backward(enum cell cell, int is_bf16, const rnn_task *task, index_t first, index_t count) {
    const RnnArgs local = *task->args, *a = &local;
    const uint32_t *packed = task->packed;
    float sums[BLOCK_ROWS * PANEL] __attribute__((aligned(64)));
    index_t H = a->units, saved = num_saved(cell) * H, stride = is_bf16 ? saved / 2 : saved;
    index_t depth = num_gates(cell) * (is_bf16 ? H / 2 : H);
    for (index_t t = a->steps - 1; t >= (a->dh0 ? -1 : 0); t--)
        for (index_t j = 0; j < H; j += PANEL) {
            index_t row = t * a->lanes + first;
            const void *next_dgates = offset_ptr(is_bf16, a->dgates, (row + a->lanes) * saved);
            if (t >= 0) prefetch_backward(cell, is_bf16, a, row, count, j);
            if (t < a->steps - 1) {
                gemm_panel(is_bf16, count, PANEL, next_dgates, stride, 1, packed + j * depth, depth, sums, PANEL, 0,
                           NULL);
                clear_starts(a, sums, row + a->lanes, count);
            } else
                memset(sums, 0, count * PANEL * sizeof *sums);
            for (index_t lane = 0; lane < count; lane++)
                for (index_t v = 0; v < PANEL; v += WIDTH) {
                    vec sum = load(0, sums, lane * PANEL + v);
                    index_t index = (first + lane) * H + j + v;
                    if (t >= 0)
                        cell_backward(cell, is_bf16, a, row + lane, first + lane, j + v, sum);
                    else
                        store(0, a->dh0, index, cell == GRU ? sum + load(0, a->dcarry, index) : sum);
                }
        }
}

/* Work on any number of lanes, in blocks, by the variant of the function for the cell and the precision. */
#define DISPATCH(function)                                                            \
    void rnn_##function##_lanes(const void *argument, index_t first, index_t count) { \
        const rnn_task *task = argument;                                              \
        index_t cell = task->args->cell, is_bf16 = task->args->is_bf16;               \
        for (; count > 0; first += BLOCK_ROWS, count -= BLOCK_ROWS) {                 \
            index_t rows = count < BLOCK_ROWS ? count : BLOCK_ROWS;                   \
            if (cell == RNN && is_bf16) function(RNN, 1, task, first, rows);          \
            if (cell == RNN && !is_bf16) function(RNN, 0, task, first, rows);         \
            if (cell == GRU && is_bf16) function(GRU, 1, task, first, rows);          \
            if (cell == GRU && !is_bf16) function(GRU, 0, task, first, rows);         \
            if (cell == LSTM && is_bf16) function(LSTM, 1, task, first, rows);        \
            if (cell == LSTM && !is_bf16) function(LSTM, 0, task, first, rows);       \
        }                                                                             \
    }
DISPATCH(forward)
static DISPATCH(backward)

int rnn_forward(const RnnArgs *args) {
    index_t H = args->units, columns = num_gates(args->cell) * H;
    for (index_t i = 0; args->tokens && i < args->steps * args->lanes; i++)
        if (args->tokens[i] < 0 || args->tokens[i] >= args->table_rows) return INVALID_TOKEN;
    index_t gates = num_gates(args->cell), depth = args->is_bf16 ? H / 2 : H, width = args->weight_units;
    packing packing = {args->is_bf16, 1, gates, args->weight, gates * width, width, depth, columns, args->packed};
    pack_weight(&packing, args->num_threads);
    rnn_task task = {args, args->packed};
    parallel_for(rnn_forward_lanes, &task, args->lanes, TILE_ROWS, args->num_threads);
    return OK;
}

int rnn_backward(const RnnArgs *args) {
    index_t H = args->units, rows = num_gates(args->cell) * H;
    index_t gates = num_gates(args->cell), depth = args->is_bf16 ? rows / 2 : rows, width = args->weight_units;
    packing packing = {args->is_bf16, 0, gates, args->weight, gates * width, width, depth, H, args->packed};
    pack_weight(&packing, args->num_threads);
    rnn_task task = {args, args->packed};
    parallel_for(rnn_backward_lanes, &task, args->lanes, TILE_ROWS, args->num_threads);
    return OK;
}
