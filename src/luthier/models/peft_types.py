"""Adapter types of our own, made known to peft: the one place that reaches into peft's list of types.

peft keeps its types in an enumeration, which Python does not let anyone extend, and refuses to register a method that
is not in it. :func:`register` adds the member by the enumeration's own tables. With that ``get_peft_model``,
``save_pretrained``, ``PeftModel.from_pretrained`` and ``merge_and_unload`` work for the type as for any other. The name
of a type is the slug of its parameter method in capitals, so that :func:`ensure` finds the method behind an adapter's
folder without a list; the method's class has ``adapter_type()``, which imports what registers the type.

A tuner of such a type subclasses :class:`Tuner`, its layers :class:`SiteLayer`, and its tensors' names begin with its
prefix. Checked with peft 0.21 (``tests/unit/test_peft_types.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method

from luthier.core import registry


def type_name(slug: str) -> str:
    """The adapter type of a parameter method."""
    return slug.replace("-", "_").upper()


def register(slug: str, config: type, tuner: type) -> Any:
    """Make an adapter type known to peft; doing it again is harmless.

    Args:
        slug: the parameter method's slug.
        config: a dataclass derived from ``peft.PeftConfig``.
        tuner: the :class:`Tuner` class, whose ``prefix`` is the lower-case name and an underscore.

    Returns:
        The member of ``peft.PeftType``.
    """
    name = type_name(slug)
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    member = PeftType(name)
    if member not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config, model_cls=tuner)
    return member


def ensure(name: str) -> None:
    """Register the adapter type of that name if a parameter method of Luthier has it; otherwise do nothing."""
    if name in PeftType.__members__:
        return
    for slug in registry.names("parameters"):
        if type_name(slug) == name:
            registry.get("parameters", slug).target.adapter_type()


class SiteLayer(torch.nn.Module, BaseTunerLayer):
    """A module of the base, wrapped; derived classes add tensors, a ``forward`` and, where it exists, an exact merge.

    ``fold(adapter, sign)`` writes the adapter into the base's weights (+1) or takes it out again (-1). ``key`` is the
    module's path in the base.
    """

    # Of peft's mixin, whose types are not read.
    active_adapters: Any
    set_adapter: Any

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, config: Any, key: str) -> None:
        super().__init__()
        self.base_layer, self.key = base_layer, key
        self.merged_adapters: list[str] = []
        names: tuple[str, ...] = type(self).adapter_layer_names
        for name in names:
            setattr(self, name, torch.nn.ParameterDict())
        self.update_layer(adapter_name, config)

    def get_base_layer(self) -> Any:
        """The wrapped module."""
        return super().get_base_layer()

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Make the tensors of an adapter."""
        raise NotImplementedError

    def fold(self, adapter_name: str, sign: int) -> None:
        """Write the adapter into the base's weights, or take it out."""
        raise NotImplementedError

    @property
    def acting(self) -> str | None:
        """The adapter that the forward pass must apply itself; None where it is off or already in the weights.

        Asked before the base's layer runs: an adapter that is off is first taken out of the weights.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        return None if self.merged or not self.active_adapters else str(self.active_adapters[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active adapter into the base's weights; refused where the result would not be finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            self.fold(name, 1)
            self.merged_adapters.append(name)
        tensors = (*self.get_base_layer().parameters(recurse=False),)
        if safe_merge and not all(torch.isfinite(p).all() for p in tensors if p.is_floating_point()):
            self.unmerge()
            raise ValueError("the merged weights are not finite")

    def unmerge(self) -> None:
        """Take every merged adapter out of the base's weights."""
        while self.merged_adapters:
            self.fold(self.merged_adapters.pop(), -1)


class Tuner(BaseTuner):
    """Wraps the target modules in ``tuner_layer_cls``; derived classes set that and ``prefix``."""

    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SiteLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
