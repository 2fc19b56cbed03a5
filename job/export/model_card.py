"""The model card of an exported model: ``README.md`` as the Hugging Face Hub reads it, without a licence."""

import html
import json
import re

import numpy as np

from job.config.model import BUILTIN_CELLS
from job.console import escape_controls, format_count
from job.data.corpus import clean_text
from job.paths import is_uri
from job.training.checkpoint import LoadedCheckpoint
from job.training.progress import perplexity

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")  # of ASCII, all of which Markdown takes literally after a backslash
_KINDS = {"char": "characters", "byte": "bytes", "word": "words", "bpe": "byte pairs"}
_CARD = """\
---
# license: choose one of https://huggingface.co/docs/hub/repositories-licenses
library_name: lanes
pipeline_tag: text-generation
tags: {tags}
---
# {name}

A recurrent language model of {kind}. `config.json` describes the model and `{vocabulary}` its tokens. Where the cell
is that of torch's `nn.RNN`, `nn.GRU` or `nn.LSTM`, the weights in `model.safetensors` have its names under `rnn.`.

| | |
| --- | --- |
{rows}
"""
_USAGE = """
## Use

`model.py` is the model in plain PyTorch. This script, in the same folder, continues a text greedily:

```python
import json
import sys
{imports}from safetensors.torch import load_file

folder = "."
sys.path.insert(0, folder)
from model import LanguageModel

model = LanguageModel(json.load(open(f"{{folder}}/config.json")), load_file(f"{{folder}}/model.safetensors"))
{read}ids = model.generate({encode}, 50)
print({decode})
```
"""
_READ_TOKENS = 'tokens = [*json.load(open(f"{folder}/vocabulary.json"))["tokens"], "<|endoftext|>"]\n'
_CODE = {  # of each kind of vocabulary; {} is a text
    "char": {
        "read": _READ_TOKENS,
        "encode": "[tokens.index(token) for token in {}]",
        "decode": '"".join(tokens[index] for index in ids)',
    },
    "word": {
        "read": _READ_TOKENS,
        "encode": "[tokens.index(token) for token in {}.split()]",
        "decode": '" ".join(tokens[index] for index in ids)',
    },
    "byte": {
        "encode": "list({}.encode())",
        "decode": 'bytes(index for index in ids if index < 256).decode(errors="replace")',
    },
    "bpe": {
        "imports": "from tokenizers import Tokenizer\n",
        "read": 'tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")\n',
        "encode": "tokenizer.encode({}).ids",
        "decode": "tokenizer.decode(ids)",
    },
}
MAX_USAGE_TOKENS = 50  # of the text that the script continues
_SAMPLE = "\n## Sample\n\n<pre>{}</pre>\n"  # HTML, in which Markdown is not read before the closing tag


def escape_markdown(text: str) -> str:
    """Returns a text as it is shown literally within a line of Markdown."""
    return _PUNCTUATION.sub(r"\\\1", " ".join(escape_controls(text).split()))


def model_card(loaded: LoadedCheckpoint, name: str, weights: str, prefix: str, sample: str | None) -> str:
    """Returns the model card of a checkpoint.

    Args:
        loaded: the checkpoint
        name: of the run
        weights: ``average`` or ``raw``
        prefix: that the script of the card continues
        sample: a text that the model generated; None: there is none
    """
    cell = loaded.config.model.cell
    rows = (f"| {meaning} | {escape_markdown(value)} |" for meaning, value in describe(loaded, weights).items())
    card = _CARD.format(
        tags=json.dumps(["recurrent-neural-network", cell if cell in BUILTIN_CELLS else "custom-cell"]),
        name=escape_markdown(name),
        kind=_KINDS[loaded.vocabulary.kind],
        vocabulary=loaded.vocabulary.file_name,
        rows="\n".join(rows),
    )
    if cell in BUILTIN_CELLS:
        card += _usage(loaded, prefix)
    return card if sample is None else card + _SAMPLE.format(html.escape(escape_controls(sample)))


def _usage(loaded: LoadedCheckpoint, prefix: str) -> str:
    """Returns the part with a script, which continues the known tokens of a prefix, or else the first token."""
    vocabulary = loaded.vocabulary
    ids = vocabulary.encode(clean_text(prefix, loaded.config.corpus))
    known = ids[vocabulary.is_text(ids)][:MAX_USAGE_TOKENS]
    if not len(known):
        known = np.flatnonzero(vocabulary.is_text(np.arange(len(vocabulary))))[:1]
    text = repr(vocabulary.decode(known.tolist())).replace("<", r"\x3c")  # which would be HTML outside of the block
    code = {name: line.format(text) if name == "encode" else line for name, line in _CODE[vocabulary.kind].items()}
    return _USAGE.format(**{"imports": "", "read": "", **code})


def describe(loaded: LoadedCheckpoint, weights: str) -> dict[str, str]:
    """Returns what the card's table shows: the model, the training, and its figures."""
    model, progress, source = loaded.config.model, loaded.progress, loaded.config.corpus.source
    counts = {name: tensor.numel() for name, tensor in loaded.weights.items()}
    if model.tied:  # stored twice
        counts.pop("embedding.weight", None)
    rows = {
        "cell": model.cell,
        "hidden units": " + ".join(map(str, model.layer_sizes)),
        "embedding": str(model.embedding_size or "one-hot") + ", tied" * model.tied,
        "weights": f"{sum(counts.values()):,}",
        "tokens of the vocabulary": f"{len(loaded.vocabulary):,}",
        "text": source if is_uri(source) else source.rstrip("/").rpartition("/")[2],  # no folders of this machine
        "training": f"{progress.epoch:,} epochs, {progress.step:,} steps, {format_count(progress.tokens)} tokens",
        "weights are": "the average over the steps" if weights == "average" else f"those of step {progress.step:,}",
    }
    if progress.last_epoch_nats is not None:
        rows["training perplexity"] = f"{perplexity(progress.last_epoch_nats):.4g}"
    nats = loaded.checkpoint.validation_nats if weights == "average" or not loaded.average else None
    if nats is not None:
        rows["validation perplexity"] = f"{perplexity(nats):.4g}"
    return rows
