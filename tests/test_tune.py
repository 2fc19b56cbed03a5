"""Searches on Ray: the winner stays the winner whatever dies; what is stopped, marked and taken over."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, job, result, rows, start_job

from job.cluster.schedulers import StopOnRequest, TrialCallback, build_scheduler
from job.cluster.trainable import TrialTrainable
from job.config.config_file import load_config
from job.config.search_space import SearchConfig, SearchSpace
from job.config.toml import config_from_toml
from job.run.lease import acquire_lease, raise_if_held
from job.storage import Folder
from job.training.checkpoint import copy_checkpoint, find_latest_valid, read_checkpoint_file
from job.tuning import trials

pytestmark = pytest.mark.cluster

LONGEST = 240.0  # seconds that anything may take on a busy machine


def small(prose, storage, name, space, *more):
    """The words of a search over runs of a second or two."""
    config = storage / f"{name}.toml"
    storage.mkdir(exist_ok=True)
    config.write_text(f"[search.space]\n{space}\n")
    return [
        "tune", config, "--corpus.source", prose, "--run.storage", storage, "--run.name", name, "--scale.workers", 0,
        "--generate.prefix", "the", "--model.hidden_size", 16, "--corpus.validation_fraction", 0.1,
        "--train.precision", "fp32", "--train.epochs", 3, *more,
    ]  # fmt: skip


RATES = '"optimizer.learning_rate" = { loguniform = [0.01, 2] }'


def outcome(folder):
    """Each trial's weights where it is finished, and the winner's configuration."""
    found = {
        path.parent.name: json.loads(path.read_text())["weights_sha256"] for path in folder.glob("trials/*/result.json")
    }
    best = config_from_toml((folder / "best.toml").read_text(), "best")
    return found, best.optimizer


def marks(folder):
    return json.loads((folder / "trials.json").read_text())


def wait_for(condition, process=None):
    until = time.monotonic() + LONGEST
    while not (found := condition()):
        assert time.monotonic() < until
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    return found


def trials_with_a_checkpoint(folder):
    return {path.parents[2].name for path in folder.glob("trials/*/checkpoints/*/manifest.json")}


def steps_of(run):
    """The last step that a run has in its checkpoints."""
    return max((int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/*/manifest.json")), default=0)


def driver_of(run):
    """The process that drives a run, by the run's own word."""
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads((run / "owner.json").read_text())["pid"])
    return None


@pytest.fixture(scope="module")
def calm(prose, cluster, tmp_path_factory):
    """A search that nothing disturbed, and the words of one that is to equal it."""
    storage = tmp_path_factory.mktemp("calm")

    def words(storage, name, *more):
        return small(prose, storage, name, RATES, "--search.trials", 3, "--train.epochs", 20, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster)
        ended = job(*words(storage, "calm"))
    assert ended.status == 0, ended.err
    assert "best is trial" in ended.out
    return storage / "calm", words


