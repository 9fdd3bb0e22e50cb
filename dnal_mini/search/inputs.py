"""What a run starts from: its images and its dense network, ours or the user's.

Read ``inputs``. What cannot be searched or cut is refused here, before anything is trained.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import DataLoader

from dnal_mini.config import PATHS, SearchConfig, need_config
from dnal_mini.data.imageset import ImageSet, Split, carve
from dnal_mini.data.loaders import LoaderPart, checked, loaded_set, repeatable
from dnal_mini.data.sources import cifar10, digits, image_folder, toy_images
from dnal_mini.gating import add_gates
from dnal_mini.graph.copies import copied
from dnal_mini.methods.contract import Scorer, Subject, Widther
from dnal_mini.models import MODELS, cannot_restart
from dnal_mini.models.builders import build_named, is_builder, takes
from dnal_mini.pruning.preview import analyse
from dnal_mini.refused import Refused, need_callable, need_folder, need_module, need_word
from dnal_mini.runs.identity import class_of, net_of
from dnal_mini.training.devices import pick_device, processes
from dnal_mini.training.loop import steps_of
from dnal_mini.training.stage import Row

Data = ImageSet | Sequence[DataLoader] | None  # None: the images that the config names


@dataclass(frozen=True)
class Inputs:
    """The settings as they hold, the images on their device, the dense net before any training.

    ``net_is``: what a record says of a net that is not one of ours as the seed makes it.
    """

    config: SearchConfig
    data: ImageSet
    net: nn.Module
    net_is: Row | None = None


def check_call(
    config: SearchConfig, out: str | Path, progress: object, on_row: object, until: str | None
) -> None:
    """Raises: ValueError for arguments of ``driver.run`` of another kind."""
    need_config(config)
    need_folder(out, "out")
    if until is not None:
        need_word("until", until, ("weights", "gates"))
    if progress is not None:
        need_callable("progress", progress, "steps", "text")
    if on_row is not None:
        need_callable("on_row", on_row, "row")


def settled(config: SearchConfig, net: nn.Module | None = None, data: Data = None) -> SearchConfig:
    """The config with absolute paths, and with what a given net and given images bring themselves.

    A net: ``model`` (its class) and ``width`` (1). Images: ``data`` ("own"), ``data_dir``,
    ``image_size``, ``val``; loaders also ``batch``, ``crop`` and ``flip``, and no ``train_images``.
    """
    told: dict[str, Any] = {}
    if net is not None:
        need_module(net)
        if any(isinstance(tensor, UninitializedParameter) for tensor in net.parameters()):
            raise Refused("got a net with lazy layers; need their shapes; do run it on a batch")
        told |= {"model": class_of(net), "width": 1.0}
    if data is not None:
        told |= {"data": "own", "data_dir": "", "image_size": 0}
        if isinstance(data, ImageSet):
            told["val"] = len(data.val)
        else:
            train, val, _ = (LoaderPart(each, "data") for each in checked(data))
            if config.train_images:
                raise Refused(
                    f"got train_images {config.train_images} with DataLoaders; need 0; do put a "
                    "Subset into the train loader"
                )
            told |= {"val": len(val), "batch": train.batch_size, "crop": 0, "flip": False}
    elif config.data in ("cifar10", "folder"):
        told["data_dir"] = config.data_dir or os.environ.get("DNAL_DATA", "")
    where = {name: told.get(name, getattr(config, name)) for name in PATHS}
    whole = {name: str(Path(path).expanduser().absolute()) for name, path in where.items() if path}
    return dataclasses.replace(config, **told | whole)


def inputs(config: SearchConfig, net: nn.Module | None = None, data: Data = None) -> Inputs:
    """Images and dense net of a ``settled`` config; those given are copied or left alone.

    Raises: ValueError for images, weights or a network that a run cannot be made of.
    """
    images = images_given(config, net, data) if data is not None else load_data(config)
    if config.data == "cifar10" and not config.data_dir:  # there by now, wherever one stands later
        config = dataclasses.replace(config, data_dir=str(Path("data/cifar10").absolute()))
    dense, net_is = dense_net(config, net, images)
    if data is not None or net is not None or config.model not in MODELS:
        _check_fit(dense, images)
    if net is not None or config.model not in MODELS:
        _check_net(dense, config, images)
    return Inputs(config, images, dense, net_is)


def images_given(config: SearchConfig, net: nn.Module | None, data: Data) -> ImageSet:
    """An ImageSet, or loaders as one, on the config's device."""
    place = pick_device(config.device)
    if isinstance(data, ImageSet):
        return on_device(_used(data, config), place)
    if processes(config.devices, config.num_nodes) > 1:
        raise Refused(
            "got DataLoaders for several processes; need one, or images that they can share; do "
            "pass an ImageSet, or --devices 1"
        )
    train, *_ = loaders = checked(data)
    known = 0 if net is None else len(_answer(net, LoaderPart(train, "train").image_shape))
    return loaded_set(loaders, known, place)


