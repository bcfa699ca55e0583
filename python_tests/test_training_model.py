"""C2CTrainingModel against a plain loop over rows; its modes, its gradients, its state."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_good_as_plain, relative_error, reorder_hidden, same_bits, set_gates
from plain_training import Row, batch_of, logits_of, loss_of
from tiny_models import (
    RECEIVERS,
    SLIDING,
    falcon_model,
    fuser_between,
    other_sharer_model,
    receiver_model,
    sharer_model,
    trio,
)
from training_samples import ROWS, chosen_rows, gap_rows, models, ragged_rows, random_ids

from c2c_ext.training import C2CTrainingModel, GateSampler, parameter_groups
from c2c_ext.training.model import BACKENDS
from c2c_ext.training.prefill import prefill

pytestmark = pytest.mark.usefixtures("one_thread")


def hard(*trio, **settings: object) -> C2CTrainingModel:
    return C2CTrainingModel(*trio, sampler=None, **{"dropout": 0.0, **settings})


def real_logits(output, rows: list[Row]) -> list[torch.Tensor]:
    """Every row's logits without padding."""
    return [
        output.logits[i, : len(row.ids) - row.prompt + 1].detach() for i, row in enumerate(rows)
    ]


def gradients(fuser) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in fuser.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradients_equal_the_plain_loop(name, side, backend):
    receiver, sharer, fuser = models()
    rows = ROWS[name]()
    model = hard(receiver, sharer, fuser, backend=backend)
    output = model(**batch_of(rows, side, extra=2))
    output.loss.backward()
    ours = gradients(fuser)
    fuser.zero_grad()
    expected = loss_of(receiver, sharer, fuser, rows)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for i, row in enumerate(rows):
        truth = logits_of(receiver, sharer, fuser, row).detach()
        assert relative_error(real_logits(output, rows)[i], truth) <= 1e-12
    if name == "single_tokens":
        assert not expected.requires_grad  # nothing is fused
        assert all(g is None or not g.any() for g in ours.values())
        return
    expected.backward()
    for parameter, grad in gradients(fuser).items():
        if "gate_logit" in parameter:
            assert ours[parameter] is None  # hard gates
        else:
            assert relative_error(ours[parameter], grad) <= 1e-10 and grad.any(), parameter
    with torch.no_grad():
        set_gates(fuser, {}, -1.0)
        closed = model(**batch_of(rows, side)).loss
    assert abs(closed - expected).item() > 1e-3  # the fusion shows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_as_good_as_the_plain_loop(dtype):
    rows = ragged_rows()
    trio_ = models(dtype=dtype)
    wide = [copy.deepcopy(m).double() for m in trio_]
    with torch.no_grad():
        output = hard(*trio_)(**batch_of(rows, "left"))
        assert output.logits.dtype == dtype and output.loss.dtype == torch.float32
        ours = torch.cat([x.flatten() for x in real_logits(output, rows)])

        def plain(receiver, sharer, fuser) -> torch.Tensor:
            return torch.cat([logits_of(receiver, sharer, fuser, row).flatten() for row in rows])

        fusers = [trio_[2], *(reorder_hidden(trio_[2], seed) for seed in range(3))]
        draws = [plain(*trio_[:2], fuser) for fuser in fusers]
        truth = plain(*wide)
    assert_as_good_as_plain(ours, draws, truth, "logits")


@pytest.mark.parametrize("kind", RECEIVERS)
def test_other_receivers_equal_the_plain_loop(kind):
    """Receivers with sliding windows shorter than the prompt among them.

    In float32, since some of them compute in nothing wider; a window that is off by one token moves
    logits by more than a tenth.
    """
    trio_ = models(kind, torch.float32)
    rows = ragged_rows()
    with torch.no_grad():
        output = hard(*trio_, prefill_chunk=4)(**batch_of(rows, "right"))
        for row, ours in zip(rows, real_logits(output, rows), strict=True):
            assert relative_error(ours, logits_of(*trio_, row)) <= 1e-5
        assert output.loss.item() == pytest.approx(loss_of(*trio_, rows).item(), rel=1e-5)
    if kind in SLIDING:
        for module in trio_[0].modules():  # the plain loop sees the window
            if getattr(module, "sliding_window", None):
                module.sliding_window -= 1
        trio_[0].config.sliding_window -= 1
        with torch.no_grad():
            wrong = logits_of(*trio_, rows[0])
        assert relative_error(real_logits(output, rows)[0], wrong) > 0.05


