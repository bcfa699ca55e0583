"""Task files of one's own, written for the tests of `c2c eval`."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
# As ARC, GSM8K and WikiText ask.
KINDS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "description": "w70 w71",  # a system message in a chat template
        "metric_list": ACCURACY,
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "w1 {{options[answer]}}",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "generation_kwargs": {"until": ["w0"], "do_sample": False, "max_gen_toks": 4},
        "filter_list": [
            {
                "name": "last",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(w\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": EXACT,
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_task(directory: Path, name: str, rows: list[dict], **config: object) -> None:
    """A task file with its data beside it."""
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **config,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def write_group(directory: Path, name: str, *tasks: str) -> None:
    """A group of tasks that are there."""
    (directory / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": list(tasks)}))


def questions(start: int, count: int = 6) -> list[dict]:
    """In the words of `word_tokenizer`; which answer is right means nothing."""

    def question(k: int) -> str:
        return " ".join(f"w{1 + (7 * k + 5 * j) % 80}" for j in range(4 + k % 3))

    return [
        {"question": question(k), "options": [f"w{k + 1}", f"w{k + 2} w3", "w5"], "answer": k % 3}
        for k in range(start, start + count)
    ]