def dense_net(
    config: SearchConfig, net: nn.Module | None, data: ImageSet
) -> tuple[nn.Module, Row | None]:
    """The dense net before any training, on the CPU, and what a record says of it.

    None for the latter where all is said by the settings: one of ours, drawn by the seed.
    """
    dense = copied(net).cpu().float() if net is not None else build(config, data)
    if config.weights:
        load_weights(dense, Path(config.weights))
    given = net is not None or bool(config.weights)
    if not given and config.model in MODELS:
        return dense, None
    _answer(dense, data.image_shape)
    return dense, net_of(dense, data, given)


def load_data(config: SearchConfig) -> ImageSet:
    """The data set of a config, train and val on its device. Raises ValueError as ``data`` does."""
    device = pick_device(config.device)
    root = config.data_dir or os.environ.get("DNAL_DATA")
    carved: dict[str, Any] = {"seed": config.seed, "val": config.val}
    match config.data:
        case "digits":
            data = digits(**carved)
        case "toy":
            data = toy_images(**carved, image_shape=(3, 32, 32))
        case "cifar10":
            data = cifar10(root or "data/cifar10", download=not root, **carved)
        case "folder":
            data = image_folder(root, config.image_size or None, **carved)
        case "own":
            raise Refused(
                "got data own, which are images that dnal.run was given; need them; do call "
                "dnal.run(config, out, data=...) again, or pass --data folder"
            )
    return on_device(_used(data, config), device)


def _used(data: ImageSet, config: SearchConfig) -> ImageSet:
    """The set with the training images that the config uses."""
    if config.train_images:
        assert isinstance(data.train, Split)
        _, used = carve(data.train.labels, config.train_images, config.seed)
        data = dataclasses.replace(data, train=data.train.take(used))
    steps_of(data.train, config.batch, processes(config.devices, config.num_nodes))
    return data


def data_still_there(config: SearchConfig) -> ImageSet | None:
    """The images of a run that is over, on the CPU; None if they are gone or come with the package.

    Nothing is downloaded.
    """
    if config.data not in ("cifar10", "folder"):
        return None
    usual = "data/cifar10" if config.data == "cifar10" else ""
    root = config.data_dir or os.environ.get("DNAL_DATA") or usual
    try:
        return load_data(dataclasses.replace(config, device="cpu", data_dir=root))
    except (OSError, ValueError):
        return None


def on_device(data: ImageSet, device: torch.device) -> ImageSet:
    """The set with train and val on a device."""
    return dataclasses.replace(data, train=data.train.to(device), val=data.val.to(device))


def build(config: SearchConfig, data: ImageSet) -> nn.Module:
    """The dense network of a config, without gates, from the config's seed."""
    with repeatable(config.seed):
        return build_named(config.model, data.num_classes, **asked(config, data))


def asked(config: SearchConfig, data: ImageSet) -> dict[str, Any]:
    """What a builder is asked for besides the number of classes."""
    side, model = data.image_shape[1], config.model
    sized = (side != 32 or model not in MODELS) and takes(model, "image_size")
    return {"width": config.width} | ({"image_size": side} if sized else {})


