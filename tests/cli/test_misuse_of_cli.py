"""A mistake in a command ends in one line that names its cause, in exit code 2, and in no file.

One row a mistake: the words, and parts of the line. Those of calls: ``test_misuse``.
"""

import json
import shlex
import sys
from pathlib import Path

import pytest
from systems import pipe

from dnal_mini.cli.commands import main
from dnal_mini.config import SearchConfig
from dnal_mini.recipes import RECIPES
from dnal_mini.runs import runlog
from dnal_mini.search import driver, sweep

SWEEP = "sweep --data toy --gate-price 1e-3"
MISTAKES: dict[str, str] = {
    # commands and recipes
    "''": "got command ''; need one of",
    "RUN": "got command 'RUN'; need",
    "run ''": "got recipe ''; need one of",
    "run ../digits": "got recipe '../digits'; need",
    "run 5": "got recipe '5'; need one of",
    "sweep nothing": "got recipe 'nothing'; need",
    "recipes digits": "got digits; need no more words",
    "recipes --long": "got option '--long'; need",
    # an option twice
    "run --seed 1 --seed 2": "got --seed twice; need it once",
    "run --seed 1 --seed=1": "got --seed twice; need it once",
    "run --weight-epochs 3 --weight_epochs 4": "got --weight_epochs twice",
    "run --out a --out b": "got --out twice",
    "run --method dnal --method random": "got --method twice",
    "run --budget.macs 0.3 --budget.macs 0.4": "got --budget.macs twice",
    "run --budget.macs 0.3 --target-macs 0.4": "got --target-macs twice",
    "sweep --gate-price 1e-3 --gate-price 2e-3": "got --gate-price twice",
    "sweep --gate-price 1e-3 --gate_price 2e-3": "got --gate-price twice",
    f"{SWEEP} --seed 1 --seed 2": "got --seed twice",
    f"{SWEEP} --jobs 1 --jobs 2": "got --jobs twice",
    f"{SWEEP} --ray --ray": "got --ray twice",
    f"{SWEEP} --out a --out b": "got --out twice",
    f"{SWEEP} --batch 8 --batch 16": "got --batch twice",
    "report record --figure a.svg --figure b.svg": "got --figure twice",
    "report record --epochs --epochs": "got --epochs twice",
    "report record --markdown --markdown": "got --markdown twice",
    "export run --format pt2 --format onnx": "got --format twice",
    "export run --out a --out b": "got --out twice",
    "export run --no-deploy --no-deploy": "got --no-deploy twice",
    "resume run --data-dir a --data-dir b": "got --data-dir twice",
    # values that are none
    "run --seed=": "got --seed ''; need int",
    "run --seed nan": "got --seed 'nan'; need int",
    "run --seed 1e3": "got --seed '1e3'; need int",
    "run --seed -1": "got seed -1; need 0 to",
    "run --width inf": "got width inf; need 1e-12 to 64",
    "run --width nan": "got width nan; need",
    "run --width 1e308": "got width 1e+308; need 1e-12 to 64",
    "run --width -1": "got width -1.0; need",
    "run --weight-lr 1e300": "got weight_lr 1e+300; need 1e-12 to 1e+30",
    "run --weight-lr 0": "got weight_lr 0.0; need 1e-12 or more",
    "run --fine-tune-lr nan": "got fine_tune_lr nan; need",
    "run --momentum 1.5": "got momentum 1.5; need 0 to 1",
    "run --weight-decay inf": "got weight_decay inf; need",
    "run --label-smoothing -0.1": "got label_smoothing -0.1; need 0 to 1",
    "run --floor 2": "got floor 2.0; need 0 to 1",
    "run --delta-max inf": "got delta_max inf; need 1 to",
    "run --threshold 1": "got threshold 1.0; need",
    "run --gate-price 1e400": "got gate_price inf; need",
    f"run --arch-epochs {10**30}": "; need 1 to 1e+06",
    f"run --weight-epochs {10**30}": "; need 0 to 1e+06",
    f"run --batch {10**30}": "; need 2 to 1e+09",
    "run --batch 1": "got batch 1; need 2 or more",
    f"run --val {10**30}": "; need 1 to 1e+09",
    "run --val 0": "got val 0; need 1 or more",
    "run --crop 65": "got crop 65; need 0 to 64",
    "run --image-size -1": "got image_size -1; need 0 to 65536",
    "run --checkpoint-s nan": "got checkpoint_s nan; need",
    "run --devices 0": "got devices 0; need 1 to 1024",
    "run --num-nodes 0": "got num_nodes 0; need 1 to 65536",
    "run --flip maybe": "got --flip 'maybe'; need True or False",
    "run --compile 2": "got --compile '2'; need True or False",
    "run --order conv": "got --order 'conv'; need conv-bn-ss-relu or",
    "run --residual both": "got --residual 'both'; need scatter or tie",
    "run --precision float16": "got --precision 'float16'; need auto or",
    "run --strategy fsdp": "got --strategy 'fsdp'; need ddp",
    "run --data imagenet": "got --data 'imagenet'; need digits or",
    "run --model ''": "got model ''; need one of",
    "run --model vgg61": "got model 'vgg61'; need vgg16",
    "run --method ''": "got method ''; need one of",
    "run --nesterov True --momentum 0": "got nesterov with momentum 0",
    "run --colour red": "got field 'colour'; need",
    "run --settings x": "got field 'settings'; need",
    "run --seed=1=2": "got --seed '1=2'; need int",
    "run --": "got field ''; need one of",
    "run - 5": "got '-' alone; need --field value",
    # names, paths and devices
    "run --name ../../x": "got name '../../x'; need a name without /",
    "run --name /x": "got name '/x'; need a name without /",
    "run --name ..": "got name '..'; need a name",
    "run --name=": "got name ''; need a name",
    f"run --name {'x' * 300}": "(str); need a name",
    f"{SWEEP} --name a/b": "got name 'a/b'; need a name",
    "run --out=": "got --out alone; need --out VALUE",
    "run --out ''": "got --out alone; need --out VALUE",
    "run --data toy --out letter": "letter is no folder; need one",
    "run --data toy --out letter/run": "letter is no folder; need one",
    "run --data toy --out pipe": "pipe is no folder; need one",
    f"run --data toy --out {'x' * 300}": "(str); need the path",
    f"{SWEEP} --out ''": "got --out alone; need --out VALUE",
    f"{SWEEP} --out letter": "letter is no folder; need one",
    "run --data toy --out images": "images, which is not empty; need a new folder",
    "run --data toy --device meta": "got device 'meta', which is not here",
    "run --data toy --device mps": "got device 'mps', which is not here",
    "run --data toy --device cuda:99": "got device 'cuda:99', which is not here",
    "run --data toy --device cpu:x": "got device 'cpu:x', which is not here",
    "run --data toy --device=": "got device '', which is not here",
    "run --data folder --data-dir void": "void: got no train; need train/<class>/*",
    "run --data folder --data-dir letter": "letter: got Not a directory",
    "run --data folder --data-dir nowhere": "nowhere: got No such file or directory",
    "run --data folder --data-dir images": "train: got one class, ant; need two or more",
    "run --data folder": "got no data folder; need one; pass --data-dir",
    "run --data cifar10 --data-dir images": "train: got one class, ant; need two or more",
    "run --data toy --val 1000000": "need an int of at least 1 up to",
    "run --data toy --batch 100000": "batch 100000",
    "run --data toy --weights-from void": "got weights_from",
    "run --data toy --weights letter": "letter",
    "run --data toy --model os:getcwd": "os:getcwd",
    "run --data toy --model nothing.there:f": "nothing.there",
    # budgets and methods
    "run --budget 0.3": "got field 'budget'; need budget.macs or budget.params",
    "run --budget.macs nan": "got budget.macs nan; need a share",
    "run --budget.macs -1": "got budget.macs -1.0; need a share",
    "run --budget.macs half": "got --budget.macs 'half'; need float",
    "run --budget.macs 0.3 --budget.params 0.3": "got budget macs and params; need one",
    "run --budget.latency 0.3": "got field 'budget.latency'; need",
    "run --method slimming": "got method 'slimming' without a budget; need one",
    "run --method random --budget.macs 0.3 --threshold 0.9": "got threshold for method random",
    # sweeps
    "sweep --seed 1 2": "got nothing that the runs differ in; need one of",
    "sweep --gate-price": "got no gate_price; need one or more",
    "sweep --gate-price=": "got gate_price ''; need float",
    "sweep --gate-price 1e-3 nan": "got gate_price nan; need a finite number",
    "sweep --gate-price 1e-3 -1": "got gate_price -1.0; need",
    "sweep --gate-price 1e-3 1e-3": "got gate_price 0.001 twice; need",
    f"{SWEEP} --seed": "got no seed; need one or more",
    f"{SWEEP} --seed 1 x": "got seed 'x'; need int",
    f"{SWEEP} --seed -1": "got seed -1; need 0 to",
    f"{SWEEP} --jobs 0": "got jobs 0; need an int of at least 1",
    f"{SWEEP} --jobs -1": "got jobs -1; need an int of at least 1",
    f"{SWEEP} --jobs 1000000": "got jobs 1000000; need an int of at least 1 up to 1024",
    f"{SWEEP} --jobs 1.5": "got jobs '1.5'; need int",
    f"{SWEEP} --jobs many": "got jobs 'many'; need int",
    f"{SWEEP} --budget.macs 0.3": "got --gate-price and --budget.macs; need one of",
    "sweep --budget.macs 0.3 --budget.params 0.3": "got --budget.macs and --budget.params; need",
    "sweep --budget.macs nan": "got budget.macs nan; need",
    f"{SWEEP} --ray": "got no package ray",
    f"{SWEEP} --ray here --jobs 2": "got no package ray",
    f"{SWEEP} --devices 2": "got 2 devices on 1 machines for each run of a sweep; need 1",
    # reports
    "report": "got no run to report; need its folder or record",
    "report ''": "got '' for a path; need the name",
    "report nowhere": "got no run record at nowhere",
    "report void": "got no run record at void",
    "report pipe": "got no run record at pipe",
    "report letter": "got no JSON row in line 1 of letter; need one row per line",
    "report record nowhere": "got no run record at nowhere",
    "report record --epoch": "got option '--epoch'; need --epochs",
    "report record --json": "got option '--json'; need",
    "report record --figure": "got --figure alone; need --figure VALUE",
    "report record --figure ''": "got --figure alone; need --figure VALUE",
    "report record --figure --epochs": "got --figure alone; need --figure VALUE",
    "report record --figure a.pdf": "got figure a.pdf; need a name that ends in .svg or .png",
    "report record --figure svg": "got figure svg; need a name that ends in .svg or .png",
    "report record --figure no/a.svg": "got No such file or directory: no/a.svg; need",
    "report broken-sweep": "sweep.json, which cannot be read",
    "report outside": "(got run '..'; need a name without /",
    # exports and what goes on
    "export": "got nothing to export; need one run folder or .safetensors file",
    "export ''": "got '' for a path; need the name",
    "export void": "got void without small.safetensors; need a finished run; do dnal resume it",
    "export nowhere": "got nowhere; need a run folder or a .safetensors file",
    "export letter": "got letter; need a run folder or a .safetensors file",
    "export pipe.safetensors": "got pipe.safetensors, which is no regular file",
    "export letter.safetensors": "got letter.safetensors, cut short or damaged",
    "export nowhere.safetensors": "got nowhere.safetensors, which is not there; need",
    "export void --format": "got --format alone; need --format VALUE",
    "export void --format=": "got --format alone; need --format VALUE",
    "export void --format torchscript": "got format 'torchscript'; need",
    "export void --out letter": "letter is no folder; need one",
    "export void --onnx": "got option '--onnx'; need",
    "export void void": "got void void; need one run folder",
    "resume": "got no folder; need the one folder of a run",
    "resume ''": "got '' for a path; need the name",
    "resume void": "got no run record at void",
    "resume letter": "got letter; need the one folder of a run",
    "resume pipe": "got pipe; need the one folder of a run",
    "resume nowhere": "got nowhere; need the one folder of a run",
    "resume unset": "config.json",
    "resume piped": "config.json",
    "resume unset --seed 1": "got option '--seed'; need",
}


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a letter, pipes, an empty folder, a set of one class, a record, bad sweeps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DNAL_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    for name in ("letter", "letter.safetensors"):
        Path(name).write_text("hello\n")
    folders = ("void", "images/train/ant", "images/test/ant", "unset", "piped", "outside")
    for name in (*folders, "broken-sweep"):
        Path(name).mkdir(parents=True)
    for folder in ("unset", "piped"):
        runlog.RunLog(Path(folder) / runlog.FILE_NAME).append("run", format=2, config={})
    if "pipe" in request.node.name:  # not every system has them
        for name in ("pipe", "pipe.safetensors", "piped/config.json"):
            pipe(name)
    Path("outside", sweep.FILE_NAME).write_text(json.dumps({"config": {}, "runs": ["../a"]}))
    Path("broken-sweep", sweep.FILE_NAME).write_text("[5")
    log = runlog.RunLog("record")
    log.append("run", format=2, config=SearchConfig().settings())
    log.append("result", macs=[2, 1], params=[2, 1], fine_tuned_accuracy=0.5, dense_accuracy=0.5)
    return tmp_path


@pytest.mark.timeout(30)  # a pipe that is opened waits for ever
@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: str, place: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(place.rglob("*"))
    assert main(shlex.split(words)) == 2
    out = capsys.readouterr()
    lines = [line for line in out.err.splitlines() if "the run is kept in" not in line]
    assert len(lines) == 1, out.err
    assert lines[0].startswith("dnal: ")
    assert "got " in lines[0]
    assert "; need " in lines[0]
    assert MISTAKES[words] in lines[0], lines[0]
    assert out.out == ""
    assert sorted(place.rglob("*")) == before


def test_the_list_is_long_and_a_fault_of_ours_is_a_traceback(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    assert len(MISTAKES) >= 120
    monkeypatch.setattr(driver, "run", lambda *_, **__: {}["a fault"])
    with pytest.raises(KeyError, match="a fault"):
        main(["run", "--data", "toy", "--out", "r"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_name_that_a_folder_can_have(name: str):
    assert RECIPES[name]().name == name
