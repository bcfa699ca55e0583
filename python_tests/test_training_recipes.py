"""Recipes: the write-ups' settings, YAML files, and one clear error for every wrong setting."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny_models

from c2c_ext.cli import main
from c2c_ext.config import FuserConfig
from c2c_ext.training.recipes import PUBLISHED, RECIPES, Recipe, load_recipe, parse_value
from c2c_ext.training.sweep import load_variants

DOCS = Path(__file__).parent.parent / "docs" / "training.md"


def test_the_published_setting_is_the_default() -> None:
    assert load_recipe("published") == Recipe()
    expected = {
        "lr": 1e-4,
        "schedule": "linear",
        "warm_up": 0.1,
        "weight_decay": 0.01,
        "clip": 1.0,
        "hidden_size": 1024,
        "depth": 3,
        "dropout": 0.1,
        "anneal_steps": 1929,
        "temperature_start": 1.0,
        "temperature_end": 0.001,
        "batch": 256,
        "max_tokens": 2048,
        "seed": 42,
    }
    assert {name: getattr(PUBLISHED, name) for name in expected} == expected
    # 500,000 samples of which 1% was held out, in batches of 256.
    assert PUBLISHED.steps(493_824) == 1929


def test_the_secondary_write_up_differs_as_it_says() -> None:
    recipe = load_recipe("write-up")
    assert (recipe.lr, recipe.batch, recipe.hidden_size) == (1e-3, 32, 512)
    assert (recipe.activation, recipe.dropout, recipe.layer_map) == ("relu", 0.1, "depth")
    assert recipe.reads == "sharer"


@pytest.mark.parametrize("name", ["published", "write-up"])
def test_a_recipe_makes_a_fuser(name: str) -> None:
    receiver, sharer = tiny_models.receiver_model(), tiny_models.sharer_model()
    config = replace(RECIPES[name], hidden_size=8).fuser_config(receiver.config, sharer.config)
    assert config.hidden_size == config.intermediate_size == 8
    assert config.activation == RECIPES[name].activation


def test_a_yaml_file_changes_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "base: tiny\nlr: 1e-3\nbatch: 64\nmicro_batch: 64\nlayer_map: [0, 1, 2]\n"
        "intermediate_size: null\nwarm_up: 0\nreport_to: [tensorboard, wandb]\n"
    )
    expected = replace(
        RECIPES["tiny"],
        lr=0.001,  # YAML reads 1e-3 as a string
        batch=64,
        micro_batch=64,
        layer_map=[0, 1, 2],
        warm_up=0.0,
        report_to=["tensorboard", "wandb"],
    )
    recipe = load_recipe(path)
    assert recipe == expected and type(recipe.lr) is float and type(recipe.warm_up) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key learning_rate; known are layer_map, hidden_size"),
        ("1: 2", "unknown key 1; known"),
        ("lr: high", "lr must be of type float, got 'high'"),
        ("lr: .nan", "lr must be of type float, got nan"),
        ("lr: [1]", r"lr must be of type float, got \[1\]"),
        ("lr: 0", "lr must be above 0, got 0"),
        ("lr: -1", "lr must be in 0..1000, got -1.0"),
        ("batch: 1.5", "batch must be of type int, got 1.5"),
        ("batch: true", "batch must be of type int, got True"),
        ("batch: '8'", "batch must be of type int, got '8'"),
        ("batch: 0", "batch must be in 1..1.67772e.07, got 0"),
        ("kinds: key", r"kinds must be of type list\[str\] or null, got 'key'"),
        ("gate: 0.5", "gate must be of type bool, got 0.5"),
        ("truncate: 1", "truncate must be of type bool, got 1"),
        ("layer_map: [1, x]", r"layer_map must be of type str or list\[int\], got \[1, 'x'\]"),
        ("layer_map: first", "layer_map must be one of last_aligned, k_nearest, depth or a list"),
        ("schedule: step", "schedule must be one of linear, cosine, got 'step'"),
        ("report_to: [tensorboard, x]", "report_to must be of none, tensorboard, wandb, got 'x'"),
        ("dtype: fp16", "dtype must be one of fp32, bf16, got 'fp16'"),
        ("temperature_end: 0", "end must be above 0"),
        ("gate_sampler: soft", "kind must be one of logistic, gumbel"),
        ("anneal_steps: 0", "steps must be an integer of at least 1"),
        ("beta2: 1", "beta2 must be below 1, got 1"),
        ("epochs: 0", "epochs or max_steps must be above 0"),
        ("base: best", "base must be one of published, write-up, tiny, got 'best'"),
        ("- lr", "must be a mapping of settings, got list"),
        ("", "must be a mapping of settings, got NoneType"),
        ("lr: [", "is not valid YAML"),
        ("lr: 1\nbatch: 8\nlr: 2", "is not valid YAML: duplicate keys: lr"),
        ("lr: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a cons"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_selects_every_variant_of_a_fuser() -> None:
    receiver, sharer = tiny_models.receiver_model(), tiny_models.sharer_model()

    def config(**changes: object) -> FuserConfig:
        recipe = replace(PUBLISHED, hidden_size=8, **changes)
        return recipe.fuser_config(receiver.config, sharer.config)

    assert config(kinds=["value"], gate=False, weighting=False).variant() == {
        "kinds": ("value",),
        "weighting": False,
        "gate": False,
    }
    assert config().variant() == {} and not config(projection="linear").weighting
    with pytest.raises(ValueError, match="kinds must be"):
        config(kinds=["gate"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold 1 to 64 variants, these are 0"),
        ("- a", "must be a mapping of settings, got list"),
        ("1: {}", "a variant must have a printable name, got 1"),
        ("' ': {}", "a variant must have a printable name, got ' '"),
        ("a: 3", "a must be a mapping of settings, got 3"),
        ("a: {dtype: bf16}", "a: 'dtype' cannot be swept; what can is lr, schedule"),
        ("a: {}\nb: {lr: 0}", "b: recipe: lr must be above 0"),
        ("a: {}\na: {lr: 1}", "duplicate keys: a"),
    ],
)
def test_a_wrong_file_of_variants_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_variants(path, PUBLISHED)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_neither_name_nor_file_lists_the_names() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe of that name \(published, write-up, t"):
        load_recipe("nothing")


def test_a_batch_is_divided_over_passes_and_processes() -> None:
    recipe = replace(PUBLISHED, batch=24, micro_batch=4)
    assert recipe.micro_batches() == (4, 6)
    assert recipe.micro_batches(2) == (4, 3)
    assert replace(recipe, micro_batch=64).micro_batches(3) == (8, 1)
    with pytest.raises(ValueError, match="batch must be a multiple of the 5 processes, got 24"):
        recipe.micro_batches(5)
    with pytest.raises(ValueError, match=r"batch \(24\) must be a multiple of micro_batch \(5\)"):
        replace(recipe, micro_batch=5).micro_batches()


if DOCS.exists():  # not where the suite runs beside an installed package

    def test_every_field_is_documented_with_its_default() -> None:
        rows = re.findall(
            r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \| [^|]+ \|$", DOCS.read_text(), re.M
        )
        documented = {}
        for names, defaults in rows:
            names, defaults = re.findall(r"\w+", names), defaults.split(", ")
            documented |= dict(zip(names, defaults, strict=len(defaults) > 1))
            if len(defaults) == 1:
                documented |= dict.fromkeys(names, defaults[0])
        parsed = Recipe().changed({name: parse_value(text) for name, text in documented.items()})
        assert documented.keys() == {f.name for f in fields(Recipe)} and parsed == Recipe()

    def test_every_option_of_the_command_is_documented(capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            main(["train", "--help"])
        options = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) - {"--help"}
        table = DOCS.read_text().partition("## Options of the command")[2].partition("\n## ")[0]
        rows = [line.partition(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
        assert {name for row in rows for name in re.findall(r"--[\w-]+", row)} == options
