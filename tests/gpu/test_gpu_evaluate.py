"""Evaluation on a GPU agrees with that on the CPU."""

import copy
from typing import Any

import pytest
import torch
from test_evaluate import TOKENS, random_model

from job.config.inference import EvaluateConfig
from job.config.model import BUILTIN_CELLS
from job.inference.evaluate import evaluate_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.cuda]


@pytest.mark.parametrize("fields", [{}, {"context": 100}, {"dynamic": 0.01, "dynamic_steps": 50}], ids=str)
@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("cell", BUILTIN_CELLS)
def test_evaluation_on_gpu_agrees_with_that_on_cpu(cell: str, num_models: int, fields: dict[str, Any]) -> None:
    models = [random_model(seed, cell) for seed in range(num_models)]
    on_gpu = [copy.deepcopy(model).to("cuda") for model in models]
    expected = evaluate_tokens(models, TOKENS, EvaluateConfig(**fields))
    torch.testing.assert_close(evaluate_tokens(on_gpu, TOKENS, EvaluateConfig(**fields)), expected, rtol=1e-9, atol=0)
