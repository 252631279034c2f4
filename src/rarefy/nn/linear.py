"""`SparseLinear`: the interface of `nn.Linear`, but only active connections are stored and computed."""

from __future__ import annotations

import math
import zlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.kernels import Layout, Panels, infer, sparse_linear
from rarefy.nn.entries import move_entries, replace_data

_INDEX_BUFFERS = ("csr_starts", "csr_offsets", "csr_back_starts", "csr_back_offsets", "csr_order")

_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # torch 2.6 has no such function


def _rename(members: dict[str, Any], old: str, new: str) -> None:
    """Renames a key of a dict in its place."""
    items = [(new if name == old else name, member) for name, member in members.items()]
    members.clear()
    members.update(items)


class SparseLinear(nn.Linear):
    """y = x · Wᵀ + b where W is stored as the values of its active connections and their indices.

    `values` [connections] is the only weight parameter; `weight` reads as the dense matrix and `weight_mask` as
    the mask, both built on each read: changing what was read changes nothing. The state dict has `weight` and
    `weight_mask` in dense form, exactly as masked storage saves them, so that each loads what the other saved.

    Args:
        mask: bool [out_features, in_features], True = active.
        bias: whether there is a bias.
        dtype: of values and bias; the default dtype if None.

    Raises:
        RarefyError: the mask is not a bool matrix; on writing to `weight`.

    Example:
        >>> layer = SparseLinear(torch.tensor([[True, False], [True, True]]), bias=False)
        >>> layer.values.numel(), layer.weight.shape, layer(torch.ones(5, 2)).shape
        (3, torch.Size([2, 2]), torch.Size([5, 2]))
    """

    values: nn.Parameter
    csr_starts: Tensor
    csr_offsets: Tensor
    csr_back_starts: Tensor
    csr_back_offsets: Tensor
    csr_order: Tensor
    _panel_widths: tuple[int, int]
    _probe: Tensor | None = None
    _moved: tuple[torch.Size, Tensor] | None = None
    _dense_class: type[nn.Module] = nn.Linear
    _own_attributes: ClassVar[tuple[str, ...]] = ("_panel_widths", "_probe", "_moved", "_dense_class")

    def __init__(self, mask: Tensor, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        csr = Panels.from_mask(mask)
        self.in_features, self.out_features, self._probe = csr.columns, csr.rows, None
        self._set_csr(csr)
        self.values = nn.Parameter(torch.empty(csr.nonzeros, dtype=dtype, device=mask.device))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(csr.rows, dtype=dtype, device=mask.device))
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor) -> SparseLinear:
        """The same layer with only the connections of `mask`; the bias parameter is shared, not copied.

        Args:
            linear: the dense layer; left as it is.
            mask: bool, the shape of its weight.

        Raises:
            RarefyError: the mask has another shape than the weight.

        Example:
            >>> linear = nn.Linear(3, 2)
            >>> sparse = SparseLinear.from_linear(linear, torch.eye(2, 3, dtype=torch.bool))
            >>> torch.equal(sparse.weight, linear.weight * torch.eye(2, 3))
            True
        """
        return cls._from_dense(linear, linear.weight, mask)

    @classmethod
    def _from_dense(cls, module: nn.Module, weight: Tensor, mask: Tensor) -> SparseLinear:
        """A layer with the values, bias, mode and hooks-free settings of `module`; mask in the shape of `weight`."""
        if mask.shape != weight.shape:
            raise RarefyError(
                f"mask: shape {tuple(mask.shape)} is not allowed; give the weight's, {tuple(weight.shape)}"
            )
        layer = cls(mask.to(weight.device), bias=False, dtype=weight.dtype)
        with torch.no_grad():
            layer.values.copy_(layer.gather(weight))
        layer.values.requires_grad_(weight.requires_grad)
        layer.bias = module.bias
        return layer.train(module.training)

    def to_linear(self) -> nn.Linear:
        """A plain dense layer with exact zeros at inactive connections; the bias parameter is shared, not copied.

        Example:
            >>> type(SparseLinear(torch.ones(2, 2, dtype=torch.bool)).to_linear()).__name__
            'Linear'
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.detach(), requires_grad=self.values.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    @classmethod
    def take_over(cls, module: nn.Module, mask: Tensor) -> SparseLinear:
        """Turns a dense layer itself into a sparse one, in place; nothing random is drawn.

        The layer stays the same object, with its hooks and its place in the model, and so does its weight parameter,
        which becomes `values`: an optimizer that trains it goes on. A gradient is kept at the active connections.

        Args:
            module: the dense layer; a `<weight>_mask` buffer beside its weight is dropped.
            mask: bool, the shape of its weight.

        Returns:
            The same object.

        Example:
            >>> linear = nn.Linear(3, 2)
            >>> weight = linear.weight
            >>> sparse = SparseLinear.take_over(linear, torch.eye(2, 3, dtype=torch.bool))
            >>> sparse is linear, sparse.values is weight, sparse.give_back() is linear, linear.weight is weight
            (True, True, True, True)
        """
        layer: Any = module
        dense_class, parameter, grad = type(module), layer.weight, layer.weight.grad
        _rename(module._parameters, "weight", "values")
        module._buffers.pop("weight_mask", None)
        module._non_persistent_buffers_set.discard("weight_mask")
        layer.__class__ = cls
        layer._dense_class, layer._probe = dense_class, None
        layer._set_csr(layer._csr_of(mask))
        replace_data(parameter, layer.gather(parameter.data))
        parameter.grad = None if grad is None else layer.gather(grad)
        return layer

    def give_back(self) -> nn.Module:
        """The reverse of `take_over`: the layer itself becomes dense again, with zeros at inactive connections."""
        layer: Any = self
        parameter, dense, grad = self.values, self.weight.detach(), self.values.grad
        dense_grad = None if grad is None else self.scatter(grad)
        dense_class = self._dense_class
        for name in _INDEX_BUFFERS:
            delattr(self, name)
        for name in self._own_attributes:
            self.__dict__.pop(name, None)
        layer.__class__ = dense_class
        _rename(layer._parameters, "values", "weight")
        replace_data(parameter, dense)
        parameter.grad = dense_grad
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_probe": None, "_moved": None}

    def reset_parameters(self) -> None:
        """Draws values and bias as `nn.Linear` does: uniform within ±1/√in_features."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """X [..., in_features] -> [..., out_features]; under autocast x takes autocast's dtype, the values do not."""
        if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(input.device.type))
        parameters = self._parameters  # finding `self.values` costs a lone token too much
        if not torch.is_grad_enabled() and "values" in parameters and "bias" in parameters:
            values, bias = parameters["values"], parameters["bias"]
            starts, offsets = self._buffers["csr_starts"], self._buffers["csr_offsets"]
            shape = (self.out_features, self.in_features, self._panel_widths[0])
            y = infer(input, values, bias, Layout(*shape, starts, offsets))  # pyright: ignore[reportArgumentType]
            if y is not None:
                return y
        wants_probe = torch.is_grad_enabled() and self.values.requires_grad and not _is_exporting()
        probe = self._probe if wants_probe else None
        return sparse_linear(input, self.values, self.bias, self.csr, probe)

    # ---- topology ------------------------------------------------------------------------------------------------

    @property
    def csr(self) -> Panels:
        """The topology of the matrix that multiplies."""
        indices = (self._buffers[name] for name in _INDEX_BUFFERS)
        return Panels(self.out_features, self.in_features, *self._panel_widths, *indices)  # pyright: ignore[reportArgumentType]

    @property
    def weight_mask(self) -> Tensor:
        """The mask in the shape of `weight`, bool; built on each read."""
        return self.csr.mask()

    def gather(self, matrix: Tensor) -> Tensor:
        """The entries of a tensor of the shape of `weight` at the active connections, in the order of `values`."""
        return self.csr.gather(matrix)

    def scatter(self, entries: Tensor) -> Tensor:
        """The reverse of `gather`: a tensor of the shape of `weight` with zeros at inactive connections."""
        return self.csr.dense(entries)

    @torch.no_grad()
    def set_topology(self, mask: Tensor) -> Tensor:
        """Replaces the active connections. Surviving ones keep their value, new ones start at zero.

        The parameter `values` stays the same object, with another shape; its gradient is dropped.

        Args:
            mask: bool, the shape of `weight`.

        Returns:
            int64 [new connections]: the old place of each, −1 = new. Give it to `move_entries` with every optimizer
            state of the shape of `values`.

        Raises:
            RarefyError: the mask has another shape.

        Example:
            >>> layer = SparseLinear(torch.tensor([[True, True, False]]))
            >>> layer.set_topology(torch.tensor([[False, True, True]]))
            tensor([ 1, -1])
        """
        if mask.shape != self.weight_shape:
            raise RarefyError(
                f"mask: shape {tuple(mask.shape)} is not allowed; give the weight's, {self.weight_shape}"
            )
        csr = self._csr_of(mask.to(self.values.device))
        sources = csr.sources_in(self.csr)
        replace_data(self.values, move_entries(self.values.data, sources))
        self._set_csr(csr)
        return sources

    def take_moved(self) -> tuple[torch.Size, Tensor] | None:
        """The old shape of `values` and what `set_topology` returned when another mask was loaded, once; else None."""
        moved, self._moved = self._moved, None
        return moved

    @property
    def topology_version(self) -> tuple[int, int]:
        """Changes when the index buffers are written to in place."""
        return self.csr_starts._version, self.csr_offsets._version

    def topology_checksum(self) -> int:
        """A checksum of the indices."""
        checksum = 0
        for indices in (self.csr_starts, self.csr_offsets):
            checksum = zlib.crc32(indices.detach().cpu().numpy().tobytes(), checksum)
        return checksum

    def _csr_of(self, mask: Tensor) -> Panels:
        return Panels.from_mask(mask)

    def _set_csr(self, csr: Panels) -> None:
        self._panel_widths = (csr.width, csr.transposed_width)
        for name, tensor in zip(_INDEX_BUFFERS, csr.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    # ---- the dense view ------------------------------------------------------------------------------------------

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape of `weight`, without building it."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dense matrix, differentiable with respect to `values`; built on each read.

        While the dense gradient is requested, that of whatever is computed with this matrix counts too.
        """
        weight, probe = self.scatter(self.values), self._probe
        if probe is None or not (torch.is_grad_enabled() and self.values.requires_grad):
            return weight
        return weight + self._as_weight(probe).to(weight.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise RarefyError(
                "weight: a sparse layer's weight cannot be assigned; change layer.values, call "
                "layer.set_topology(mask), or make it dense first with layer.to_linear()"
            )
        super().__setattr__(name, value)

    # ---- dense gradient ------------------------------------------------------------------------------------------

    def request_dense_gradient(self) -> Tensor:
        """From the next forward pass on, backward also adds up the gradient of every position in `dense_gradient`.

        Returns:
            The leaf tensor whose gradient it is, [rows, columns] of the matrix that multiplies.

        Example:
            >>> layer = SparseLinear(torch.eye(2, dtype=torch.bool), bias=False)
            >>> probe = layer.request_dense_gradient()
            >>> layer(torch.ones(3, 2)).sum().backward()
            >>> layer.dense_gradient
            tensor([[3., 3.],
                    [3., 3.]])
        """
        if self._probe is None:
            single = torch.zeros((), dtype=self.values.dtype, device=self.values.device)
            self._probe = single.expand(self.out_features, self.in_features).requires_grad_()
        return self._probe

    @property
    def wants_dense_gradient(self) -> bool:
        """Whether the dense gradient was requested and not released since."""
        return self._probe is not None

    def release_dense_gradient(self) -> None:
        """Forgets the dense gradient and stops computing it."""
        self._probe = None

    @property
    def dense_gradient(self) -> Tensor | None:
        """The gradient in the shape of `weight`, summed over backward passes since the request; None without one."""
        grad = None if self._probe is None else self._probe.grad
        return None if grad is None else self._as_weight(grad.detach())

    def _as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix in the layout of the one that multiplies, in the layout of `weight`."""
        return matrix

    # ---- state dict ----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "values"]
        destination[prefix + "weight_mask"] = self.weight_mask

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        weight, mask = (own.pop(prefix + name, None) for name in ("weight", "weight_mask"))
        missing_keys += [
            prefix + name for name, given in (("weight", weight), ("weight_mask", mask)) if given is None
        ]
        fits = all(t is None or tuple(t.shape) == self.weight_shape for t in (weight, mask))
        if not fits:
            error_msgs.append(f"size mismatch for {prefix}weight: the layer has {self.weight_shape}")
        elif mask is not None and not torch.equal(mask.to(self.values.device), self.weight_mask):
            before = self.values.shape
            self._moved = before, self.set_topology(mask.bool())
        loaded = (
            self.gather(weight.to(self.values.device))
            if fits and weight is not None
            else self.values.detach()
        )
        own[prefix + "values"] = loaded
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(own, prefix, *arguments)

    def extra_repr(self) -> str:
        """Adds the measured sparsity to what `nn.Linear` shows."""
        return f"{super().extra_repr()}, sparsity={1 - self.csr.density:.4g}"
