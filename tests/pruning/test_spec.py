"""A file with a forged spec and the right checksum is refused before anything is built from it."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dnal_mini as dnal
from dnal_mini.pruning.netfile import _digest
from dnal_mini.refused import Refused
from tests.pruning.test_netfile import ASSORTED_SHAPE, Assorted, assorted, rewritten

FILES = Path(__file__).parents[1] / "files"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a file with an entry of every kind."""
    path = tmp_path_factory.mktemp("spec") / "net.safetensors"
    dnal.save(assorted(), path)
    return path.read_bytes()


def entry(name: str, **changes: object) -> Callable[[dict], None]:
    """Add to an entry of "modules"."""
    return lambda spec: spec["modules"].setdefault(name, {}).update(changes)


def keep(name: str, axis: str, index: object) -> Callable[[dict], None]:
    return lambda spec: spec["keep"].setdefault(name, {}).update({axis: index})


def part(**changes: object) -> Callable[[dict], None]:
    return lambda spec: spec.update(changes)


def within(name: str, **changes: object) -> Callable[[dict], None]:
    return lambda spec: spec[name].update(changes)


def note(**changes: object) -> Callable[[dict], None]:
    return lambda spec: spec["probe"]["outputs"][0].update(changes)


HUGE = 10**18
FORGED: dict[str, tuple[Callable[[dict], None], str]] = {
    "an index twice": (keep("stem.weight", "0", [1, 1, 2]), "keep stem.weight {'0': [1, 1, 2]"),
    "a negative index": (keep("stem.weight", "0", [-1]), "keep stem.weight {'0': [-1]"),
    "an index of 10**18": (keep("stem.weight", "0", [HUGE]), "keep stem.weight"),
    "a float for an index": (keep("stem.weight", "0", [1.0]), "keep stem.weight {'0': [1.0]"),
    "NaN for an index": (keep("stem.weight", "0", [math.nan]), "keep stem.weight {'0': [nan]"),
    "a bool for an index": (keep("stem.weight", "0", [True]), "keep stem.weight {'0': [True]"),
    "a text for indices": (keep("stem.weight", "0", "012"), "keep stem.weight {'0': '012'"),
    "a count for indices": (keep("stem.weight", "0", HUGE), "keep stem.weight {'0': 1000000"),
    "a negative axis": (keep("stem.weight", "-1", [0]), "keep stem.weight"),
    "an axis by name": (keep("stem.weight", "rows", [0]), "keep stem.weight"),
    "another tensor": (keep("other.weight", "0", [0]), "other.weight' does not fit"),
    "a list of tensors": (part(keep=[1]), "says keep [1]; need"),
    "a tensor without axes": (lambda spec: spec["keep"].update(stem=[0]), "says keep stem [0]"),
    "a map under -1": (entry("bn2", source=[-2]), "modules bn2 source [-2]; need"),
    "a map of 10**18": (entry("bn2", source=[HUGE]), "modules bn2 source [1000"),
    "a map of floats": (entry("bn2", source=[0.5]), "modules bn2 source [0.5]"),
    "a map of a count": (entry("bn2", source=HUGE), "modules bn2 source 1000"),
    "an empty map": (entry("bn2", source=[]), "bn2' does not fit"),
    "a stride of 0": (entry("bn2", stride=0), "modules bn2 stride 0; need"),
    "a stride of 10**18": (entry("bn2", stride=HUGE), "modules bn2 stride 1000"),
    "a stride of 1.5": (entry("bn2", stride=1.5), "modules bn2 stride 1.5"),
    "no stride": (lambda spec: spec["modules"]["bn2"].pop("stride"), "bn2' does not fit"),
    "10**18 features": (entry("bn0", num_features=HUGE), "modules bn0 num_features 1000"),
    "-1 features": (entry("bn0", num_features=-1), "modules bn0 num_features -1"),
    "features of NaN": (entry("bn0", num_features=math.nan), "modules bn0 num_features nan"),
    "inputs twice": (entry("grouped", inputs=[1, 1]), "modules grouped inputs [1, 1]"),
    "a flag of a text": (entry("dead", gone="yes"), "modules dead gone 'yes'"),
    "an unknown word": (entry("dead", run="rm"), "modules dead run 'rm'"),
    "another module": (entry("nowhere", gone=True), "nowhere' does not fit"),
    "an entry that is none": (lambda spec: spec["modules"].update(dead=7), "modules dead 7"),
    "a list of modules": (part(modules=[]), "says modules []"),
    "an image of 10**18": (part(image_shape=[3, HUGE, HUGE]), "says image_shape [3, 1000"),
    "an image of 60000": (part(image_shape=[3, 60000, 60000]), "says image_shape [3, 60000"),
    "an image of floats": (part(image_shape=[3, 9.0, 7.0]), "says image_shape [3, 9.0"),
    "no image": (part(image_shape=None), "says image_shape None"),
    "another image": (part(image_shape=[5, *ASSORTED_SHAPE[1:]]), "whose net cannot run"),
    "a config of a list": (part(config=[1]), "says config [1]"),
    "a report of a text": (part(report="good"), "says report 'good'"),
    "a report with more": (within("report", more=[]), "says report more []"),
    "layers of a number": (within("report", layers=5), "says report layers 5"),
    "a certificate of a text": (part(certificate="exact"), "says certificate 'exact'"),
    "a certificate of NaN": (within("certificate", absolute=math.nan), "says certificate {"),
    "an empty certificate": (part(certificate={}), "says certificate {}"),
    "a probe of a list": (part(probe=[]), "says probe []"),
    "a seed of 10**30": (within("probe", seed=10**30), "says seed of the probe 1000"),
    "a seed of a text": (within("probe", seed="0"), "says seed of the probe '0'"),
    "no outputs": (lambda spec: spec["probe"].pop("outputs"), "says probe {'seed': 0}"),
    "answers of NaN": (note(numbers=[math.nan]), "says numbers of the probe [nan]"),
    "answers of texts": (note(numbers=["1"]), "says numbers of the probe ['1']"),
    "a largest of infinity": (note(largest=math.inf), "says note of the probe"),
    "no shape": (note(shape=None), "says note of the probe"),
    "extra state of a list": (part(extra_state=[1]), "says extra_state [1]"),
    "a format of True": (part(format=True), "of format True; need 1 to"),
    "a format of a text": (part(format="3"), "of format 3; need 1 to"),
    "a format of 10**30": (part(format=10**30), "of format 1000"),
}


