"""EleutherAI's lm-evaluation-harness on a pair: the model type ``c2c``.

Importing this module registers it; it needs the extra ``eval``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from transformers import PreTrainedTokenizerBase

from ..chat.models import ChatModels, load_models
from ..chat.prompts import have_same_tokens
from ..fuser import Fuser
from ..position_limit import limit_of
from .modes import MODES, Item, generate, score
from .readers import EvaluationPair
from .text_to_text import Wording, write

MAX_LENGTH = 2048  # where neither model has a bound
ROLLING_BLOCK = 64


@register_model("c2c")
class C2CModel(LM):
    """One mode of a pair as a model of the harness.

    Both models must have one vocabulary: they read the same token ids. What is too long loses the
    beginning of its context, as usual in the harness (`truncated` counts such requests).

    Args:
        receiver, sharer, fuser, dtype, device: see `load_models`.
        mode: one of `MODES`.
        identical_fuser: a directory; see `EvaluationPair`.
        batch_size: contexts at a time, at least 1.
        wording: of ``"t2t"``.
        max_gen_toks: of an answer, where the task does not say.
        rolling_block: rolling log-likelihoods are those of so many tokens at a time, each block
            after all earlier text: what a mode fuses is the text before a block. The first block
            has nothing before it, and is the receiver's own.
        loaded: models that are loaded already, in place of their places.

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
        max_gen_toks: int = 256,
        rolling_block: int = ROLLING_BLOCK,
        loaded: ChatModels | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.batch_size = 8 if batch_size is None else int(batch_size)
        for name, value in (
            ("batch_size", self.batch_size),
            ("max_gen_toks", max_gen_toks),
            ("rolling_block", rolling_block),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        models = loaded or load_models(
            receiver, sharer, fuser, dtype=dtype, device=device or "auto"
        )
        if not have_same_tokens(*(models.tokenizers[side] for side in ("receiver", "sharer"))):
            raise ValueError(
                "evaluation needs two models that read the same token ids; these tokenizers differ"
            )
        own = None
        if identical_fuser is not None:
            own = Fuser.from_pretrained(identical_fuser).eval().requires_grad_(False)
            own.to(models.receiver.device)
        self.pair = EvaluationPair(models.receiver, models.sharer, models.fuser, own)
        if mode == "identical":
            self.pair.fuser_of(mode)  # before any question has been answered
        self.tokenizers = models.tokenizers
        self.tokenizer: PreTrainedTokenizerBase = models.tokenizers["receiver"]
        self.mode, self.wording = mode, wording or Wording()
        self.max_gen_toks, self.rolling_block = max_gen_toks, rolling_block
        limits = [limit_of(models.receiver), limit_of(models.sharer)]
        self.max_length = min([limit for limit in limits if limit is not None], default=MAX_LENGTH)
        self._device = models.receiver.device
        self._chats: dict[str, list[dict[str, str]]] = {}
        self.truncated = 0
        self.written: list[int] = []  # tokens that the sharer wrote, a text each

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
            ValueError: the receiver has no template.
        """
        text = self._render("receiver", chat_history, add_generation_prompt)
        self._chats[text] = [dict(message) for message in chat_history]
        return text

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        contexts = self._contexts(requests)
        items = []
        for request, context in zip(requests, contexts, strict=True):
            start, rest = self._split(context, request.args[1])
            document = _document(request)
            group = (document, bool(context))  # apart from the options without their question
            items.append(Item(self._cut(start, len(rest)), tuple(rest), group, document))
        mode = "receiver" if self.mode == "t2t" else self.mode
        return [
            (s.log_likelihood, s.greedy) for s in score(mode, self.pair, items, self.batch_size)
        ]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `LM.loglikelihood_rolling`, and ``rolling_block`` above.

        Raises:
            ValueError: in mode t2t, which has no question to write about.
        """
        if self.mode == "t2t":
            raise ValueError("t2t: a rolling log-likelihood has no question to write about")
        size = min(self.rolling_block, self.max_length)
        items, owner = [], []
        for k, request in enumerate(requests):
            ids = [self._first(), *self._encode(request.args[0], special=False)]
            for start in range(1, len(ids), size):
                block = tuple(ids[start : start + size])
                context = tuple(ids[:start][-max(self.max_length - len(block), 1) :])
                document = _document(request)
                items.append(Item(context, block, (document, start), document))
                owner.append(k)
        totals = [0.0] * len(requests)
        scores = score(self.mode, self.pair, items, self.batch_size)
        for k, part in zip(owner, scores, strict=True):
            totals[k] += part.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`; greedy.

        Raises:
            ValueError: a task that asks for sampling.
        """
        stops, limits, items = [], [], []
        for request, context in zip(requests, self._contexts(requests), strict=True):
            settings = dict(request.args[1])
            if settings.get("do_sample") and settings.get("temperature") != 0:
                raise ValueError(
                    f"task {request.task_name}: answers are generated greedily, but the task asks "
                    "for do_sample"
                )
            until = settings.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            limits.append(min(int(settings.get("max_gen_toks", self.max_gen_toks)), self._room()))
            ids = self._encode(context) or [self._first()]
            document = _document(request)
            items.append(Item(self._cut(ids, limits[-1]), (), document, document))
        ends = self._ends("receiver")
        if self.mode in ("sharer", "routing", "ensemble"):
            ends |= self._ends("sharer")

        def done(k: int, ids: list[int]) -> bool:
            return ids[-1] in ends or any(s and s in self._text(ids) for s in stops[k])

        mode = "receiver" if self.mode == "t2t" else self.mode
        said = generate(mode, self.pair, items, limits, stop=done, batch_size=self.batch_size)
        texts = []
        for answer, until in zip(said, stops, strict=True):
            text = self._text([token for token in answer.ids if token not in ends])
            for stop in filter(None, until):
                text = text.partition(stop)[0]
            texts.append(text)
        return texts

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
        prompts = []
        for key in asked:
            question = self._question(key[1])
            listed = options[key] if len(options[key]) > 1 else []
            ids = self._asked(self.wording.asked(question, listed))
            prompts.append(self._cut(ids, min(self.wording.tokens, self._room())))
        tokens = min(self.wording.tokens, self._room())
        ends = sorted(self._ends("sharer"))
        texts = write(self.pair, prompts, tokens, ends=ends, batch_size=self.batch_size)
        self.written += [len(text) for text in texts]
        read = {
            key: self._reading(key[1], self._text(text))
            for key, text in zip(asked, texts, strict=True)
        }
        keys = [(_document(request), request.args[0]) for request in requests]
        return [read.get(key, key[1]) for key in keys]

    def _question(self, context: str) -> str:
        """The last user message of a rendered conversation, or the plain context."""
        users = [m["content"] for m in self._chats.get(context, []) if m["role"] == "user"]
        return users[-1] if users else context

    def _reading(self, context: str, text: str) -> str:
        chat = self._chats.get(context)
        filled = self.wording.read(text, self._question(context))
        if chat is None:
            return filled
        last = max(k for k, message in enumerate(chat) if message["role"] == "user")
        chat = [*chat[:last], {**chat[last], "content": filled}, *chat[last + 1 :]]
        return self._render("receiver", chat, chat[-1]["role"] != "assistant")

    def _asked(self, prompt: str) -> list[int]:
        """Token ids of what the sharer is asked for, as a conversation where the task is one."""
        if self._chats and self.tokenizers["sharer"].chat_template:
            prompt = self._render("sharer", [{"role": "user", "content": prompt}], True)
        return self._encode(prompt)

    def _render(self, side: str, chat: list[dict[str, str]], generation: bool) -> str:
        tokenizer = self.tokenizers[side]
        if not tokenizer.chat_template:
            raise ValueError(f"the {side} has no chat template")
        return tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=generation,
            continue_final_message=not generation,
        )

    def _encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; a text that a chat template made, or that begins with BOS, has its own."""
        bos = self.tokenizer.bos_token
        if self._chats or (bos and text.startswith(bos)):
            special = False
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, cut where the tokens of the context end in those of the whole."""
        if not context:
            rest = self._encode(continuation, special=False)
            first = self._first()
            start, rest = ([first], rest) if rest[:1] != [first] else (rest[:1], rest[1:])
        else:
            bare = context.rstrip()  # spaces belong to the word that follows
            start = self._encode(bare)
            rest = self._encode(bare + context[len(bare) :] + continuation)[len(start) :]
            # One word of both, as chat templates join them before some tokenizers: cut it here.
            rest = rest or self._encode(continuation, special=False)
        if not rest or not start:
            raise ValueError(f"a request makes no tokens: {context!r} and {continuation!r}"[:300])
        return start, rest

    def _cut(self, ids: Sequence[int], more: int) -> tuple[int, ...]:
        """The end of a context that leaves room for ``more`` tokens."""
        room = self.max_length - more
        if room < 1:
            raise ValueError(
                f"an answer of {more} tokens leaves no room for its question: the models were made "
                f"for {self.max_length}"
            )
        self.truncated += len(ids) > room
        return tuple(ids[-room:])

    def _room(self) -> int:
        """Tokens that may be generated at most: half of what the models were made for."""
        return max(self.max_length // 2, 1)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _first(self) -> int:
        """The token that stands before a text without context."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the receiver's tokenizer has neither BOS nor EOS to begin a text with")

    def _ends(self, side: str) -> set[int]:
        config = getattr(self.pair, side).generation_config
        ends = None if config is None else config.eos_token_id
        found = set(ends if isinstance(ends, (list, tuple)) else [ends])
        return (found | {self.tokenizers[side].eos_token_id}) - {None}


def _document(request: Instance) -> Hashable:
    return request.task_name, request.doc_id
