"""Composites: LRP's rules for a whole net or function, as mappings for ``rules=`` of `jaxcnn.attribute`."""

from typing import Any

from jaxcnn.layers import Activation, Dense, Dropout, LpPool
from jaxcnn.net import Model, Residual, Serial, expect_model, layers_of
from jaxcnn.ops.rule import Call, Rule
from jaxcnn.rules.relevance import AlphaBeta, Epsilon, Flat, Gamma, ZBox, ZeroParams, ZPlus, pass_through
from jaxcnn.selection import First, IfThere

#: Layers of the form x·w + b, and the convolutions among them.
_AFFINE = layers_of("affine", "hidden")
_CONVOLUTIONS = tuple(layer for layer in _AFFINE if layer is not Dense)


def epsilon_plus(*, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()) -> dict[Any, Rule]:
    """Return z⁺ for convolutions, and ε for dense layers, average pooling and sums; R passes activations unchanged.

    This corresponds to zennit's EpsilonPlus. z⁺ applies to all kinds of convolutions. The sums are those of residual
    nets. Max pooling keeps its exact rule, R to the winner.

    Args:
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters that the rules of convolutions and dense layers treat as 0, as in `Epsilon`.

    Returns:
        A mapping for ``rules=``.

    Source: Montavon et al. 2019; Kohlbrenner et al. 2020.
    """
    return _composite(ZPlus(stabilizer, zero_params), epsilon, stabilizer, zero_params)


def epsilon_plus_flat(
    net: Model, *, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()
) -> dict[Any, Rule]:
    """Return `epsilon_plus` with the flat rule for the first layer, corresponding to zennit's EpsilonPlusFlat.

    Args:
        net: the net or function, in which the first convolution or dense layer gets the flat rule.
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.

    Source: Lapuschkin et al. 2019.
    """
    first = _for_first(net, _AFFINE, Flat(stabilizer, zero_params))
    return {**first, **epsilon_plus(epsilon=epsilon, stabilizer=stabilizer, zero_params=zero_params)}


def epsilon_alpha2_beta1(
    *, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()
) -> dict[Any, Rule]:
    """Return `epsilon_plus` with αβ (α = 2, β = 1) for convolutions, corresponding to zennit's EpsilonAlpha2Beta1.

    Args:
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.
    """
    return _composite(AlphaBeta(2.0, 1.0, stabilizer, zero_params), epsilon, stabilizer, zero_params)


def epsilon_alpha2_beta1_flat(
    net: Model, *, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()
) -> dict[Any, Rule]:
    """Return `epsilon_alpha2_beta1` with the flat rule for the first layer.

    This corresponds to zennit's EpsilonAlpha2Beta1Flat.

    Args:
        net: the net or function, in which the first convolution or dense layer gets the flat rule.
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.
    """
    first = _for_first(net, _AFFINE, Flat(stabilizer, zero_params))
    return {**first, **epsilon_alpha2_beta1(epsilon=epsilon, stabilizer=stabilizer, zero_params=zero_params)}


def epsilon_gamma_box(
    net: Model,
    low: Any = None,
    high: Any = None,
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabilizer: float = 1e-6,
    zero_params: ZeroParams = (),
) -> dict[Any, Rule]:
    """Return `epsilon_plus` with γ for convolutions and zᴮ for the first, corresponding to zennit's EpsilonGammaBox.

    Args:
        net: the net or function, in which the first convolution gets zᴮ.
        low: the smallest value of a pixel after scaling of the net's inputs, a number or one per channel.
        high: the largest value of a pixel.
        epsilon: ε of dense layers.
        gamma: γ of the convolutions.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.

    Raises:
        TypeError: if low or high is missing.
    """
    first = _for_first(net, _CONVOLUTIONS, ZBox(low, high, stabilizer, zero_params))
    return {**first, **_composite(Gamma(gamma, stabilizer, zero_params), epsilon, stabilizer, zero_params)}


def excitation_backprop(*, stabilizer: float = 1e-6, zero_params: ZeroParams = ()) -> dict[Any, Rule]:
    """Return z⁺ for convolutions and dense layers, and ε for average pooling and sums; activations stay exact.

    This corresponds to zennit's ExcitationBackprop.

    Args:
        stabilizer: ε of all fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.

    Source: Zhang et al. 2016.
    """
    return {
        **_for_types(_AFFINE, ZPlus(stabilizer, zero_params)),
        **_for_sums(stabilizer),
        **_for_types((Activation,), _exact),
        **_for_types((Dropout,), pass_through),
    }


def _composite(conv_rule: Rule, epsilon: float, stabilizer: float, zero_params: ZeroParams) -> dict[Any, Rule]:
    return {
        **_for_types(_CONVOLUTIONS, conv_rule),
        **_for_types((Dense,), Epsilon(epsilon, zero_params)),
        **_for_sums(stabilizer),
        **_for_types((Activation, Dropout), pass_through),
    }


def _for_sums(stabilizer: float) -> dict[Any, Rule]:
    return _for_types((*layers_of("sum"), LpPool, Residual), Epsilon(stabilizer))


def _for_types(types: tuple[type, ...], rule: Rule) -> dict[Any, Rule]:
    """Return the rule for each of these layer types; a net need not contain them."""
    return dict.fromkeys(map(IfThere, types), rule)


def _for_first(net: Model, types: tuple[type, ...], rule: Rule) -> dict[Any, Rule]:
    """Return the rule under the name of the first layer of these types, if there is one.

    The operations of a function are known once it is called; until then the key is a `First`.
    """
    expect_model("attribute", net)
    if not isinstance(net, Serial):
        return {First(types): rule}
    return dict.fromkeys([name for name, layer in net.walk() if isinstance(layer, types)][:1], rule)


def _exact(call: Call, delta: Any) -> tuple[Any, ...]:
    """Return the exact δ, for composites that select it explicitly."""
    return call.exact(delta)
