"""The model card (README.md) of a saved fuser: the pair, sizes, training, metrics, licence.

Names come from files of strangers: they appear as code, and in the YAML block only if they are Hub
ids. What nobody has given is "not recorded". Equal input gives equal bytes; there is no date.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from .config import FuserConfig
from .model_kv import ModelKV

CARD_NAME = "README.md"
# A README.md with this line is ours to replace; one without it is never touched.
CARD_MARKER = (
    "<!-- Written by c2c_ext when the fuser was saved, and rewritten by the next save. To keep "
    "changes of your own, delete this line. -->"
)
MAX_CARD_BYTES = 4 << 20
HUB_ID = re.compile(r"(?=.{3,96}\Z)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
NOT_RECORDED = "Not recorded."
Number = int | float | str


@dataclass(frozen=True)
class CardMetric:
    """One measured number.

    Attributes:
        name: what was measured, e.g. ``"right answers, MMLU-Redux"``.
        value: the fuser's result.
        count: out of how many examples it was measured.
        baselines: what else was measured the same way, e.g. ``{"receiver alone": 114}``.
    """

    name: str
    value: Number
    count: int | None = None
    baselines: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class CardInfo:
    """What a model card says beyond what the fuser itself knows.

    Attributes:
        license: a licence identifier of the Hub, e.g. ``"apache-2.0"``.
        training: label -> value, in the order to be shown, e.g. ``{"steps": 1929, "seed": 0}``.
        datasets: names of what it was trained on; Hub ids become metadata.
        metrics: what was measured.

    Raises:
        TypeError, ValueError: a field is of another kind; names it.
    """

    license: str | None = None
    training: Mapping[str, Number] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    metrics: Sequence[CardMetric] = ()

    def __post_init__(self) -> None:
        if self.license is not None and not (
            isinstance(self.license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license)
        ):
            raise ValueError(
                "CardInfo.license must be a licence identifier such as 'apache-2.0', got "
                f"{self.license!r:.80}"
            )
        if not isinstance(self.training, Mapping):
            raise TypeError(f"CardInfo.training must be a mapping, got {self.training!r:.80}")
        for name, kind in (("datasets", str), ("metrics", CardMetric)):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"CardInfo.{name} must be a sequence, got {value!r:.80}")
            for entry in value:
                if not isinstance(entry, kind):
                    raise TypeError(
                        f"CardInfo.{name} must hold {kind.__name__} entries, got {entry!r:.80}"
                    )


def is_own_card(path: Path) -> bool:
    """Whether ``path`` is a model card that `Fuser.save_pretrained` wrote."""
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return False
    return CARD_MARKER.encode() in path.read_bytes().splitlines()


def card_text(
    config: FuserConfig,
    open_streams: Sequence[tuple[int, str]],
    num_parameters: int,
    dtype: str,
    info: CardInfo | None = None,
    repo_id: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        config: the fuser's configuration.
        open_streams: (receiver layer, kind) of every open gate.
        num_parameters: how many numbers are saved.
        dtype: theirs, e.g. ``"float32"``.
        info: what only its maker knows.
        repo_id: the Hub repository that it is written for.
    """
    from huggingface_hub import ModelCard

    info = CardInfo() if info is None else info
    sections = {
        "Pair": _pair(config),
        "Architecture": _architecture(config, open_streams, num_parameters, dtype),
        "Use": _usage(config, repo_id),
        "Training": _training(info),
        "Metrics": _metrics(info.metrics),
        "Licence": NOT_RECORDED if info.license is None else _code(info.license),
        "Limits": _LIMITS,
        "Citation": _CITATION,
    }
    receiver, sharer = (_code(_label(model)) for model in (config.receiver, config.sharer))
    text = f"---\n{_metadata(config, info)}\n---\n\n{CARD_MARKER}\n\n"
    text += f"# Fuser from {sharer} to {receiver}\n\n{_INTRODUCTION}\n"
    text += "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items())
    return ModelCard(text).content  # parses the metadata back: raises if that cannot be read


_INTRODUCTION = """\
With this fuser one LLM, the *receiver*, reads the KV-cache of another, the *sharer*
(Cache-to-Cache, [arXiv 2510.03215](https://arxiv.org/abs/2510.03215)). It is in the format of
`c2c_ext`, belongs to exactly this pair, and leaves both models as they are; neither is included."""

_LIMITS = """\
- It was made for the two models above. Shapes are compared when it is used; other weights of the
  same shapes cannot be told apart, and with them the result is meaningless.
- A KV-cache carries the content of its prompt. Whatever the sharer has read can reach the
  receiver's answer, and whoever holds a cache may recover text from it: treat caches as the text.
- The receiver can take over the sharer's errors and biases."""

_CITATION = """\
```bibtex
@article{fu2025cachetocache,
  title = {Cache-to-Cache: Direct Semantic Communication Between Large Language Models},
  author = {Fu, Tianyu and Min, Zihan and Zhang, Hanling and Yan, Jichao and Dai, Guohao and
            Ouyang, Wanli and Wang, Yu},
  journal = {arXiv preprint arXiv:2510.03215},
  year = {2025}
}
```"""


