"""Selection of rules: which layer of a net takes which rule of ``rules=``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcnn.arguments import bad_type, bad_value, fail, is_predicate, nearest
from jaxcnn.layers import Conv, Flatten, Function, HiddenLayer, Layer, MaxPool, Net, Relu
from jaxcnn.ops.rule import Rule

#: One rule for all layers, or a mapping from layer types, names or predicates (name, layer) → bool to rules.
Rules = Rule | Mapping[Any, Rule]

#: The layers that a hidden layer contains, and the argument of `jaxcnn.rules.HiddenLayerRules` for each.
_IN_HIDDEN_LAYER = {Conv: "conv", Relu: "relu", MaxPool: "pool"}


@dataclasses.dataclass(frozen=True, eq=False)
class IfThere:
    """A layer type as a key of ``rules=`` that may match nothing, for mappings that fit every net.

    It equals the type itself, so a mapping can be read and merged as if the type were the key.
    """

    kind: type

    def __eq__(self, other: object) -> bool:
        return (other.kind if isinstance(other, IfThere) else other) == self.kind

    def __hash__(self) -> int:
        return hash(self.kind)

    def __repr__(self) -> str:
        return repr(self.kind)


@dataclasses.dataclass(frozen=True)
class First:
    """A key of ``rules=`` for the first operation of a function that a layer of these types would apply."""

    kinds: tuple[type, ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rules of the outermost net, and the path of the net that looks them up.

    A net passes it as ``rules=`` to the nets inside it, and a net with its own ``apply`` hands it on.
    """

    rules: Rules | None
    #: The names of the enclosing nets, each followed by "/".
    path: str = ""
    #: Full names of the layers whose rules have been looked up, shared by all selections of one call.
    requested: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)

    def inside(self, name: str) -> "Selection":
        """Return the selection for the inner net of this name."""
        return dataclasses.replace(self, path=f"{self.path}{name}/")

    def rule_for(self, name: str, layer: Layer) -> Rule | None:
        """Return the rule of a layer of the net, by its name in that net."""
        self.requested.add(f"{self.path}{name}")
        return rule_for(self.rules, f"{self.path}{name}", layer)

    def check_all_requested(self, net: Net) -> None:
        """Raise ValueError for a key that only matches layers in nets whose own `apply` does not hand on the rules."""
        if not isinstance(self.rules, Mapping):
            return
        layers = _leaves(net)
        if self.requested.issuperset(name for name, _ in layers):
            return
        for key, rule in self.rules.items():
            matches = [name for name, layer in layers if _key_matches(key, name, layer)]
            if rule is None or isinstance(key, IfThere) or not matches or self.requested.intersection(matches):
                continue
            fail(
                "rules",
                "a net with its own apply must hand on rules= to super().apply or to apply_layer, "
                f"got one that calls {', '.join(matches)} without",
            )


def select(rules: "Rules | Selection | None", net: Net) -> Selection:
    """Return ``rules=`` of a net as a `Selection`, checked against the net's layers if it is the outermost net."""
    if isinstance(rules, Selection):
        return rules
    if isinstance(rules, Mapping):
        check_rules(rules, [name for name, _ in net.walk()])
        check_matches(rules, net)
    return Selection(rules)


def rule_for(rules: Rules | None, name: str, layer: Layer) -> Rule | None:
    """Return the rule of a layer: the one rule, or that of the first key that matches."""
    if not isinstance(rules, Mapping):
        return rules
    return next((rule for key, rule in rules.items() if _key_matches(key, name, layer)), None)


def rule_of_sum(rules: Rules | None, net: Layer) -> Rule | None:
    """Return the rule of the sum at the end of a net.

    Only types of nets select it, such as `Residual`: few rules accept several inputs.
    """
    if not isinstance(rules, Mapping) or not isinstance(net, Net):
        return None
    return next((rule for key, rule in rules.items() if _type_of(key) in net.sum_keys), None)


