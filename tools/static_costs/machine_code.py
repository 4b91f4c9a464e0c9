"""The disassembly of a kernel: its instructions, loops and subroutines, and the cycles that they take."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# Cycles until a result is there; estimates for Hopper.
LATENCY = {"dram": 800, "l2": 280, "l1": 35, "LDS": 30, "SHFL": 24, "MUFU": 22, "I2F": 22, "F2I": 22, "other": 5}
BARRIER = 20
# Cycles of a scheduler's pipe per instruction of a warp: throughput of compute capability 9.0 in the CUDA programming
# guide. Other instructions take only an issue slot.
_PIPES = {
    "alu": (
        2,
        "IADD3 LOP3 SHF LEA ISETP FSETP FSET SEL FSEL IMNMX VIADD VIMNMX IABS PRMT MOV PLOP3 FMNMX I2FP F2FP SGXT",
    ),
    "imad": (2, "IMAD"),
    "xu": (8, "MUFU"),
    "convert": (2, "I2F F2I F2F I2I"),
    "shuffle": (4, "SHFL"),
    "tensor": (6, "HMMA"),  # an estimate: these forms reach about two thirds of what HGMMA does
}
PIPES = {op: (pipe, cycles) for pipe, (cycles, ops) in _PIPES.items() for op in ops.split()}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes of a thread's access; 4 if none is named
_NO_RESULT = {"STG", "STS", "STL", "BRA", "CALL", "RED", "ATOM", "BAR", "EXIT", "LDGSTS"}


class Instruction:
    def __init__(self, predicate: str | None, op: str, operands: str, lines: tuple[tuple[str, int], ...]) -> None:
        self.op, self.base, self.lines, self.conditional = op, op.split(".")[0], lines, bool(predicate)
        self.label = (re.findall(r"`\((\S+)\)", operands) or [None])[0]
        self.target: int | None = None
        self.width = next((_WIDTHS[part] for part in reversed(op.split(".")) if part in _WIDTHS), 4)
        self.moves = self.width if self.base in ("LDG", "STG") else 0
        registers = re.findall(r"\bU?[RP]\d+\b", operands)
        results = 0 if self.base in _NO_RESULT else 1
        self.uses = [*registers[results:], *re.findall(r"U?P\d", predicate or "")]
        self.sets = registers[:results]
        if self.sets and self.sets[0][0] == "R" and self.base in ("LDG", "LDS") and self.width > 4:
            self.sets = [f"R{int(self.sets[0][1:]) + i}" for i in range(self.width // 4)]


class Function:
    """A kernel's instructions, its subroutines, and its loops as (first, last) pairs of places."""

    def __init__(self, section: str) -> None:
        body, labels = _parse(section)
        for instruction in body:
            instruction.target = labels.get(instruction.label)
        starts = sorted((i, name) for name, i in labels.items() if name.startswith("$") and i < len(body))
        ends = [*(i for i, _ in starts[1:]), len(body)][: len(starts)]
        self.main = body[: starts[0][0]] if starts else body
        self.subroutines = {}
        for (i, name), end in zip(starts, ends, strict=True):
            last = max((j for j in range(i, end) if body[j].base == "RET"), default=end - 1)
            self.subroutines[name] = body[i : last + 1]  # padding follows
        while self.main[-1].base == "NOP" or self.main[-1].target == len(self.main) - 1:  # padding and a trap
            self.main.pop()
        self.all = [*self.main, *(i for s in self.subroutines.values() for i in s)]
        branches = [(x.target, i) for i, x in enumerate(self.main) if x.base == "BRA" and x.target is not None]
        backward = {target: i for target, i in branches if target <= i}
        self.loops = sorted(backward.items(), key=lambda loop: (loop[0], -loop[1]))
        self._rare = self._wide_divisions()

    def within(self, loop: tuple[int, int]) -> list[tuple[int, int]]:
        return [other for other in self.loops if other != loop and loop[0] <= other[0] and other[1] <= loop[1]]

    def moved(self, loop: tuple[int, int], scalars: bool = True) -> int:
        """Return the bytes that a thread moves in an iteration, with or without its loads of 32 bits."""
        body = self.main[loop[0] : loop[1] + 1]
        return sum(i.moves for i in body if scalars or i.base == "STG" or i.width != 4)

    def trace(self, loop: tuple[int, int] | None = None, skip: set[int] | None = None) -> list[Instruction]:
        """Return an iteration's instructions without inner loops. Without a loop, return those outside of all loops."""
        loop = loop or (0, len(self.main) - 1)
        left_out = self._rare.union(skip or (), *(range(a, b + 1) for a, b in self.within(loop)))
        result = []
        for i in range(loop[0], loop[1] + 1):
            if i not in left_out:
                result.append(self.main[i])
                if self.main[i].base == "CALL":
                    result += self.subroutines.get(self.main[i].label, [])
        return result

    def remainders(self, loop: tuple[int, int]) -> list[tuple[range, int]]:
        """Return (places, bytes moved) of the remainder of an unrolled loop, which sizes that are multiples skip."""
        found = []
        for i in range(loop[1] + 1, len(self.main)):
            x, target = self.main[i], self.main[i].target
            same = x.base == "BRA" and x.conditional and x.lines == self.main[loop[1]].lines
            if same and target is not None and target > i:
                moves = sum(y.moves for y in self.main[i + 1 : target])
                if moves and not any(i < other[0] < target for other in self.loops):
                    found.append((range(i + 1, target), moves))
        return found

    def _wide_divisions(self) -> set[int]:
        """Places of calls in ``if (both fit) {quotient in 32 bits} else {call}``, in either order."""
        rare: set[int] = set()
        for i, x in enumerate(self.main):
            middle = x.target
            if x.base != "BRA" or not x.conditional or middle is None or not i < middle < min(i + 80, len(self.main)):
                continue
            jump = self.main[middle - 1]
            join = jump.target if jump.base == "BRA" and not jump.conditional else None
            if join is not None and middle < join < middle + 80:
                sides = range(i + 1, middle), range(middle, join)
                first, second = (any(self.main[j].base == "CALL" for j in side) for side in sides)
                if first != second:
                    rare.update(sides[0] if first else sides[1])
        return rare


