/* The cells' pointwise parts: one vector of a lane's hidden units at one step. */

#ifndef CELLS_H
#define CELLS_H

#include "vector.h"

INLINE index_t num_gates(enum cell cell) { return cell == RNN ? 1 : cell == GRU ? 3 : 4; }

/* Vectors of H in a step's saved gates and in their gradients. */
INLINE index_t num_saved(enum cell cell) { return cell == RNN ? 1 : 4; }

/* Whether the state before the step of a lane is taken to be zero; `row` is the lane's index in (T, B). */
INLINE int is_start(const RnnArgs *a, index_t row) { return a->starts && a->starts[row]; }

/* The carry that a lane's step reads. */
INLINE vec carry_before(const RnnArgs *a, index_t row, index_t j) {
    return is_start(a, row) ? (vec){} : load(0, a->carry, row * a->units + j);
}

/* `sums` are the gates' recurrent parts, `gate_stride` apart; `row` is the lane's index in (T, B); `j` is the first
   unit. */
INLINE void cell_forward(enum cell cell, int is_bf16, const RnnArgs *a, index_t row, index_t j, const float *sums,
                         index_t gate_stride) {
    index_t H = a->units, next = (row + a->lanes) * H + j;
    const float *x = a->inputs + (a->tokens ? a->tokens[row] : row) * num_gates(cell) * H + j;
    index_t saved = row * 4 * H + j;
    if (cell == RNN) {
        store(is_bf16, a->hidden, next, vtanh(is_bf16, load(0, x, 0) + load(0, sums, 0)));
    } else if (cell == GRU) {
        vec r = sigmoid(is_bf16, load(0, x, 0) + load(0, sums, 0));
        vec z = sigmoid(is_bf16, load(0, x, H) + load(0, sums, gate_stride));
        vec q = load(0, sums, 2 * gate_stride) + load(0, a->bias, j);
        vec n = vtanh(is_bf16, load(0, x, 2 * H) + r * q);
        vec h = n + z * (carry_before(a, row, j) - n);
        store(0, a->carry, next, h);
        store(is_bf16, a->hidden, next, h);
        if (!a->gates) return;
        store(is_bf16, a->gates, saved, r);
        store(is_bf16, a->gates, saved + H, z);
        store(is_bf16, a->gates, saved + 2 * H, n);
        store(is_bf16, a->gates, saved + 3 * H, q);
    } else {
        vec i = sigmoid(is_bf16, load(0, x, 0) + load(0, sums, 0));
        vec f = sigmoid(is_bf16, load(0, x, H) + load(0, sums, gate_stride));
        vec g = vtanh(is_bf16, load(0, x, 2 * H) + load(0, sums, 2 * gate_stride));
        vec o = sigmoid(is_bf16, load(0, x, 3 * H) + load(0, sums, 3 * gate_stride));
        vec c = f * carry_before(a, row, j) + i * g;
        store(0, a->carry, next, c);
        store(is_bf16, a->hidden, next, o * vtanh(is_bf16, c));
        if (!a->gates) return;
        store(is_bf16, a->gates, saved, i);
        store(is_bf16, a->gates, saved + H, f);
        store(is_bf16, a->gates, saved + 2 * H, g);
        store(is_bf16, a->gates, saved + 3 * H, o);
    }
}

/* `recurrent` is the gradient of the hidden state through the next step's gates. */
INLINE void cell_backward(enum cell cell, int is_bf16, const RnnArgs *a, index_t row, index_t lane, index_t j,
                          vec recurrent) {
    index_t H = a->units, saved = row * 4 * H + j, next = (row + a->lanes) * H + j;
    vec dh = load(is_bf16, a->dhidden, row * H + j) + recurrent;
    if (cell == RNN) {
        vec h = load(is_bf16, a->hidden, next);
        store(is_bf16, a->dgates, row * H + j, dh * (1 - h * h));
    } else if (cell == GRU) {
        vec r = load(is_bf16, a->gates, saved), z = load(is_bf16, a->gates, saved + H);
        vec n = load(is_bf16, a->gates, saved + 2 * H), q = load(is_bf16, a->gates, saved + 3 * H);
        dh += load(0, a->dcarry, lane * H + j);
        vec dn = dh * (1 - z) * (1 - n * n);
        store(0, a->dcarry, lane * H + j, is_start(a, row) ? (vec){} : dh * z);
        store(is_bf16, a->dgates, saved, dn * q * r * (1 - r));
        store(is_bf16, a->dgates, saved + H, dh * (carry_before(a, row, j) - n) * z * (1 - z));
        store(is_bf16, a->dgates, saved + 2 * H, dn * r);
        store(is_bf16, a->dgates, saved + 3 * H, dn);
    } else {
        vec i = load(is_bf16, a->gates, saved), f = load(is_bf16, a->gates, saved + H);
        vec g = load(is_bf16, a->gates, saved + 2 * H), o = load(is_bf16, a->gates, saved + 3 * H);
        vec c = vtanh(is_bf16, load(0, a->carry, next));
        vec dc = load(0, a->dcarry, lane * H + j) + dh * o * (1 - c * c);
        store(0, a->dcarry, lane * H + j, is_start(a, row) ? (vec){} : dc * f);
        store(is_bf16, a->dgates, saved, dc * g * i * (1 - i));
        store(is_bf16, a->dgates, saved + H, dc * carry_before(a, row, j) * f * (1 - f));
        store(is_bf16, a->dgates, saved + 2 * H, dc * i * (1 - g * g));
        store(is_bf16, a->dgates, saved + 3 * H, dh * c * o * (1 - o));
    }
}

#endif
