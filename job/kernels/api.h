/* What Python calls. abi.py reads this header and makes ctypes structs and prototypes of it, so it contains only
   structs of numbers and pointers, and functions of these that return int.

   Axes: T steps, B lanes, R rows (T times B), E input features, H hidden units, G gates (1, 3 or 4) times H,
   V tokens. E and H are multiples of 32 where nothing else is said: the caller pads. Weights, inputs and carries are float. Hidden
   states, saved gates and their gradients are float, or bf16 where `is_bf16`. */

#ifndef API_H
#define API_H

#include <stdint.h>

typedef long index_t;

enum cell { RNN, GRU, LSTM };
enum status { OK, OUT_OF_MEMORY, INVALID_TOKEN };

/* One recurrent layer over all steps of a window. Forward reads the first group and writes hidden[1:],
   carry[1:] and gates; backward also reads the second group and writes dgates, dh0 and dcarry. */
typedef struct {
    index_t cell, is_bf16, steps, lanes, units, table_rows, num_threads;
    index_t weight_units;  /* H before it was rounded up to a multiple of 32 */
    const float *inputs;   /* input projections (T, B, G), or a table (table_rows, G) of them */
    const int64_t *tokens; /* (T, B): row of the table for each lane; NULL if there is no table */
    const float *weight;   /* (gates * weight_units, weight_units) */
    const float *bias;     /* (H): of a GRU's candidate state, scaled by the reset gate */
    const uint8_t *starts; /* (T, B): whether the state before the step is taken to be zero; NULL if it never is */
    void *hidden;          /* (T + 1, B, H); the first is the initial state */
    float *carry;          /* (T + 1, B, H); a GRU's hidden state in float or an LSTM's cell; the first is initial */
    void *gates;           /* (T, B, 4 H): saved for backward; NULL to save nothing */
    void *packed;          /* (G, H), aligned to 64 bytes: memory for the weight */

    const void *dhidden; /* (T, B, H) */
    void *dgates;        /* (T, B, H or 4 H); may be `gates`. A GRU's are: reset, update, and the candidate with
                            respect to its hidden part and to its input part */
    float *dh0;          /* (B, H); NULL if not needed */
    float *dcarry;       /* (B, H): gradient of the last carry, replaced by that of the first */
} RnnArgs;

int rnn_forward(const RnnArgs *args);
int rnn_backward(const RnnArgs *args);

/* out (rows, columns) = left (rows, inner) times weight, plus bias (columns) if it is not NULL.
   The weight (weight_rows, weight_columns) is (columns, inner) if `transposed`, else (inner, columns). What it lacks of
   that is zero: in columns, and in rows of each of its `gates`. */
typedef struct {
    index_t is_bf16, out_is_bf16, transposed, gates, rows, inner, columns, weight_rows, weight_columns, num_threads;
    const void *left;
    const float *weight, *bias;
    void *packed; /* (inner, columns), aligned to 64 bytes: memory for the weight */
    void *out;
} LinearArgs;

int linear(const LinearArgs *args);

/* The cross-entropy of an output layer, for each row, and the gradients of the sum times `scale`. */
typedef struct {
    index_t is_bf16, rows, units, vocabulary_size; /* units: H, any number */
    index_t padded_units, columns, num_threads;    /* H and V, rounded up to multiples of 32 */
    float scale;
    const void *hidden;     /* (R, padded_units); the last ones are zero */
    const float *weight;    /* (V, H) */
    const float *bias;      /* (V) */
    const int64_t *targets; /* (R) */
    void *packed;           /* (columns, padded_units), aligned to 64 bytes: memory for the weight */
    float *nats;            /* (R): the result */
    float *dhidden;         /* (R, padded_units), of which the first are written: the gradients, */
    float *dweight;         /* (V, H) */
    float *dbias;           /* (columns); these are NULL if they are not needed, as is */
    void *token_packed;     /* (columns, padded_units), aligned to 64 bytes: memory for the weight */
} LossArgs;

int linear_cross_entropy(const LossArgs *args);

/* out (out_rows, out_columns) = left[:, :left_columns]^T times right[:, :out_columns], plus the previous `out` if
   `accumulate`. `left_columns` is out_rows with the rows of each of its `gates` rounded up to a multiple of 32, and
   `columns` is out_columns rounded up. */
typedef struct {
    index_t is_bf16, accumulate, gates, rows, left_columns, left_stride, columns, out_rows, out_columns, num_threads;
    const void *left;  /* (rows, left_stride) */
    const void *right; /* (rows, columns) */
    float *out;
} WeightGradientArgs;

int weight_gradient(const WeightGradientArgs *args);

/* out (num_segments, columns) = the sums of the rows that have the same segment number. The columns are a multiple of
   32 if some are left out or `is_bf16`. */
