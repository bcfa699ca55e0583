"""Conversations from a JSON-lines file or a dataset of the Hub, with every bad record named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import open_regular, parse_json
from ..messages import shown, shown_name

ROLES = ("system", "user", "assistant")
BAD_DATA = ("refuse", "skip")
MAX_LINE_BYTES = 8 << 20
MAX_FILE_BYTES = 1 << 40
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Conversation:
    """One record.

    Attributes:
        messages: ``{"role", "content"}``; the last one is the assistant's.
        number: of the line in its file, or of the row in its dataset, from 1.
        positions: first and last + 1 of the receiver's token positions that are fused; None: the
            prompt without its last token.
    """

    messages: tuple[dict[str, str], ...]
    number: int
    positions: tuple[int, int] | None = None


@dataclass
class BadData:
    """What is wrong with a source, record by record.

    Attributes:
        source: the file or dataset.
        unit: what its records are called, ``"line"`` or ``"row"``.
        policy: ``"refuse"`` or ``"skip"``.
        kept: records that are used.
    """

    source: str
    unit: str
    policy: str
    kept: int = 0
    _problems: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy not in BAD_DATA:
            raise ValueError(
                f"bad_data must be one of {', '.join(BAD_DATA)}, got {shown(self.policy)}"
            )

    @property
    def count(self) -> int:
        """Bad records."""
        return len(self._problems)

    def add(self, number: int, problem: str) -> None:
        """Notes what is wrong with record ``number``."""
        self._problems[number] = problem

    def place(self, number: int) -> str:
        """How a message names record ``number``."""
        return f"{self.source}, {self.unit} {abs(number)}"

    def lines(self) -> list[str]:
        """The first problems, in the records' order, one sentence each."""
        found = sorted(self._problems.items())
        lines = [f"{self.place(number)}: {problem}" for number, problem in found[:SHOWN_PROBLEMS]]
        if len(found) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(found) - SHOWN_PROBLEMS} more")
        return lines

    def summary(self) -> str:
        """How many records are used and how many are not."""
        return (
            f"{self.source}: {self.kept} conversations, {self.count} bad {self.unit}s"
            f"{' skipped' if self.count and self.policy == 'skip' else ''}"
        )

    def check(self) -> None:
        """Raises ValueError if there are bad records and they are refused, or nothing is left."""
        if self.count and self.policy == "refuse":
            raise ValueError(
                f"{self.summary()} (bad_data='skip' leaves them out):\n  "
                + "\n  ".join(self.lines())
            )
        if not self.kept:
            listed = "".join(f"\n  {line}" for line in self.lines())
            raise ValueError(f"{self.source} holds no conversation that can be used{listed}")


def read_conversations(
    source: str | Path, *, bad_data: str = "refuse", split: str = "train"
) -> tuple[list[Conversation], BadData]:
    """Reads every conversation of a file or dataset.

    Args:
        source: a file of one JSON object per line, ``{"messages": [{"role", "content"}, ...]}``
            with an optional ``"positions": [first, end]``; or, where no such file exists, the name
            of a dataset whose rows look like that, read through the ``datasets`` library.
        bad_data: ``"refuse"`` or ``"skip"``.
        split: of a dataset.

    Returns:
        the conversations, and what is wrong with the others. Nothing is raised for bad records
        yet, so that a later stage may find more: call `BadData.check` when all are known.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is none that can be read.
        ImportError: a dataset's name without the ``datasets`` library.
    """
    if is_file_place(source):
        bad = BadData(str(Path(source)), "line", bad_data)
        records = _lines(Path(source), bad)
    else:
        bad = BadData(str(source), "row", bad_data)
        records = _rows(str(source), split)
    conversations = []
    for number, record in records:
        try:
            conversations.append(_conversation(record, number))
        except ValueError as error:
            bad.add(number, str(error))
    bad.kept = len(conversations)
    return conversations, bad


def is_file_place(source: str | Path) -> bool:
    """Whether ``source`` names a file, there or missing, and not a dataset of the Hub."""
    path = Path(source)
    return path.suffix in (".jsonl", ".json", ".txt") or len(path.parts) > 2 or path.exists()


def _lines(path: Path, bad: BadData) -> Iterator[tuple[int, Any]]:
    """(line number, parsed JSON) of every line that is not blank; notes those that are no JSON."""
    with open_regular(path, MAX_FILE_BYTES) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                bad.add(number, f"must be at most {MAX_LINE_BYTES} bytes long")
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                    pass
                continue
            if not line.strip():
                continue
            try:
                yield number, parse_json(line, "the line")
            except ValueError as error:
                bad.add(number, shown_name(str(error).removeprefix("c2c_ext: "), 200))


def _rows(name: str, split: str) -> Iterable[tuple[int, Any]]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"--data: there is no file {name}; to read a dataset of that name from the Hub, "
            "install the datasets library (pip install datasets)"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's errors are of many kinds
        text = shown_name(" ".join(str(error).split()), 300)
        raise ValueError(
            f"--data: there is no file {name}, and the dataset of that name cannot be loaded "
            f"(split {split!r}): {text}"
        ) from error
    return enumerate(rows, start=1)


def _conversation(record: Any, number: int) -> Conversation:
    """A checked conversation. Raises ValueError saying what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"must be an object with messages, got {type(record).__name__}")
    if "messages" not in record:
        keys = ", ".join(shown_name(str(key)) for key in list(record)[:4]) or "none"
        raise ValueError(f"messages is missing (keys: {keys})")
    raw = record["messages"]
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"messages must be a list with a message in it, got {shown(raw)}")
    messages = []
    for i, message in enumerate(raw):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] must be an object, got {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"messages[{i}].{key} is missing")
            if not isinstance(message[key], str):
                raise ValueError(
                    f"messages[{i}].{key} must be a string, got {type(message[key]).__name__}"
                )
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half a character, no tokenizer reads it
            raise ValueError(f"messages[{i}].content holds a lone surrogate") from None
        if message["role"] not in ROLES:
            raise ValueError(
                f"messages[{i}].role must be one of {', '.join(ROLES)}, "
                f"got {shown(message['role'])}"
            )
        messages.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's: there is no response to learn")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, it is the {raw[-1]['role']}'s")
    if messages[0]["role"] == "assistant":
        raise ValueError("the first message is the assistant's: there is no prompt")
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"messages[{i}].content, the response, is empty")
    return Conversation(tuple(messages), number, _positions(record.get("positions")))


def _positions(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    is_pair = isinstance(value, list) and [type(n) for n in value] == [int, int]
    if not is_pair or not 0 <= value[0] < value[1]:
        raise ValueError(
            "positions must be [first, end] with 0 <= first < end, the receiver's token positions "
            f"that are fused, got {shown(value)}"
        )
    return value[0], value[1]