def test_a_search_leaves_all_that_one_looks_at(calm, on_cluster):
    folder, words = calm
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["trial"] for row in table] == [0, 1, 2]
    best = min(table, key=lambda row: row["validation_perplexity"])
    assert best["best"]
    number = f"{best['trial']:05d}"
    assert outcome(folder)[1].learning_rate == best["optimizer.learning_rate"]
    assert best["validation_perplexity"] == result(folder / "trials" / number)["best_validation_perplexity"]
    assert (folder / "sample.txt").read_text().startswith("the")
    for picture in ("curves.png", "space.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    board = (folder / "tensorboard" / number / "events.out.tfevents.search").read_bytes()
    assert b"_hparams_/session_start_info" in board
    assert b"optimizer.learning_rate" in board
    assert not (folder / "ray").exists()
    again = job(*words(folder.parent, "calm"))
    assert "is finished" in again.out
    (folder / "best.toml").unlink()  # as when the driver is killed before all is written
    again = job(*words(folder.parent, "calm"))
    assert (again.status, again.err) == (0, "")
    assert "is finished" not in again.out
    # The winner's file is a configuration that train takes, and the run is the trial's.
    ended = job("train", folder / "best.toml", "--run.name", "again")
    assert ended.status == 0, ended.err
    assert result(folder.parent / "again")["weights_sha256"] == outcome(folder)[0][number]


def test_more_trials_are_added_to_those_there_are(calm, tmp_path, on_cluster):
    folder, words = calm
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    ended = job(*words(folder.parent, "calm", "--search.trials", 4))
    assert ended.status == 0, ended.err
    assert "1 of 4 trials" in ended.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(outcome(folder)[0]) == 4


def test_a_killed_trial_does_not_change_the_winner(calm, tmp_path, cluster):
    folder, words = calm
    words = words(tmp_path, "struck")
    place = tmp_path / "struck"
    process = start_job(*words, env={"RAY_ADDRESS": cluster})
    wait_for(lambda: "00001" in trials_with_a_checkpoint(place) and driver_of(place / "trials/00001"), process)
    os.kill(driver_of(place / "trials/00001"), signal.SIGKILL)
    out, err = process.communicate(timeout=LONGEST)
    assert (process.returncode, err) == (0, ""), out
    weights, _ = outcome(folder)
    struck, winner = outcome(place)
    assert struck == {name: weights[name] for name in struck}
    assert len(struck) == 3
    assert winner.learning_rate in [mark["point"]["optimizer.learning_rate"] for mark in marks(place).values()]
    assert sum(result(place / "trials" / name)["restarts"] for name in struck) > 0


def test_ctrl_c_saves_the_trials_and_the_same_command_goes_on(calm, tmp_path, cluster, on_cluster):
    words = calm[1](tmp_path, "stopped", "--train.epochs", 3000, "--search.trials", 2)
    place = tmp_path / "stopped"
    process = start_job(*words, env={"RAY_ADDRESS": cluster})
    wait_for(lambda: len(trials_with_a_checkpoint(place)) == 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONGEST)
    assert (process.returncode, err) == (130, "")
    assert "the same command goes on" in out
    assert not list(place.glob("trials/*/owner.json"))
    last = steps_of(place / "trials" / "00001")
    again = start_job(*words, env={"RAY_ADDRESS": cluster})
    wait_for(lambda: steps_of(place / "trials" / "00001") > last, again)
    again.send_signal(signal.SIGTERM)  # as ray job stop sends it
    out, err = again.communicate(timeout=LONGEST)
    assert (again.returncode, err) == (143, ""), out
    over = job(*words, "--search.minutes", 0.001)
    assert over.status == 0, over.err
    assert "time is up with 2 trials left" in over.out
    assert (place / "best.toml").exists()


def test_asha_stops_the_hopeless_and_keeps_their_checkpoints(prose, tmp_path, on_cluster):
    space = '"optimizer.learning_rate" = { grid = [1.0, 0.5, 0.001, 0.002, 0.003, 0.004] }'
    words = small(prose, tmp_path, "asha", space, "--search.scheduler", "asha", "--search.concurrent", 2)
    words += ["--train.epochs", 9]
    ended = job(*words)
    assert ended.status == 0, ended.err
    found = {name: mark["state"] for name, mark in marks(tmp_path / "asha").items()}
    assert list(found.values()).count("stopped") >= 3
    assert "finished" in found.values()
    assert outcome(tmp_path / "asha")[1].learning_rate == 1.0
    for name, state in found.items():
        sound, problems = find_latest_valid(Folder(str(tmp_path / "asha" / "trials" / name / "checkpoints")))
        assert sound
        assert problems == ()
        assert (state == "finished") == (tmp_path / "asha" / "trials" / name / "result.json").exists()
    again = job(*words)
    assert "is finished" in again.out


def test_a_trial_that_diverges_is_marked_and_the_others_go_on(prose, tmp_path, on_cluster, monkeypatch):
    monkeypatch.setattr("job.cluster.tune.MAX_TRIAL_FAILURES", 1)
    space = '"model.cell" = { grid = ["test_cells:Bomb", "rnn", "test_cells:Dies"] }'
    ended = job(*small(prose, tmp_path, "marked", space, "--search.concurrent", 2))
    assert ended.status == 0, ended.err
    found = marks(tmp_path / "marked")
    assert [mark["state"] for mark in found.values()] == ["diverged", "finished", "failed"]
    assert "the loss is nan at step 8" in found["00000"]["why"]
    assert "trial 0 diverged" in ended.out
    assert "time is up" not in ended.out
    table = pq.read_table(tmp_path / "marked" / "trials.parquet").to_pylist()
    assert [row["state"] for row in table] == ["diverged", "finished", "failed"]
    assert "best is trial 1" in ended.out


def test_an_exploited_trial_goes_on_with_the_winners_weights_and_state(prose, tmp_path, on_cluster, monkeypatch):
    """Bit for bit: where exploring changes nothing, the loser's way is the winner's from there on."""
    monkeypatch.setattr(SearchSpace, "perturb", lambda self, point, rng: point)
    space = '"optimizer.learning_rate" = { grid = [1.0, 0.001] }'
    words = small(prose, tmp_path, "pbt", space, "--search.scheduler", "pbt", "--train.epochs", 5)
    words += ["--model.cell", "lstm", "--optimizer.name", "adamw", "--model.dropout", 0.2, "--train.log_every", 1]
    ended = job(*words)
    assert ended.status == 0, ended.err
    winner, loser = (tmp_path / "pbt" / "trials" / name for name in ("00000", "00001"))
    assert marks(tmp_path / "pbt")["00001"]["point"] == {"optimizer.learning_rate": 1.0}
    ours, theirs = ({row["step"]: row["nats"] for row in rows(run, "train")} for run in (loser, winner))
    own = [step for step in ours if ours[step] != theirs[step]]  # those before the exploit
    assert own
    assert min(own) == 2  # both have the same first weights
    after = [step for step in ours if step > max(own)]
    assert len(after) > 25
    assert max(after) == max(theirs)
    assert result(loser)["weights_sha256"] == result(winner)["weights_sha256"]


class Member:
    """As much of Ray Tune's trial as a scheduler looks at."""

    def __init__(self, number):
        self.number, self.status, self.config, self.checkpoint, self.experiment_tag = number, "PENDING", {}, None, ""
        self.run_metadata = SimpleNamespace(
            checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=5))
        )
        self.temporary_state = SimpleNamespace(saving_to=None)

    def __str__(self):
        return trials.trial_name(self.number)

    def is_finished(self):
        return self.status == "TERMINATED"


