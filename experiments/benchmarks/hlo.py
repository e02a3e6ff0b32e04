"""Counts of a compiled program: memory traffic, kernels, collectives, and scheduled TPU bundles.

The program is HLO text after XLA's passes (`jax.stages.Compiled.as_text`). The bundles are libtpu's text dump of its
last pass. Nothing here imports JAX.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
"""Bytes per element."""

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier",
}  # fmt: skip
"""Operations that move nothing. Those that end in "-done" are free as well: they end an operation in "-start"."""
FREE_CALLS = {"ConcatBitcast", "AllocateBuffer"}
"""Targets of custom calls that move nothing."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's shape."""

    size: int
    """Bytes in memory, including the padding of tiles."""
    rank: int
    on_chip: bool
    """Whether the array is in a TPU's vector memory."""
    minor: tuple[int, ...] = ()
    """Its dims, those of neighboring elements first."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""
    """Value of a constant, or number of a parameter."""

    @property
    def target(self) -> str:
        """Target of a custom call, or ""."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def asynchronous(self) -> bool:
        """Whether the operation runs while others do."""
        return self.op.endswith("-start")

    @property
    def free(self) -> bool:
        """Whether the operation moves nothing."""
        return self.op in FREE or self.op.endswith("-done") or self.target in FREE_CALLS


@dataclasses.dataclass(frozen=True)
class Step:
    """One executed operation: its instruction, the number of executions, and the bytes that one execution moves."""

    instruction: Instruction
    times: int
    moved: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of one program."""

    moved: int
    """Bytes that the kernels read from and write to the device's memory: operands and results, no scalars."""
    kernels: int
    calls: Mapping[str, int]
    """Number of calls per library function, such as those of cuDNN."""
    collectives: Mapping[str, int]
    """Number of collectives per kind."""
    cycles: float | None = None
    """Modelled cycles of a TPU."""


def count(text: str, bundles: Mapping[str, int] | None = None, bytes_per_cycle: float = math.inf) -> Counts:
    """Count what a program does.

    Args:
        text: The compiled HLO.
        bundles: Scheduled bundles per instruction, for TPU. The time of an instruction is then modelled as one cycle
            per bundle, or as its bytes divided by the memory's rate if that is more. Asynchronous copies overlap with
            other instructions, but all bytes together take at least their time.
        bytes_per_cycle: The memory's rate.
    """
    steps = list(executed(text))
    moved = sum(step.times * step.moved for step in steps)
    calls: collections.Counter[str] = collections.Counter()
    collectives: collections.Counter[str] = collections.Counter()
    for step in steps:
        if step.instruction.target.startswith("__"):
            calls[step.instruction.target.removeprefix("__")] += step.times
        if (kind := step.instruction.op.removesuffix("-start")) in COLLECTIVES:
            collectives[kind] += step.times
    cycles = None
    if bundles is not None:
        cycles = float(bundles.get("TLP", 0))  # the program around the instructions
        for step in steps:
            if not step.instruction.asynchronous:
                cycles += step.times * max(bundles.get(step.instruction.name, 0), step.moved / bytes_per_cycle)
        cycles = max(cycles, moved / bytes_per_cycle)
    return Counts(moved, sum(step.times for step in steps), dict(calls), dict(collectives), cycles)


def executed(text: str) -> Iterator[Step]:
    """Yield the operations that the program executes, excluding free ones.

    Bodies of loops count as often as they run, if the program says how often that is, or once. Of a conditional, the
    branch that moves the fewest bytes counts.
    """
    computations, entry = parse(text)

    def walk(name: str, times: int) -> Iterator[Step]:
        instructions = computations[name]
        for instruction in instructions.values():
            if instruction.op == "while":
                yield from walk(_called(instruction, "body")[0], times * _trips(instruction, computations))
            elif instruction.op == "call":
                yield from walk(_called(instruction, "to_apply")[0], times)
            elif instruction.op == "conditional":
                keys = ("branch_computations", "true_computation", "false_computation")
                branches = [list(walk(branch, times)) for key in keys for branch in _called(instruction, key)]
                yield from min(branches, key=_cost)
            elif not instruction.free:
                yield Step(instruction, times, _moved(instruction, instructions, computations))

    yield from walk(entry, 1)


def _cost(steps: Sequence[Step]) -> tuple[int, int]:
    """Return the bytes that steps move, and their number."""
    return sum(step.times * step.moved for step in steps), len(steps)