def test_other_sharer_equals_the_plain_loop():
    receiver, sharer = receiver_model().double(), other_sharer_model().double()
    fuser = fuser_between(receiver, sharer).double()
    rows = ragged_rows()
    loss = hard(receiver, sharer, fuser)(**batch_of(rows, "left")).loss
    assert loss.item() == pytest.approx(loss_of(receiver, sharer, fuser, rows).item(), rel=1e-12)


VARIANTS = {
    "values": {"kinds": ("value",)},
    "no_gate": {"gate": False},
    "replacement": {"integration": "replacement"},
    "linear": {"projection": "linear"},
    "transformer": {"projection": "transformer", "attention_heads": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_plain_loop(variant):
    receiver, sharer, fuser = models(**VARIANTS[variant])
    rows = ragged_rows()
    model = C2CTrainingModel(receiver, sharer, fuser, sampler=GateSampler(), dropout=0.0).eval()
    loss = model(**batch_of(rows, "left")).loss
    assert loss.item() == pytest.approx(loss_of(receiver, sharer, fuser, rows).item(), rel=1e-12)
    model.train()
    model(**batch_of(rows, "left")).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fuser.parameters())


def soft_gates(fuser, noise, temperature: float) -> list:
    """Binary concrete gates from uniform noise [layers, kinds, b, h, n], written out."""
    (group,) = fuser.groups
    return [
        tuple(
            torch.sigmoid((group.gate_logit[2 * layer + i] + (u / (1 - u)).log()) / temperature)[
                ..., None
            ]
            for i, u in enumerate(pair)
        )
        for layer, pair in enumerate(noise)
    ]


@pytest.mark.parametrize("per", ["stream", "token"])
def test_soft_gates_follow_the_samples(per):
    receiver, sharer, fuser = models()
    sampler = GateSampler(per=per, start=0.8, end=0.1, steps=10)
    model = C2CTrainingModel(receiver, sharer, fuser, sampler=sampler, dropout=0.0, seed=11)
    model.step = 5
    rows, ids = ragged_rows(), [40, 7, 2**50, 0]
    for row, sample in zip(rows, ids, strict=True):
        noise = sampler.noise(fuser, 1, row.prompt - 1, 11, step=5, sample_ids=[sample])
        row.gates = soft_gates(fuser, noise, sampler.temperature(5))
    for side, order in itertools.product(("left", "right"), ([0, 1, 2, 3], [2, 3, 1, 0], [1])):
        batch = batch_of([rows[i] for i in order], side)
        fuser.zero_grad()
        loss = model(**batch, sample_ids=torch.tensor([ids[i] for i in order])).loss
        loss.backward()
        ours = gradients(fuser)
        fuser.zero_grad()
        expected = loss_of(receiver, sharer, fuser, [rows[i] for i in order])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        expected.backward(retain_graph=True)
        for name, grad in gradients(fuser).items():
            assert relative_error(ours[name], grad) <= 1e-10 and grad.any(), name
    before = model(**batch, sample_ids=[7]).loss
    model.step = 6
    assert model(**batch, sample_ids=[7]).loss != before
    model.eval()
    for row in rows:
        row.gates = None
    expected = loss_of(receiver, sharer, fuser, [rows[1]])
    assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_rows_do_not_see_their_neighbours():
    """In float32, where padding to another length may move a rounding and nothing else."""
    trio_ = models(dtype=torch.float32)
    model = hard(*trio_)
    rows = ragged_rows()
    with torch.no_grad():
        together = real_logits(model(**batch_of(rows, "right")), rows)
        for i, row in enumerate(rows):
            alone = real_logits(model(**batch_of([row], "left")), [row])[0]
            assert relative_error(together[i], alone) <= 1e-5
        changed = [Row(random_ids(len(r.ids), 99 + i), r.prompt) for i, r in enumerate(rows)]
        changed[2] = rows[2]
        others = real_logits(model(**batch_of(changed, "right")), changed)
        assert same_bits(others[2], together[2])
        assert not torch.equal(others[0], together[0])


def test_what_padding_holds_reaches_nothing():
    trio_ = models(dtype=torch.float32)
    model, rows = hard(*trio_), ragged_rows()
    batch = batch_of(rows, "left", extra=3)
    with torch.no_grad():
        expected = model(**batch).loss
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 10**6, batch["input_ids"])
        assert same_bits(model(**batch).loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences_of_the_whole_loss(backend):
    # Unlike most, Falcon computes in float64 throughout.
    receiver, sharer = falcon_model().double(), sharer_model().double()
    fuser = fuser_between(receiver, sharer).double()
    sampler = GateSampler(per="token", start=0.7)
    model = C2CTrainingModel(
        receiver, sharer, fuser, sampler=sampler, dropout=0.1, seed=3, backend=backend
    )
    model.step = 2
    batch = {**batch_of(chosen_rows(), "left"), "sample_ids": [3, 1, 4, 15]}
    model(**batch).loss.backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in fuser.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
                losses.append(model(**batch).loss)
                parameter.sub_(direction, alpha=sign * 1e-5)
        slope = (losses[0] - losses[1]).item() / 2e-5
        expected = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-9), name
        assert abs(expected) > 1e-5, name


