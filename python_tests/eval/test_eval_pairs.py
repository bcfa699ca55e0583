"""`c2c eval` with models of one's own: two vocabularies, every kind of task, identical, groups."""

import json
from pathlib import Path

import pytest
from eval_tasks import KINDS, questions, write_group, write_task
from lm_eval.api.instance import Instance
from local_tokenizers import letter_tokenizer, word_tokenizer
from tiny_models import fuser_between, receiver_model, sharer_model

from c2c_ext.chat.models import load_models
from c2c_ext.cli import main
from c2c_ext.evaluation import lm_eval as command
from c2c_ext.evaluation.harness import C2CModel
from c2c_ext.evaluation.latency import PARTS
from c2c_ext.evaluation.text_to_text import Wording

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for kind, config in KINDS.items():
        write_task(directory, kind, questions(0), **config)
    write_task(directory, "more", questions(4), **KINDS["choice"])
    write_group(directory, "both", "choice", "more")
    return directory


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two vocabularies, a sharer with the receiver's own KV shape, and fusers between all."""
    root = tmp_path_factory.mktemp("models")
    receiver, sharer = receiver_model(), sharer_model()
    twin = receiver_model("llama")
    made = {
        "receiver": (receiver, word_tokenizer()),
        "letters": (sharer, letter_tokenizer()),
        "words": (sharer, word_tokenizer()),
        "twin": (twin, word_tokenizer()),
        "bare": (sharer, letter_tokenizer(chat_template=None)),
    }
    for name, (model, tokenizer) in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, source in (("fuser", sharer), ("twin_fuser", twin), ("own_fuser", receiver)):
        fuser_between(receiver, source).save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


def pair_of(places: dict[str, str], sharer: str, fuser: str = "fuser") -> list[str]:
    named = {"receiver": "receiver", "sharer": sharer, "fuser": fuser}
    return [word for side, name in named.items() for word in (f"--{side}", places[name])]


def run(tasks: Path, tmp_path: Path, *options: str) -> dict:
    path = tmp_path / "out.json"
    arguments = ["eval", "--include-path", str(tasks), "--t2t-tokens", "3", "--json", str(path)]
    assert main([*arguments, *options]) == 0
    return json.loads(path.read_text())


def test_two_vocabularies_answer_every_kind_of_task(tasks, places, tmp_path, capsys) -> None:
    pair = pair_of(places, "letters")
    found = run(tasks, tmp_path, *pair, "--tasks", "choice", "written")
    modes = ["receiver", "sharer", "routing", "t2t", "c2c", "mismatched", "zero", "noise"]
    assert found["settings"]["modes"] == modes and not found["settings"]["same_tokens"]
    assert found["tasks"]["written"]["metric"] == "exact_match, last"
    for task in found["tasks"].values():
        assert list(task["modes"]) == modes
        assert all(row["count"] == 6 for row in task["modes"].values())
        assert task["verdict"]["transferred"] in (True, False)
    shown = capsys.readouterr().out
    assert "without ensemble: averages the logits of both models, token by token" in shown
    assert "latency, ms per question" in shown
    wrote = {mode: row["tokens_written"] for mode, row in found["modes"].items()}
    assert 12 <= wrote.pop("t2t") <= 36 and not any(wrote.values())
    for mode, row in found["modes"].items():
        assert row["questions"] == 12 and row["tokens_answered"] >= 6
        assert list(row["seconds"]) == list(PARTS)
        assert 0 < sum(row["seconds"].values()) < row["total_seconds"]
        assert (row["seconds"]["fusing"] > 0) == (mode in modes[4:])
        assert (row["seconds"]["sharer_decode"] > 0) == (mode in ("sharer", "routing", "t2t"))
        assert row["mean_seconds"]["receiver_prefill"] == row["seconds"]["receiver_prefill"] / 12


def test_perplexities_leave_out_the_modes_that_have_none(tasks, places, tmp_path, capsys) -> None:
    pair = pair_of(places, "letters")
    found = run(tasks, tmp_path, *pair, "--tasks", "perplexity", "--rolling-block", "2")
    assert found["settings"]["modes"] == [
        *("receiver", "sharer", "c2c", "mismatched", "zero", "noise")
    ]
    harness = found["tasks"]["perplexity"]["harness"]
    values = {mode: row["aggregates"]["word_perplexity,none"] for mode, row in harness.items()}
    assert len(set(values.values())) == 6 and min(values.values()) > 1
    shown = capsys.readouterr().out
    assert "without t2t: a rolling log-likelihood has no question to write about" in shown
    assert "without routing: a rolling log-likelihood is of blocks of tokens" in shown