def _metadata(config: FuserConfig, info: CardInfo) -> str:
    """The YAML block, without its fences."""
    from huggingface_hub import ModelCardData

    models = [m.name for m in (config.receiver, config.sharer) if is_hub_id(m.name)]
    data: dict[str, Any] = {
        "library_name": "c2c_ext",
        "pipeline_tag": "text-generation",
        "tags": ["c2c_ext", "cache-to-cache", "kv-cache", "arxiv:2510.03215"],
        "license": info.license,
        "datasets": [name for name in info.datasets if is_hub_id(name)] or None,
    }
    if models:
        data |= {"base_model": models, "base_model_relation": "adapter"}
    return ModelCardData(**data).to_yaml(line_break="\n")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a Hub repository, ``"org/name"``."""
    return (
        HUB_ID.fullmatch(name) is not None
        and ".." not in name
        and "--" not in name
        and not name.endswith((".git", ".", "-"))
    )


def _pair(config: FuserConfig) -> str:
    rows = [
        [side, _code(m.name), _code(m.model_type), len(m.layers), _kv_shapes(m)]
        for side, m in (("receiver", config.receiver), ("sharer", config.sharer))
    ]
    header = ["", "model", "type", "layers", "KV heads x head dim"]
    pairs = " ".join(f"{layer}<-{source}" for layer, source in enumerate(config.layer_map))
    return f"{_table(header, rows)}\n\nReceiver layer <- sharer layer: `{pairs}`"


def _architecture(
    config: FuserConfig, open_streams: Sequence[tuple[int, str]], num_parameters: int, dtype: str
) -> str:
    rows = [[f"`{name}`", _text(value)] for name, value in config.settings().items()]
    rows.append(["parameters", f"{num_parameters:,} ({dtype})"])
    if config.gate:
        layers = len(config.layer_map)
        gates = [f"{_count(open_streams, k)} of {layers} ({k}s)" for k in config.kinds]
        rows.append(["open gates", ", ".join(gates)])
    return _table(["", ""], rows)


def _count(open_streams: Sequence[tuple[int, str]], kind: str) -> int:
    return sum(stream_kind == kind for _, stream_kind in open_streams)


def _usage(config: FuserConfig, repo_id: str | None) -> str:
    receiver, sharer = (
        model.name if is_hub_id(model.name) else f"path/to/{side}"
        for side, model in (("receiver", config.receiver), ("sharer", config.sharer))
    )
    fuser = repo_id if repo_id is not None and is_hub_id(repo_id) else "path/to/this/directory"
    return f"""\
```python
import c2c_ext
from transformers import AutoModelForCausalLM

receiver = AutoModelForCausalLM.from_pretrained("{receiver}")
sharer = AutoModelForCausalLM.from_pretrained("{sharer}")
fuser = c2c_ext.Fuser.from_pretrained("{fuser}")
with c2c_ext.attached(receiver, sharer, fuser):
    output = receiver.generate(input_ids, max_new_tokens=64)
```"""


def _training(info: CardInfo) -> str:
    lines = [f"- {_text(name)}: {_text(value)}" for name, value in info.training.items()]
    lines += [f"- dataset: {_code(name)}" for name in info.datasets]
    return "\n".join(lines) or NOT_RECORDED


def _metrics(metrics: Sequence[CardMetric]) -> str:
    if not metrics:
        return NOT_RECORDED
    baselines = list(dict.fromkeys(name for metric in metrics for name in metric.baselines))
    rows = [
        [
            _text(metric.name),
            "" if metric.count is None else f"{metric.count}",
            _text(metric.value),
            *(_text(metric.baselines.get(name, "")) for name in baselines),
        ]
        for metric in metrics
    ]
    return _table(["", "examples", "this fuser", *map(_text, baselines)], rows)


def _label(model: ModelKV) -> str:
    return model.name or model.model_type or "unnamed model"


def _kv_shapes(model: ModelKV) -> str:
    """E.g. ``8 x 128``, or run by run where layers differ."""
    runs = [(shape, len(list(run))) for shape, run in groupby(model.layers)]
    if len(runs) == 1:
        return f"{runs[0][0].num_heads} x {runs[0][0].head_dim}"
    return ", ".join(f"{n} layers of {shape.num_heads} x {shape.head_dim}" for shape, n in runs)


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(text: str) -> str:
    """``text`` on one line as inline code, in a table or outside; nothing in it is Markdown."""
    text = _one_line(text).replace("|", "¦")  # no escape works for code in and out of tables
    if not text:
        return "not recorded"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _text(value: object) -> str:
    """``value`` on one line, as plain text that is no Markdown or HTML."""
    text = str(value) if not isinstance(value, (list, tuple)) else ", ".join(map(str, value))
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return "".join(c for c in text if c.isprintable())