def test_gradients_reach_the_fuser_alone():
    receiver, sharer, fuser = trio()
    receiver.train().requires_grad_(True)
    sharer.train()
    model = C2CTrainingModel(receiver, sharer, fuser, sampler=GateSampler())
    assert fuser.training and model.training
    for again in (model.train, lambda: model.train(False), model.requires_grad_, model.train):
        again()
        assert not any(m.training for frozen in (receiver, sharer) for m in frozen.modules())
        assert not any(
            p.requires_grad for frozen in (receiver, sharer) for p in frozen.parameters()
        )
        assert fuser.training == model.training
        assert all(p.requires_grad for p in fuser.parameters())
    batch = batch_of(ragged_rows(), "right")
    model(**batch).loss.backward()
    assert all(p.grad is None for frozen in (receiver, sharer) for p in frozen.parameters())
    assert all(p.grad.any() for p in fuser.parameters())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def test_state_is_the_fusers():
    receiver, sharer, fuser = trio()
    model = hard(receiver, sharer, fuser)
    state = model.state_dict()
    assert state.keys() == fuser.state_dict().keys()
    other = hard(receiver_model(), sharer_model(), fuser_between(receiver, sharer, gate_init=3.0))
    other.load_state_dict(state)
    assert other.fuser.groups[0].gate_logit.tolist() == [1.0] * 6
    wrapped = torch.nn.ModuleDict({"inner": model})
    assert wrapped.state_dict().keys() == {f"inner.{name}" for name in state}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing_gives_the_same_gradients(recompute, backend):
    receiver, sharer, fuser = models("gemma2", torch.float32)
    model = C2CTrainingModel(
        receiver,
        sharer,
        fuser,
        sampler=GateSampler(),
        dropout=0.2,
        recompute=recompute,
        backend=backend,
    )
    batch = {**batch_of(ragged_rows(), "left"), "sample_ids": [1, 2, 3, 4]}

    def run() -> dict:
        fuser.zero_grad()
        output = model(**batch)
        output.loss.backward()
        return {"loss": output.loss.detach(), **gradients(fuser)}

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    counts = [0]
    receiver.model.layers[1].mlp.register_forward_hook(
        lambda *_: counts.__setitem__(0, counts[0] + 1)
    )
    again = run()
    assert counts[0] == 3  # prefill, forward, backward
    for name, expected in plain.items():
        assert same_bits(again[name], expected), name
    assert not any("forward" in vars(m) for m in receiver.modules())
    model.activation_checkpointing_disable()
    run()
    assert counts[0] == 5