@pytest.mark.parametrize("system", [(), ("--system", "w60 w61")])
def test_chat_templates_of_two_vocabularies(system, tasks, places, tmp_path) -> None:
    pair = pair_of(places, "letters")
    options = ("--tasks", "choice", "written", "--chat-template", "--modes", "t2t", "c2c")
    found = run(tasks, tmp_path, *pair, *options, *system)
    assert found["settings"]["chat_template"]
    assert found["settings"]["system"] == (system[1] if system else None)
    assert all(row["count"] == 6 for row in found["tasks"]["written"]["modes"].values())


def test_t2t_of_two_vocabularies_hands_over_the_sharers_text(places) -> None:
    loaded = load_models(*(places[name] for name in ("receiver", "letters", "fuser")))
    wording = Wording("{question}", "{text} {question}", tokens=4)
    model = C2CModel(loaded=loaded, mode="t2t", wording=wording)
    asked = [Instance("loglikelihood", {}, ("w1 w2", " w3"), 0, metadata=("t", 0, 1))]
    found = model.loglikelihood(asked)
    letters = letter_tokenizer()
    ids = letters("w1 w2", return_tensors="pt")["input_ids"]
    said = loaded.sharer.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    text = letters.decode(said, skip_special_tokens=True)
    assert model.written == [4]
    own = C2CModel(loaded=loaded, mode="receiver")
    read = [Instance("loglikelihood", {}, (f"{text} w1 w2", " w3"), 0, metadata=("t", 0, 1))]
    assert found == own.loglikelihood(read)


@pytest.mark.parametrize("own", [False, True])
def test_identical_is_measured_where_a_fuser_fits(own, tasks, places, tmp_path, capsys) -> None:
    """The pair's own where both models have one KV shape, or one that is named."""
    pair = pair_of(places, "twin", "twin_fuser") if not own else pair_of(places, "words")
    named = ("--identical-fuser", places["own_fuser"]) if own else ()
    modes = ("--modes", "receiver", "c2c", "identical")
    found = run(tasks, tmp_path, *pair, *named, "--tasks", "choice", *modes)
    assert list(found["tasks"]["choice"]["modes"]) == ["receiver", "c2c", "identical"]
    assert found["modes"]["identical"]["seconds"]["sharer_prefill"] > 0
    assert found["pooled"] == {} and found["multiplicity"] is None  # of one task


def test_a_group_and_all_tasks_are_judged_together(tasks, places, tmp_path, capsys) -> None:
    pair = pair_of(places, "words")
    modes = ("--modes", "receiver", "c2c", "mismatched")
    found = run(tasks, tmp_path, *pair, *modes, "--tasks", "both", "written")
    assert list(found["pooled"]) == ["both", "all tasks"]
    both, everything = found["pooled"].values()
    assert both["tasks"] == ["choice", "more"] and both["repeated"] == 2  # questions 4 and 5
    assert both["modes"]["c2c"]["count"] == 10
    right = {name: found["tasks"][name]["right"]["c2c"] for name in ("choice", "more")}
    assert both["modes"]["c2c"]["right"] == sum(right["choice"]) + sum(right["more"][2:])
    assert everything["modes"]["c2c"]["count"] == 10 and everything["repeated"] == 8
    assert found["multiplicity"]["judged"] == 3
    shown = capsys.readouterr().out
    assert "both (2 tasks pooled, 2 repeated questions left out)" in shown
    assert "3 tasks were judged, each at 95%" in shown


def test_the_harness_s_own_command_knows_c2c(tasks, places, tmp_path, monkeypatch) -> None:
    """As `python -m c2c_ext.evaluation.lm_eval` runs it."""
    named = {"receiver": "receiver", "sharer": "letters", "fuser": "fuser"}
    models = ",".join(f"{side}={places[name]}" for side, name in named.items())
    output = tmp_path / "harness.json"
    arguments = [
        *("run", "--model", "c2c", "--model_args", f"mode=c2c,t2t_tokens=3,{models}"),
        *("--tasks", "choice", "--include_path", str(tasks), "--output_path", str(output)),
        *("--batch_size", "4", "--limit", "5"),
    ]
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments])
    command.main()
    (written,) = tmp_path.glob("harness*.json")
    (result,) = json.loads(written.read_text())["results"].values()
    assert 0 <= result["acc,none"] <= 1
    ours = run(
        tasks, tmp_path, *pair_of(places, "letters"), "--tasks", "choice", "--limit", "5",
        "--modes", "c2c", "mismatched",
    )  # fmt: skip
    assert ours["tasks"]["choice"]["modes"]["c2c"]["right"] == round(5 * result["acc,none"])
