"""`c2c eval` refuses before any model answers, in one line that names what is wrong."""

import json
from pathlib import Path

import pytest
from eval_tasks import KINDS, questions, write_group, write_task
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from local_tokenizers import letter_tokenizer, word_tokenizer
from tiny_models import fuser_between, receiver_model, sharer_model

from c2c_ext.cli import main
from c2c_ext.evaluation.harness import C2CModel

pytestmark = pytest.mark.usefixtures("one_thread")
CHOICE, WRITTEN = KINDS["choice"], KINDS["written"]
SAMPLED = {"until": ["w0"], "max_gen_toks": 2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for kind, config in KINDS.items():
        write_task(directory, kind, questions(0), **config)

    def generating(name: str, **settings: object) -> None:
        kwargs = {**SAMPLED, **settings}
        write_task(directory, name, questions(0), **{**WRITTEN, "generation_kwargs": kwargs})

    generating("drawn", do_sample=True, temperature=0.7)
    generating("warm", temperature=0.7)
    generating("beams", num_beams=4)
    generating("wordless", max_gen_toks=0)
    write_group(directory, "twice", "choice", "drawn")
    write_task(directory, "empty", [], **CHOICE)
    write_task(directory, "lost", questions(0), **CHOICE)
    (directory / "lost.jsonl").unlink()
    # The harness looks at the first question when it loads a task.
    write_task(directory, "blank", questions(1), **{**CHOICE, "doc_to_text": "{{ 1 / answer }}"})
    silent = [questions(0)[0], {**questions(1)[0], "options": ["w1", "", "w2"]}]
    write_task(directory, "silent", silent, **CHOICE)
    write_task(directory, "shotless", questions(0), **{**CHOICE, "num_fewshot": 40})
    write_task(directory, "kindless", questions(0), **{**CHOICE, "output_type": "magic"})
    write_task(directory, "unsafe", questions(0), **{**WRITTEN, "unsafe_code": True})
    (directory / "code.py").write_text(
        "def broken(doc):\n    raise RuntimeError('out of\\nluck')\n"
    )
    write_task(directory, "code", questions(0), **CHOICE)
    text = (directory / "code.yaml").read_text()
    text = text.replace("'{{question}}'", "!function code.broken")
    (directory / "code.yaml").write_text(text)
    (directory / "no_yaml.yaml").write_text("task: [no_yaml\n")
    (directory / "loop.yaml").write_text("include: loop.yaml\ntask: loop\n")
    long = [{**row, "question": " ".join(["w4"] * 300)} for row in questions(0, 2)]
    write_task(directory, "long", long + questions(0, 1), **CHOICE)
    for row in long:
        row["options"] = [row["question"], "w1", "w2"]
    write_task(directory, "long_option", long + questions(0, 1), **CHOICE)
    contexts = zip(questions(0, 4), ("", "w3", "w4", "w5 w6"), strict=True)
    short = [{**row, "question": context} for row, context in contexts]
    write_task(directory, "short", short, **{**CHOICE, "description": ""})
    return directory


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    receiver, sharer = receiver_model(), sharer_model()
    for name, model, tokenizer in (
        ("receiver", receiver, word_tokenizer()),
        ("sharer", sharer, word_tokenizer()),
        ("letters", sharer, letter_tokenizer(chat_template=None)),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    fuser_between(receiver, sharer).save_pretrained(root / "fuser")
    (root / "torn").mkdir()
    for file in (root / "fuser").iterdir():
        (root / "torn" / file.name).write_bytes(file.read_bytes()[:-9])
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def small_index(monkeypatch) -> None:
    """The harness's own tasks are left out: reading their files takes long, and one test does."""

    def manager(include_path, **settings):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("c2c_ext.evaluation.tasks.TaskManager", manager)


@pytest.fixture
def nobody_answers(monkeypatch) -> None:
    def answer(*arguments, **settings):
        raise AssertionError("a model was asked")

    monkeypatch.setattr(C2CModel, "loglikelihood", answer)
    monkeypatch.setattr(C2CModel, "loglikelihood_rolling", answer)
    monkeypatch.setattr(C2CModel, "generate_until", answer)


def arguments(tasks: Path, places: dict[str, str], *options: str) -> list[str]:
    """Later options override these."""
    models = [
        word for side in ("receiver", "sharer", "fuser") for word in (f"--{side}", places[side])
    ]
    return ["eval", "--include-path", str(tasks), *models, *options]


@pytest.mark.parametrize(
    "named, message",
    [
        ("none_such", "--tasks: the harness knows no none_such; a file that is no YAML is passed"),
        ("no_yaml", "--tasks: the harness knows no no_yaml; a file that is no YAML is passed"),
        ("", "--tasks: the harness knows no ''"),
        ("perplexity no_*", "--tasks: the harness knows no no_*"),
        ("drawn", "--tasks: task drawn: answers are generated greedily, as a paired test of drawn"),
        ("warm", "--tasks: task warm: answers are generated greedily, as a paired test of drawn"),
        ("beams", "--tasks: task beams: num_beams must be 1, as answers are generated greedily"),
        ("wordless", "--tasks: task wordless: max_gen_toks must be at least 1, got 0"),
        ("choice twice", "--tasks: choice is named twice, alone or in a group"),
        ("empty", "--tasks: empty has no questions"),
        ("lost", "--tasks: lost cannot be loaded: FileNotFoundError: "),
        ("blank", "--tasks: blank makes no requests of its questions: ZeroDivisionError: "),
        ("silent", "--tasks: silent has an answer or option without text"),
        ("shotless", "--tasks: shotless makes no requests of its questions: "),
        ("kindless", "--tasks: kindless "),
        ("unsafe", "--tasks: unsafe runs code that a model has written, which is refused"),
        ("code", "--tasks: code "),
    ],
)
@pytest.mark.usefixtures("nobody_answers", "small_index")
def test_a_bad_task_is_named(named, message, tasks, places, capsys) -> None:
    assert main(arguments(tasks, places, "--tasks", *(named.split() or [""]))) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("c2c eval: ")]
    assert line.startswith(f"c2c eval: {message}"), line
    assert error.rstrip().endswith(line)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--modes t2t --tasks perplexity", "--modes: t2t: a rolling log-likelihood has no"),
        ("--modes identical --tasks choice", "--modes: identical: needs a fuser between the"),
        ("--modes mismatched --limit 1 --tasks choice", "--modes: mismatched: needs the context"),
        ("--sharer {letters} --modes ensemble --tasks choice", "--modes: ensemble: averages"),
        ("--sharer {letters} --chat-template --tasks choice", "--chat-template: the sharer's tok"),
        ("--fuser {torn} --tasks choice", "--fuser: "),
        ("--fuser {receiver} --tasks choice", "--fuser: "),
        ("--identical-fuser {torn} --tasks choice", "--identical-fuser: "),
        (
            "--identical-fuser /nowhere --tasks choice",
            "--identical-fuser: directory_or_repo_id: no fuser",
        ),
        ("--identical-fuser {fuser} --tasks choice", "--identical-fuser: the fuser was made for"),
        ("--synchronize --tasks choice", "--synchronize goes with a GPU"),
        ("--rolling-block 0 --tasks perplexity", "--rolling-block must be at least 1, got 0"),
        ("--metric bleu --tasks choice", "--metric: choice measures acc, got bleu"),
    ],
)
@pytest.mark.usefixtures("nobody_answers")
def test_a_bad_option_is_named(options, message, tasks, places, capsys) -> None:
    words = options.format(**places).split()
    assert main(arguments(tasks, places, *words)) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("c2c eval: ")]
    assert line.startswith(f"c2c eval: {message}"), line


