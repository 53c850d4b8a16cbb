"""Commands of Slurm and Kubernetes that do as much as a sweep asks of them, and fail when they are
told to.

`install` makes them; run as a program, this file is one of them. Their state is engine.json beside
them. A job runs its script, or the command of its pod, when it has been looked at `looks` times;
task n of an array n looks later."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "kubectl")


def install(folder: Path, monkeypatch, *, looks: int = 3, **state) -> Path:
    """The folder of the stand-ins, which is put on the path.

    failures    {command: [words, or None for success, of its 1st, 2nd, .. call]}; words that begin
                with "+" come after the command has done its work
    """
    folder.mkdir()
    for name in COMMANDS:
        tool = folder / name
        words = shlex.join([sys.executable, __file__, str(folder), name])
        tool.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        tool.chmod(0o755)
    empty = {"calls": [], "failures": {}, "jobs": {}, "jobsets": {}, "looks": looks}
    (folder / "engine.json").write_text(json.dumps(empty | state))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def calls(folder: Path, command: str) -> list[list[str]]:
    """The arguments of all calls of a command, oldest first."""
    made = json.loads((folder / "engine.json").read_text())["calls"]
    return [arguments for name, *arguments in made if name == command]


def jobsets(folder: Path) -> dict:
    return json.loads((folder / "engine.json").read_text())["jobsets"]


def sbatch(state, arguments):
    script = sys.stdin.read()
    last = int(re.findall(r"--array=0-(\d+)", script)[0])
    largest = state.get("MaxArraySize", 1001) - 1
    if last > largest:
        return "sbatch: error: Batch job submission failed: Invalid job array specification"
    job = str(101 + len(state["jobs"]))
    name = next(a for a in arguments if a.startswith("--job-name="))
    tasks = {f"{job}_{task}": 0 for task in range(last + 1)}
    state["jobs"][job] = {"name": name, "script": script, "tasks": tasks}
    print(job)
    return None


def squeue(state, arguments):
    asked = arguments[arguments.index("--jobs") + 1].split(",") if "--jobs" in arguments else ()
    for job, entry in state["jobs"].items():
        by_name = entry["name"].replace("--job-name", "--name") in arguments
        for task in list(entry["tasks"]) if job in asked or by_name else ():
            entry["tasks"][task] += 1
            number = task.partition("_")[2]
            if entry["tasks"][task] > state["looks"] + int(number):
                del entry["tasks"][task]
                environment = {"SLURM_ARRAY_TASK_ID": number}
                subprocess.run(["bash", "-c", entry["script"]], env=os.environ | environment)
            else:
                print(task, "RUNNING")
    over = [job for job in asked if not state["jobs"][job]["tasks"]]
    return "slurm_load_jobs error: Invalid job id specified" if over == list(asked) != [] else None


def scancel(state, arguments):
    del state, arguments


def scontrol(state, arguments):
    if arguments == ["show", "config"] and "MaxArraySize" in state:
        print(f"LaunchParameters = (null)\nMaxArraySize            = {state['MaxArraySize']}")


def kubectl(state, arguments):
    known, verb = state["jobsets"], arguments[0]
    if verb == "apply":
        for item in yaml.safe_load_all(sys.stdin.read()):
            known[item["metadata"]["name"]] = item | {"looks": 0}
    if verb == "delete":
        for name in arguments[2:]:
            known.pop(name, None)
    for item in known.values() if arguments[:2] == ["get", "jobsets"] else ():
        item["looks"] = item.get("looks", 0) + 1
        if item["looks"] == state["looks"] + 1:
            job = item["spec"]["replicatedJobs"][0]["template"]["spec"]
            (container,) = job["template"]["spec"]["containers"]
            done = subprocess.run(container["command"], capture_output=True, text=True)
            item["output"] = done.stdout + done.stderr
            ended = "Failed" if done.returncode else "Completed"
            item["status"] = {"conditions": [{"type": ended, "status": "True"}]}
    if verb == "get":
        print(json.dumps({"items": list(known.values())}))
    if verb == "logs":
        print(known[arguments[1].rpartition("=")[2]]["output"])


def main(folder: Path, name: str, arguments: list[str]) -> None:
    file = folder / "engine.json"
    state = json.loads(file.read_text())
    place = f"{name} {arguments[0]}" if name == "kubectl" else name
    due = state["failures"].get(place) or [None]
    state["failures"][place], words = due[1:], due[0] or ""
    state["calls"].append([name, *arguments])
    late = words.startswith("+")
    if not words or late:
        words = globals()[name](state, arguments) or words
    file.write_text(json.dumps(state))
    if words:
        print(words.removeprefix("+"), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
