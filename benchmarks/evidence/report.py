"""The tables and drawings of docs/evidence.md, made from the result files alone."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.evidence.outcomes import Cell, Run, read_runs
from benchmarks.evidence.wording import (
    AT_CHANCE,
    LABELS,
    PARALLEL,
    against_text,
    at_chance,
    environments,
    listed,
    modes,
    ordered,
    p_value,
    percent,
)
from benchmarks.tables import MARKED, markdown
from c2c_ext.analysis.chart import Panel, bar_chart, line_chart
from c2c_ext.evaluation.statistics import compare, verdict, wilson_interval
from c2c_ext.measure import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
DOCUMENT = ROOT / "docs" / "evidence.md"
CONFIRMATION = 3  # the first seed that is not one of those that are added up

BUDGET = re.compile(r"(.*), (\d+) facts? written")  # cells of T2T that stops early


class Report:
    """What the result files of a directory say, as Markdown and SVG.

    Args:
        directory: of the files.
    """

    def __init__(self, directory: Path = RESULTS) -> None:
        self.directory = directory
        self.worlds: dict[str, list[Run]] = {}
        for run in read_runs(directory):
            self.worlds.setdefault(run.world, []).append(run)

    def table(self, name: str) -> str:
        """The text between the marks of a table, e.g. of ``"accuracy form"``.

        Raises:
            ValueError: there is none of this name, or no result file for it.
        """
        if name == "ablations":
            from benchmarks.evidence import ablations

            return ablations.table(self.directory / "ablations.json")
        if name in ("summary", "training"):
            return getattr(self, name)()
        what, _, world = name.partition(" ")
        makers = {
            "accuracy": self.accuracy,
            "paired": self.paired,
            "verdicts": self.verdicts,
            "latency": self.latency,
            "budgets": self.budgets,
        }
        if what not in makers:
            raise ValueError(f"docs/evidence.md: no table {name!r}")
        if world not in self.worlds:
            raise ValueError(f"docs/evidence.md: no result file of the world {world!r}")
        return makers[what](world)

    def cells(self, world: str, *, confirmation: bool = False) -> dict[str, Cell]:
        """By name, the questions of all seeds that are added up, or of the fresh ones."""
        runs = [r for r in self.worlds[world] if (r.seed >= CONFIRMATION) == confirmation]
        found: dict[str, list[Cell]] = {}
        for run in runs:
            for cell in run.cells:
                found.setdefault(cell.name, []).append(cell)
        joined = {}
        for name, cells in found.items():
            if len(cells) != len(runs):
                raise ValueError(f"{world}: not every seed has the cell {name!r}")
            right = {
                mode: torch.cat([cell.right[mode] for cell in cells])
                for mode in cells[0].right
                if all(mode in cell.right for cell in cells)
            }
            written = {
                mode: sum(cell.written[mode] for cell in cells) / len(cells)
                for mode in cells[0].written
            }
            joined[name] = Cell(name, cells[0].candidates, right, written)
        return joined

    def main_cells(self, world: str, *, confirmation: bool = False) -> dict[str, Cell]:
        """Without the cells of T2T that stops early."""
        cells = self.cells(world, confirmation=confirmation)
        return {name: cell for name, cell in cells.items() if not BUDGET.fullmatch(name)}

    def accuracy(self, world: str) -> str:
        """Right answers of every mode in every cell: seeds added up / the fresh seed."""
        cells, fresh = self.main_cells(world), self.main_cells(world, confirmation=True)
        lines = []
        for mode in modes(cells.values()):
            line = [LABELS.get(mode, mode)]
            for name, cell in cells.items():
                counts = [str(cell.count(mode)) if mode in cell.right else ""]
                if name in fresh and mode in fresh[name].right:
                    counts.append(str(fresh[name].count(mode)))
                line.append(" / ".join(counts) if counts[0] else "")
            lines.append(line)
            if mode == "c2c":
                lines.append(["C2C, seed by seed", *(self._by_seed(world, c) for c in cells)])
        first = next(iter(cells.values()))
        added = [run.seed for run in self.worlds[world] if run.seed < CONFIRMATION]
        new = [run.seed for run in self.worlds[world] if run.seed >= CONFIRMATION]
        said = f"Right answers of {first.questions:,} (seeds {listed(added)}"
        if fresh:
            said += f") / of {next(iter(fresh.values())).questions:,} (fresh: {listed(new)}"
        said += f"); guessing is right one time in {first.candidates}.\n\n"
        return said + markdown(["", *cells], lines) + "\n" + self.where(world, "accuracy")

    def _by_seed(self, world: str, name: str) -> str:
        """C2C's right answers in a cell, of every seed that is added up."""
        runs = [run for run in self.worlds[world] if run.seed < CONFIRMATION]
        cells = [cell for run in runs for cell in run.cells if cell.name == name]
        return " + ".join(str(cell.count("c2c")) for cell in cells if "c2c" in cell.right)

    def paired(self, world: str) -> str:
        """Of the last cell: counts with intervals, and McNemar's test against C2C."""
        cell = list(self.main_cells(world).values())[-1]
        lines = []
        for mode in modes([cell]):
            right = cell.count(mode)
            low, high = wilson_interval(right, cell.questions)
            line = [LABELS.get(mode, mode), f"{right}", percent(right / cell.questions)]
            line.append(f"{percent(low)} to {percent(high)}")
            if mode in ("c2c", "swapped"):
                line += ["", ""]
            else:
                test = compare("c2c", mode, {m: b.tolist() for m, b in cell.right.items()})
                line.append(f"{test.first_only} : {test.second_only}")
                line.append(p_value(test.p))
            written = cell.written.get(mode)
            lines.append([*line, "" if written is None else f"{written:g}"])
        header = ["", f"of {cell.questions:,}", "share", "95% interval"]
        header += ["only C2C right : only this", "p (McNemar)", "tokens written"]
        said = f"Questions `{cell.name}`, all seeds that are added up.\n\n"
        return said + markdown(header, lines) + "\n" + self.where(world, "accuracy")

    def verdicts(self, world: str) -> str:
        """Whether content crossed, by seed and cell; and whether what must guess does guess."""
        sentences = []
        for run in self.worlds[world]:
            cells = {c.name: c for c in run.cells if not BUDGET.fullmatch(c.name)}
            found = {
                name: verdict({mode: bits.tolist() for mode, bits in cell.right.items()})
                for name, cell in cells.items()
                if {"c2c", "receiver", "mismatched"} <= set(cell.right)
            }
            good = sum(one.transferred for one in found.values())
            sentences.append(
                f"- Seed {run.seed}: content transferred in {good} of {len(found)} cells."
                + "".join(f" No evidence: {n}." for n, v in found.items() if not v.transferred)
            )
        for confirmation, which in ((False, "the seeds added up"), (True, "the fresh seed")):
            if cells := self.main_cells(world, confirmation=confirmation):
                sentences += [against_text(cells, which), at_chance(cells, which)]
        return "\n".join(sentences) + "\n"

    def latency(self, world: str) -> str:
        """Milliseconds from question to answer, and C2C's parts."""
        run = self.timed(world)
        rows = [row for row in run.latency if not BUDGET.fullmatch(row["cell"])]
        cells = list(dict.fromkeys(row["cell"] for row in rows))
        modes = ordered({row["mode"] for row in rows})
        at = {(row["mode"], row["cell"]): row for row in rows}
        lines = []
        for mode in modes:
            found = [at.get((mode, cell)) for cell in cells]
            texts = [
                f"{r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})" if r else "" for r in found
            ]
            lines.append([LABELS.get(mode, mode), *texts])
        parts = dict.fromkeys(
            p for row in rows if row["mode"] == "c2c" for p in row.get("parts", {})
        )
        for part in parts:
            texts = [
                f"{at['c2c', cell]['parts'][part]:.2f}" if ("c2c", cell) in at else ""
                for cell in cells
            ]
            lines.append([f"of C2C: {part.replace('_', ' ')}", *texts])
        if "t2t" in modes and "c2c" in modes:
            both = [(at.get(("t2t", c)), at.get(("c2c", c))) for c in cells]
            texts = [f"{a['median'] / b['median']:.1f} x" if a and b else "" for a, b in both]
            lines.append(["T2T : C2C", *texts])
        said = (
            "Milliseconds from question to answer, batch 1, median (20th to 80th percentile), all "
        )
        said += f"modes alternating, {rows[0]['rounds']} rounds, seed {run.seed}.\n\n"
        return said + markdown(["", *cells], lines) + "\n" + self.where(world, "latency")

    def budgets(self, world: str) -> str:
        """T2T that stops after some facts, against C2C and parallel text, by time."""
        points = self.budget_points(world)
        lines = [[label, f"{ms:.2f}", str(right), str(of)] for label, ms, right, of in points]
        said = "Accuracy over the seeds that are added up, times of one seed.\n\n"
        table = markdown(["", "ms (median)", "right", "of"], lines)
        return said + table + "\n" + self.where(world, "accuracy", "latency")

    def budget_points(self, world: str) -> list[tuple[str, float, int, int]]:
        """(label, median ms, right, questions) of T2T by facts written, then of other modes."""
        cells = self.cells(world)
        times = {(row["cell"], row["mode"]): row["median"] for row in self.timed(world).latency}
        points, base = [], None
        for name, cell in cells.items():
            if match := BUDGET.fullmatch(name):
                base = match[1]
                label = f"T2T, {match[2]} facts written"
                points.append((label, times[name, "t2t"], cell.count("t2t"), cell.questions))
        if base is None:
            raise ValueError(f"{world}: T2T was never stopped early")
        for mode in ("receiver", "t2t_parallel", "t2t_asked", "c2c"):
            if mode in cells[base].right and (base, mode) in times:
                cell = cells[base]
                points.append((LABELS[mode], times[base, mode], cell.count(mode), cell.questions))
        return points

    def training(self) -> str:
        """Of every world: how large what was trained is, and the CPU time of each seed."""
        lines = []
        for runs in self.worlds.values():
            stages = runs[0].document["training"]["stages"]
            sizes = ", ".join(f"{name} {stage['parameters']:,}" for name, stage in stages.items())
            times = [run.document["training"].get("cpu_seconds") for run in runs]
            shown = ", ".join("-" if t is None else f"{t:.0f}" for t in times)
            lines.append([runs[0].document["title"], sizes, shown])
        header = ["world", "parameters", "CPU seconds of each seed (-: not recorded)"]
        return markdown(header, lines)

    def summary(self) -> str:
        """One line a world: the last cell's C2C, text, receiver, best control, and times."""
        lines = []
        for world, runs in self.worlds.items():
            cell = list(self.main_cells(world).values())[-1]
            best = max((m for m in AT_CHANCE[1:] if m in cell.right), key=cell.count)
            times: dict[str, float] = {}
            if any(run.latency for run in runs):
                rows = self.timed(world).latency
                last = [row["cell"] for row in rows if row["mode"] == "c2c"][-1]
                times = {row["mode"]: row["median"] for row in rows if row["cell"] == last}
            shown = [f"{cell.count('c2c')} = {self._by_seed(world, cell.name)}"]
            shown.append(f"{cell.count('t2t')}" if "t2t" in cell.right else "")
            side = [mode for mode in PARALLEL if mode in cell.right]
            top = max(side, key=cell.count) if side else ""
            parallel = f"{cell.count(top)}" if side else ""
            timed = ("c2c", "t2t", top) if side else ("c2c", "t2t")
            ms = [f"{times[mode]:.1f}" if mode in times else "" for mode in timed]
            lines.append(
                [
                    f"{runs[0].document['title']} ({cell.name})",
                    f"{cell.questions:,}",
                    *shown,
                    parallel,
                    f"{cell.count('receiver')}",
                    f"{cell.count(best)} ({best})",
                    f"{cell.written.get('t2t', 0):g}",
                    " / ".join(ms) if all(ms) else "",
                ]
            )
        header = [
            "world",
            "questions",
            "C2C",
            "T2T",
            "best parallel text",
            "receiver",
            "best control",
        ]
        return markdown([*header, "T2T's tokens", "ms C2C / T2T / parallel"], lines)

    def timed(self, world: str) -> Run:
        """The run of the lowest seed that has times."""
        for run in self.worlds[world]:
            if run.latency:
                return run
        raise ValueError(f"{world}: no times were measured")

    def where(self, world: str, *sections: str) -> str:
        """When and on what was measured, with links to the files."""
        sentences = []
        for section in sections:
            runs = [self.timed(world)] if section == "latency" else self.worlds[world]
            runs = [run for run in runs if section in run.document]
            said = environments([run.document[section]["environment"] for run in runs])
            files = ", ".join(
                f"[{run.path.name}](../benchmarks/results/evidence/{run.path.name})" for run in runs
            )
            sentences.append(f"{section.capitalize()}: {said}: {files}.")
        return "\n".join(sentences) + "\n"

    def drawings(self) -> dict[str, str]:
        """SVG by file name."""
        found = {}
        for world, runs in self.worlds.items():
            cell = list(self.main_cells(world).values())[-1]
            title = f"{runs[0].document['title']}: right of {cell.questions:,} ({cell.name})"
            bars = [(LABELS.get(m, m).strip("*"), cell.count(m)) for m in modes([cell])]
            note = f"guessing: {cell.questions / cell.candidates:.0f}; {world}_seed*.json"
            found[f"{world}.svg"] = bar_chart(title, note, bars)
            if any(BUDGET.fullmatch(name) for name in self.cells(world)):
                found[f"{world}_budgets.svg"] = self._budget_drawing(world)
        if (self.directory / "ablations.json").exists():
            from benchmarks.evidence import ablations

            found["ablations.svg"] = ablations.drawing(self.directory / "ablations.json")
        return found

    def _budget_drawing(self, world: str) -> str:
        lines: dict[str, list[tuple[float, float]]] = {}
        for label, ms, right, of in self.budget_points(world):
            name = "T2T, stopped early" if label.startswith("T2T, ") else label.strip("*")
            name = name.replace("T2T of a sharer that sees the question", "T2T, question seen")
            lines.setdefault(name.partition(":")[0], []).append((ms, right / of))
        panel = Panel("share of right answers", "milliseconds", lines, 0.0, 1.0, joined=False)
        return line_chart("Accuracy at equal time", f"{world}_seed*.json", [panel])


def filled(text: str, report: Report) -> str:
    """A document's text with its tables written anew."""
    return MARKED.sub(lambda match: match[1] + report.table(match[2]) + match[3], text)


def main(*, check: bool) -> int:
    """Writes tables and drawings, or compares them; returns the exit status."""
    report = Report()
    wanted = {RESULTS / name: svg for name, svg in report.drawings().items()}
    wanted[DOCUMENT] = filled(DOCUMENT.read_text("utf-8"), report)
    status = 0
    for path, text in wanted.items():
        if path.exists() and path.read_text("utf-8") == text:
            continue
        print(f"{path.relative_to(ROOT)}: {'differs' if check else 'written'}")
        status = 1
        if not check:
            write_text(path, text)
    return status if check else 0