def run(tasks: Path, places: dict[str, str], tmp_path: Path, *options: str) -> dict:
    path = tmp_path / "out.json"
    words = arguments(tasks, places, "--t2t-tokens", "2", "--json", str(path), *options)
    assert main(words) == 0
    return json.loads(path.read_text())


def test_a_task_that_draws_is_decoded_greedily_when_told_to(tasks, places, tmp_path) -> None:
    options = ("--greedy", "--tasks", "drawn", "--modes", "receiver", "c2c")
    first, again = (run(tasks, places, tmp_path, *options)["tasks"]["drawn"] for _ in "ab")
    assert first["right"] == again["right"]


def test_a_single_question_has_no_mismatched_control(tasks, places, tmp_path, capsys) -> None:
    found = run(tasks, places, tmp_path, "--tasks", "choice", "--limit", "1")
    assert "mismatched" not in found["tasks"]["choice"]["modes"]
    assert found["tasks"]["choice"]["verdict"] is None
    shown = capsys.readouterr().out
    assert "without mismatched: needs the context of another question" in shown
    assert "no verdict: it needs the modes c2c, receiver, mismatched" in shown


@pytest.mark.parametrize("sharer", ["sharer", "letters"])
def test_contexts_of_no_one_and_too_many_tokens(sharer, tasks, places, tmp_path) -> None:
    options = ("--sharer", places[sharer], "--tasks", "short", "long")
    found = run(tasks, places, tmp_path, *options)
    short, long = found["tasks"]["short"], found["tasks"]["long"]
    assert {row["count"] for row in short["modes"].values()} == {4}
    assert {row["count"] for row in long["modes"].values()} == {3}
    assert found["modes"]["c2c"]["truncated"] >= 6  # two questions of three options


def test_an_answer_that_is_too_long_names_its_task(tasks, places, capsys) -> None:
    assert main(arguments(tasks, places, "--tasks", "long_option", "--modes", "c2c")) == 2
    error = capsys.readouterr().err
    assert "c2c eval: task long_option: an answer of 300 tokens leaves no room for its" in error


def test_the_harness_s_command_refuses_a_task_that_draws(tasks, places) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    places = ",".join(f"{side}={places[side]}" for side in ("receiver", "sharer", "fuser"))
    with pytest.raises(ValueError, match="task drawn: answers are generated greedily"):
        simple_evaluate("c2c", places, tasks=["drawn"], task_manager=manager, device="cpu")
