"""What a run stands on is what it was: edited settings, other images and flipped bits are told."""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import CONFIG, Stop, changed, copy_of, stopped_at, told

from dnal_mini.cli.commands import main
from dnal_mini.data.imageset import Split
from dnal_mini.data.sources import toy_images
from dnal_mini.refused import Refused
from dnal_mini.runs import runlog
from dnal_mini.runs.checkpoint import Checkpoints, load_state
from dnal_mini.runs.reopen import saved, settings_in
from dnal_mini.search.driver import run

TINY = changed(baseline="none", arch_epochs=2, fine_tune_epochs=1)  # of a folder of images


stop = stopped_at("arch_stage", 1)


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory) -> Path:
    """Folders of the same run: over, and stopped in its second stage."""
    root = tmp_path_factory.mktemp("runs")
    copy_of(finished, root / "over")
    with pytest.raises(Stop):
        run(CONFIG, root / "stopped", on_row=stop)
    return root


@pytest.mark.parametrize("name", ["over", "stopped"])
def test_settings_that_were_edited_are_told_with_both_values(runs, tmp_path, name, capsys):
    shutil.copytree(runs / name, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate_price": 0.5}))
    both = r"config\.json with gate_price=0\.5, the record beside it with 0\.001; need .*; do"
    for config in (CONFIG, CONFIG.replace(gate_price=0.5)):
        with pytest.raises(Refused, match=both):
            run(config, tmp_path / "run")
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with gate_price=0.5, the record beside it with 0.001" in line
    with pytest.raises(Refused, match=both):
        run(CONFIG.replace(weights_from=str(tmp_path / "run")), tmp_path / "new")


def write_images(root: Path, seed: int) -> None:
    data = toy_images(train=48, test=16, image_shape=(3, 32, 32), seed=seed)
    for split, name in ((data.train, "train"), (data.test, "test")):
        for k, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / name / f"class{label}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def test_other_images_in_the_place_of_a_runs_own_are_told(tmp_path):
    write_images(tmp_path / "images", seed=0)
    config = TINY.replace(data="folder", data_dir=str(tmp_path / "images"), val=8, batch=16)
    result = run(config, tmp_path / "over")
    with pytest.raises(Stop):
        run(config, tmp_path / "stopped", on_row=stop)
    assert run(config, tmp_path / "over") == result
    shutil.rmtree(tmp_path / "images")
    assert run(config, tmp_path / "over") == result  # nothing left to compare with
    write_images(tmp_path / "images", seed=1)
    other = config.replace(gate_price=2e-3, weights_from=str(tmp_path / "over"))
    for asked, out in ((config, "over"), (config, "stopped"), (other, "new")):
        before = [path.read_bytes() for path in tmp_path.glob(f"{out}/record.jsonl")]
        with pytest.raises(Refused, match=r"got images, 40 to train and 8 to .*; need 40 .*; d"):
            run(asked, tmp_path / out)
        assert [path.read_bytes() for path in tmp_path.glob(f"{out}/record.jsonl")] == before
    assert not (tmp_path / "new").exists()
    assert main(["resume", str(tmp_path / "over")]) == 2


def test_a_fingerprint_changes_with_names_labels_lengths_and_pixels_and_not_with_memory():
    data = toy_images(train=300)
    train = data.train
    images, labels = train.images.clone(), train.labels.clone()
    images[0, 0, 0, 0] ^= 1
    labels[299] = (labels[299] + 1) % 4
    layout = train.images.contiguous(memory_format=torch.channels_last)
    same = type(data)(**vars(data) | {"train": Split(layout, train.labels)})
    assert same.fingerprint() == data.fingerprint()
    others = [
        {"classes": ("a", *data.classes[1:])},
        {"train": Split(images, train.labels)},
        {"train": Split(train.images, labels)},
        {"train": train.take(torch.arange(299))},
        {"val": train.take(torch.arange(32))},
    ]
    found = {type(data)(**vars(data) | other).fingerprint() for other in others}
    assert len(found | {data.fingerprint()}) == 6


def read(folder: Path) -> dict:
    """All that a run goes on from, and all that is reported of it."""
    config = settings_in(folder)
    files = Checkpoints(folder, writes=False)
    last = {s.name: files._last_state(s.name, torch.device("cpu")) for s in config.stages()}
    return {
        "config": config.replace(checkpoint_s=0.0, devices=1, num_nodes=1, data_dir=""),
        "rows": runlog.read(folder),
        "last": last,
        "before": [load_state(path) for path in sorted(folder.glob("*.before.pt"))],
        "nets": [saved(path).module.state_dict() for path in sorted(folder.glob("*.safetensors"))],
    }


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["over", "stopped"])
def test_a_flipped_bit_in_any_file_is_told_or_changes_nothing(runs, tmp_path, name):
    folder, draw = shutil.copytree(runs / name, tmp_path / "run"), random.Random(name)
    whole = read(folder)
    for path in sorted(path for path in folder.iterdir() if path.stat().st_size):
        content, noticed = path.read_bytes(), 0
        for _ in range(20 if path.suffix.startswith(".json") else 5):
            flip(path, draw)
            refused = ""
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    same = equal(read(folder), whole)
                except Refused as error:
                    same, refused = False, str(error)
            assert same or said or refused, path
            assert "\n" not in refused
            noticed += bool(said or refused)
            path.write_bytes(content)
        assert noticed, path


def test_a_run_goes_on_over_a_flipped_bit_to_the_same_end(runs, tmp_path):
    folder = shutil.copytree(runs / "stopped", tmp_path / "run")
    flip(folder / "arch_stage.pt", random.Random(0))
    shutil.copy(runs / "stopped" / "arch_stage.pt", folder / "arch_stage.before.pt")
    with pytest.warns(UserWarning, match=r"arch_stage\.pt, which .*; went on from the one before"):
        result = run(CONFIG, folder)
    assert told(result) == told(runlog.read(runs / "over")[-1])
