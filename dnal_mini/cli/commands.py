"""The ``dnal`` command: start a run, resume it, print or export its results. Read ``main`` first.

A mistake of the user's ends in one line on stderr and exit code 2. Progress bars live here, not in
the library.
"""

import hashlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dnal_mini.cli.arguments import (
    overrides,
    paths_and_switches,
    print_fields,
    take,
    take_all,
    take_folder,
    typed,
)
from dnal_mini.cli.display import Display, how_to_continue, show_of_several
from dnal_mini.config import PATHS, Budget, SearchConfig, known
from dnal_mini.deployment.export import export
from dnal_mini.methods import METHODS
from dnal_mini.recipes import RECIPES
from dnal_mini.refused import Refused
from dnal_mini.runs import aggregate, origin, runlog, tables
from dnal_mini.runs.reopen import nets_in, settings_in
from dnal_mini.search import driver, sweep
from dnal_mini.search.answer import answer
from dnal_mini.search.inputs import settled
from dnal_mini.training.devices import is_first_process

USAGE = """\
usage: dnal run [RECIPE] [--field value ...] [--out DIR]
       dnal resume DIR [--data-dir NEW]
       dnal sweep [RECIPE] --gate-price P1 P2 ... | --budget.macs M1 M2 ... [--seed S1 S2 ...]
                  [--jobs N] [--ray [ADDRESS]] [--field value ...] [--out DIR]
       dnal report DIR|FILE ... [--epochs] [--markdown] [--figure FILE.svg|png]
       dnal export DIR|FILE [--format onnx|pt2|both] [--no-deploy] [--out DIR] [--model NAME]
       dnal recipes

run      Train, learn the width, cut, fine-tune; the default recipe is digits (minutes on two
         cores). "dnal run --help" lists every field, "dnal run RECIPE --help" with its values.
         --method NAME: who decides which channels stay. --budget.macs 0.3: what may be left.
         --model package.module:function: a net of yours, called with num_classes. --weights FILE:
         a trained one.
resume   Go on with an interrupted run where it was stopped. --data-dir: its images have moved.
sweep    A run per price and seed. What the runs of a seed share is trained once. The same command
         again goes on, with more prices or seeds if they are named. --budget.macs M1 M2 ...: a
         share of the MACs to reach, in place of a price. --jobs: runs at a time. --ray: on a Ray
         cluster, whose machines must share the file system.
report   The results of one run, or tables of several or of a sweep: each run, means over seeds,
         what sharing saved. --epochs: one line per epoch. --figure: accuracy over MACs.
export   The dense and the pruned net of a finished run as ONNX and torch.export files, each
         compared with the net; of a .safetensors file the pruned net alone. BatchNorm is folded
         into the convolutions unless --no-deploy. --model: what makes the net, if it was yours.
recipes  The recipes, one line each.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 the user's mistake, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    commands = {
        "run": _run,
        "resume": _resume,
        "sweep": _sweep,
        "report": _report,
        "export": _export,
        "recipes": _recipes,
    }
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if not words or words[0] in ("-h", "--help"):
                print(USAGE, end="")
            elif words[0] == "--version":
                print(", ".join(f"{name} {found}" for name, found in origin.versions().items()))
            else:
                commands[known(words[0], commands, "command")](words[1:])
            sys.stdout.flush()  # here, where a closed pipe can be caught
        except BrokenPipeError:  # the reader, e.g. head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError, FloatingPointError) as error:
            line = _one_line(error)
            if line is None:
                raise
            print(f"dnal: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            print(f"dnal: {str(stop) or 'interrupted'}", file=sys.stderr)
            return 130
    return 0


def _one_line(error: Exception) -> str | None:
    """The error as one line of got, need, do; None if it is a fault of the program."""
    text = " ".join(str(error).split())
    told = isinstance(error, OSError) and error.errno is None  # in words of our own
    if told or isinstance(error, Refused | FloatingPointError):
        return text
    if isinstance(error, PermissionError):
        return f"got no permission for {error.filename}; need access to it; do choose another path"
    if isinstance(error, OSError):
        what = f"{error.strerror}: {error.filename}" if error.filename else text
        return f"got {what}; need a readable input and a writable folder; do check the paths"
    return None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning of the library on one line, without the place in its code."""
    print(f"dnal: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run(words: list[str]) -> None:
    """The recipe with its overrides, in a folder that its settings name unless --out does."""
    config, rest = _recipe(words)
    if _asked_for_help(rest, config, "dnal run [RECIPE] [--out DIR]"):
        return
    out = take_folder(rest, "--out")
    config = config.replace(**overrides(rest, config))
    _search(config, out or Path("runs") / f"{config.name}-{_hash(config)}")


def _recipe(words: list[str]) -> tuple[SearchConfig, list[str]]:
    """The recipe that the first word names, else digits, and the words that are left."""
    bare = bool(words) and not words[0].startswith("-")
    name = words[0] if bare else "digits"
    return RECIPES[known(name, RECIPES, "recipe")](), words[1:] if bare else list(words)


def _asked_for_help(words: list[str], config: SearchConfig, command: str) -> bool:
    """True if --help was among the words; then the fields are printed, those of --method too."""
    if not {"-h", "--help"} & {*words}:
        return False
    method = take(words, "--method") or config.method.name
    shown = config.replace(method=method, budget=Budget(macs=0.5))  # which may want one
    object.__setattr__(shown, "budget", None)  # to be asked for, not a default
    print_fields(shown, command)
    return True


def _resume(words: list[str]) -> None:
    """Continue the run in the folder with its own settings; a finished one prints its results.

    Its images are looked for where --data-dir says, else where they were, else in $DNAL_DATA.
    """
    rest = list(words)
    moved = take(rest, "--data-dir")
    paths, _ = paths_and_switches(rest, ("--data-dir",))
    if len(paths) != 1 or not paths[0].is_dir():
        got = " ".join(words) or "no folder"
        raise Refused(f"got {got}; need the one folder of a run; do look at what dnal run said")
    done = tables.summary(paths[0])["finished"]
    if not done or (paths[0] / "config.json").exists():
        config = settings_in(paths[0])
        if not moved and config.data_dir and not Path(config.data_dir).exists():
            moved = os.environ.get("DNAL_DATA")
        config = replace(config, data_dir=moved or config.data_dir)
        if not done:
            _search(config, paths[0])
            return
        answer(settled(config), paths[0])  # refused where it is another run's now
    print(tables.final_table(paths[0]))


def _sweep(words: list[str]) -> None:
    """All runs of a sweep that are not finished, in a folder that the settings name, or --out."""
    config, rest = _recipe(words)
    if _asked_for_help(rest, config, "dnal sweep [RECIPE] --gate-price P1 P2 ... [--seed S1 ...]"):
        return
    rest = [word.replace("--target-macs", "--budget.macs") for word in rest]
    strengths = {m.strength: f"--{m.strength.replace('_', '-')}" for m in METHODS.values()}
    flags = strengths | {f"budget.{f.name}": f"--budget.{f.name}" for f in fields(Budget)}
    found = {name: take_all(rest, flag) for name, flag in flags.items() if name}
    asked = {name: texts for name, texts in found.items() if texts is not None}
    if len(asked) != 1:
        got = " and ".join(flags[name] for name in asked) or "nothing that the runs differ in"
        need = "one of " + ", ".join(f"{flag} V1 V2 ..." for name, flag in flags.items() if name)
        raise Refused(f"got {got}; need {need}; do name what the runs differ in")
    ((field, texts),) = asked.items()
    values = [typed(field, text, float) for text in texts]
    seeds = take_all(rest, "--seed")
    jobs, ray = take(rest, "--jobs"), take_all(rest, "--ray")
    out, given = take_folder(rest, "--out"), overrides(rest, config)
    if field not in strengths and "method" in given:  # which may want a budget to be made
        given["budget"] = Budget(macs=0.5)
    config = config.replace(**given)
    folder = out or Path("runs") / f"{config.name}-sweep-{_hash(config, sweep.FREE)}"
    try:
        failed = sweep.sweep(
            config,
            values,
            [config.seed] if seeds is None else [typed("seed", text, int) for text in seeds],
            folder,
            field=field,
            jobs=1 if jobs is None else typed("jobs", jobs, int),
            ray=None if ray is None else " ".join(ray),
            on_row=show_of_several,
        )
    except KeyboardInterrupt:
        again = shlex.join(["dnal", "sweep", *words])
        raise KeyboardInterrupt(f"interrupted; continue with the same command: {again}") from None
    _report([str(folder)])
    if failed:
        need = "what their lines above say; do type the command again"
        raise Refused(f"got failures: {', '.join(failed)}; need {need}")


def _report(words: list[str]) -> None:
    """Results of one run, or of several, or of a sweep, in tables; and a figure of them."""
    rest = list(words)
    figure = take(rest, "--figure")
    paths, switches = paths_and_switches(rest, ("--epochs", "--markdown", "--figure"))
    if not paths:
        raise Refused("got no run to report; need its folder or record; do name one or more")
    sweeps = [path for path in paths if (path / sweep.FILE_NAME).exists()]
    asked = [run for path in paths for run in (sweep.runs(path) if path in sweeps else [path])]
    left = [run for path in sweeps for run in sweep.runs(path) if not run.exists()]
    found = {path: runlog.read(path) for path in asked if path not in left}
    records, markdown = list(found.values()), "--markdown" in switches
    if figure:
        aggregate.draw(records, figure)
    if "--epochs" in switches:
        for path, rows in found.items():
            print(f"{path}\n\n{tables.epochs_table(rows, markdown)}\n")
    if len(records) == 1 and not sweeps:
        print(tables.final_table(records[0], markdown))
    else:
        print(aggregate.tables(records, left if sweeps else None, markdown))


def _export(words: list[str]) -> None:
    """The nets of a run, or that of a saved file, written for other runtimes and checked."""
    rest = list(words)
    kind = known(take(rest, "--format") or "both", ("onnx", "pt2", "both"), "format")
    out, model = take_folder(rest, "--out"), take(rest, "--model") or ""
    paths, switches = paths_and_switches(rest, ("--deploy", "--no-deploy"))
    if len(paths) != 1 or len(switches) > 1:
        got = " ".join(words) or "nothing to export"
        raise Refused(f"got {got}; need one run folder or .safetensors file; do see dnal --help")
    nets, image_shape = nets_in(paths[0], model)
    folder = out or (paths[0] if paths[0].is_dir() else paths[0].parent)
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{'file':<12}{'bytes':>14}{'ratio':>8}{'difference':>12}\n"
    for suffix in ("onnx", "pt2") if kind == "both" else (kind,):
        largest = None
        for name, net in nets.items():
            fold = "--no-deploy" not in switches
            done = export(net, folder / f"{name}.{suffix}", image_shape, fold=fold)
            largest = largest or done.bytes
            ratio = f"{largest / done.bytes:.2f}x" if len(nets) > 1 else ""
            line = f"{done.path.name:<12}{done.bytes:>14,}{ratio:>8}{done.difference:>12.1e}"
            print(head + line, flush=True)  # at once: a file takes seconds
            head = ""
    print(f"\nin {folder}; difference: largest against eager torch, relative to the largest output")


def _recipes(words: list[str]) -> None:
    """Name, model, epochs of the three stages, and the first line of each recipe."""
    if paths_and_switches(words, ())[0]:
        raise Refused(f"got {' '.join(words)}; need no more words; do see dnal run RECIPE --help")
    for name, recipe in RECIPES.items():
        config = recipe()
        epochs = [stage.epochs for stage in config.stages() if stage.name != "baseline"]
        about = (recipe.__doc__ or "").strip().splitlines()[0]
        print(f"{name:<20} {config.model:<12} {'+'.join(map(str, epochs))} epochs\n    {about}")
    print("\nepochs: weight stage + architecture stage + fine-tuning")


def _search(config: SearchConfig, out: Path) -> None:
    """Run or resume in ``out`` with a live display, then print the final table."""
    display = Display(sys.stderr, f"{config.name}: the run is kept in {out}")
    try:
        driver.run(config, out, progress=display.progress, on_row=display.show)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_continue(out)) from None
    if is_first_process():
        print(tables.final_table(out))


def _hash(config: SearchConfig, free: Iterable[str] = PATHS) -> str:
    """Six digits that differ between runs of one recipe with other settings, but for ``free``."""
    settings = config.settings()
    text = json.dumps({name: settings[name] for name in sorted({*settings} - {*free})})
    return hashlib.sha256(text.encode()).hexdigest()[:6]
