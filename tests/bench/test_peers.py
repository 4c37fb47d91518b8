import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.machine import describe_machine
from bench.peers import run
from bench.peers.__main__ import app, check_machine, make_settings
from bench.peers.entrant import _from_here, time_trainer
from bench.peers.run import Command, MemoryWatch, resident_bytes, run_trainer
from bench.peers.trainers import TRAINERS
from bench.race_ratios import make_report
from bench.race_results import Entrant, read_race, write_race
from fastppt.errors import UserError
from tests.bench.peer_jobs import job_of, write_sizes

# Prints what diffusers' scripts print, for as long as it is told; all else of them is left out.
SCRIPT = """
import argparse, json, pathlib, sys, time
from tqdm import tqdm

parser = argparse.ArgumentParser()
for name in ("instance_data_dir", "class_data_dir", "output_dir"):
    parser.add_argument(f"--{name}", type=pathlib.Path)
for name in ("max_train_steps", "num_class_images", "seed"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--with_prior_preservation", action="store_true")
parser.add_argument("--fail", action="store_true")
parser.add_argument("--forget", action="store_true")
args, others = parser.parse_known_args()
print("INFO - Distributed environment: DistributedType.NO", file=sys.stderr)
if args.with_prior_preservation:
    batches = range(args.num_class_images // 4)
    for batch in tqdm(batches, desc="Generating class images"):
        time.sleep(0.05)
        (args.class_data_dir / f"{batch}.jpg").touch()
if args.fail:
    sys.exit("CUDA out of memory")
bar = tqdm(range(0, args.max_train_steps), initial=0, desc="Steps", disable=False)
for step in range(args.max_train_steps):
    time.sleep(0.15 if step == 0 else 0.03)
    bar.update(1)
    bar.set_postfix(loss=0.1, lr=1e-4)
seen = {"photos": len(list(args.instance_data_dir.iterdir())), "seed": args.seed, "rest": others}
(args.output_dir / "seen.json").write_text(json.dumps(seen))
if not args.forget:
    (args.output_dir / "pytorch_lora_weights.safetensors").touch()
"""
# Starts what follows its own flags, as `accelerate launch` does, without importing torch for it.
PYTHON = f"""#!{sys.executable}
import os, subprocess, sys

words = sys.argv[1:]
if words[:1] == ["-m"]:
    assert words[1] == "accelerate.commands.launch", words
    first = next(number for number, word in enumerate(words) if word.endswith(".py"))
    sys.exit(subprocess.run([sys.executable, *words[first:]]).returncode)
os.execv(sys.executable, [sys.executable, *words])
"""


@pytest.fixture
def diffusers(tmp_path):
    """Return a checkout and an interpreter, as flags."""
    script = tmp_path / "diffusers" / "examples" / "dreambooth" / "train_dreambooth_lora.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    checkout = tmp_path / "diffusers"
    return ["--trainer", "diffusers", "--checkout", str(checkout), "--python", str(python)]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return model and photos as flags: what the race asks of them is there, and no more."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "model").mkdir()
    index = {"_class_name": "StableDiffusionPipeline"}
    (folder / "model" / "model_index.json").write_text(json.dumps(index))
    write_sizes(folder / "model", "unet", 8)
    (folder / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (4, 4)).save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "captions.toml").touch()
    return ["--model", folder / "model", "--photos", folder / "photos", *SETTINGS]


SETTINGS = ["--steps", "8", "--resolution", "64", "--device", "cpu"]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.slow
def test_a_trainer_is_run_on_the_race_and_joins_it(diffusers, given, tmp_path):
    own = [*diffusers, *given, "--seed", 7, "--rounds", 2]
    first = call(*own, "--output", tmp_path / "plain")
    assert first.exit_code == 0, first.output
    plain = read_race(tmp_path / "plain" / "race.json")
    (entrant,) = plain.entrants
    assert (entrant.kind, entrant.prior, len(entrant.rounds)) == ("external", False, 2)
    assert entrant.settings["it/s, as printed"] > 0
    assert entrant.settings["date"] == plain.machine["date"] and entrant.settings["load"] >= 0
    # A copy of the photos alone, and the seed.
    for number in range(2):
        seen = json.loads((tmp_path / "plain" / f"round-{number}" / "seen.json").read_text())
        assert (seen["photos"], seen["seed"]) == (5, 7)

    joining = [*diffusers, "--race", tmp_path / "plain" / "race.json", "--device", "cpu"]
    joining += [*given[2:4], "--prior", "--output", tmp_path / "prior", "--", "--more"]
    second = call(*joining)
    assert second.exit_code == 0, second.output
    joined = read_race(tmp_path / "prior" / "race.json")
    assert joined.settings == plain.settings
    assert [each.name for each in joined.entrants] == [
        "diffusers, its own command",
        "diffusers, its own command, prior preservation",
    ]
    assert {ratio.what for ratio in joined.ratios} == {"total", "class images cached", "step"}
    prior = joined.entrants[1]
    words = shlex.split(prior.settings["command"])
    assert words[-1] == "--more" and "--instance_prompt=a photo of sks robot" in words
    assert "x as fast" in second.output


