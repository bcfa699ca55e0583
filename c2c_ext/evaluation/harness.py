"""EleutherAI's lm-evaluation-harness on a pair: the model type ``c2c``.

Importing this module registers it; it needs the extra ``eval``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from transformers import PreTrainedTokenizerBase

from ..chat.models import ChatModels, load_models
from ..chat.prompts import SIDES, have_same_tokens
from ..fuser import Fuser
from ..messages import shown
from ..model_kv import ModelKV
from ..position_limit import limit_of
from .modes import MODES, Item, generate, score
from .readers import EvaluationPair
from .text_to_text import T2T_PROMPT, T2T_TOKENS, Wording, write
from .texts import Texts

ROLLING_BLOCK = 64
HARNESS_DEVICE = "cuda:0"  # what its command says where nobody has named a device, GPU or not
MAX_GEN_TOKS = 256
# Names that the harness has for one setting, the one that counts first.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings that greedy decoding gives a meaning; with these values others change nothing.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0}


def evaluation_pair(models: ChatModels, identical_fuser: str | None = None) -> EvaluationPair:
    """The pair that all modes are evaluated with.

    Args:
        identical_fuser: a directory with a fuser between the receiver and itself.

    Raises:
        ValueError, OSError: that one cannot be read, or does not fit; names ``--identical-fuser``.
    """
    own = None
    if identical_fuser is not None:
        try:
            own = Fuser.from_pretrained(identical_fuser).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = str(error).removeprefix("c2c_ext: ")
            raise type(error)(f"--identical-fuser: {reason}") from error
        shapes = ModelKV.from_config(models.receiver.config)
        if problems := own.config.mismatches(shapes, shapes):
            raise ValueError(f"--identical-fuser: {problems[0]}")
        own.to(models.receiver.device)
    same = have_same_tokens(*(models.tokenizers[side] for side in SIDES))
    return EvaluationPair(models.receiver, models.sharer, models.fuser, own, same_tokens=same)


def check_generation(settings: Mapping[str, Any], task: str) -> None:
    """Raises ValueError, naming the task, unless its answers may be generated greedily."""
    drawn = settings.get("do_sample")
    warm = settings.get("temperature") or 0
    if drawn is None:
        drawn = warm != 0  # as the harness takes it
    if drawn and settings.get("temperature") != 0:
        raise ValueError(
            f"task {task}: answers are generated greedily, as a paired test of drawn ones would "
            "test the draws too, but the task asks for do_sample with temperature "
            f"{shown(settings.get('temperature', 1))}; --greedy decodes it greedily all the same"
        )
    for name, neutral in _NEUTRAL.items():
        if settings.get(name) not in (None, neutral):
            raise ValueError(
                f"task {task}: {name} must be {neutral}, as answers are generated greedily, got "
                f"{shown(settings[name])}"
            )
    limit = _new_tokens(settings)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"task {task}: max_gen_toks must be at least 1, got {shown(limit)}")


def _new_tokens(settings: Mapping[str, Any], default: int = MAX_GEN_TOKS) -> Any:
    return next((settings[name] for name in _LIMITS if settings.get(name) is not None), default)


@register_model("c2c")
class C2CModel(LM):
    """One mode of a pair as a model of the harness.

    What each model reads, also where their vocabularies differ, is `Texts`'. What is too long loses
    the beginning of its context, as usual in the harness (`truncated` counts such requests).

    Args:
        receiver, sharer, fuser, dtype, device: see `load_models`.
        mode: one of `MODES`.
        identical_fuser: a directory; see `EvaluationPair`.
        batch_size: contexts at a time, at least 1.
        wording: of ``"t2t"``; None: the usual one, with t2t_tokens and t2t_prompt.
        t2t_tokens, t2t_prompt: see `Wording`.
        max_gen_toks: of an answer, where the task does not say.
        rolling_block: rolling log-likelihoods are those of so many tokens at a time, each block
            after all earlier text: what a mode fuses is the text before a block. The first block
            has nothing before it, and is the receiver's own.
        loaded: models that are loaded already, in place of their places.
        pair: they with what they are evaluated with; None: `evaluation_pair` of them.

    Raises:
        ValueError, OSError: an argument, file or pair breaks a rule; names it.
    """

    def __init__(
        self,
        receiver: str | None = None,
        sharer: str | None = None,
        fuser: str | None = None,
        *,
        mode: str = "c2c",
        identical_fuser: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        wording: Wording | None = None,
        t2t_tokens: int = T2T_TOKENS,
        t2t_prompt: str = T2T_PROMPT,
        max_gen_toks: int = MAX_GEN_TOKS,
        rolling_block: int = ROLLING_BLOCK,
        loaded: ChatModels | None = None,
        pair: EvaluationPair | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not str(8 if batch_size is None else batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number, got {shown(batch_size)}")
        self.batch_size = 8 if batch_size is None else int(batch_size)
        for name, value in (
            ("batch_size", self.batch_size),
            ("max_gen_toks", max_gen_toks),
            ("rolling_block", rolling_block),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if device == HARNESS_DEVICE and not torch.cuda.is_available():
            device = None
        models = loaded or load_models(
            receiver, sharer, fuser, dtype=dtype, device=device or "auto"
        )
        self.pair = pair or evaluation_pair(models, identical_fuser)
        self.pair.check(mode)  # before any question has been answered
        limits = {side: limit_of(getattr(models, side)) for side in SIDES}
        self.texts = Texts(models.tokenizers, limits)
        self.tokenizer: PreTrainedTokenizerBase = models.tokenizers["receiver"]
        self.mode = mode
        self.wording = wording or Wording(prompt=t2t_prompt, tokens=int(t2t_tokens))
        self.max_gen_toks, self.rolling_block = max_gen_toks, rolling_block
        self._device = models.receiver.device
        self.written: list[int] = []  # tokens that the sharer wrote, a text each
        self.answered = 0  # tokens of answers that were generated

    @property
    def truncated(self) -> int:
        """Contexts that were too long."""
        return self.texts.truncated

    @property
    def tokenizer_name(self) -> str:
        """See `LM.tokenizer_name`."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """See `LM.chat_template`; the receiver's own."""
        return (self.tokenizer.chat_template or "") if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """See `LM.apply_chat_template`.

        Raises:
            ValueError: no template, or one that refuses the messages.
        """
        return self.texts.chat(chat_history, add_generation_prompt)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        items = []
        for request, context in zip(requests, self._contexts(requests), strict=True):
            group = (_document(request), bool(context))  # apart from options without a question
            items.append(self._item(request, context, request.args[1], group=group))
        scores = score(self._reading_mode, self.pair, items, self.batch_size)
        return [(s.log_likelihood, s.greedy) for s in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `LM.loglikelihood_rolling`, and ``rolling_block`` above.

        Raises:
            ValueError: in a mode that has none, see `rolling_refusal`.
        """
        if refused := rolling_refusal(self.mode, self.pair):
            raise ValueError(refused)
        items, owner = [], []
        for k, request in enumerate(requests):
            blocks = self.texts.blocks(
                self.mode, request.args[0], self.rolling_block, _document(request)
            )
            items += blocks
            owner += [k] * len(blocks)
        totals = [0.0] * len(requests)
        scores = score(self.mode, self.pair, items, self.batch_size)
        for k, part in zip(owner, scores, strict=True):
            totals[k] += part.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`; greedy.

        Raises:
            ValueError: a task that asks for something else, see `check_generation`.
        """
        stops, limits, items = [], [], []
        contexts = self._contexts(requests)
        for request, context in zip(requests, contexts, strict=True):
            settings = dict(request.args[1])
            check_generation(settings, request.task_name)
            until = settings.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            limits.append(min(_new_tokens(settings, self.max_gen_toks), self.texts.room))
            group = _document(request)
            items.append(self._item(request, context, None, group=group, new=limits[-1]))
        ends = {side: self._ends(side) for side in SIDES}
        if self.pair.same_tokens and self.mode in ("sharer", "routing", "ensemble"):
            ends = dict.fromkeys(SIDES, ends["receiver"] | ends["sharer"])

        def done(side: str, k: int, ids: list[int]) -> bool:
            if ids[-1] in ends[side]:
                return True
            return any(s and s in self.texts.decode(side, ids) for s in stops[k])

        said = generate(
            self._reading_mode, self.pair, items, limits, stop=done, batch_size=self.batch_size
        )
        self.answered += sum(len(answer.ids) for answer in said)
        texts = []
        for answer, until in zip(said, stops, strict=True):
            ids = [token for token in answer.ids if token not in ends[answer.side]]
            text = self.texts.decode(answer.side, ids)
            for stop in filter(None, until):
                text = text.partition(stop)[0]
            texts.append(text)
        return texts

    @property
    def _reading_mode(self) -> str:
        """After the sharer has written, the receiver reads alone."""
        return "receiver" if self.mode == "t2t" else self.mode

    def _contexts(self, requests: Sequence[Instance]) -> list[str]:
        """What the receiver reads before each answer: in mode t2t with the sharer's text."""
        contexts = [request.args[0] for request in requests]
        if self.mode != "t2t":
            return contexts
        options: dict[tuple[Hashable, str], list[str]] = defaultdict(list)
        for request in requests:
            found = options[_document(request), request.args[0]]
            if isinstance(request.args[1], str) and request.args[1] not in found:
                found.append(request.args[1])
        asked = [key for key in options if key[1]]  # without a question there is nothing to write
        tokens = min(self.wording.tokens, self.texts.room)
        prompts = []
        for key in asked:
            listed = options[key] if len(options[key]) > 1 else []
            prompt = self.wording.asked(self.texts.question(key[1]), listed)
            ids = self.texts.asked_of_sharer(prompt, key[1])
            prompts.append(self.texts.cut("sharer", ids, tokens))
        ends = sorted(self._ends("sharer"))
        said = write(self.pair, prompts, tokens, ends=ends, batch_size=self.batch_size)
        self.written += [len(ids) for ids in said]
        read = {}
        for key, ids in zip(asked, said, strict=True):
            text = self.texts.decode("sharer", ids)
            reading = self.wording.read(text, self.texts.question(key[1]))
            read[key] = self.texts.with_question(key[1], reading)
        keys = [(_document(request), request.args[0]) for request in requests]
        return [read.get(key, key[1]) for key in keys]

    def _item(self, request: Instance, *read: str | None, **settings: Any) -> Item:
        try:
            return self.texts.item(*read, document=_document(request), **settings)
        except ValueError as error:
            raise ValueError(f"task {request.task_name}: {error}") from error

    def _ends(self, side: str) -> set[int]:
        config = getattr(self.pair, side).generation_config
        ends = None if config is None else config.eos_token_id
        found = set(ends if isinstance(ends, (list, tuple)) else [ends])
        return (found | {self.texts.tokenizers[side].eos_token_id}) - {None}


def rolling_refusal(mode: str, pair: EvaluationPair) -> str | None:
    """Why a mode has no rolling log-likelihood; None: it has one."""
    if mode == "t2t":
        return "t2t: a rolling log-likelihood has no question to write about"
    if mode == "routing" and not pair.same_tokens:
        return (
            "routing: a rolling log-likelihood is of blocks of tokens, which two vocabularies cut "
            "differently"
        )
    return None


def _document(request: Instance) -> Hashable:
    return request.task_name, request.doc_id
