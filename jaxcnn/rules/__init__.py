"""Other backward halves, as values for ``rule=`` and ``rules=``.  Rooms: rules import `jaxcnn.ops`."""

from jaxcnn.ops.rule import Call as Call
from jaxcnn.ops.rule import Rule as Rule
from jaxcnn.ops.rule import autodiff as autodiff
from jaxcnn.rules.relevance import AlphaBeta as AlphaBeta
from jaxcnn.rules.relevance import Epsilon as Epsilon
from jaxcnn.rules.relevance import Flat as Flat
from jaxcnn.rules.relevance import Gamma as Gamma
from jaxcnn.rules.relevance import WSquare as WSquare
from jaxcnn.rules.relevance import ZBox as ZBox
from jaxcnn.rules.relevance import ZPlus as ZPlus
from jaxcnn.rules.relevance import passed as passed
from jaxcnn.rules.relevance import rescale as rescale
