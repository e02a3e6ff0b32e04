"""Names of operations: that of a tap, the path of the module, or the path, the kind and a count."""

import dataclasses
from collections import Counter

from jaxcnn.taps import tapped_name
from jaxcnn.tracing.program import Equation, Operation, Program
from jaxcnn.tracing.shapes import move_of


def tap_of(program: Program, operation: Operation) -> str | None:
    """Return the name under which the function itself taps an operation's output, reshaped or not, or None."""
    value = operation.output
    while True:
        users = [user for user in program.users.get(value, ()) if isinstance(user, Equation)]
        for user in users:
            name = tapped_name(user.eqn)
            if name is not None:
                return name
        if len(users) != 1 or move_of(users[0]) is None:
            return None
        (value,) = users[0].outputs


def named(program: Program) -> Program:
    """Return the program with a unique name for each operation.

    An operation that the function taps has the name of the tap. A module whose only operation it is gives it its path:
    "Net/Conv_0". In a module with several, or with inner modules, and outside of modules, the kind and a count follow:
    "Net/relu1", "conv2".
    """
    operations = list(program.operations())
    paths = Counter(operation.path for operation in operations)
    inner = {path[:i] for path in paths for i in range(len(path)) if path[i] == "/"}
    used = {name for step in program.equations() if (name := tapped_name(step.eqn)) is not None}
    counts: Counter[str] = Counter()

    def counted(stem: str) -> str:
        counts[stem] += 1
        name = f"{stem}{counts[stem]}"
        return counted(stem) if name in used else name

    def name_of(operation: Operation) -> str:
        path = operation.path
        if operation.name:  # that of a tap; the function may run the same layers several times
            counts[operation.name] += 1
            return operation.name if counts[operation.name] == 1 else f"{operation.name}/{counts[operation.name]}"
        if path and paths[path] == 1 and path not in inner and path not in used:
            return path
        return counted(f"{path}/{operation.form.kind}".lstrip("/"))

    names = {}
    for operation in operations:
        names[operation] = name_of(operation)
        used.add(names[operation])
    return program.map(lambda operation: dataclasses.replace(operation, name=names[operation]))
