"""A small transformer with nanoGPT's recipe for GPUs, to compare the time to a loss on the same card.

    python -m benchmarks.transformer TEXT [--compile] [--device cpu] [--json FILE] [--target NATS] [--quick]

Characters, six layers of six heads, 384 wide, windows of 256 characters, 64 at a time, 5,000 steps of AdamW, bf16. The
first nine tenths are trained on. As in the recipe, the loss is that of random windows of the rest, from an empty
context, every 250 steps. Ends at the target. The recipe compiles the model, which takes longer than many of its steps.

Axes: B windows, T characters, C channels, H heads.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """The sizes of the model and of its training."""

    layers: int = 6
    heads: int = 6
    channels: int = 384
    context: int = 256
    windows: int = 64
    steps: int = 5000
    warmup_steps: int = 100
    learning_rate: float = 1e-3
    dropout: float = 0.2
    evaluate_every: int = 250
    evaluated_batches: int = 200


QUICK = Recipe(2, 2, 32, 32, 8, steps=40, warmup_steps=5, evaluate_every=20, evaluated_batches=4)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.heads, self.dropout = recipe.heads, recipe.dropout
        self.project_in = nn.Linear(recipe.channels, 3 * recipe.channels, bias=False)
        self.project_out = nn.Linear(recipe.channels, recipe.channels, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.project_in(x_BTC).chunk(3, 2)
        )
        dropout = self.dropout if self.training else 0.0
        mixed_BHTC = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return F.dropout(self.project_out(mixed_BHTC.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Block(nn.Module):
    """Attention and a perceptron, each added to its normalized input."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        channels = recipe.channels
        self.attention_norm = nn.LayerNorm(channels, bias=False)
        self.attention = Attention(recipe)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(channels, bias=False),
            nn.Linear(channels, 4 * channels, bias=False),
            nn.GELU(),
            nn.Linear(4 * channels, channels, bias=False),
            nn.Dropout(recipe.dropout),
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC))
        return x_BTC + self.perceptron(x_BTC)


class Transformer(nn.Module):
    """Tokens (B, T) to logits; the output layer has the weights of the embedding."""

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, recipe.channels)
        self.positions = nn.Embedding(recipe.context, recipe.channels)
        self.dropout = nn.Dropout(recipe.dropout)
        self.blocks = nn.Sequential(*(Block(recipe) for _ in range(recipe.layers)))
        self.norm = nn.LayerNorm(recipe.channels, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_residual = name.endswith(("project_out.weight", "perceptron.3.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * recipe.layers) if is_residual else 1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.dropout(self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]])
        return F.linear(self.norm(self.blocks(x_BTC)), self.tokens.weight)


def random_windows(text: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) at random places of a text (N,)."""
    starts = torch.randint(len(text) - recipe.context, (recipe.windows, 1), device=text.device)
    windows = text[starts + torch.arange(recipe.context + 1, device=text.device)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: Transformer, text: Tensor, recipe: Recipe) -> Tensor:
    """The mean loss of random windows in nats."""
    inputs, targets = random_windows(text, recipe)
    with torch.autocast(text.device.type, torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: Transformer, text: Tensor, recipe: Recipe) -> float:
    """The mean loss over many batches, without dropout."""
    model.eval()
    losses = [loss_of(model, text, recipe) for _ in range(recipe.evaluated_batches)]
    model.train()
    return float(torch.stack(losses).mean())


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """A linear warm-up, then a cosine to a tenth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
    progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(text: str, recipe: Recipe, device: torch.device, compiled: bool = False) -> Iterator[dict[str, float]]:
    """Trains, and yields the validation loss with the seconds that all evaluations have taken so far."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[character] for character in text], device=device)
    split = len(tokens) * 9 // 10
    model = Transformer(recipe, len(ids)).to(device)
    if compiled:
        model.compile()  # type: ignore[no-untyped-call]
    decayed = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.99), fused=True)
    evaluation_seconds = 0.0
    for step in range(recipe.steps + 1):
        if step % recipe.evaluate_every == 0:
            start = time.time() if device.type == "cpu" else waited_time()
            nats = evaluate(model, tokens[split:], recipe)
            evaluation_seconds += time.time() - start
            yield {"step": step, "nats": nats, "time": time.time(), "evaluation_seconds": evaluation_seconds}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        loss_of(model, tokens[:split], recipe).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def waited_time() -> float:
    """The time at which the GPU has done all steps so far."""
    torch.cuda.synchronize()
    return time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each loss to this file as a line")
    parser.add_argument("--target", type=float, default=0.0, metavar="NATS", help="end at this loss")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--compile", action="store_true", help="compile the model, as the recipe does")
    parser.add_argument("--quick", action="store_true", help="small sizes, which only check the program")
    args = parser.parse_args()
    recipe = QUICK if args.quick else replace(Recipe(), steps=args.steps)
    for row in train(args.text.read_text(), recipe, torch.device(args.device), args.compile):
        print(f"step {row['step']:,.0f}: {row['nats']:.4f} nats", flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if row["nats"] <= args.target:
            break


if __name__ == "__main__":
    main()