def test_checkpointing_leaves_nothing_behind_an_error():
    receiver, sharer, fuser = trio()
    model = hard(receiver, sharer, fuser)
    model.activation_checkpointing_enable()

    def fail(*_: object) -> None:
        raise KeyError("broken layer")

    own = receiver.model.layers[0].forward  # as tools that wrap a model's layers set it
    receiver.model.layers[0].forward = own
    receiver.model.norm.register_forward_hook(fail)
    model._clean = lambda role, *_: [  # the prefill would fail first
        tuple(torch.zeros(1, s.num_heads, 4, s.head_dim) for _ in range(2))
        for s in getattr(fuser.config, role).layers
    ]
    with pytest.raises(KeyError, match="broken layer"):
        model(**batch_of([Row(random_ids(9, 0), 5)], "left"))
    assert vars(receiver.model.layers[0])["forward"] is own
    assert not any("forward" in vars(layer) for layer in receiver.model.layers[1:])


def test_checkpointing_refuses_what_it_cannot_do():
    model = hard(*trio())
    for kwargs in ({"use_reentrant": True}, {"context_fn": None}):
        with pytest.raises(ValueError, match=r"must be none or {'use_reentrant': False}, got"):
            model.gradient_checkpointing_enable(kwargs)
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_prefill_equals_whole_prefill(kind, chunk):
    trio_ = models(kind)
    batch = batch_of(ragged_rows(), "left")
    with torch.no_grad():
        whole = hard(*trio_)(**batch).loss
        calls = []
        trio_[1].model.register_forward_hook(lambda *_: calls.append(1))
        chunked = hard(*trio_, prefill_chunk=chunk)(**batch).loss
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-12)
    assert len(calls) == -(-11 // chunk)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_keeps_less_for_the_backward(backend):
    trio_ = models(dtype=torch.float32)
    batch = batch_of([Row(random_ids(60, i), 58) for i in range(4)], "left")
    kept = []
    for recompute in (False, True):
        model = hard(*trio_, recompute=recompute, backend=backend)
        saved = {}

        def pack(t: torch.Tensor, saved: dict = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**batch).loss
        kept.append(sum(saved.values()))
        loss.backward()
    assert kept[1] < 0.7 * kept[0]


def test_prefills_record_no_gradients():
    model = receiver_model()
    ids = random_ids(5, 0)[None]
    assert all(p.requires_grad for p in model.parameters())
    pairs = prefill(model, ids, torch.ones_like(ids) > 0, "receiver")
    assert not any(t.requires_grad for pair in pairs for t in pair)


def test_a_model_without_a_cache_is_an_error():
    model = receiver_model().train()
    enable = "activation_checkpointing_enable"  # by its older name in older versions
    enable = enable if hasattr(model, enable) else "gradient_checkpointing_enable"
    getattr(model, enable)()  # transformers drops the cache then
    ids = random_ids(5, 0)[None]
    with pytest.raises(RuntimeError, match=r"the sharer \(Qwen3ForCausalLM\) kept no cache of the"):
        prefill(model, ids, torch.ones_like(ids) > 0, "sharer")


def test_dropout_is_keyed_by_step_and_samples():
    trio_ = models()
    model = hard(*trio_, dropout=0.3, seed=5)
    batch = {**batch_of(ragged_rows(), "left"), "sample_ids": [1, 2, 3, 4]}
    with torch.no_grad():
        state = torch.get_rng_state()
        first = model(**batch).loss
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(123)
        assert same_bits(model(**batch).loss, first)
        for changed in ({"sample_ids": [9, 2, 3, 4]}, {"step": 1}, {"seed": 6}):
            model.step, model.seed = changed.pop("step", 0), changed.pop("seed", 5)
            assert not same_bits(model(**{**batch, **changed}).loss, first)
        model.step, model.seed = 0, 5
        other = model(**{**batch, "sample_ids": [9, 2, 3, 4]}).logits
        rows = zip(other, model(**batch).logits, strict=True)
        assert [same_bits(a, b) for a, b in rows] == [False, True, True, True]
        del batch["sample_ids"]  # then the default generator's
        model.step, model.seed = 0, 5
        torch.manual_seed(0)
        drawn = [model(**batch).loss for _ in range(2)]
        torch.manual_seed(0)
        assert same_bits(model(**batch).loss, drawn[0]) and not same_bits(*drawn)
        model.eval()
        plain = hard(*trio_).eval()(**batch).loss
        assert same_bits(model(**batch).loss, plain)


def test_default_dropout_is_the_fusers():
    receiver, sharer = receiver_model(), sharer_model()
    fuser = fuser_between(receiver, sharer, dropout=0.25)
    assert C2CTrainingModel(receiver, sharer, fuser, sampler=None).dropout == 0.25


def test_loss_is_divided_by_what_the_trainer_counts():
    model, rows = hard(*models()), gap_rows()
    batch = batch_of(rows, "right")
    output = model(**batch)
    count = int((batch["labels"] != -100).sum())
    assert int((output.targets != -100).sum()) == count
    expected = F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-14)
    for items in (8, torch.tensor(8)):
        loss = model(**batch, num_items_in_batch=items).loss
        assert loss.item() == pytest.approx(output.loss.item() * count / 8, rel=1e-12)


