"""Whether a module's weights are still what they were when something was made of them."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_WATCHES: WeakSet[Watch] = WeakSet()

_NUMBERS = ("eps", "num_heads")
"""What some layers compute with beside their parameters."""


class Watch:
    """Notices any change to a module's parameters: replaced, moved, written in place, or stepped; and to
    what its layers do with them: hooks, a ``forward`` of their own, another eps or number of heads.

    autograd counts writes in place, except through ``p.data`` or a NumPy view, and those of torch's fused
    optimisers on a CPU: an optimiser that has the parameters says itself that it stepped. The tensors
    are held, so that neither an ``id`` nor an address can be reused unnoticed. The module itself is not:
    it has its watch, and a circle would keep the weights' memory until Python's collector comes by.
    """

    def __init__(self, module: nn.Module) -> None:
        self._members: list[tuple[dict[str, Any], str, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, int, int]] = []
        every = torch.nn.modules.module
        self._hooks: list[dict[Any, Any]] = [
            every._global_forward_hooks,
            every._global_forward_pre_hooks,
        ]
        self._attributes: list[dict[str, Any]] = []
        self._numbers: list[tuple[dict[str, Any], str, Any]] = []
        for child in module.modules():
            members = [*child._modules.items(), *child._parameters.items()]
            for name, member in members:
                owner = child._modules if name in child._modules else child._parameters
                self._members.append((cast(dict[str, Any], owner), name, member))
                # Neither a version nor an address: only replacing those is noticed.
                if isinstance(member, Tensor) and not (
                    member.is_inference() or isinstance(member, FakeTensor)
                ):
                    entry = (member, member.detach(), member._version, member.data_ptr())
                    self._tensors.append(entry)
            if child is not module:
                own = child.__dict__
                self._hooks += [child._forward_hooks, child._forward_pre_hooks]
                self._attributes.append(own)
                self._numbers += [(own, name, own[name]) for name in _NUMBERS if name in own]
        self._parameters = [member for *_, member in self._members if isinstance(member, Tensor)]
        self._ids = {id(tensor) for tensor in self._parameters}
        self._stepped = False
        _watch_optimizers()
        _WATCHES.add(self)

    def unchanged(self) -> bool:
        """Neither weights nor what the layers do with them."""
        return (
            self.same_weights()
            and not any(self._hooks)
            and not any("forward" in own for own in self._attributes)
            and all(own.get(name) == number for own, name, number in self._numbers)
        )

    def same_weights(self) -> bool:
        return (
            not self._stepped
            and all(owner.get(name) is member for owner, name, member in self._members)
            and all(
                tensor._version == version and tensor.data_ptr() == address
                for tensor, _, version, address in self._tensors
            )
        )

    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self._parameters)

    def step(self, ids: set[int]) -> None:
        """An optimiser of parameters with these ids has stepped."""
        self._stepped = self._stepped or not ids.isdisjoint(self._ids)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    if _WATCHES:
        ids = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for watch in list(_WATCHES):
            watch.step(ids)


_hook: Any = None


def _watch_optimizers() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_stepped)


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, whose tensors the fast path cannot
    read."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
