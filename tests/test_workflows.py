"""What runs on every push and every week: jobs call what exists and may do no more than needed."""

import os
import re
from pathlib import Path
from typing import Any

import launch
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE, README = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
BOOK = "_build/html"
# Who may write what; a job that is not named reads the repository and nothing else.
WRITERS = {"deploy": {"pages": "write", "id-token": "write"}, "launch": {"contents": "write"}}


def commands(job: dict[str, Any]) -> list[str]:
    """The shell lines of a job."""
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def asked_of_make(lines: list[str]) -> set[str]:
    """Targets that shell lines ask make for."""
    calls = [line.split("#")[0].split() for line in lines if line.startswith("make ")]
    return {word for call in calls for word in call[1:]}


def faults(workflow: dict[Any, Any]) -> list[str]:
    """What is wrong with a workflow, one line each."""
    found = [] if workflow.get("permissions") == {"contents": "read"} else ["permissions are wide"]
    for name, job in workflow["jobs"].items():
        if not 0 < job.get("timeout-minutes", 0) <= 120:
            found.append(f"{name}: no timeout, or a long one")
        if job.get("permissions") != WRITERS.get(name):
            found.append(f"{name}: may do {job.get('permissions')}")
        for used in (step["uses"] for step in job["steps"] if "uses" in step):
            if not re.fullmatch(r"actions/[\w-]+@v\d+", used):
                found.append(f"{name}: {used} is not GitHub's own or not at a major version")
        found += [f"{name}: no target {t}" for t in asked_of_make(commands(job)) - TARGETS]
        needs = job.get("needs", [])
        for other in [needs] if isinstance(needs, str) else needs:
            if other not in workflow["jobs"]:
                found.append(f"{name}: needs {other}, which is no job")
    return found


def read(name: str) -> dict[Any, Any]:
    """A workflow as parsed YAML, in which the key ``on`` is true."""
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_exists_and_may_do_no_more_than_it_must(path: Path):
    assert faults(yaml.safe_load(path.read_text())) == []


def test_each_planted_fault_of_a_workflow_is_found():
    steps = [{"uses": "somebody/action@main"}, {"run": "make setup\nmake coffee"}]
    job = {"steps": steps, "permissions": {"contents": "write"}, "needs": ["nobody"]}
    found = " ".join(faults({"jobs": {"test": job}}))
    for words in ("wide", "timeout", "may do", "somebody", "no target coffee", "needs nobody"):
        assert words in found
    assert "no target setup" not in found


def test_every_push_is_linted_tested_and_built_and_only_main_is_published():
    workflow = read("ci")
    jobs = workflow["jobs"]
    assert {"push", "pull_request"} <= set(workflow[True])
    assert [line.split()[0] for line in commands(jobs["test"])] == [".ci/run"]
    assert asked_of_make((ROOT / ".ci" / "run").read_text().splitlines()) == {
        "setup", "lint", "test",
    }  # fmt: skip
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert jobs["test"]["runs-on"].startswith("ubuntu")
    assert jobs["systems"]["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]
    assert "book" in asked_of_make(commands(jobs["build"]))
    (artifact,) = (s for s in jobs["build"]["steps"] if "upload-pages" in s.get("uses", ""))
    assert artifact["with"]["path"] == BOOK
    assert set(jobs["deploy"]["needs"]) == {"test", "build"}
    assert "refs/heads/main" in jobs["deploy"]["if"]
    assert "event_name == 'push'" in jobs["deploy"]["if"]


def test_on_windows_the_tests_run_by_the_commands_of_the_readme_and_elsewhere_by_make():
    job = read("ci")["jobs"]["systems"]
    lines = {step["if"]: step["run"].splitlines() for step in job["steps"] if "if" in step}
    assert lines["runner.os != 'Windows'"] == ["make test"]
    (told,) = re.findall(r"^```powershell\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    utf8, *commands = told.splitlines()
    assert lines["runner.os == 'Windows'"] == commands
    assert utf8 == f"$env:PYTHONUTF8 = {job['env']['PYTHONUTF8']}"
    made, tested = MAKEFILE.split("$(READY): ")[1], MAKEFILE.split("\ntest: ")[1]
    assert commands[0].removeprefix("python ") in made.replace("$(PYTHON) ", "")
    assert commands[1].partition("python ")[2] in tested


def test_the_branch_of_the_launch_buttons_is_pushed_with_the_address_filled_in():
    workflow = read("ci")
    jobs = workflow["jobs"]
    fill = "python book/launch.py notebooks/*.ipynb"
    for name in ("build", "launch"):
        assert any(line.endswith(fill) for line in commands(jobs[name]))
    assert f"git push --force origin {launch.BRANCH}" in commands(jobs["launch"])
    assert jobs["launch"]["needs"] == "deploy"
    assert workflow["env"]["DNAL_REPOSITORY"].startswith("${{ github.server_url }}/")
    assert workflow[True]["push"]["branches-ignore"] == [launch.BRANCH]


def test_once_a_week_everything_is_executed_afresh_and_the_slow_lane_runs():
    workflow = read("weekly")
    minute, hour, *days = workflow[True]["schedule"][0]["cron"].split()
    assert minute.isdigit()
    assert hour.isdigit()
    assert days == ["*", "*", "1"]
    assert {"book", "slow"} <= asked_of_make(commands(workflow["jobs"]["pinned"]))
    assert "book" in asked_of_make(commands(workflow["jobs"]["newest"]))