def test_without_labels_the_row_is_prompt():
    receiver, sharer, fuser = models()
    ids = random_ids(7, 0)
    output = hard(receiver, sharer, fuser)(ids[None])
    assert output.loss is None and (output.targets == -100).all()
    expected = logits_of(receiver, sharer, fuser, Row(ids, 7))
    assert relative_error(output.logits[0].detach(), expected.detach()) <= 1e-12


@pytest.mark.parametrize("settings", [{}, {"recompute": True}])
def test_nothing_to_fuse_gives_zero_gradients(settings):
    """As other processes need: every parameter takes part in every step."""
    model = C2CTrainingModel(*trio(), sampler=GateSampler(per="token"), **settings)
    model.gradient_checkpointing_enable()
    batch = batch_of([Row(random_ids(n, n), 1) for n in (4, 7)], "left")
    output = model(**batch, sample_ids=[0, 1])
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(not p.grad.any() for p in model.fuser.parameters())
    rows = ragged_rows()
    for row in rows[:3]:
        row.columns = torch.zeros(row.prompt - 1, dtype=torch.bool)
    model.zero_grad()
    output = model(**batch_of(rows, "left"), sample_ids=[0, 1, 2, 3])
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(not p.grad.any() for p in model.fuser.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_models_train_a_float32_fuser(dtype):
    receiver, sharer, fuser = models(dtype=dtype)
    model = C2CTrainingModel(receiver, sharer, fuser, sampler=GateSampler())
    loss = model(**batch_of(ragged_rows(), "left")).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in fuser.parameters())


def test_autocast_trains_a_float32_fuser():
    receiver, sharer, fuser = models(dtype=torch.float32)
    model = C2CTrainingModel(receiver, sharer, fuser, sampler=GateSampler())
    batch = batch_of(ragged_rows(), "left")
    exact = model(**batch).loss
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert 0 < abs(loss.item() - exact.item()) < 0.1 * exact.item()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in fuser.parameters())


def test_parameter_groups():
    _, _, fuser = trio()
    decayed, kept = parameter_groups(fuser, 0.01)
    assert decayed["weight_decay"] == 0.01 and kept["weight_decay"] == 0.0
    names = {id(p): name.rpartition(".")[2] for name, p in fuser.named_parameters()}
    assert {names[id(p)] for p in kept["params"]} == {
        "gate_logit",
        "shared_norm",
        "proj_norm",
        "weight_norm",
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    for p in kept["params"]:
        p.requires_grad_(False)
    assert len(parameter_groups(fuser, 0.01)) == 1
    with pytest.raises(
        ValueError, match=r"must be float32 or float64 .* its .* is torch\.bfloat16"
    ):
        parameter_groups(fuser.bfloat16(), 0.01)


def test_an_optimizer_lowers_the_loss():
    torch.manual_seed(0)
    model = C2CTrainingModel(*trio(), sampler=GateSampler(steps=20), dropout=0.0)
    optimizer = torch.optim.AdamW(parameter_groups(model.fuser, 0.01), lr=3e-3)
    batch = batch_of(ragged_rows(), "left")
    losses = []
    for step in range(30):
        model.step = step
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