def without_rule(rules: Mapping[Any, Rule | None], net: Net) -> list[str]:
    """Return the names of the layers, and of the nets with a sum, for which the first key that matches has no rule."""
    names = []
    for name, layer in net.walk():
        sums = layer.sum_keys if isinstance(layer, Net) else None
        matching = (
            rule for key, rule in rules.items()
            if (_key_matches(key, name, layer) if sums is None else _type_of(key) in sums)
        )  # fmt: skip
        if next(matching, "no key") is None:
            names.append(name)
    return names


def check_rules(rules: Mapping[Any, Rule], names: list[str]) -> None:
    """Raise ValueError for a name that is not among ``names``, and TypeError for a key of another kind."""
    for key in rules:
        if isinstance(key, str) and key not in names:
            near = nearest(key, names)
            raise bad_value("rules", "a key", "the name of a layer", f"{key!r}; the nearest are {', '.join(near)}")
        kind = _type_of(key)
        if not isinstance(key, str) and not (is_predicate(key) if kind is None else issubclass(kind, Layer)):
            raise bad_type("rules", "a key", "a layer type, a name or a predicate", repr(key))


def check_matches(rules: Mapping[Any, Rule], net: Net) -> None:
    """Raise ValueError for a key that no layer takes a rule from; `IfThere` may match nothing."""
    layers = _leaves(net)
    sum_keys = {kind for each in _nets(net) for kind in each.sum_keys}
    for key in rules:
        kind = _type_of(key)
        if isinstance(key, IfThere) or kind in sum_keys:
            continue
        matches = [layer for name, layer in layers if _key_matches(key, name, layer)]
        if any(map(_takes_rule, matches)):
            continue
        shown = key if isinstance(key, str) else getattr(key if kind is None else kind, "__name__", repr(key))
        if matches:
            only = ", ".join(sorted({type(layer).__name__ for layer in matches}))
            raise bad_value("rules", "a key", _MATCHING, f"{shown!r}, which matches only {only}")
        if isinstance(key, str) and not any(name.startswith(f"{key}/") for name, _ in layers):
            continue  # a net without layers
        kinds = ", ".join(sorted({type(layer).__name__ for _, layer in layers})) or "none"
        raise bad_value("rules", "a key", _MATCHING, f"{shown!r}; the layers are {kinds}{_hint(kind, net)}")


_MATCHING = "a type, name or predicate that matches a layer that takes a rule"


def _nets(net: Net) -> list[Net]:
    return [net, *(layer for _, layer in net.walk() if isinstance(layer, Net))]


def _leaves(net: Net) -> list[tuple[str, Layer]]:
    """Return the layers that are not nets, with their full names."""
    return [(name, layer) for name, layer in net.walk() if not isinstance(layer, Net)]


def _takes_rule(layer: Layer) -> bool:
    return layer.takes_rule if isinstance(layer, Function) else type(layer) is not Flatten


def _key_matches(key: Any, name: str, layer: Layer) -> bool:
    kind = _type_of(key)
    if kind is not None:
        return isinstance(layer, kind)
    if isinstance(key, str):
        return f"{name}/".startswith(f"{key}/")
    return bool(key(name, layer))


def _type_of(key: Any) -> type | None:
    """Return the layer type of a key, or None if it is not one."""
    return key.kind if isinstance(key, IfThere) else key if isinstance(key, type) else None


def _hint(kind: type | None, net: Net) -> str:
    """Return a hint at the key that takes a rule for this type, or ""."""
    if kind is None:
        return ""
    if issubclass(kind, Net) and any(isinstance(each, kind) for each in _nets(net)):
        return ". A net takes rules by its name, or by the types of its layers"
    inside = next((part for of, part in _IN_HIDDEN_LAYER.items() if issubclass(of, kind)), None)
    if inside is None or not any(isinstance(layer, HiddenLayer) for _, layer in _leaves(net)):
        return ""
    return f". A HiddenLayer contains one: {{HiddenLayer: rules.HiddenLayerRules({inside}=...)}}"
