"""The model card that every save writes: what it says, and that no name can break out of it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_fuser, set_gates
from huggingface_hub import ModelCard

from c2c_ext import CardInfo, CardMetric, Fuser, FuserConfig
from c2c_ext.model_card import CARD_MARKER, CARD_NAME, is_hub_id
from c2c_ext.model_kv import KVShape, ModelKV

INFO = CardInfo(
    license="apache-2.0",
    training={"optimizer": "AdamW", "steps": 1929, "rate": 1e-4},
    datasets=["org/questions", "a list of our own"],
    metrics=[
        CardMetric("right answers, is", 955, 960, {"receiver alone": 120, "text": 960}),
        CardMetric("loss", 0.0625),
    ],
)


def fuser_of(receiver: str = "org/receiver", sharer: str = "org/sharer") -> Fuser:
    shapes = (KVShape(2, 6), KVShape(2, 6), KVShape(1, 8))
    config = FuserConfig(
        ModelKV("qwen3", receiver, shapes),
        ModelKV("llama", sharer, (KVShape(3, 4),)),
        (0, 0, 0),
        10,
        7,
    )
    return make_fuser(config)


def card_of(fuser: Fuser, directory: Path, info: CardInfo | None = None) -> str:
    fuser.save_pretrained(directory, card=info)
    return (directory / CARD_NAME).read_bytes().decode()


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.partition(f"\n## {title}\n\n")[2], flags=re.M)[0].strip()


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]


def test_card_has_every_section_and_parsable_metadata(tmp_path: Path) -> None:
    fuser = fuser_of()
    set_gates(fuser, {(1, "key"): 0.0, (2, "key"): -1.0})
    text = card_of(fuser.bfloat16(), tmp_path, INFO)
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "c2c_ext"
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == ["org/receiver", "org/sharer"]
    assert data["datasets"] == ["org/questions"]
    assert data["pipeline_tag"] == "text-generation"
    titles = re.findall(r"^## (.+)$", text, flags=re.M)
    expected = "Pair Architecture Use Training Metrics Licence Limits Citation"
    assert titles == expected.split()

    pair = rows(section(text, "Pair"))
    assert pair[2][:4] == ["receiver", "`org/receiver`", "`qwen3`", "3"]
    assert pair[2][4] == "2 layers of 2 x 6, 1 layers of 1 x 8"
    assert pair[3] == ["sharer", "`org/sharer`", "`llama`", "1", "3 x 4"]
    assert "`0<-0 1<-0 2<-0`" in section(text, "Pair")
    sizes = {row[0]: row[1] for row in rows(section(text, "Architecture"))}
    assert sizes["parameters"] == f"{fuser.config.num_parameters():,} (bfloat16)"
    assert sizes["open gates"] == "1 of 3 (keys), 3 of 3 (values)"
    assert sizes["`hidden_size`"] == "10" and sizes["`activation`"] == "gelu"
    training = section(text, "Training").splitlines()
    assert training[:3] == ["- optimizer: AdamW", "- steps: 1929", "- rate: 0.0001"]
    metrics = rows(section(text, "Metrics"))
    assert metrics[0] == ["", "examples", "this fuser", "receiver alone", "text"]
    assert metrics[2] == ["right answers, is", "960", "955", "120", "960"]
    assert metrics[3] == ["loss", "", "0.0625", "", ""]
    assert "2510.03215" in section(text, "Citation")


def test_what_is_not_given_is_not_recorded(tmp_path: Path) -> None:
    text = card_of(fuser_of("", "a model"), tmp_path)
    for title in ("Training", "Metrics", "Licence"):
        assert section(text, title) == "Not recorded."
    data = ModelCard(text).data.to_dict()
    assert not {"license", "base_model", "datasets"} & set(data)
    assert not re.search(r"\b20[2-9]\d-\d\d", text)  # no date that nobody gave


def test_usage_example_is_python(tmp_path: Path) -> None:
    for fuser in (fuser_of(), fuser_of('x"); import os; ("', "y")):
        example = section(card_of(fuser, tmp_path), "Use")
        code = example.removeprefix("```python\n").removesuffix("```")
        compile(code, "card", "exec")
        assert "import os" not in code


def test_the_same_fuser_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    text = card_of(fuser_of(), tmp_path / "a")
    assert card_of(fuser_of(), tmp_path / "b") == text
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_model_card import card_of, fuser_of
from pathlib import Path
card_of(fuser_of(), Path({str(tmp_path / "c")!r}))
"""
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "c" / CARD_NAME).read_bytes() == text.encode()


