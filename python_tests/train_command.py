"""A tiny pair with conversations on disk, and `c2c train` on them."""

from pathlib import Path

import pytest
import tiny_models
import yaml
from local_tokenizers import turns, word_tokenizer, write_lines

from c2c_ext.cli import main

SETTINGS = {
    "hidden_size": 16,
    "batch": 4,
    "micro_batch": 2,
    "max_steps": 4,
    "save_steps": 2,
    "lr": 0.01,
    "dropout": 0.0,
    "dtype": "fp32",
    "device": "cpu",
    "log_steps": 1,
    "anneal_steps": 4,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """receiver, sharer, talks.jsonl and recipe.yaml."""
    place = tmp_path_factory.mktemp("train")
    for side in ("receiver", "sharer"):
        getattr(tiny_models, f"{side}_model")().save_pretrained(place / side)
        word_tokenizer().save_pretrained(place / side)
    records = [{"messages": turns(f"w{i} w{i + 1}", f"w{i + 2}")} for i in range(10)]
    write_lines(place / "talks.jsonl", records)
    write_lines(place / "bad.jsonl", [*records, "{", {"messages": turns("w1")}])
    (place / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
    return place


def train(place: Path, output: Path, *options: str, data: str = "talks.jsonl") -> int:
    """Runs the command in this process; returns its exit status."""
    given = ["--receiver", str(place / "receiver"), "--sharer", str(place / "sharer")]
    given += ["--data", str(place / data), "--output", str(output)]
    return main(["train", *given, "--config", str(place / "recipe.yaml"), *options])
