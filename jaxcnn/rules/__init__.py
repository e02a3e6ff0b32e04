"""Alternative backward rules, as values for ``rule=`` and ``rules=``."""

from jaxcnn.ops.rule import Call as Call
from jaxcnn.ops.rule import Rule as Rule
from jaxcnn.ops.rule import autodiff as autodiff
from jaxcnn.rules.compose import HiddenLayerRules as HiddenLayerRules
from jaxcnn.rules.pooling import even_split as even_split
from jaxcnn.rules.pooling import literal_up as literal_up
from jaxcnn.rules.pooling import proportional as proportional
from jaxcnn.rules.pooling import winner as winner
from jaxcnn.rules.rectifiers import SoftplusSmoothed as SoftplusSmoothed
from jaxcnn.rules.rectifiers import deconv_relu as deconv_relu
from jaxcnn.rules.rectifiers import guided_relu as guided_relu
from jaxcnn.rules.rectifiers import straight_through as straight_through
from jaxcnn.rules.relevance import AlphaBeta as AlphaBeta
from jaxcnn.rules.relevance import Epsilon as Epsilon
from jaxcnn.rules.relevance import Flat as Flat
from jaxcnn.rules.relevance import Gamma as Gamma
from jaxcnn.rules.relevance import WSquare as WSquare
from jaxcnn.rules.relevance import ZBox as ZBox
from jaxcnn.rules.relevance import ZPlus as ZPlus
from jaxcnn.rules.relevance import pass_through as pass_through
from jaxcnn.rules.relevance import rescale as rescale
from jaxcnn.rules.training import ClipDelta as ClipDelta
from jaxcnn.rules.training import FeedbackAlignment as FeedbackAlignment
from jaxcnn.rules.training import QuantizedDelta as QuantizedDelta
from jaxcnn.rules.training import sign_symmetric as sign_symmetric