def test_every_phase_of_a_run_is_noted(diffusers, given, tmp_path):
    words = [*diffusers, *given, "--prior", "--class-images", 12, "--output", tmp_path / "out"]
    assert call(*words).exit_code == 0
    (entrant,) = read_race(tmp_path / "out" / "race.json").entrants
    (found,) = entrant.rounds
    assert found.steps == 8
    assert list(found.phases) == ["class_images", "first_step", "training", "save", "other"]
    assert min(found.phases.values()) >= 0 and found.phases["class_images"] > 0
    assert found.step_s.p50 > 0 and found.start_s > 0 and found.batch_s.p50 > 0
    assert found.memory_kind == "resident" and found.peak_memory_bytes > 5e6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "9"], "--steps: the race has 8, got 9; leave the flag out"),
        (["--photos", "."], "found 0 images"),
        (["--trainer", "other"], "--trainer other: there are diffusers, kohya"),
        (["--", "--fail"], r"ends:\n(.*\n)*CUDA out of memory"),
        (["--", "--forget"], r"no .*pytorch_lora_weights.safetensors;.*ends:\n(.*\n)*Steps: 100%"),
    ],
    ids=["another setting", "no photos", "no such trainer", "a failure", "nothing saved"],
)
def test_what_cannot_join_is_refused(diffusers, given, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    phases = {"first_step": 1.0, "training": 1.0, "save": 1.0, "other": 1.0}
    rounds = [{"phases": phases, "steps": 8}]
    entrant = Entrant(name="it", kind="diffusers", engine="eager", prior=True, rounds=rounds)
    known = {"model": str(given[1]), "steps": 8, "resolution": 64}
    race = tmp_path / "race.json"
    machine = describe_machine()
    write_race(race, make_report(machine, make_settings(known, "cpu", 5), [entrant]))
    joining = ["--race", race, "--device", "cpu", "--output", tmp_path / "out", *given[2:4]]
    done = call(*diffusers, *joining, *flags)
    assert done.exit_code == 2
    assert re.search(message, done.output), done.output
    assert not (tmp_path / "out" / "race.json").exists()


def test_a_race_of_another_machine_cannot_be_joined():
    here = {"device": "cpu", "cpu": "this one", "gpu": None, "driver": None, "load": 0.2}
    check_machine(here | {"load": 1.5}, here)
    with pytest.raises(UserError, match="--race: it ran on cpu another, and this is this one; run"):
        check_machine(here | {"cpu": "another"}, here)


def test_what_a_failed_run_has_left_is_not_taken_for_this_ones(diffusers, given, tmp_path):
    (tmp_path / "out" / "round-0" / "class_images").mkdir(parents=True)
    done = call(*diffusers, *given, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "holds a race already; give another folder" in done.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--race", "none.json"], "none.json: no such file"),
        (["--steps", "0"], "--steps 0: Input should be greater than 0"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--checkout", "elsewhere"], "--checkout elsewhere: is no folder"),
        (["--checkout", "."], "there is no .*train_dreambooth_lora.py"),
        (["--python", "elsewhere"], "--python .*elsewhere: is no working interpreter"),
    ],
    ids=["no race", "out of range", "no model", "no checkout", "no script", "no interpreter"],
)
def test_what_makes_no_race_is_refused(diffusers, given, tmp_path, flags, message):
    done = call(*diffusers, *given, *flags, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert re.search(message, done.output), done.output


def test_a_race_of_its_own_takes_all_settings(diffusers, given, tmp_path):
    done = call(*diffusers, *given[:4], "--steps", "8", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "--resolution: give it, or a race to join with --race" in done.output


@pytest.mark.slow
def test_the_scripts_are_launched_by_accelerate_on_a_model_that_is_built(diffusers, tmp_path):
    words = [*diffusers[:-1], sys.executable, *SETTINGS, "--model", "mini-sd"]
    done = call(*words, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model" / "unet").is_dir()
    (entrant,) = read_race(tmp_path / "out" / "race.json").entrants
    # The launcher imports torch, and that is not the script's.
    assert entrant.rounds[0].peak_memory_bytes < 100e6
    assert entrant.settings["torch"]


def test_a_race_that_is_written_where_the_trainer_lies_names_no_folder_above(
    diffusers, given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert call(*diffusers, *given, "--output", "out").exit_code == 0
    (entrant,) = read_race(tmp_path / "out" / "race.json").entrants
    words = shlex.split(entrant.settings["command"])
    assert words[0] == "venv/bin/python"
    assert f"--output_dir={Path('out/round-0')}" in words
    assert not [word for word in words if str(tmp_path) in word]


def test_of_a_command_only_what_begins_in_this_folder_is_shortened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"{tmp_path}/python", f"--output={tmp_path}/out", f"--data=/data{tmp_path}/photos"]
    assert _from_here(words) == ["python", "--output=out", f"--data=/data{tmp_path}/photos"]


def test_a_setting_that_the_trainer_left_out_is_refused(tmp_path, diffusers, monkeypatch):
    script = tmp_path / "checkout" / "scripts" / "train.py"
    job = job_of("sd", tmp_path, rounds=1, steps=2)
    job = job.model_copy(update={"device": "cpu", "python": Path(diffusers[-1]), "extra": ()})
    script.parent.mkdir(parents=True)
    script.write_text("print('Could not set train_dtype as FLOAT_8')\n")
    with pytest.raises(UserError, match="left out a setting: Could not set train_dtype as FLOAT_8"):
        time_trainer("onetrainer", TRAINERS["onetrainer"], job, [])


def run_python(code, tmp_path, *, num_launchers=0, device="cpu", **options):
    words = [sys.executable, "-c", textwrap.dedent(code)]
    command = Command(words, tmp_path, {}, num_launchers)
    return run_trainer(command, tmp_path / "output.txt", device=device, **options)


def test_the_job_ends_with_the_last_line_and_not_with_the_process(tmp_path):
    begun = time.monotonic()
    log = run_python("import time; print('saved', flush=True); time.sleep(1)", tmp_path)
    assert 0 < log.done_s <= time.monotonic() - begun - 1


def test_the_job_ends_with_what_is_written_after_the_last_line(tmp_path):
    code = """
        import time
        print("saving", flush=True)
        time.sleep(1)
        open("lora.safetensors", "w").close()
        time.sleep(1)
    """
    (tmp_path / "old").touch()
    begun = time.monotonic()
    log = run_python(code, tmp_path)
    # A file's time is that of a clock's last tick.
    assert 0.9 < log.done_s < time.monotonic() - begun - 0.9


def test_the_start_is_until_the_trainer_says_that_it_begins(tmp_path):
    code = "import time; time.sleep(0.5); print('begun: now', flush=True); time.sleep(0.5)"
    log = run_python(f"{code}; print('done')", tmp_path, begins="^begun: ")
    assert 0.5 < log.start_s < log.done_s - 0.4


def test_a_trainer_that_never_says_that_it_begins_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"printed nothing like '.begun: ', which says that it has"):
        run_python("import time; time.sleep(0.5); print('begin')", tmp_path, begins="^begun: ")


def test_a_start_that_is_measured_apart_finds_its_files_read(tmp_path, monkeypatch):
    printed = {"help": iter([9.0, 5.0]), "train": iter([30.0])}

    def run_once(command, words, output, watch, begins=None):
        if watch is not None:
            watch.peak = 1000
        return run._Ran([], None, next(printed[words[0]]), -1.0)

    monkeypatch.setattr(run, "_run", run_once)
    command = Command(["train"], tmp_path, {})
    log = run_trainer(command, tmp_path / "output.txt", device="cpu", start_words=["help"])
    assert (log.start_s, log.done_s) == (5.0, 30.0)


def test_a_failure_shows_the_end_of_what_was_printed(tmp_path):
    code = "import sys; print('x' * 10, *range(100), sep='\\n'); sys.exit('no memory')"
    with pytest.raises(UserError) as caught:
        run_python(code, tmp_path)
    message = str(caught.value)
    assert "exit code 1" in message and "no memory" in message and "\n99\n" in message
    assert "\n50\n" not in message
    assert "xxxxxxxxxx" in (tmp_path / "output.txt").read_text()


def test_a_launchers_traceback_does_not_hide_what_the_trainer_said(tmp_path):
    code = "print('no such flag'); print('launcher\\n' * 22); raise SystemExit(1)"
    with pytest.raises(UserError, match=r"ends:\nno such flag\nlauncher\n"):
        run_python(code, tmp_path)


def test_a_program_that_is_not_there_is_named(tmp_path):
    command = Command([str(tmp_path / "none")], tmp_path, {})
    with pytest.raises(UserError, match="none: cannot be started"):
        run_trainer(command, tmp_path / "output.txt", device="cpu", start_words=None)


@pytest.mark.parametrize("of_its_own", [False, True], ids=["our session", "its own session"])
def test_an_interrupted_run_leaves_no_process(tmp_path, monkeypatch, of_its_own):
    def interrupt(self, piece, at_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.BarReader, "read", interrupt)
    code = f"""
        import os, subprocess, sys, time
        words = [sys.executable, "-c", "import time; time.sleep(60)"]
        child = subprocess.Popen(words, start_new_session={of_its_own})
        open("ids", "w").write(f"{{os.getpid()}} {{child.pid}}")
        print("ready", flush=True)
        time.sleep(60)
    """
    with pytest.raises(KeyboardInterrupt):
        run_python(code, tmp_path)
    for number in (tmp_path / "ids").read_text().split():
        # A child of the killed one is a zombie until init has looked.
        assert is_gone(int(number))


def is_gone(number):
    for _ in range(100):
        try:
            if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def family_of_processes():
    """Yield a launcher of 60 MB whose child of 30 MB has a child of 15 MB."""
    code = """
        import subprocess, sys
        size, *others = map(int, sys.argv[1].split(","))
        held = bytearray(b"x") * (size << 20)
        words = [sys.executable, "-c", sys.argv[2], ",".join(map(str, others)), sys.argv[2]]
        child = subprocess.Popen(words, stdout=subprocess.PIPE) if others else None
        if child:
            child.stdout.readline()
        print("ready", flush=True)
        sys.stdin.read()
    """
    code = textwrap.dedent(code)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "60,30,15", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    yield psutil.Process(process.pid)
    process.communicate()


@pytest.mark.parametrize(("num_launchers", "held"), [(0, 105), (1, 45), (2, 15), (3, 0)])
def test_memory_is_that_of_the_tree_below_its_launchers(family_of_processes, num_launchers, held):
    found = resident_bytes(family_of_processes, num_launchers) / 2**20
    # An interpreter's own is a few more, each.
    assert held <= found < held + 15 * (3 - num_launchers) + 1e-9


def test_memory_that_is_shared_with_a_launcher_is_counted_and_among_children_once(tmp_path):
    code = """
        import mmap, subprocess, sys
        with open("shared", "rb") as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sum(held[::4096])
        words = [sys.executable, "-c", sys.argv[2], "", ""]
        children = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in sys.argv[1]]
        for child in children:
            child.stdout.readline()
        print("ready", flush=True)
        sys.stdin.read()
    """
    (tmp_path / "shared").write_bytes(bytes(60 << 20))
    code = textwrap.dedent(code)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "12", code],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    found = resident_bytes(psutil.Process(process.pid), 1) / 2**20
    process.communicate()
    assert 60 <= found < 60 + 3 * 15


def test_memory_that_cannot_be_read_is_no_peak(monkeypatch, tmp_path):
    def refuse(process, num_launchers):
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(run, "resident_bytes", refuse)
    with pytest.raises(UserError, match=r"memory of the trainer cannot be read: psutil\.Access"):
        run_python("import time; time.sleep(0.5)", tmp_path)


def test_memory_of_a_gpu_is_what_is_taken_beyond_what_was(monkeypatch, tmp_path):
    taken = iter([1000, 1500, 4000])
    monkeypatch.setattr(run, "_gpu_bytes", lambda: next(taken, 1200))
    monkeypatch.setattr(run, "POLL_S", 0.01)
    log = run_python("import time; time.sleep(0.3)", tmp_path, device="cuda")
    assert (log.peak_memory_bytes, log.memory_kind) == (3000, "device")


def test_a_watch_is_over_when_it_is_stopped(tmp_path):
    watch = MemoryWatch("cpu", 0)
    watch.start(os.getpid())
    watch.stop()
    assert watch.peak > 0 and not watch._thread.is_alive()


@pytest.mark.gpu
@pytest.mark.skipif(
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1,
    reason="sees the bytes of the other workers too: run it without -n",
)
def test_on_a_gpu_the_bytes_of_another_process_are_seen(tmp_path):
    code = """
        import time, torch
        held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        time.sleep(1)
    """
    log = run_python(code, tmp_path, device="cuda")
    # The tensor, and a context of some hundreds of megabytes.
    assert 1 << 30 <= log.peak_memory_bytes < 3 << 30
