"""Linear layers for inference on CPUs: their weights laid out once as oneDNN multiplies them, in each number format.

Otherwise MKL copies a matrix into blocks for each product, and autocast a matrix into bf16 for each batch; and GELU
reads and writes the widest activations of a block once more. The layers keep their weights, for whoever compares them
or takes gradients: what is laid out is as much memory again in fp32, half of it in bf16, and only of layers that are
used.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 2**16
"""Below so many weights nothing is gained."""


class PackedWeight:
    """y = x W^T + b for a weight [O, I], laid out at first use in the format that products are taken in: the weight's,
    or autocast's. Where oneDNN cannot be used (gradients, other devices, other formats) torch's own product.

    A row's bits depend neither on how many rows there are nor on the number of threads. One row alone is multiplied by
    another kernel, so it never is alone.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None):
        self.weight_OI, self.bias_O = weight_OI, bias_O
        self._packed: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        self._plain: dict[torch.dtype, Tensor] = {}

    def __call__(self, x: Tensor, gelu: bool = False, bias_O: Tensor | None = None) -> Tensor:
        """[..., I] -> [..., O]; `gelu`: the exact GELU of it; with `bias_O` in place of the layer's own."""
        if not self.usable(x):
            y = F.linear(x, self.weight_OI, self.bias_O if bias_O is None else bias_O)
            return F.gelu(y) if gelu else y
        if x.numel() == x.shape[-1]:
            return self(x.reshape(1, -1).repeat(2, 1), gelu, bias_O)[:1].view(*x.shape[:-1], -1)
        format_ = product_format(x)
        if format_ not in self._packed:
            weight = self.weight_OI.detach().to(format_).contiguous()
            own = None if self.bias_O is None else self.bias_O.detach().to(format_)
            self._packed[format_] = torch.ops.mkldnn._reorder_linear_weight(weight), own
        weight, own = self._packed[format_]
        bias_O = own if bias_O is None else bias_O.to(format_)
        after = "gelu" if gelu else "none"
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(format_), weight, bias_O, after, [], "none")
        return out

    def plain(self, format_: torch.dtype) -> Tensor:
        """The weight in this format as torch multiplies it, [O, I], cast once."""
        if format_ not in self._plain:
            self._plain[format_] = self.weight_OI.detach().to(format_)
        return self._plain[format_]

    def usable(self, x: Tensor) -> bool:
        """Whether `x` is multiplied by the packed weight."""
        dtype, format_ = self.weight_OI.dtype, product_format(x)
        if x.device.type != "cpu" or torch.is_grad_enabled() or not x.numel():
            return False
        if dtype not in (torch.float32, torch.bfloat16) or (x.dtype != dtype and not torch.is_autocast_enabled("cpu")):
            return False  # torch says what is wrong with formats that do not go together
        return format_ == torch.float32 or (format_ == torch.bfloat16 and multiplies_bf16())


class PackedLinear(nn.Linear):
    """A linear layer with the same weights, by the same names, that multiplies by a `PackedWeight`."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.multiply = PackedWeight(self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input)


def pack(model: nn.Module) -> None:
    """Let the large linear layers of a model on a CPU, whose weights change no more, multiply by packed weights.

    Layers inside modules of other packages (BLIP-2's language model) stay: some hold most of a machine's memory.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        if not type(module).__module__.startswith("capfilt."):
            continue
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.numel() >= SMALL:
                setattr(module, name, PackedLinear(child))


def linear(layer: nn.Linear, x: Tensor, bias_O: Tensor) -> Tensor:
    """`layer` with another bias than its own."""
    return layer.multiply(x, bias_O=bias_O) if isinstance(layer, PackedLinear) else F.linear(x, layer.weight, bias_O)


def linear_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """The exact GELU of what a layer gives."""
    return layer.multiply(x, gelu=True) if isinstance(layer, PackedLinear) else F.gelu(layer(x))


def product_format(x: Tensor) -> torch.dtype:
    """The format in which `x` is multiplied on a CPU: autocast's, or its own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


@functools.cache
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU other than by emulation."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported
