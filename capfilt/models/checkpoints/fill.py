"""Fill a model with saved tensors: every one that it has must be there, of its shape, or is named in the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints import key_maps
from capfilt.models.checkpoints.files import Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from capfilt.models.interface import Model

M = TypeVar("M", bound="Model")


@contextmanager
def without_weights() -> Iterator[None]:
    """Models that are built in it lie on the meta device."""
    import torch
    from torch.overrides import TorchFunctionMode

    class NoInit(TorchFunctionMode):
        """Leaves out what torch.nn.init fills: on the meta device that fills nothing, in most of the time it takes."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(function, "__module__", "") == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return function(*args, **kwargs)

    with torch.device("meta"), NoInit():
        yield


def distinct_names(model: Model) -> list[str]:
    """The names of a model's tensors, one each: the second names of tied ones left out."""
    second = model.tied()
    return [name for name in model.state_dict() if name not in second]


def fill(model: Model, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into a model that may need fewer of them, or say exactly what does not fit (ModelError)."""
    refuse_misfit(model, tensors, source)
    second = model.tied()
    model.load_state_dict({name: tensors[second.get(name, name)] for name in model.state_dict()})


def refuse_misfit(model: Model, tensors: Mapping[str, Tensor], source: object) -> None:
    """Say exactly which tensors do not fit a model, which may still be without weights: what a file holds bounds what
    is allocated for it. ModelError."""
    every = model.state_dict()
    wanted = {name: every[name] for name in distinct_names(model)}
    missing = sorted(wanted.keys() - tensors.keys())
    misshapen = sorted(
        f"{name} {list(tensors[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if wanted[name].shape != tensors[name].shape
    )
    key_maps.refuse(source, [("missing", missing), ("of another shape", misshapen)])


def load_whole(build: Callable[[Any], M], config: ArchitectureConfig, tensors: Tensors, source: object) -> M:
    """A model of this architecture with saved tensors, those that it does not have left behind, positions interpolated.

    Raises:
        ModelError: tensors that are missing or of another shape.
    """
    with without_weights():
        model = build(config)
    model.adapt(tensors)
    refuse_misfit(model, tensors, source)
    model.to_empty(device="cpu")
    fill(model, tensors, source)
    return model


def continue_parts(
    build: Callable[[Any], M], config: Any, saved: ArchitectureConfig, tensors: Tensors, source: object
) -> M:
    """The saved model with the parts of the text stack and at the picture size that the new architecture has."""
    return load_whole(build, saved.changed(roles=config.text.roles, image_size=config.image_size), tensors, source)
