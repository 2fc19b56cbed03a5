"""The recurrent language model: tokens and state in, logits and state out.

Axes: T steps, B lanes, H hidden units, E input features, H hidden units, V tokens of the vocabulary, L layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from job.config.model import BUILTIN_CELLS, ModelConfig
from job.errors import UserError
from job.kernels.ops import embedding
from job.nn.adaptive_softmax import Tails, head_size, resolve_cutoffs
from job.nn.cell_layers import LAYERS, CellLayers
from job.nn.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from job.nn.custom_cell import build_custom_cell, check_state_protocol
from job.nn.regularization import Regularization
from job.nn.rnn import RecurrentLayers
from job.nn.state import State, run_documents


class LanguageModel(nn.Module):
    """An embedding (or one-hot inputs), recurrent layers ``rnn``, and an output layer ``linear``.

    With ``model.softmax = adaptive`` the output layer is the head of an adaptive softmax, and ``tails`` are the others.
    """

    def __init__(self, model_config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        embedding_size, layer_sizes = model_config.embedding_size, model_config.layer_sizes
        self.embedding = nn.Embedding(vocabulary_size, embedding_size) if embedding_size else None
        input_size = embedding_size or vocabulary_size
        self.rnn: nn.Module
        if model_config.cell in RecurrentLayers.MODES:
            self.rnn = RecurrentLayers(model_config.cell, input_size, layer_sizes)
        elif model_config.cell in LAYERS:
            self.rnn = CellLayers(model_config.cell, input_size, layer_sizes)
        else:
            self.rnn = build_custom_cell(model_config, input_size)
        cutoffs = resolve_cutoffs(model_config, vocabulary_size)
        self.linear = nn.Linear(layer_sizes[-1], head_size(cutoffs, vocabulary_size))
        self.tails = Tails(cutoffs, vocabulary_size, layer_sizes[-1])
        self.vocabulary_size = vocabulary_size
        self.reset_token: int | None = None  # before which the state of a lane is taken to be zero
        self.is_tied = model_config.tied
        if self.is_tied:  # between those of torch's embedding, 1, and of its output layer, which learns very slowly
            nn.init.normal_(self.linear.weight, std=embedding_size**-0.25)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the output layer's weight that of the embedding, if ``model.tied`` is set.

        Source: Press and Wolf, "Using the output embedding to improve language models", 2017; Inan et al., "Tying word
        vectors and word classifiers", 2017.
        """
        if self.is_tied and self.embedding is not None:
            self.embedding.weight = self.linear.weight

    @property
    def has_custom_cell(self) -> bool:
        """Whether the cell is the user's, which may leave parameters unused and branch on its inputs."""
        return not isinstance(self.rnn, RecurrentLayers | CellLayers)

    @property
    def embedding_weight(self) -> Tensor | None:
        """The features of each token (V, E); None: one-hot."""
        return None if self.embedding is None else self.embedding.weight

    def forward(
        self, tokens_TB: Tensor, state: State, regularization: Regularization | None = None
    ) -> tuple[Tensor, State]:
        """Runs the model over a window.

        Args:
            tokens_TB: token ids, int64
            state: the lanes' state before the window
            regularization: this step's; None disables it

        Returns:
            Logits (T, B, V), which are log-probabilities if the softmax is adaptive, and the state after the window.
        """
        hidden_TBH, state = self._hidden_states(tokens_TB, state, regularization)
        dropped_TBH = hidden_TBH if regularization is None else regularization.drop_outputs(hidden_TBH)
        return self.tails.log_probabilities(self.linear, dropped_TBH), state

    def advance(self, tokens_TB: Tensor, state: State) -> State:
        """Returns the state after a window without computing logits; the arguments are those of ``forward``."""
        return self._hidden_states(tokens_TB, state, None)[1]

    def cross_entropy_sum(
        self,
        tokens_TB: Tensor,
        targets_TB: Tensor,
        state: State,
        regularization: Regularization | None = None,
        upstream: float = 1.0,
    ) -> tuple[Tensor, State]:
        """Returns the summed cross-entropy of ``targets_TB`` in nats, a scalar, and the state after the window.

        ``upstream`` is that of ``linear_cross_entropy``. The other arguments are those of ``forward``.
        """
        cross_entropy = partial(linear_cross_entropy, upstream=upstream)
        hidden_TBH, state = self._hidden_states(tokens_TB, state, regularization)
        dropped_TBH = hidden_TBH if regularization is None else regularization.drop_outputs(hidden_TBH)
        nats = self.tails.cross_entropy_sum(self.linear, dropped_TBH, targets_TB, cross_entropy)
        if regularization is None:
            return nats, state
        return regularization.add_penalty(nats, hidden_TBH, dropped_TBH, self._document_starts(tokens_TB)), state

    def evaluation_nats(self, tokens_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns ``cross_entropy_sum`` by torch operators, where targets of -1 count nothing, and the state."""
        hidden_TBH, state = self._hidden_states(tokens_TB, state, None)
        return self.tails.cross_entropy_sum(self.linear, hidden_TBH, targets_TB, chunked_cross_entropy), state

    def _hidden_states(
        self, tokens_TB: Tensor, state: State, regularization: Regularization | None
    ) -> tuple[Tensor, State]:
        starts_TB = self._document_starts(tokens_TB)
        if isinstance(self.rnn, RecurrentLayers):
            needs_features = regularization is not None and regularization.needs_features
            inputs = self._features(tokens_TB, regularization) if needs_features else tokens_TB
            return self.rnn(inputs, state, regularization, self.embedding_weight, starts_TB)
        features_TBE = self._features(tokens_TB, regularization)
        if isinstance(self.rnn, CellLayers):
            return self.rnn(features_TBE, state, regularization, starts_TB)
        return run_documents(self.rnn, features_TBE, state, starts_TB)

    def _features(self, tokens_TB: Tensor, regularization: Regularization | None) -> Tensor:
        """Returns the features (T, B, E) that the first layer reads."""
        if self.embedding is None:
            return F.one_hot(tokens_TB, self.vocabulary_size).to(self.linear.weight.dtype)
        features_TBE = embedding(tokens_TB, self.embedding.weight)
        if regularization is None:
            return features_TBE
        return regularization.drop_inputs(features_TBE, tokens_TB, self.vocabulary_size)

    def _document_starts(self, tokens_TB: Tensor) -> Tensor | None:
        """Returns whether the state before each token is taken to be zero (T, B); None if it never is."""
        if self.reset_token is None:
            return None
        starts_TB = tokens_TB == self.reset_token
        return starts_TB if starts_TB.any() else None


def build_model(model_config: ModelConfig, vocabulary_size: int, seed: int) -> LanguageModel:
    """Builds a float32 model on the CPU with torch's default initialization, a function of ``seed`` only.

    Raises:
        UserError: a custom cell cannot be built or does not implement the state protocol
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and not those of GPUs
        model = LanguageModel(model_config, vocabulary_size)
    if model.has_custom_cell:
        check_state_protocol(model.rnn, model_config, model_config.embedding_size or vocabulary_size)
    return model


def build_model_with_weights(
    model_config: ModelConfig,
    vocabulary_size: int,
    seed: int,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    source: str,
) -> LanguageModel:
    """Builds a model of given weights, after their names and shapes were compared and nothing was allocated for it.

    Args:
        model_config: may be read from an untrusted file
        vocabulary_size: number of tokens V
        seed: for a custom cell, which is initialized before it gets its weights
        weights: all tensors of the model's ``state_dict``, by name; those of the dtype become the model's own
        dtype: of the model
        source: where the weights are from, for the message

    Raises:
        UserError: names or shapes differ, or a custom cell cannot be built
    """
    is_custom = model_config.cell not in BUILTIN_CELLS
    # A user's cell may not support the meta device: what surrounds it is compared first.
    compared = replace(model_config, cell="rnn", num_layers=1) if is_custom else model_config
    model = _build_meta_model(compared, vocabulary_size)
    found, expected = (
        {name: tensor for name, tensor in tensors.items() if not (is_custom and name.startswith("rnn."))}
        for tensors in (weights, model.state_dict())
    )
    check_shapes(found, expected, source)
    check_tied(model_config, weights, source)
    if is_custom:
        model = build_model(model_config, vocabulary_size, seed).to(dtype)
        load_weights(model, weights, source)
    else:
        model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        model.tie_weights()  # what is assigned are tensors of their own
    return model


def _build_meta_model(model_config: ModelConfig, vocabulary_size: int) -> LanguageModel:
    """Builds a model without memory for its weights."""
    try:
        with torch.device("meta"):
            return LanguageModel(model_config, vocabulary_size)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond all
        raise UserError(f"model: {str(error).splitlines()[0]}", "make it smaller") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copies weights into the model, converted to the model's dtypes; the arguments are those of ``check_shapes``."""
    state_dict = model.state_dict()
    check_shapes(weights, state_dict, source)
    model.load_state_dict({name: weights[name].to(tensor.dtype) for name, tensor in state_dict.items()})


def check_shapes(weights: dict[str, Tensor], state_dict: dict[str, Tensor], source: str) -> None:
    """Raises UserError if names or shapes of weights differ from those of a model's ``state_dict``.

    Args:
        weights: tensors by name
        state_dict: of the model, which may be on the meta device
        source: where the weights are from, for the message
    """
    shapes, expected = ({name: tuple(tensor.shape) for name, tensor in x.items()} for x in (weights, state_dict))
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            mismatch = f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
            raise UserError(f"{source}: weights do not match the model: {mismatch}")


def check_tied(model_config: ModelConfig, weights: dict[str, Tensor], source: str) -> None:
    """Raises UserError if ``model.tied`` is set, and embedding and output layer have different weights.

    Args:
        model_config: of the model
        weights: tensors by name, after ``check_shapes``
        source: where the weights are from, for the message
    """
    if not model_config.tied:
        return
    first, second = weights["embedding.weight"], weights["linear.weight"]
    if first.dtype != second.dtype or not torch.equal(first, second):
        problem = f"{source}: weights do not match the model: embedding.weight and linear.weight differ"
        raise UserError(problem, "set model.tied = false")


def reference_state_dict(model_config: ModelConfig, vocabulary_size: int) -> dict[str, Tensor]:
    """Returns tensors with the names and shapes of a model's; without memory, unless the cell is the user's."""
    if model_config.cell in BUILTIN_CELLS:
        return _build_meta_model(model_config, vocabulary_size).state_dict()
    return build_model(model_config, vocabulary_size, 0).state_dict()


def place_by_token(
    weights: dict[str, Tensor],
    old_tokens: Sequence[str],
    model: nn.Module,
    model_config: ModelConfig,
    tokens: Sequence[str],
) -> dict[str, Tensor]:
    """Returns weights for another vocabulary: rows of embedding and output, columns of one-hot inputs, by token.

    Args:
        weights: all tensors of a model with the same configuration and ``old_tokens``, by name
        old_tokens: the token of each id in ``weights``
        model: gives the tokens that are not in ``old_tokens`` their weights
        model_config: the configuration of both
        tokens: the token of each id in ``model``

    Raises:
        UserError: a custom cell has weights that depend on the vocabulary in another way
    """
    larger = reference_state_dict(model_config, len(tokens) + 1)  # shows which axes are those of tokens
    old_ids = {token: index for index, token in enumerate(old_tokens)}
    pairs = [(index, old_ids[token]) for index, token in enumerate(tokens) if token in old_ids]
    targets, sources = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    placed = dict(weights)
    for name, initial in model.state_dict().items():
        axes = [axis for axis, size in enumerate(initial.shape) if size != larger[name].shape[axis]]
        if len(axes) > 1 or any(initial.shape[axis] != len(tokens) for axis in axes):
            raise UserError(f"{name}: cannot be placed by token", "use a corpus with the vocabulary of these weights")
        for axis in axes:
            known = weights[name].index_select(axis, sources)
            placed[name] = initial.to(known.dtype).index_copy(axis, targets, known)
    return placed
