"""Functions of JAX as lists of the library's ops.

`trace` makes a `Traced` of a function and arguments; its `Program` is a list of steps. A step is an `Operation`, which
has a name, an op, inputs, and the form in which the op is called, or an `Equation` of JAX. `evaluate` computes a
program, by default as `explicit` does. To analyze a function, hand it your own ``run``:

    traced = trace(net.apply, params, x)
    def run(step, inputs):
        outputs = execute(step, inputs, run)
        ...                                   # isinstance(step, Operation): step.name, step.op, step.form, …
        return outputs
    y = traced.result(evaluate(traced.program, traced.arrays, run))

Values are compared by identity: ``program.producer[value]`` is the step that computes a value, ``program.users[value]``
are those that read it, and ``program.inputs`` belong to ``traced.arrays`` and ``traced.paths``.
"""

from jaxcnn.tracing.evaluate import evaluate as evaluate
from jaxcnn.tracing.evaluate import execute as execute
from jaxcnn.tracing.program import Equation as Equation
from jaxcnn.tracing.program import Form as Form
from jaxcnn.tracing.program import Operation as Operation
from jaxcnn.tracing.program import Program as Program
from jaxcnn.tracing.program import Value as Value
from jaxcnn.tracing.trace import Traced as Traced
from jaxcnn.tracing.trace import trace as trace
