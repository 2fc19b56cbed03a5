"""The recipes in ``configs/`` load, and train on a tiny text with smaller sizes."""

from pathlib import Path

import pytest
from conftest import job, result

from job.config.config_file import load_config
from job.data.dataset import num_train

RECIPES = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.toml"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_with_smaller_sizes_trains(recipe: Path, prose: Path, tmp_path: Path) -> None:
    config = load_config(str(recipe), {})
    layers = config.model.layer_sizes
    flags = {
        "corpus.source": prose, "run.storage": tmp_path, "run.name": "small", "scale.workers": 0, "train.max_steps": 3,
        "stream.batch_size": 4, "stream.num_steps": 8, "model.hidden_size": [8] * len(layers),
        "model.embedding_size": 8 if config.model.embedding_size else 0, "train.validate_every": 0,
        "generate.prefix": "the", "generate.length": 5,
    }  # fmt: skip
    if config.corpus.validation_source:
        flags["corpus.validation_source"] = prose
    ended = job("train", recipe, *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert (ended.status, ended.err.count("error")) == (0, 0), ended.err
    assert result(tmp_path / "small")["steps"] == 3
    assert ("validation_perplexity" in result(tmp_path / "small")) == bool(config.corpus.validation_setting)


def test_enwik8_recipe_trains_on_90_million_bytes_and_validates_on_5_million() -> None:
    corpus_config = load_config("configs/enwik8.toml", {}).corpus
    assert (num_train(corpus_config.max_tokens, corpus_config), corpus_config.max_tokens) == (90_000_000, 95_000_000)