def test_a_population_goes_on_without_the_one_it_waited_for(tmp_path):
    """It ended without a report; and while all wait for each other, a stop has nobody to wait for."""

    space = {"optimizer.learning_rate": {"grid": [1.0, 0.1, 0.01]}}
    known = trials.Trials(Folder(str(tmp_path)), load_config(None, {}), SearchConfig(scheduler="pbt", space=space))
    ear = TrialCallback(known)
    stop = StopOnRequest(ear)
    scheduler = build_scheduler(known, stop)
    members = [Member(number) for number in range(3)]
    controller = SimpleNamespace(search_alg=None, get_trials=lambda: members)
    controller.get_live_trials = lambda: {member for member in members if not member.is_finished()}
    for member in members:
        scheduler.on_trial_add(controller, member)
        member.config = {"trial": {"number": member.number, "point": known.found[member.number].point}}
        ear.on_trial_start(0, members, member)
        member.status = "RUNNING"
    for member in members[:2]:
        assert scheduler.on_trial_result(controller, member, {"epoch": 6, "score": 7.0 - member.number}) == "PAUSE"
        member.status = "PAUSED"
    assert scheduler.choose_trial_to_run(controller) is None
    stop.wanted = True
    assert not stop.stop_all()
    members[2].status = "TERMINATED"  # diverged
    assert scheduler.choose_trial_to_run(controller) is None
    assert stop.stop_all()
    stop.wanted = False
    assert scheduler.choose_trial_to_run(controller) in members[:2]


def test_a_checkpoint_is_taken_over_when_the_last_actor_has_written_its_own(tmp_path, monkeypatch):
    """What an old actor still commits would else be taken for the later one."""

    actor = TrialTrainable.__new__(TrialTrainable)
    actor.told_to_stop = False
    folder, order = Folder(str(tmp_path)), []
    monkeypatch.setattr(TrialTrainable, "place", folder)
    monkeypatch.setattr(TrialTrainable, "options", None)
    monkeypatch.setattr("job.cluster.trainable.import_checkpoint", lambda *_: order.append("taken"))
    old = acquire_lease(folder)
    timer = threading.Timer(1.0, lambda: (order.append("written"), old.release()))
    timer.start()
    actor.load_checkpoint(str(tmp_path))
    timer.join()
    assert order == ["written", "taken"]
    raise_if_held(folder)