def placed(net: nn.Module, config: SearchConfig, data: ImageSet) -> nn.Module:
    """The net on the data's device, its filters in the config's memory layout."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return net.to(data.train.device).to(memory_format=layout)  # type: ignore[call-overload]


def load_weights(net: nn.Module, path: Path) -> None:
    """Fill a network with the tensors of a .safetensors file: a state dict, in place.

    Raises: ValueError for another kind of file, or the first tensor that is missing, not the
    net's, or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    do = "do save the weights of this net: safetensors.torch.save_model(net, path)"
    if not path.is_file():
        raise Refused(f"got weights {path}, which is not there; need a .safetensors file; {do}")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise Refused(f"got weights {path} ({error}); need a .safetensors file; {do}") from error
    wanted = {name: t for name, t in net.state_dict().items() if isinstance(t, Tensor)}
    shared = {id(t) for name, t in _all_tensors(net) if name in found}
    for name, tensor in _all_tensors(net):
        if name in found and found[name].shape != tensor.shape:
            got, need = tuple(found[name].shape), tuple(tensor.shape)
            raise Refused(f"got weights {path} with {name} of {got}; need {need}; {do}")
        if name in wanted and name not in found and id(tensor) not in shared:
            raise Refused(f"got weights {path} without {name}; need it; {do}")
    if more := sorted(found.keys() - wanted.keys()):
        raise Refused(
            f"got weights {path} with {more[0]}, which the net has not; need its own names; {do}"
        )
    net.load_state_dict(found, strict=False)


def _all_tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under each of their names; tied ones come several times."""
    return [
        *net.named_parameters(remove_duplicate=False),
        *net.named_buffers(remove_duplicate=False),
    ]


def _answer(net: nn.Module, image_shape: tuple[int, ...]) -> Tensor:
    """What a net says to one image, one number per class.

    Raises: ValueError for a net that does not take such an image, or gives no such tensor, in
    either mode.
    """
    net = copied(net).cpu().float()
    try:
        with repeatable(0), torch.no_grad():
            images = torch.rand(2, *image_shape)
            said, also = net.eval()(images), net.train()(images)
    except Exception as error:  # whatever the user's forward raises
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refused(
            f"got a {type(net).__name__} that does not take images of {tuple(image_shape)} "
            f"({told}); need one that does; do change the images or the net"
        ) from error
    said = said if isinstance(also, Tensor) else also
    if not isinstance(said, Tensor) or said.dim() != 2 or len(said) != 2:
        shape = f" of shape {tuple(said.shape)}" if isinstance(said, Tensor) else ""
        raise Refused(
            f"got a {type(net).__name__} that answers two images with a {type(said).__name__}"
            f"{shape}; need a tensor (images, classes); do wrap it in a module that gives that"
        )
    return said[0]


def _check_fit(net: nn.Module, data: ImageSet) -> None:
    """Raises: ValueError for a network that cannot tell the classes of the images."""
    classes = len(_answer(net, data.image_shape))
    if classes < data.num_classes:
        raise Refused(
            f"got a net that tells {classes} classes apart, and images of {data.num_classes}; "
            "need as many; do change its last layer"
        )


def _check_net(net: nn.Module, config: SearchConfig, data: ImageSet) -> None:
    """Raises: ValueError for a network of the user's that the run would fail with later."""
    gated, method = add_gates(net, config.order, image_shape=data.image_shape), config.method
    analyse(gated, data.image_shape)
    if config.tuned_from == "scratch" and (name := cannot_restart(net)):
        raise Refused(
            f"got tuned_from scratch for a net whose layer {name} has weights and no "
            "reset_parameters(); need it to draw new ones; do write it, or take tuned_from pruned"
        )
    if isinstance(method, Scorer):
        method.values(Subject(gated, data, config.seed))  # some want a certain layer at each gate
    if isinstance(method, Widther):
        if not is_builder(config.model):
            raise Refused(
                f"got method {method.name} for a given net; need a builder, since it may want more "
                "channels than the net has; do pass --model package.module:function"
            )
        if not takes(config.model, "width"):
            raise Refused(
                f"got method {method.name} for {config.model}, which has no argument width; need "
                "it, since the method may want more channels; do give the function one"
            )
