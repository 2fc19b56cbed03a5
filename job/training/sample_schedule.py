"""When a run samples text: a function of the step alone, so that a resumed run has the samples of an uninterrupted one.

Without ``train.sample_every`` that is the end of an epoch. Of short epochs, those count whose number is a power of two,
and those that complete another ``INTERVAL`` of tokens since the start, so that samples take a small share of the time:
a sample takes as long as the training on some thousands of tokens, whatever the size of the model.
"""

from job.config.training import TrainConfig
from job.training.train_state import TrainState

INTERVAL = {"cpu": 1 << 20, "cuda": 1 << 26}  # tokens, by the device


def is_sample_due(train_state: TrainState, train_config: TrainConfig, *, ends_epoch: bool) -> bool:
    """Returns whether text is sampled after the last step, which ``ends_epoch`` or does not."""
    progress, every = train_state.progress, train_config.sample_every
    if every or not ends_epoch:
        return bool(every) and progress.step % every == 0
    epoch, interval = progress.epoch + 1, INTERVAL[train_state.model.linear.weight.device.type]
    tokens_before = progress.tokens - progress.window * train_state.stream.tokens_per_step
    return progress.tokens // interval > tokens_before // interval or epoch & (epoch - 1) == 0
