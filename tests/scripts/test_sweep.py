import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from hf_momentum.errors import UserError
from hf_momentum.training.grid import read_grid
from hf_momentum.training.sweep import read_sweep
from hf_momentum.training.sweep_study import SharedStudy

optuna = pytest.importorskip("optuna")
ROOT = Path(__file__).parents[2]
SCRIPT, TOY = ROOT / "scripts" / "sweep.py", Path(__file__).with_name("toy_recipe.py")
pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
]
SHIPPED = ["five_tasks", "schedules", "betas", "batch_size"]


def load(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def main():
    return load(SCRIPT).main


@pytest.fixture
def config(tmp_path):
    """Write a sweep of the toy; `changes` replaces keys, None leaves one out."""

    def write(name: str = "toy", **changes) -> str:
        options = {"output_dir": str(tmp_path / "out"), "journal": str(tmp_path / "journal")}
        content = {"recipe": str(TOY), "options": options, "search": {"optim": ["sgd", "sgdm"], "seeds": [1, 2]}}
        content |= changes
        content["options"] = options | (changes.get("options") or {})
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return str(file)

    return write


def journal(folder: Path) -> list[list[str]]:
    file = folder / "journal"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def runs(folder: Path, word: str) -> Counter:
    return Counter(line[1] for line in journal(folder) if line[0] == word)


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def wait_until(found, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_killed_workers_trial_is_taken_up_and_no_run_is_lost_or_done_twice(main, config, tmp_path):
    options = {"seconds": 0.2, "orphan_seconds": 6.0}
    file = config(options=options, search={"seeds": [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]})
    context = multiprocessing.get_context("fork")  # the imports are made already
    killed, other = (context.Process(target=main, args=([file, "--heartbeat", "1"],), daemon=True) for _ in range(2))
    killed.start()
    other.start()
    wait_until(lambda: {str(killed.pid), str(other.pid)} <= {line[2] for line in journal(tmp_path)})
    wait_until(lambda: [line[0] for line in journal(tmp_path) if line[2] == str(killed.pid)][-1] == "start")
    killed.kill()  # its trial's command runs on, slowly
    killed.join()
    other.join(timeout=90)
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)

    assert sorted(record["seed"] for record in results(tmp_path)) == list(range(1, 13))
    assert set(runs(tmp_path, "end").values()) == {1}
    assert runs(tmp_path, "start") == runs(tmp_path, "end")
    trials = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path}/out/sweep.db").get_trials()
    assert [trial.state.name for trial in trials].count("COMPLETE") == 6
    retries = [len(trial.system_attrs.get("retry_history", [])) for trial in trials]
    assert retries[:6] == [0] * 6
    assert retries[6:]  # more than one where a busy machine delays a heartbeat


def claim_all(file: str, url: str, barrier, queue) -> None:
    study = SharedStudy(read_sweep(file, {}), "toy", url, heartbeat=60)
    barrier.wait()
    claimed = []
    while (trial := study.claim()) is not None:
        claimed.append(int(trial.params["seeds"]))
        time.sleep(0.06)  # let the others at the lock
    queue.put(claimed)