NASTY = [
    "---",
    "x\n---\nlicense: mit\n---\n# Free",
    "a: [b, {c: *d",
    "`code` ``more`` ```",
    "| cell | cell |",
    "<script>alert(1)</script>",
    "<!-- comment",
    "[link](https://example.org) ![image](x)",
    "**bold** _it_ ~~no~~ &amp; \\",
    "\u202egpj.exe\u200b",
    CARD_MARKER,
]


@pytest.mark.parametrize("name", NASTY)
def test_no_text_breaks_out_of_its_place(tmp_path: Path, name: str) -> None:
    plain = card_of(fuser_of("name", "name"), tmp_path / "plain", INFO)
    info = CardInfo(
        license="apache-2.0",
        training={name: name},
        datasets=["org/questions", name],
        metrics=[CardMetric(name, name, 1, {name: name})],
    )
    # Past ModelKV.from_dict, which lets in printable names only.
    text = card_of(fuser_of(name, name), tmp_path / "nasty", info)

    def metadata(card: str) -> dict:
        return yaml.safe_load(card.split("\n---\n")[0])

    assert metadata(text) == metadata(plain)
    assert re.findall(r"^#.*", text, flags=re.M)[1:] == re.findall(r"^#.*", plain, flags=re.M)[1:]
    assert len(text.splitlines()) == len(plain.splitlines()) - 3  # training 3 -> 1, metrics 2 -> 1
    body = text.partition(CARD_MARKER)[2]
    outside = re.sub(r"(`+)(?!`).*?[^`]\1(?!`)", "", body)  # inline code cannot be Markdown
    for mark in ("<script", "<!--", "[link]", "**bold", "_it_", "~~no", "&amp;"):
        assert re.search(rf"(?<!\\){re.escape(mark)}", outside) is None
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line[:1] == "|"}
    assert widths == {3, 5, 6}  # the three tables keep their columns
    assert "\u202e" not in text


def test_a_readme_of_the_users_stays(tmp_path: Path) -> None:
    fuser = fuser_of()
    (tmp_path / CARD_NAME).write_text("# Mine\n")
    fuser.save_pretrained(tmp_path)  # silent: nobody asked for a card
    with pytest.warns(UserWarning, match=r"card is not written: .*README\.md was not written by"):
        fuser.save_pretrained(tmp_path, card=INFO)
    assert (tmp_path / CARD_NAME).read_text() == "# Mine\n"
    (tmp_path / CARD_NAME).unlink()
    (tmp_path / CARD_NAME).symlink_to(tmp_path / "nowhere")
    fuser.save_pretrained(tmp_path)
    assert (tmp_path / CARD_NAME).is_symlink() and not (tmp_path / "nowhere").exists()


def test_a_card_of_ours_is_written_anew(tmp_path: Path) -> None:
    first = card_of(fuser_of(), tmp_path, INFO)
    assert card_of(fuser_of(sharer="org/other"), tmp_path) != first
    assert "apache-2.0" not in (tmp_path / CARD_NAME).read_text()
    edited = first.replace(CARD_MARKER, "")
    (tmp_path / CARD_NAME).write_text(edited)
    assert card_of(fuser_of(), tmp_path) == edited


def test_loading_ignores_the_card(tmp_path: Path) -> None:
    fuser = fuser_of()
    fuser.save_pretrained(tmp_path)
    (tmp_path / CARD_NAME).write_bytes(b"\xff---\n: [")
    loaded = Fuser.from_pretrained(tmp_path)
    assert torch.equal(loaded.groups[0].in_weight, fuser.groups[0].in_weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CardInfo(license="Apache License\n"), r"CardInfo\.license must be a licence"),
        (lambda: CardInfo(license=2), r"CardInfo\.license must be a licence"),
        (lambda: CardInfo(training=["x"]), r"CardInfo\.training must be a mapping"),
        (lambda: CardInfo(datasets="x"), r"CardInfo\.datasets must be a sequence, got 'x'"),
        (lambda: CardInfo(datasets=[1]), r"CardInfo\.datasets must hold str entries, got 1"),
        (lambda: CardInfo(metrics=[{}]), r"CardInfo\.metrics must hold CardMetric entries"),
    ],
)
def test_bad_card_info_is_refused(make: Callable[[], CardInfo], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_card_of_another_kind_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="card must be a CardInfo, got str"):
        fuser_of().save_pretrained(tmp_path / "new", card="mit")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "a/b", "org_1/x.y-z"])
def test_hub_ids_are_recognised(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "a", "a/", "/a", "./a", "../a", "a/..", "a/.b", "a/b/c", "a--b/c", "a/b.git", "é/b"),
        *("a/b\n", "a b/c", "a/" + "b" * 95, "a\\b/c", "a/b?x", "~/x", "a/b-"),
    ],
)
def test_what_is_no_hub_id_is_told_apart(name: str) -> None:
    assert not is_hub_id(name)