def refused(path: Path, build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(Refused) as caught:
        dnal.load(path, build)
    line = str(caught.value)
    assert "\n" not in line
    assert "; need " in line
    assert words in line


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", FORGED)
def test_a_forged_spec_is_refused_in_one_line(tmp_path: Path, whole: bytes, what: str):
    change, words = FORGED[what]
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole)
    rewritten(path, change)
    refused(path, Assorted, words)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "value"), [("columns", HUGE), ("zeros", HUGE), ("zeros", -1), ("in", [0, 0])]
)
def test_a_forged_file_of_an_older_format_is_refused_before_it_asks_for_memory(
    tmp_path: Path, key: str, value: object
):
    path = tmp_path / "net.safetensors"
    path.write_bytes((FILES / "format2_assorted.safetensors").read_bytes())
    tensors, (size,) = load_file(path), struct.unpack("<Q", path.read_bytes()[:8])
    about = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    spec = json.loads(about["dnal_mini"])
    spec["modules"]["head"][key] = value
    text = json.dumps(spec, sort_keys=True)
    about |= {"dnal_mini": text, "sha256": _digest(text, tensors)}
    save_file(tensors, path, metadata=about)
    refused(path, Assorted, f"modules head {key}")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "[1, 2]", "5", '"spec"', "null", "{", "", "NaN"]
)
def test_a_spec_that_is_no_object_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "net.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata={"dnal_mini": text, "sha256": ""})
    refused(path, Assorted, "with a damaged spec")


def test_tensors_of_another_kind_are_refused(tmp_path: Path, whole: bytes):
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole)
    (size,) = struct.unpack("<Q", whole[:8])
    about = json.loads(whole[8 : 8 + size])["__metadata__"]
    tensors = load_file(path)
    tensors["head.bias"] = tensors["head.bias"].to(torch.int32)
    spec = json.loads(about["dnal_mini"])
    spec.pop("sha256")
    text = json.dumps(spec, sort_keys=True)
    spec["sha256"] = _digest(text, tensors)
    about["dnal_mini"] = json.dumps(spec, sort_keys=True)
    save_file(tensors, path, metadata=about)
    refused(path, Assorted, "whose head.bias is torch.int32, not torch.float32")