def _trips(loop: Instruction, computations: Mapping[str, Mapping[str, Instruction]]) -> int:
    """Return how often a loop runs: what XLA knows, or the constant that its condition compares a counter with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = computations[_called(loop, "condition")[0]]
    for test in condition.values():
        if test.op == "compare" and "direction=LT" in test.attributes:
            limits = (condition[name].literal for name in test.operands if name in condition)
            return next((int(limit) for limit in limits if limit.isdigit()), 1)
    return 1


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Return the instructions of every computation by name, and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, shape, op, rest = match.groups()
            inside = _closing(rest)
            operands = tuple(_NAME.findall(rest[:inside]))
            literal = rest[: inside - 1] if op in ("constant", "parameter") else ""
            current[name] = Instruction(name, op, tuple(arrays(shape)), operands, rest[inside:], literal)
    return computations, entry


def arrays(shape: str) -> Iterator[Array]:
    """Yield the arrays of a shape, which may be a tuple, such as ``(bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, u32[])``."""
    for dtype, dims, layout, attributes in _ARRAY.findall(shape):
        if dtype not in BYTES:
            continue
        sizes = [int(n) for n in dims.split(",") if n]
        order = [int(n) for n in layout.split(",") if n] or list(reversed(range(len(sizes))))
        minor_first = [sizes[dim] for dim in order]
        if minor_first and (tile := re.search(r"T\(([\d,]+)\)", attributes)):
            for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")])):
                if i < len(minor_first):
                    minor_first[i] = -(-minor_first[i] // n) * n
        yield Array(BYTES[dtype] * math.prod(minor_first), len(sizes), "S(1)" in attributes, tuple(order))


def _moved(
    instruction: Instruction,
    others: Mapping[str, Instruction],
    computations: Mapping[str, Mapping[str, Instruction]],
) -> int:
    sources = {name: others[name] for name in instruction.operands if name in others}
    if instruction.asynchronous:
        # The result is a tuple of source, destination and flags, for copies in another order. Only the destination's
        # bytes move, even if the source is larger.
        results = [array for array in instruction.arrays if array.rank]
        if not results:
            return 0
        to = results[0] if instruction.op == "copy-start" else results[-1]
        in_memory = [not to.on_chip, any(not array.on_chip for source in sources.values() for array in source.arrays)]
        return to.size * sum(in_memory)
    read, written = _slices(instruction, computations)
    moved = _in_memory(instruction.arrays, written)
    for name, source in sources.items():
        if source.op != "tuple":
            part = _total([read[i] for i, operand in enumerate(instruction.operands) if operand == name])
            moved += _in_memory(source.arrays, part)
    return moved


def _in_memory(arrays: Sequence[Array], part: int | None) -> int:
    """Return the bytes of the arrays that are in the device's memory, or of the part of the only one that moves."""
    sizes = (array.size for array in arrays if array.rank and not array.on_chip)
    return sum(size if part is None else min(size, part) for size in sizes)


def _total(parts: Sequence[int | None]) -> int | None:
    """Return the sum of the parts, or None if there are none or one is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def _slices(
    instruction: Instruction, computations: Mapping[str, Mapping[str, Instruction]]
) -> tuple[list[int | None], int | None]:
    """Return the bytes that an instruction reads from each operand and writes, None for whole arrays.

    A slice reads its result's bytes, also of an array that is converted to another dtype before, unless it has a stride
    along one of the two dims of neighboring elements. A dynamic update slice reads and writes those of the update: the
    array is updated in place.
    """
    body: Mapping[str, Instruction] = {instruction.name: instruction}
    names: Sequence[str] = instruction.operands
    if instruction.op == "fusion":
        body = computations.get(next(iter(_called(instruction, "calls")), ""), {})
        by_number = {inside.literal: name for name, inside in body.items() if inside.op == "parameter"}
        names = [by_number.get(str(i), "") for i in range(len(instruction.operands))]

    def parts(name: str) -> int | None:
        return _total([part(user, name) for user in body.values() if name in user.operands])

    def part(user: Instruction, name: str) -> int | None:
        if name != user.operands[0] or name in user.operands[1:]:
            return None
        if user.op == "convert" and (converted := parts(user.name)) is not None:
            return converted * body[name].arrays[0].size // user.arrays[0].size
        if user.op == "dynamic-slice" or (user.op == "slice" and _in_runs(user)):
            return user.arrays[0].size
        return 0 if user.op == "dynamic-update-slice" else None

    read = [parts(name) for name in names]
    last = list(body.values())[-1] if body else instruction
    if last.op != "dynamic-update-slice" or last.operands[1] not in body:
        return read, None
    return read, body[last.operands[1]].arrays[0].size


def _in_runs(slice_: Instruction) -> bool:
    """Whether a slice has no stride along the two dims of neighboring elements."""
    strides = [stride or "1" for stride in re.findall(r"\[\d+:\d+(?::(\d+))?\]", slice_.attributes)]
    return all(strides[dim] == "1" for dim in slice_.arrays[0].minor[:2])


def _called(instruction: Instruction, key: str) -> list[str]:
    match = re.search(rf"\b{key}=(%[\w.\-]+|\{{[^}}]*\}})", instruction.attributes)
    return _NAME.findall(match[1]) if match else []


def _closing(text: str) -> int:
    """Return the index after the parenthesis that closes the operands."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    return len(text)


# ---------------------------------------------------------------------------------------------------------------------
# Bundles of a TPU

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{(.*)$")
_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder [^;]*?, (\d+) /\*[^*]*loop exit test")
_DUMP = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")


def dumped_instruction(file_name: str) -> str | None:
    """Return the instruction whose bundles a file of the dump contains, or None for other files."""
    match = _DUMP.fullmatch(file_name)
    return None if match is None or "schedule-analysis" in file_name else match[1]


def executed_bundles(lines: Iterable[str]) -> int:
    """Return the number of bundles that an instruction executes: those of a loop times its limit.

    The number of ``>`` is the depth of loops, ``LB`` marks the first bundle of a loop's body, and the last test of the
    body compares with the limit.
    """
    limits: list[int] = []  # of every loop
    open_loops: list[tuple[int, int]] = []  # (depth, number of the loop)
    bundles: list[Sequence[int]] = []  # the loops that contain each bundle
    for line in lines:
        match = _BUNDLE.match(line)
        if match is None:
            continue
        label, markers, rest = match.groups()
        depth = markers.count(">")
        if depth == 0 and rest.startswith("}"):
            depth = open_loops[-1][0] if open_loops else 0
        while open_loops and open_loops[-1][0] > depth - (label == "LB"):
            open_loops.pop()
        if label == "LB":
            limits.append(1)
            open_loops.append((depth, len(limits) - 1))
        if open_loops and (limit := _EXIT.search(line)):
            limits[open_loops[-1][1]] = max(int(limit[1]), 1)
        bundles.append([number for _, number in open_loops])
    return sum(math.prod(limits[number] for number in loops) for loops in bundles)
