"""Other backward halves, as values for ``rule=`` and ``rules=``.  Rooms: rules import `jaxcnn.ops`."""

from jaxcnn.ops.rule import Call as Call
from jaxcnn.ops.rule import Rule as Rule
from jaxcnn.ops.rule import autodiff as autodiff
from jaxcnn.rules.fitting import InHiddenLayer as InHiddenLayer
from jaxcnn.rules.pooling import even_split as even_split
from jaxcnn.rules.pooling import literal_up as literal_up
from jaxcnn.rules.pooling import proportional as proportional
from jaxcnn.rules.pooling import winner as winner
from jaxcnn.rules.rectifiers import SoftplusSmoothed as SoftplusSmoothed
from jaxcnn.rules.rectifiers import deconv_relu as deconv_relu
from jaxcnn.rules.rectifiers import guided_relu as guided_relu
from jaxcnn.rules.rectifiers import straight_through as straight_through
from jaxcnn.rules.training import ClipDelta as ClipDelta
from jaxcnn.rules.training import FeedbackAlignment as FeedbackAlignment
from jaxcnn.rules.training import QuantisedDelta as QuantisedDelta
from jaxcnn.rules.training import SignSymmetric as SignSymmetric
