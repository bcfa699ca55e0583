"""The mutants of a kernel source: one barrier less, one wait less, one comparison shifted by one.

Two ways to get one: `Mutant.applied` gives the changed text; `switched` gives a text in which all
mutants are there and the variable c2c_mutant of `HEADER` chooses one when the kernel runs. That
variant is built once. It cannot have the mutants of what has to be constant (`Mutant.constant`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
NOT_RUN = re.compile(r"static_assert\s*\(.*?\)\s*;|^\s*#[^\n]*", re.DOTALL | re.MULTILINE)
BARRIER = re.compile(r"\b(?:__syncthreads|__syncwarp|cp_async_wait\s*<[^;]*?>)\s*\([^;]*?\)\s*;")
GROUPS = re.compile(r"\bcp_async_wait\s*<([^;]*?)>\s*\(")
# clang-format puts spaces around comparisons and none into template argument lists.
COMPARISON = re.compile(r"(?<= )(<=?|>=?)(?=\s)")
SHIFTED = {  # looser, stricter
    "<": ("<=", "+ 1 <"),
    "<=": ("<= 1 +", "<"),
    ">": (">=", "> 1 +"),
    ">=": ("+ 1 >=", ">"),
}
KINDS = ("barrier", "groups", "looser", "stricter")

# Compiled in front of every source of the variant with switches. `x < y` becomes
# `x <= Comparison<'<', 1, 2>{} >= y`: two operators of the precedence that `<` has.
HEADER = """\
#pragma once
__attribute__((visibility("default"))) inline int c2c_mutant = -1;  // the one that runs; -1: none
__attribute__((visibility("default"))) inline unsigned char c2c_reached[{count}] = {{}};

namespace c2c_mutants {{
#define C2C_INLINE inline __attribute__((always_inline))
C2C_INLINE bool active(int number) {{
  c2c_reached[number] = 1;
  return c2c_mutant == number;
}}
enum Operator {{ {operators} }};
template <Operator kOperator, int kLooser, int kStricter>
struct Comparison {{}};
template <class A, Operator kOperator, int kLooser, int kStricter>
struct Left {{
  A value;
}};
template <class A, Operator kOperator, int kLooser, int kStricter>
C2C_INLINE Left<A, kOperator, kLooser, kStricter> operator<=(
    A a, Comparison<kOperator, kLooser, kStricter>) {{
  return {{a}};
}}
template <class A, class B, Operator kOperator, int kLooser, int kStricter>
C2C_INLINE bool operator>=(Left<A, kOperator, kLooser, kStricter> left, B b) {{
  const A a = left.value;
  const bool looser = active(kLooser), stricter = active(kStricter);
{cases}
}}
}}  // namespace c2c_mutants
"""
NAMES = {"<": "kLess", "<=": "kLessEqual", ">": "kGreater", ">=": "kGreaterEqual"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one source text."""

    file: str  # relative to the root
    start: int
    end: int
    replacement: str
    kind: str  # one of KINDS
    constant: bool  # in what the compiler has to know: no switch can stand there

    def applied(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]

    def key(self, text: str) -> tuple[str, str, str]:
        """(file, line before, line after): what the list of survivors knows it by."""
        first = text.rfind("\n", 0, self.start) + 1
        last = text.find("\n", self.end)
        last = len(text) if last < 0 else last
        after = text[first : self.start] + self.replacement + text[self.end : last]
        return self.file, " ".join(text[first:last].split()), " ".join(after.split())

    def line(self, text: str) -> int:
        return text.count("\n", 0, self.start) + 1


def blanked(text: str, pattern: re.Pattern[str]) -> str:
    """The text with every match turned into as many spaces; line ends stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def statement_before(code: str, at: int) -> str:
    """What stands between the last end of a statement or a brace and the place."""
    return code[max(code.rfind(end, 0, at) for end in ";{}") + 1 : at]


def is_constant(code: str, at: int) -> bool:
    """Is the place part of a constexpr declaration, condition or function, or of an alignment?"""
    if re.search(r"\b(constexpr|alignas)\b", statement_before(code, at)):
        return True
    depth = 0
    for i in range(at - 1, -1, -1):
        depth += {"}": 1, "{": -1}.get(code[i], 0)
        if depth < 0:  # a brace that is open at the place
            depth = 0
            if re.search(r"(?<!\bif )\bconstexpr\b", statement_before(code, i)):
                return True
    return False


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Every mutant of a source text, from its beginning to its end."""
    code = blanked(blanked(text, COMMENT_OR_STRING), NOT_RUN)
    barriers = [m.span() for m in BARRIER.finditer(code)]
    found = [Mutant(file, *span, ";", "barrier", False) for span in barriers]
    for match in GROUPS.finditer(code):
        found.append(Mutant(file, *match.span(1), f"({match[1]}) + 1", "groups", False))
    for match in COMPARISON.finditer(code):
        inside = any(start < match.start() < end for start, end in barriers)
        constant = inside or is_constant(code, match.start())
        for kind, replacement in zip(("looser", "stricter"), SHIFTED[match[1]], strict=True):
            found.append(Mutant(file, *match.span(1), replacement, kind, constant))
    yield from sorted(found, key=lambda mutant: (mutant.start, mutant.kind))


def switched(text: str, numbered: Mapping[int, Mutant], changed: Mutant | None = None) -> str:
    """The text with a switch at the place of every mutant that is not constant, and `changed`."""
    edits: dict[tuple[int, int], str] = {}
    groups = {n: m for n, m in numbered.items() if m.kind == "groups"}
    stricter = {m.start: n for n, m in numbered.items() if m.kind == "stricter"}
    for number, mutant in numbered.items():
        start, end = mutant.start, mutant.end
        original = text[start:end]
        if mutant.kind == "barrier":
            call = original.rstrip("; \n")
            chosen = f"c2c_mutants::active({number}) ? void() : {call}"
            for n, m in groups.items():
                if start < m.start < end:
                    less = call[: m.start - start] + m.replacement + call[m.end - start :]
                    chosen = f"c2c_mutants::active({n}) ? {less} : {chosen}"
            edits[start, end] = f"({chosen});"
        elif mutant.kind == "looser" and not mutant.constant:
            arguments = f"c2c_mutants::{NAMES[original]}, {number}, {stricter[start]}"
            edits[start, end] = f"<= c2c_mutants::Comparison<{arguments}>{{}} >="
    if changed is not None:
        edits = {(s, e): to for (s, e), to in edits.items() if not s <= changed.start < e}
        edits[changed.start, changed.end] = changed.replacement
    for (start, end), replacement in sorted(edits.items(), reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def header(count: int) -> str:
    """`HEADER` for so many mutants."""
    case = "  if constexpr (kOperator == {0}) return looser ? {1} : stricter ? {2} : {3};"
    cases = [
        case.format(NAMES[operator], *(f"a {way} b" for way in (*SHIFTED[operator], operator)))
        for operator in SHIFTED
    ]
    return HEADER.format(count=count, operators=", ".join(NAMES.values()), cases="\n".join(cases))