def test_workers_never_get_the_same_trial_and_queue_each_once(config, tmp_path):
    file, url = config(search={"seeds": list(range(24))}), f"sqlite:///{tmp_path}/study.db"
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=claim_all, args=(file, url, barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    claimed = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(bool(part) for part in claimed) > 1
    assert sorted(itertools.chain(*claimed)) == list(range(24))


def test_a_worker_that_dies_at_once_loses_its_trial_too(config, tmp_path):
    sweep, url = read_sweep(config(search={"seeds": [5]}), {}), f"sqlite:///{tmp_path}/study.db"
    study = SharedStudy(sweep, "toy", url, heartbeat=1)
    assert study.claim().params == {"seeds": "5"}
    assert study.claim() is None
    again = []
    wait_until(lambda: again.append(study.claim()) or again[-1] is not None, 10)
    assert (again[-1].params, study.failed()) == ({"seeds": "5"}, [])


def test_a_grid_runs_in_order_and_a_second_time_nothing(main, config, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    search = {"method": [{"optim": "sgd"}, {"optim": "sgdm", "momentum": 0.5}], "seeds": [1, [2, 3]]}
    file = config(search=search, launch=f"env MARK=launched {sys.executable}")
    main([file])
    starts = [line[1:2] + line[4:] for line in journal(tmp_path) if line[0] == "start"]
    names = [f"{method}/0.1/{seed}" for method in ("sgd/None", "sgdm/0.5") for seed in (1, 2, 3)]
    assert starts == [[name, "launched"] for name in names]
    output = capsys.readouterr().out
    assert "optim=sgdm momentum=0.5 seeds=2 3: dev_accuracy 0.9," in output
    assert "sgdm β=0.5" in output[output.index("Test accuracy") :]
    main([file, "--workers", "2"])
    assert [line for line in journal(tmp_path) if line[0] == "start"] == journal(tmp_path)[::2]
    assert len(journal(tmp_path)) == 12


def test_several_trials_at_once_share_the_cores(main, config, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    main([config(), "--workers", "2", "--seconds", "1.5", "--learning_rate=0.01"])
    assert ("start", "start") in itertools.pairwise(line[0] for line in journal(tmp_path))
    assert {line[3] for line in journal(tmp_path)} == {"3"}
    assert {record["learning_rate"] for record in results(tmp_path)} == {0.01}
    assert "2 trials at once, OMP_NUM_THREADS=3 for each." in capsys.readouterr().out


def test_tpe_searches_a_range_and_reports_the_best(main, config, tmp_path, capsys):
    search = {"learning_rate": {"low": "1e-3", "high": 1.0, "log": True}, "optim": ["sgd", "sgdm"]}
    settings = {"sampler": "tpe", "options": {"seeds": [1, 2]}, "search": search}
    main([config(trials=3, **settings)])
    main([config(trials=4, **settings)])  # more trials of the same search
    rates = {record["learning_rate"]: record["dev_accuracy"] for record in results(tmp_path)}
    assert len(results(tmp_path)) == 8
    assert len(rates) == 4
    assert all(0.001 <= rate <= 1.0 for rate in rates)
    best = max(rates, key=rates.get)
    output = capsys.readouterr().out
    assert f"Best dev_accuracy: {rates[best]:.4g} at learning_rate={best:.4g} optim=sgd" in output


def test_a_failing_trial_stops_no_other_and_is_tried_again(main, config, tmp_path, capsys):
    argv = [config(options={"needs": str(tmp_path / "ball")}, search={"seeds": [1, 2]})]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 1
    output = capsys.readouterr().out
    assert "seeds=1: FAILED with status 1" in output
    assert "two\nthe toy has nothing to play with" in output
    assert "1 trials failed" in output
    assert [record["seed"] for record in results(tmp_path)] == [2]
    (tmp_path / "ball").touch()
    main(argv)
    assert sorted(record["seed"] for record in results(tmp_path)) == [1, 2]
    assert runs(tmp_path, "end") == {"sgd/None/0.1/1": 1, "sgd/None/0.1/2": 1}


def test_a_trial_without_the_objective_fails(main, config, capsys):
    with pytest.raises(SystemExit):
        main([config(objective="train_loss", direction="minimize", search={"seeds": [1]})])
    assert "seeds=1: FAILED, 1 of 1 runs have no train_loss" in capsys.readouterr().out


def test_the_objective_is_a_mean_over_runs(config):
    sweep = read_sweep(config(), {})
    dev, test = ({"run_id": "a", "stage": stage, "dev_accuracy": 0.5} for stage in ("dev", "test"))
    zero_shot = {"run_id": "z", "optim": "zero-shot", "dev_accuracy": None}
    assert sweep.score([zero_shot, dev, {"run_id": "b", "dev_accuracy": 0.8}, test]) == 0.65
    with pytest.raises(UserError, match="it recorded no run"):
        sweep.score([zero_shot])


def test_an_interrupt_ends_the_commands_and_gives_their_trials_back(main, config, tmp_path):
    argv = [config(options={"seconds": 30.0})]

    def interrupt():
        wait_until(lambda: len(journal(tmp_path)) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        main([*argv, "--workers", "2"])
    thread.join()
    assert time.monotonic() - start < 20
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path}/out/sweep.db")
    states = Counter(trial.state.name for trial in study.get_trials())
    assert states == {"WAITING": 4, "FAIL": 2}
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_changed_sweep_is_refused_and_under_another_name_skips_what_is_finished(main, config, tmp_path):
    main([config(search={"seeds": [1, 2]})])
    with pytest.raises(UserError, match=r"begun with search.seeds = 1 2, and now it is 1 2 3.*--study"):
        main([config(search={"seeds": [1, 2, 3]})])
    with pytest.raises(UserError, match=r"options.seconds = not set, and now it is --seconds=0.1"):
        main([config(search={"seeds": [1, 2]}), "--seconds", "0.1"])
    main([config(search={"seeds": [1, 2, 3]}), "--study", "more"])
    assert set(runs(tmp_path, "start").values()) == {1}
    assert [record["seed"] for record in results(tmp_path)] == [1, 2, 3]


def test_refused_options_stop_the_sweep_and_may_be_corrected(main, config, tmp_path, capsys):
    file = config(search={"seeds": [1, 2, 3]})
    with pytest.raises(UserError, match=r"first trial's options were refused \(status 2"):
        main([file, "--secnods", "0.1"])
    output = capsys.readouterr().out
    assert "unrecognized arguments: --secnods=0.1" in output
    assert output.count("FAILED") == len(list((tmp_path / "out" / "trials").iterdir())) == 1
    main([file, "--seconds", "0.1"])
    assert [record["seed"] for record in results(tmp_path)] == [1, 2, 3]
    assert "trials failed" not in capsys.readouterr().out


def test_a_sweep_that_runs_elsewhere_keeps_its_definition_and_heartbeat(config, tmp_path):
    url, whole = f"sqlite:///{tmp_path}/study.db", config(search={"seeds": [1, 2]})
    study = SharedStudy(read_sweep(whole, {}), "toy", url, heartbeat=60)
    study = SharedStudy(read_sweep(whole, {}), "toy", url, heartbeat=30)  # nothing runs yet
    trial = study.claim()
    with pytest.raises(UserError, match=r"have --heartbeat 30, and this one has 60. Give --heartbeat 30"):
        SharedStudy(read_sweep(whole, {}), "toy", url, heartbeat=60)
    changed = read_sweep(whole, {"seconds": "1"})
    with pytest.raises(UserError, match=r"begun with options\.seconds = not set"):
        SharedStudy(changed, "toy", url, heartbeat=30)
    study.give_back(trial)
    again = SharedStudy(changed, "toy", url, heartbeat=60)
    assert [again.claim().params["seeds"] for _ in range(2)] == ["1", "2"]
    assert again.claim() is None


def test_an_option_replaces_its_axis_and_the_whole_sweep_skips_that_part(main, config, tmp_path, capsys):
    file = config()
    main([file, "--seeds", "2", "--optim=sgdm"])
    assert [(record["optim"], record["seed"]) for record in results(tmp_path)] == [("sgdm", 2)]
    main([file])
    assert len(results(tmp_path)) == 4
    assert set(runs(tmp_path, "start").values()) == {1}
    commands = [record["sweep_command"] for record in results(tmp_path)]
    whole = f"python scripts/sweep.py {file}"
    assert commands == [f"{whole} --seeds=2 --optim=sgdm", *[whole] * 3]
    search = {"learning_rate": {"low": 0.01, "high": 1.0}, "seeds": [1, 2]}
    sweep = read_sweep(config(search=search, sampler="tpe", trials=2), {"learning_rate": "0.5", "seeds": ["3", "4"]})
    assert sweep.search == {
        "learning_rate": {"0.5": {"learning_rate": "0.5"}},
        "seeds": {"3": {"seeds": "3"}, "4": {"seeds": "4"}},
    }
    assert sweep.name == "toy learning_rate=0.5 seeds=3 4"


def test_options_that_cannot_replace_an_axis_are_refused(config):
    file = config(search={"method": [{"optim": "sgd"}, {"optim": "sgdm"}], "seeds": [1, [2, 3]]})
    for given in ({"optim": "sgd"}, {"seeds": ["2", "3"]}):
        with pytest.raises(UserError, match=rf"{min(given)} is set by search.* and also by the command line"):
            read_sweep(file, given)


def test_the_recorded_command_holds_what_the_runs_need_and_no_secret(main, config, tmp_path):
    file = config(search={"seeds": [1]})
    command = f"python scripts/sweep.py {file} --seconds=0.01"
    assert read_sweep(file, {"seconds": "0.01", "hub_token": "hf_secret"}).started_with == command
    main([file, "--storage", f"sqlite:///{tmp_path}/secret.db", "--workers", "2", "--seconds", "0.01"])
    assert [record["sweep_command"] for record in results(tmp_path)] == [command]


def test_a_study_belongs_to_one_folder(main, config, tmp_path):
    storage = ["--storage", f"sqlite:///{tmp_path}/shared.db"]
    main([config(search={"seeds": [1]}), *storage])
    assert not (tmp_path / "out" / "sweep.db").exists()
    with pytest.raises(UserError, match="writes into another folder"):
        main([config(search={"seeds": [1]}), *storage, "--output_dir", str(tmp_path / "other")])


def test_a_dry_run_lists_the_commands(main, config, tmp_path, capsys):
    main([config(search={"optim": ["sgd"], "seeds": [[1, 2]]}, launch=["accelerate", "launch"]), "--dry_run", "--k=2"])
    command, total = capsys.readouterr().out.splitlines()
    assert command.startswith(f"accelerate launch {TOY} --output_dir={tmp_path}/out/trials/optim=sgd_seeds=1_2-")
    assert command.endswith(f" --journal={tmp_path}/journal --k=2 --optim=sgd --seeds 1 2")
    assert total == "1 trials."
    search = {"learning_rate": {"low": 0.01, "high": 1, "log": True}}
    main([config(search=search, sampler="tpe", trials=7), "--dry-run"])
    assert "'--learning_rate=<0.01 to 1, log>'\n7 trials." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_are_what_the_recipe_takes(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(f"recipes/grids/{name}.yaml", {"data_dir": "data", "use_cpu": "True"})
    cells, parse = sweep.cells(), load(ROOT / sweep.recipe).parse
    assert len({sweep.folder(cell) for cell in cells}) == len(cells)
    for cell in cells:
        if cell["seeds"] == "13":
            few, training, _ = parse(sweep.command(cell, "python")[2:])
            assert (few.seeds, len(training.optim), few.data_dir) == ([13], 1, "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serach": {}}, "unknown key|Unknown key 'serach'. Did you mean 'search'"),
        ({"search": None}, "has no search"),
        ({"recipe": "recipes/none.py"}, "no such recipe: recipes/none.py"),
        ({"sampler": "random"}, "Unknown sampler 'random'. Allowed: grid, tpe"),
        ({"trials": 3}, "a grid runs every combination"),
        ({"sampler": "tpe"}, "needs the number of trials"),
        ({"search": {"seeds": 13}}, r"search.seeds must be a list such as \[1, 2\]"),
        ({"search": {"seeds": [1, 1]}}, "search.seeds lists a value twice: 1, 1"),
        ({"search": {"m": [{"optim": "sgd"}, "sgdm"]}}, "search.m mixes values and mappings"),
        ({"search": {"m": [{"optim": "sgd"}], "optim": ["sgd"]}}, "optim is set by search.optim and also by search.m"),
        ({"search": {"journal": ["a"]}}, "journal is set by search.journal and also by options"),
        ({"search": {"lr": {"low": 0.1, "high": 1.0}}}, "search.lr is a range. A grid needs a list"),
        ({"search": {"lr": {"low": 0.0, "high": 1.0, "log": True}}}, "and, for log, above 0"),
        ({"search": {"lr": {"low": 1, "hihg": 2}}}, "'hihg'. Did you mean 'high'"),
        ({"options": {"output_dir": None}}, "give output_dir under options"),
        ({"launch": "acclerate launch"}, "there is no command 'acclerate'"),
    ],
)
def test_a_bad_file_says_what_is_wrong(main, config, changes, message):
    with pytest.raises(UserError, match=message):
        main([config(**changes)])


def test_the_command_shows_a_message_without_traceback(config):
    command = [sys.executable, str(SCRIPT), config(sampler="random")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("Unknown sampler 'random'. Allowed: grid, tpe.")
    assert "Traceback" not in result.stderr


def test_bad_words_say_what_is_wrong(main, config, tmp_path):
    for words, message in [
        (["--workers", "0"], "--workers must be at least 1"),
        (["stray"], "'stray' belongs to no option"),
        (["--worker", "2"], r"Unknown option --worker \(did you mean --workers\?\).*under options in .*toy.yaml"),
        (["--seeds"], r"search.seeds must be a list"),
        (["--storage", "nothing://x"], "Cannot open --storage"),
        (["--output_dir", __file__], "Cannot use .* as --output_dir"),
    ]:
        with pytest.raises(UserError, match=message):
            main([config(), *words])
    with pytest.raises(UserError, match=r"describes a sweep, not a grid. Run it with: python scripts/sweep.py"):
        read_grid(config())
