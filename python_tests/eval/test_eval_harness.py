"""`c2c eval` and its model in the harness, on local task files: make test-eval."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from c2c_ext.chat.models import ChatModels
from c2c_ext.chat.shipped_pair import load_shipped_pair
from c2c_ext.cli import main
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.evaluation.harness import C2CModel
from c2c_ext.evaluation.modes import Item, generate, score
from c2c_ext.evaluation.readers import EvaluationPair
from c2c_ext.evaluation.text_to_text import Wording

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
{rest}
"""
CHOICE = """\
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
WRITTEN = """\
doc_to_target: "{{options[answer]}}"
generation_kwargs: {until: ["rain"], max_gen_toks: 1}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
ROLLING = """\
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}]"""


def questions(count: int) -> list[dict]:
    """Questions of the form world about held-out entities, whose facts only the sharer knows."""
    world = w.make_world(0)
    asked = ev.held_out_questions(world, "is", 3)
    truth = asked.answers(world)
    chosen = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    rows = []
    for k in chosen[:count].tolist():
        form = world.blank_form(asked.entities[k : k + 1], asked.attributes[k : k + 1])
        ids = torch.cat([form, asked.question()[k : k + 1]], dim=1)[0]
        attribute = asked.asked[k : k + 1]
        options = [w.decode(w.value_ids(attribute, torch.tensor([v]))) for v in range(8)]
        prompt = w.decode(ids[1:])
        rows.append({"prompt": prompt, "options": options, "answer": int(truth[k])})
    return rows


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "forms.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions(24)))
    kinds = (
        ("choice", "multiple_choice", CHOICE),
        ("written", "generate_until", WRITTEN),
        ("rolling", "loglikelihood_rolling", ROLLING),
    )
    for name, kind, rest in kinds:
        text = TASK.format(name=f"forms_{name}", data=data, kind=kind, rest=rest)
        if kind == "loglikelihood_rolling":
            text = text.replace('doc_to_text: "{{prompt}}"\n', "")
        (directory / f"{name}.yaml").write_text(text)
    return directory


@pytest.fixture(scope="module")
def shipped() -> ChatModels:
    return load_shipped_pair()


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(kind, {}, given, 0, metadata=("task", document, 1))
        for document, given in enumerate(arguments)
    ]


def run(tasks: Path, tmp_path: Path, *options: str) -> dict:
    path = tmp_path / "out.json"
    arguments = ["eval", "--include-path", str(tasks), "--t2t-tokens", "3", "--json", str(path)]
    assert main([*arguments, *options]) == 0
    return json.loads(path.read_text())


def test_the_model_is_registered_as_c2c() -> None:
    assert get_model("c2c") is C2CModel


def test_eval_sees_content_cross_the_shipped_fuser(tasks, tmp_path, capsys) -> None:
    found = run(tasks, tmp_path, "--tasks", "forms_choice")["tasks"]["forms_choice"]
    modes = found["modes"]
    assert list(modes) == [
        *("receiver", "sharer", "ensemble", "routing", "t2t"),
        *("c2c", "mismatched", "zero", "noise"),
    ]
    assert all(row["count"] == 24 for row in modes.values())
    assert modes["c2c"]["right"] >= 20
    assert all(modes[mode]["right"] <= 10 for mode in ("receiver", "mismatched", "zero", "noise"))
    assert found["verdict"]["transferred"]
    assert sum(found["right"]["c2c"]) == modes["c2c"]["right"]
    assert found["harness"]["c2c"]["aggregates"]["acc,none"] == modes["c2c"]["right"] / 24
    shown = capsys.readouterr().out
    assert "content transferred: C2C beats receiver, mismatched, zero, noise" in shown
    assert "without identical: needs a fuser between the receiver and itself" in shown


def test_eval_of_written_answers_and_perplexity(tasks, tmp_path, capsys) -> None:
    options = ("--tasks", "forms_written", "forms_rolling", "--limit", "12", "--batch-size", "5")
    found = run(tasks, tmp_path, *options, "--modes", "receiver", "c2c", "mismatched")["tasks"]
    written, rolling = found["forms_written"], found["forms_rolling"]
    assert written["metric"].startswith("exact_match")
    assert written["modes"]["c2c"]["right"] >= 8 > 5 >= written["modes"]["mismatched"]["right"]
    assert rolling["right"] is None
    assert all(row["aggregates"]["word_perplexity,none"] > 1 for row in rolling["harness"].values())
    assert "forms_rolling: no answers that are right or wrong" in capsys.readouterr().out


def test_loglikelihoods_are_those_of_the_modes(shipped: ChatModels) -> None:
    rows = questions(3)
    model = C2CModel(loaded=shipped, mode="c2c")
    asked = [(row["prompt"], " " + row["options"][row["answer"]]) for row in rows]
    words = shipped.tokenizers["receiver"]
    items = [
        Item(tuple(words(a)["input_ids"]), tuple(words(b, add_special_tokens=False)["input_ids"]))
        for a, b in asked
    ]
    pair = EvaluationPair(shipped.receiver, shipped.sharer, shipped.fuser)
    expected = [(s.log_likelihood, s.greedy) for s in score("c2c", pair, items)]
    assert model.loglikelihood(requests("loglikelihood", *asked)) == expected