typedef struct {
    index_t is_bf16, rows, columns, stride, num_segments, num_threads;
    index_t skip_start, skip_count; /* columns of `source` that are left out */
    const void *source;             /* (rows, stride) */
    const int64_t *segments;        /* (rows); NULL if all rows are in one segment */
    float *out;
} SegmentSumArgs;

int segment_sum(const SegmentSumArgs *args);

/* A gradient of `size` floats, and its weight, which is NULL if only the gradient is scaled. */
typedef struct {
    index_t size;
    float *gradient, *weight;
} Parameter;

/* gradient *= scale; weight -= learning_rate * gradient. */
typedef struct {
    index_t count, num_threads;
    float scale, learning_rate;
    const Parameter *parameters;
} UpdateArgs;

int update(const UpdateArgs *args);

/* The sum of the squares of all gradients. */
typedef struct {
    index_t count, num_threads;
    const Parameter *parameters;
    double *sum;
} SquaresArgs;

int sum_squares(const SquaresArgs *args);

/* Packs a weight (columns, inner) of floats for `decode`, padded with zeros to `depth`. */
typedef struct {
    index_t columns, inner, depth, num_threads;
    const float *weight;
    void *packed; /* (columns rounded up to a multiple of 32, depth) */
} PackArgs;

int pack(const PackArgs *args);

/* A layer of a decoder. `table` is used in a first layer of one-hot inputs, in its place the next two elsewhere. */
typedef struct {
    index_t units, state_units; /* H, and its value before it was rounded up to a multiple of 32 */
    const float *table;         /* (V, G): input projection of each token; NULL if there is none */
    const void *input_weight;   /* packed (G, embedding_size or H of the layer below) */
    const float *input_bias;    /* (G) */
    const void *hidden_weight;  /* packed (G, H) */
    const float *hidden_bias;   /* (H): as RnnArgs.bias */
} DecoderLayer;

/* The state of a layer's lanes, replaced by that after the last step. */
typedef struct {
    float *hidden; /* (B, state_units) */
    float *carry;  /* (B, state_units): of an LSTM */
} DecoderState;

/* Steps of a model, float only. Each step's most likely token is the input of the next step. Threads share no lane. */
typedef struct {
    index_t cell, num_layers, lanes, length, embedding_size; /* 0: one-hot */
    index_t vocabulary_size, columns; /* V, and rounded up to a multiple of 32; 0: no logits, for a single step */
    index_t reset_token;              /* before which the state is taken to be zero; -1 if there is none */
    index_t num_threads;
    const DecoderLayer *layers;
    const DecoderState *states; /* of each layer */
    const float *embedding;     /* (V, embedding_size) */
    const void *weight;         /* packed (V, H): output layer */
    const float *bias;          /* (columns) */
    int64_t *tokens;            /* (length, B): the first are read, the others written */
    float *logits;              /* (B, columns): of the last step */
} DecoderArgs;

int decode(const DecoderArgs *args);

/* Keys of the dropout masks of one layer and step. */
typedef struct {
    index_t seed, step, layer, first_lane, lanes;
    int32_t *keys; /* (lanes) */
} DropoutKeysArgs;

int dropout_keys(const DropoutKeysArgs *args);

/* out = source, with elements zeroed whose 16-bit draw is below `threshold`, and the others divided by `keep`. */
typedef struct {
    index_t is_bf16, steps, lanes, units, num_threads;
    index_t is_locked;   /* all steps have the mask of the first */
    index_t threshold;   /* -32768 … 32767 */
    float keep;          /* the probability that an element is kept */
    const void *source;  /* (T, B, units) */
    const int32_t *keys; /* (B) */
    void *out;           /* (T, B, units) */
} DropoutArgs;

int dropout(const DropoutArgs *args);

/* Whether the kernels compute with bf16 on this processor. */
int supports_bf16(void);

/* Whether they multiply bf16 with AMX, which gives other bits than AVX-512 does. */
int uses_amx(void);

/* Asks the system to let this process use AMX. Returns 0 if the kernels need it and the system refuses, else 1. */
int request_amx(void);

/* One process's view of a group that shares memory; see collectives.c. */
typedef struct {
    char *memory; /* a cache line that identifies it, flags of each rank, a slot of each rank, a slot for the sums */
    index_t rank, workers, slot_bytes;
    double timeout_s;
    index_t sequence;     /* number of the current round */
    index_t stalled_rank; /* after a timeout: the rank that did not arrive */
} ShmGroup;

/* Both return 0, or 1 after a timeout. All ranks must call with the same sizes. */
int all_reduce(ShmGroup *group, index_t item_size, index_t count, void *data);
int all_gather(ShmGroup *group, index_t bytes, const void *data, void *const *outputs);

/* The size of a struct of this header in bytes; -1 if there is none of that name. */
int struct_size(const char *name);

#endif