def _parse(section: str) -> tuple[list[Instruction], dict[str, int]]:
    body: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: tuple[tuple[str, int], ...] = ()
    fresh = True
    for line in section.splitlines():
        if found := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            lines, fresh = (() if fresh else lines) + ((found[1], int(found[2])),), False
        elif found := re.match(r"(\S+):$", line):
            labels[found[1]] = len(body)
        elif found := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;", line):
            body.append(Instruction(*found.groups(), lines))
            fresh = True
    return body, labels


def disassemble(cubin: Path) -> dict[str, Function]:
    command = [TOOLS / "nvdisasm", "-gi", "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]
    return {section.split()[0]: Function(section) for section in sections}


def registers(cubin: Path) -> dict[str, int]:
    command = [TOOLS / "cuobjdump", "-res-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", text)}


def issue_cycles(trace: list[Instruction]) -> float:
    """Cycles of a scheduler for one warp's pass."""
    pipes: Counter[str] = Counter(issue=len(trace))
    for i in trace:
        pipe, cycles = PIPES.get(i.base, ("issue", 0))
        pipes[pipe] += cycles
        if i.moves or i.base in ("LDS", "STS"):
            pipes["l1"] += 4 * max(1, i.width // 4)  # 128 bytes a cycle for the four schedulers of an SM
    return max(pipes.values())


def latency_cycles(trace: list[Instruction], memory: str, repeats: int) -> int:
    """Cycles of the last of some iterations of a warp that issues in order and is alone."""
    ready: dict[str, int] = {}
    clock = before = 0
    for _ in range(repeats):
        before = clock
        for i in trace:
            step = BARRIER if i.base == "BAR" else 1
            clock = max([clock + step, *(ready.get(r, 0) for r in (*i.uses, *i.sets))])
            after = clock + LATENCY.get(memory if i.base == "LDG" else i.base, LATENCY["other"])
            ready.update(dict.fromkeys(i.sets, after))
    return clock - before