def test_rolling_adds_up_the_blocks(shipped: ChatModels) -> None:
    text = questions(1)[0]["prompt"]
    ids = shipped.tokenizers["receiver"](text, add_special_tokens=False)["input_ids"]
    whole = [shipped.tokenizers["receiver"].bos_token_id, *ids]
    pair = EvaluationPair(shipped.receiver, shipped.sharer, shipped.fuser)
    for size in (2, 100):
        model = C2CModel(loaded=shipped, mode="c2c", rolling_block=size)
        (found,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
        blocks = [
            Item(tuple(whole[:k]), tuple(whole[k : k + size])) for k in range(1, len(whole), size)
        ]
        parts = [score("c2c", pair, [block])[0].log_likelihood for block in blocks]
        assert found == pytest.approx(sum(parts), abs=1e-4)


def test_generation_ends_at_its_stop_and_refuses_sampling(shipped: ChatModels) -> None:
    prompt = questions(1)[0]["prompt"]
    model = C2CModel(loaded=shipped, mode="c2c")

    def answer(**settings):
        (text,) = model.generate_until(requests("generate_until", (prompt, settings)))
        return text

    full = answer(max_gen_toks=4)
    ids = tuple(shipped.tokenizers["receiver"](prompt)["input_ids"])
    pair = EvaluationPair(shipped.receiver, shipped.sharer, shipped.fuser)
    assert full == model.texts.decode("receiver", generate("c2c", pair, [Item(ids)], 4)[0].ids)
    word = full.split()[0]
    assert answer(max_gen_toks=4, until=[word]) == ""
    assert answer(max_gen_toks=1) == word
    with pytest.raises(ValueError, match="answers are generated greedily"):
        answer(do_sample=True, temperature=0.7)


def test_t2t_shows_the_sharer_the_options_and_the_receiver_its_text(shipped, monkeypatch) -> None:
    row = questions(1)[0]
    wording = Wording("{question}{options}", "{text} {question}", tokens=2)
    model = C2CModel(loaded=shipped, mode="t2t", wording=wording)
    seen = []
    monkeypatch.setattr(
        model.texts, "asked_of_sharer", lambda text, context: seen.append(text) or [1, 2, 3]
    )
    asked = [
        Instance("loglikelihood", {}, (row["prompt"], f" {o}"), k, metadata=("t", 0, 1))
        for k, o in enumerate(row["options"])
    ]
    found = model.loglikelihood(asked)
    assert seen == [row["prompt"] + "".join(f"\n- {o}" for o in row["options"])]
    assert model.written == [2]
    pair = EvaluationPair(shipped.receiver, shipped.sharer, shipped.fuser)
    said = model.texts.decode("sharer", generate("sharer", pair, [Item((1, 2, 3))], 2)[0].ids)
    own = C2CModel(loaded=shipped, mode="receiver")
    read = [(f"{said} {row['prompt']}", f" {o}") for o in row["options"]]
    assert found == own.loglikelihood(requests("loglikelihood", *read))


def test_chat_templates_are_the_receivers_and_t2t_rewrites_the_last_message(shipped) -> None:
    model = C2CModel(loaded=shipped, mode="t2t", wording=Wording(reading="{text} {question}"))
    prompt = questions(1)[0]["prompt"]
    rendered = model.apply_chat_template([{"role": "user", "content": prompt}])
    assert rendered == f"<bos> {prompt}"
    item = model.texts.item(rendered, None, group=0, document=0)
    assert list(item.context) == [w.BOS, *w.encode(prompt)]
    assert model.texts.question(rendered) == prompt
    assert model.texts.with_question(rendered, f"tea {prompt}") == f"<bos> tea {prompt}"


def test_eval_in_a_chat_template_sees_content_cross_too(tasks, tmp_path) -> None:
    options = ("--tasks", "forms_choice", "--chat-template", "--modes")
    found = run(tasks, tmp_path, *options, "receiver", "c2c", "mismatched")
    assert found["settings"]["chat_template"]
    assert found["tasks"]["forms_choice"]["modes"]["c2c"]["right"] >= 20
    assert found["tasks"]["forms_choice"]["verdict"]["transferred"]


def test_bad_arguments_are_refused(shipped: ChatModels, tasks, capsys) -> None:
    with pytest.raises(ValueError, match="mode must be one of receiver, sharer"):
        C2CModel(loaded=shipped, mode="magic")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        C2CModel(loaded=shipped, batch_size=0)
    with pytest.raises(ValueError, match="identical: needs a fuser"):
        C2CModel(loaded=shipped, mode="identical")
    with pytest.raises(ValueError, match="batch_size must be a number, got 'auto'"):
        C2CModel(loaded=shipped, batch_size="auto")
    model = C2CModel(loaded=shipped, mode="t2t")
    with pytest.raises(ValueError, match="has no question to write about"):
        model.loglikelihood_rolling(requests("loglikelihood_rolling", ("tea",)))
    assert main(["eval", "--include-path", str(tasks), "--tasks", "no_such_task"]) == 2
    assert "--tasks: the harness knows no no_such_task" in capsys.readouterr().err
