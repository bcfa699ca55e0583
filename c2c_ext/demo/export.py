"""Writes the demo's pair and its questions as `c2c train` takes them: models, tokenizer, data.

`python -m c2c_ext.demo.export DIR` writes DIR/receiver, DIR/sharer and DIR/train.jsonl, of the
shipped pair or of one that `c2c_ext.demo.train` made. Held-out entities are not in the questions.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.demo.command import ASSETS, SEED
from c2c_ext.files import write_atomically

ROWS = 48_000
# The user's message is form and question, the answer is one word.
CHAT_TEMPLATE = "<bos>{% for message in messages %} {{ message['content'] }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the demo's vocabulary."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(w.VOCABULARY)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def conversations(world: w.World, rows: int, seed: int) -> Iterator[dict]:
    """Random questions about train entities, of both kinds, with forms of every size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(count, (rows,), generator=generator)

    entities = world.train[draw(len(world.train))]
    asked, kinds, sizes = draw(w.NUM_ATTRIBUTES), draw(len(w.KINDS)), draw(len(ev.FORM_SIZES))
    forms = [ev.random_forms(asked, size, generator) for size in ev.FORM_SIZES]
    facts = world.facts[entities, asked]
    answers = w.value_ids(asked, world.answers(kinds, asked, facts))
    for row in range(rows):
        form = forms[sizes[row]][row : row + 1]
        blank = world.blank_form(entities[row : row + 1], form)[0, 1:]  # the template adds <bos>
        question = w.question(kinds[row : row + 1], asked[row : row + 1])[0]
        yield {
            "messages": [
                {"role": "user", "content": w.decode(torch.cat([blank, question]))},
                {"role": "assistant", "content": w.decode(answers[row : row + 1])},
            ],
            "positions": [w.FORM_START, w.FORM_START + form.shape[1]],
        }


def main(arguments: list[str] | None = None) -> None:
    """Writes models and data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"questions (default: {ROWS})")
    parser.add_argument("--pair", type=Path, default=ASSETS, help="default: the shipped pair")
    parser.add_argument("--seed", type=int, default=SEED, help=f"the pair's (default: {SEED})")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("receiver", "sharer"):
        shutil.copytree(options.pair / name, options.output / name, dirs_exist_ok=True)
        tokenizer().save_pretrained(options.output / name)
    # Seeds of their own: sharer and receiver were trained with `seed` and `seed + 1`.
    rows = conversations(w.make_world(options.seed), options.rows, options.seed + 2)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    target = options.output / "train.jsonl"
    write_atomically({target: lambda path: Path(path).write_text(text, "utf-8")})
    print(f"{options.rows} questions about train entities, and the two models: {options.output}")


if __name__ == "__main__":
    main()
