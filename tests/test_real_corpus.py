"""The path of docs/corpora.md from a folder of files to a model, on the docstrings of one package."""

import email
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import job, result, rows
from test_docs import BLOCKS, commands, job_words

SMALL = ["--stream.batch_size", 4, "--stream.num_steps", 16, "--model.hidden_size", 8, "--model.embedding_size", 8]
SMALL += ["--optimizer.schedule_steps", 6, "--optimizer.warmup_steps", 2]
SMALL += ["--train.max_steps", 6, "--train.validate_every", 4]


def stored_tokens(store: Path) -> list[int]:
    shards = json.loads((store / "manifest.json").read_text())["content"]["shards"]
    return np.concatenate([np.fromfile(store / f"{shard['name']}.bin", "<u2") for shard in shards]).tolist()


@pytest.mark.slow
def test_documented_path_from_files_to_a_model_runs_and_all_formats_give_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(Path(email.__file__).parent))
    blocks = [block for block in BLOCKS["docs/corpora.md"] if "test_real_corpus" in block.reason]
    program, config, path = blocks
    exec(compile(program.code, program.place, "exec"), {})  # of this repository, as a reader would run it
    Path(config.file).write_text(config.code)
    outputs = {}
    for words in commands(path.code):
        if arguments := job_words(words):
            ended = job(*arguments, *(SMALL if arguments[0] in ("train", "doctor") else ()))
            assert ended.status == 0, (words, ended)
            outputs[" ".join(arguments[:4])] = ended.out
    assert [row["step"] for row in rows(tmp_path / "runs" / "python", "validation")] == [4, 6]
    assert result(tmp_path / "runs" / "python")["corpus"]["tokens"] == len(stored_tokens(tmp_path / "python-store"))
    perplexities = {out.split(",")[0] for words, out in outputs.items() if words.startswith("evaluate")}
    assert len(perplexities) == 1
    for source in ("documents.parquet", "documents.jsonl.gz"):
        assert job("prepare", "python.toml", "--corpus.source", source, "--corpus.store", source[10:]).status == 0
        assert stored_tokens(Path(source[10:])) == stored_tokens(Path("python-store"))
