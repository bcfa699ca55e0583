"""What of a prompt was fused, and its heat map: the right numbers, and nothing that is rendered."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch
from chat_models import chat_models
from conftest import set_gates
from local_tokenizers import letter_tokenizer, word_tokenizer
from transformers import DynamicCache

from c2c_ext import TokenAligner
from c2c_ext.chat import heat_map as drawing
from c2c_ext.chat.fused_prompt import FusedPrompt, fused_prompt
from c2c_ext.chat.heat_map import HEADS, MEAN, caption, heat_map, usual_view
from c2c_ext.chat.models import load_models
from c2c_ext.weights import LayerWeights, fusion_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def cache_of(model: torch.nn.Module, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("letters", [False, True])
def test_the_weights_are_those_of_the_prompts_own_fusion(letters: bool) -> None:
    models = chat_models(None, letter_tokenizer() if letters else None)
    messages = asked("w3 w14")
    prompt = fused_prompt(models, messages)
    ids = models.prompts.encode("receiver", messages)
    theirs, token_map = ids[:, :-1], torch.arange(ids.shape[1])
    if letters:
        aligner = TokenAligner(models.tokenizers["receiver"], models.tokenizers["sharer"])
        inputs = aligner.apply_chat_template(messages).sharer_inputs
        theirs, token_map = inputs["input_ids"], inputs["token_map"][0]
    assert prompt.token_map == [*token_map.tolist()[:-1], -1]
    assert prompt.receiver_tokens == [models.tokenizers["receiver"].decode([i]) for i in ids[0]]
    assert prompt.sharer_tokens == [models.tokenizers["sharer"].decode([i]) for i in theirs[0]]
    caches = cache_of(models.receiver, ids[:, :-1]), cache_of(models.sharer, theirs)
    expected = fusion_weights(*caches, models.fuser, token_map[:-1])
    for ours, theirs_ in zip(prompt.layers, expected, strict=True):
        for kind in ("key", "value"):
            torch.testing.assert_close(getattr(ours, kind), getattr(theirs_, kind), equal_nan=True)


def test_the_shipped_pair_fuses_the_forms_attributes() -> None:
    models = load_models()
    prompt = fused_prompt(models, asked("Corbin : metal drink colour question : is metal"))
    assert prompt.token_map == [-1, -1, -1, 3, 4, 5, -1, -1, -1, -1]
    assert prompt.receiver_tokens[3:6] == ["metal", "drink", "colour"]
    assert [x.key.shape for x in prompt.layers] == [(1, 4, 9)] * 3
    assert caption(prompt) == "3 of 10 prompt tokens are fused (the last one never is)."
    assert usual_view(models.fuser.config) == HEADS


def make_prompt(tokens: list[str]) -> FusedPrompt:
    """Two layers of two heads, key weights 0 to 1; the second layer's value gate is closed."""
    count = len(tokens) - 1
    steps = torch.linspace(0, 1, 2 * count).view(1, 2, count)
    layers = [LayerWeights(steps, steps, True, True), LayerWeights(steps, steps, True, False)]
    return FusedPrompt(tokens, tokens, [*range(count), -1], layers)


@pytest.mark.parametrize(("view", "rows"), [(HEADS, 4), (MEAN, 2)])
def test_every_cell_says_its_number(view: str, rows: int) -> None:
    tree = ElementTree.fromstring(heat_map(make_prompt(["a", "b", "c"]), view))
    titles = [element.text for element in tree.iter() if element.tag.endswith("title")]
    assert len(titles) == 2 * rows * 3
    assert sum(title.endswith("not fused") for title in titles) == 2 * rows
    closed = [title for title in titles if "closed" in title]
    assert len(closed) == rows and all("layer 1" in t and ", value," in t for t in closed)
    if view == HEADS:
        assert "layer 0, head 1, key, b: 1.000" in titles
        assert "layer 0, head 0, key, b: 0.333" in titles
    else:
        assert "layer 0, key, a: 0.333" in titles
    fills = {title.split(": ")[1]: rect.get("fill") for rect, title in cells(tree)}
    if view == HEADS:
        assert fills["0.000"] == "#edf4fb" and fills["1.000"] == "#08306b"
        assert fills["1.000, but the gate is closed"] == "url(#closed)"


def cells(tree: ElementTree.Element) -> list[tuple[ElementTree.Element, str]]:
    return [(rect, rect[0].text) for rect in tree.iter() if len(rect) and "title" in rect[0].tag]


def test_labels_units_and_scale_are_there() -> None:
    text = " ".join(ElementTree.fromstring(heat_map(make_prompt(["a", "b"]), HEADS)).itertext())
    for label in (
        *("Keys", "Values", "receiver token", "sharer token", "layer 1, head 1", "0.25", "0.75"),
        *("dynamic weight (sigmoid, no unit)", "token not fused", "gate closed"),
    ):
        assert label in text


def test_tokens_are_escaped_and_made_visible() -> None:
    svg = heat_map(make_prompt(["<script>", "'&\"", " \n\x1b", "x" * 50, "z"]), HEADS)
    tree = ElementTree.fromstring(svg)  # well-formed
    assert not [e for e in tree.iter() if e.tag.endswith("script")]
    text = " ".join(tree.itertext())
    assert "<script>" in text and "·⏎␛" in text and "x" * 13 + "…" in text
    assert "\x1b" not in svg


def test_a_long_prompt_shows_its_end() -> None:
    prompt = make_prompt([f"t{i}" for i in range(drawing.MAX_TOKENS + 20)])
    svg = heat_map(prompt, MEAN)
    assert ", t19:" not in svg and ", t20:" in svg
    assert caption(prompt).endswith(f"; the last {drawing.MAX_TOKENS} are shown.")
    assert len(re.findall("<title>", svg)) == 2 * 2 * drawing.MAX_TOKENS


def test_closed_gates_of_a_real_fuser_are_hatched() -> None:
    models = chat_models(word_tokenizer(), word_tokenizer())
    set_gates(models.fuser, {(0, "key"): -1.0})
    svg = heat_map(fused_prompt(models, asked("w3 w14")), MEAN)
    closed = re.findall(r"<title>(layer \d), (\w+), [^<]*the gate is closed</title>", svg)
    assert set(closed) == {("layer 0", "key")}