def test_before_it_explores_it_holds_the_winners_checkpoint(prose, tmp_path):
    """Weights, optimizer, every lane's state and the place in the text; then it goes on with its own rate."""
    flags = ["--corpus.source", prose, "--run.storage", tmp_path, "--scale.workers", 0, "--generate.prefix", "the"]
    flags += ["--model.hidden_size", 16, "--optimizer.name", "adamw", "--train.log_every", 1, "--train.epochs", 3]
    for name, rate in (("winner", 0.01), ("loser", 0.02)):
        more = ["--run.name", name, "--optimizer.learning_rate", rate, "--train.max_steps", 30]
        assert job("train", *flags, *more).status == 0
    winner, _ = find_latest_valid(Folder(str(tmp_path / "winner" / "checkpoints")))
    sound = winner.checkpoint
    copy_checkpoint(sound, Folder(str(tmp_path / "between")))
    (tmp_path / "loser" / "result.json").unlink()
    options = config_from_toml((tmp_path / "loser" / "config.toml").read_text(), "loser")
    explored = trials.with_params(options, {"optimizer.learning_rate": 0.005})
    trials.import_checkpoint(Folder(str(tmp_path / "between")), Folder(str(tmp_path / "loser")), explored)
    loser, _ = find_latest_valid(Folder(str(tmp_path / "loser" / "checkpoints")))
    taken = loser.checkpoint
    assert taken.name == sound.name
    assert {file: read_checkpoint_file(taken, file) for file in taken.files} == {
        file: read_checkpoint_file(sound, file) for file in sound.files
    }
    ended = job("train", *flags, "--run.name", "loser", "--optimizer.learning_rate", 0.005)
    assert f"goes on from step {sound.step}" in ended.out
    assert job("train", *flags, "--run.name", "winner", "--optimizer.learning_rate", 0.01).status == 0
    ours, theirs = ({row["step"]: row for row in rows(tmp_path / name, "train")} for name in ("loser", "winner"))
    assert ours[31]["nats"] == theirs[31]["nats"]  # the loss before the first update of its own
    assert ours[31]["learning_rate"] == 0.005
    assert ours[32]["nats"] != theirs[32]["nats"]


def test_a_trial_that_can_never_be_placed_is_told(prose, tmp_path, on_cluster):
    ended = job(*small(prose, tmp_path, "big", RATES, "--scale.workers", 20))
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert "can never place more than 8 workers of 1 CPU each" in ended.err
    assert not (tmp_path / "big").exists()


def test_a_driver_that_lives_keeps_its_search(calm, prose, tmp_path, on_cluster):

    mine = acquire_lease(Folder(str(tmp_path / "kept")))
    ended = job(*small(prose, tmp_path, "kept", RATES))
    mine.release()
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "this run is alive" in ended.err


@pytest.fixture
def three_nodes():
    """A cluster of a head that only drives and three nodes of one processor."""
    from ray.cluster_utils import Cluster

    noticed = {f"health_check_{name}_ms": 1000 for name in ("initial_delay", "period", "timeout")}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed}
    it = Cluster(initialize_head=True, head_node_args=head)
    nodes = [it.add_node(num_cpus=1) for _ in range(3)]
    yield it, nodes
    it.shutdown()


def workers_on(nodes):
    """The processes that train on some nodes, which their raylets have started."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and (path / "cmdline").read_text().startswith("ray::RayTrainWorker"):
                found.append(int(path.name))
    return found


@pytest.mark.slow
def test_two_workers_a_trial_on_three_nodes_whatever_dies(prose, tmp_path, three_nodes, monkeypatch):
    """A worker, a node and the driver are killed; the trials are those of a calm search without workers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    it, nodes = three_nodes
    space = '"optimizer.learning_rate" = { grid = [0.1, 1.0] }'
    more = ["--train.reproducible", "true", "--train.epochs", 40, "--train.checkpoint_every", 10]
    calm = job(*small(prose, tmp_path, "calm", space, *more, "--train.log_every", 0))
    assert calm.status == 0, calm.err
    words = small(prose, tmp_path, "struck", space, *more, "--scale.workers", 2)
    place = tmp_path / "struck"
    process = start_job(*words, env={"RAY_ADDRESS": it.address})
    wait_for(lambda: "00000" in trials_with_a_checkpoint(place), process)
    os.kill(wait_for(lambda: workers_on(nodes), process)[0], signal.SIGKILL)
    wait_for(lambda: "00001" in trials_with_a_checkpoint(place), process)
    busy = wait_for(lambda: [node for node in nodes if workers_on([node])], process)
    it.remove_node(busy[0], allow_graceful=False)
    nodes.remove(busy[0])
    last = steps_of(place / "trials" / "00001")
    wait_for(lambda: steps_of(place / "trials" / "00001") > last, process)
    process.kill()
    process.wait()
    again = start_job(*words, env={"RAY_ADDRESS": it.address})
    out, err = again.communicate(timeout=LONGEST)
    assert (again.returncode, err) == (0, ""), out
    assert outcome(place) == outcome(tmp_path / "calm")
    assert len(outcome(place)[0]) == 2
