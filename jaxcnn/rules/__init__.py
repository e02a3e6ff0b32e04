"""Other backward halves, as values for ``rule=`` and ``rules=``.  Rooms: rules import `jaxcnn.ops`."""

from jaxcnn.ops.rule import Call as Call
from jaxcnn.ops.rule import Rule as Rule
from jaxcnn.ops.rule import autodiff as autodiff
