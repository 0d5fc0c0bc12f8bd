"""Studies in real storages: what is recorded, who may write, and what a kill or a full disk leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from evolkv.claims import ClaimedError
from evolkv.cli import main
from evolkv.errors import RunError, StudyError
from evolkv.evolution.lease import LEASE, Lease
from evolkv.evolution.location import locate
from evolkv.evolution.result import Evaluation
from evolkv.evolution.storage import _AppendLock, close_storage, open_storage
from evolkv.evolution.study import Study, read_studies

SETTINGS = {"model": {"fingerprint": "abc"}, "task": "niah:context=1600", "budget": 128, "sigma": 0.1 + 0.2, "seed": 0}
SETTINGS |= {"floor": 33, "ceiling": 1600}
STAGE = "budget 128"
#: Children share the modules that are loaded here; none of them computes anything.
PROCESSES = multiprocessing.get_context("fork")


def read_study(path, name=None):
    (found,) = read_studies(path, name)
    return found


def storage_url(path):
    return locate(path).url


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """An SQLite file with Optuna's tables, which take half a second to make, and no study."""
    path = tmp_path_factory.mktemp("tables") / "empty.db"
    close_storage(open_storage(locate(path), create=True))
    return path


@pytest.fixture(params=["study.db", "study.log"])
def new_path(request, tmp_path):
    """Where a study of each kind of local storage goes."""
    return tmp_path / request.param


@pytest.fixture
def path(new_path, tables):
    """The same; a database has its tables already."""
    if new_path.suffix == ".db":
        shutil.copy(tables, new_path)
    return new_path


def generation(number, candidates=5, layers=4, heads=2):
    """Candidates that depend on the number of their generation alone; no float of them is a round one."""
    rng = random.Random(number)
    return [
        Evaluation(
            [[rng.randrange(33, 1600) for _ in range(heads)] for _ in range(layers)],
            rng.random() / 3,
            rng.random() / 7,
            rng.random() * 1e-9,
            number,
            [rng.random() / 3, None, rng.random() * 1e300],
            60 * rng.random(),
        )
        for _ in range(candidates)
    ]


def generations(number):
    return [generation(i) for i in range(number)]


def record(path, upto, name="search", settings=SETTINGS, begun=None):
    """Open a study and record what it lacks of the first generations."""
    with Study.open(path, name, settings) as study:
        if begun is not None:
            begun.set()
        for number in range(len(study.generations(STAGE)), upto):
            study.record(STAGE, number, generation(number))


def hold(path, name, held):
    """Open a study and keep it."""
    with Study.open(path, name, SETTINGS):
        held.set()
        time.sleep(600)


@pytest.fixture
def start():
    """Start a function in a process of its own; it is killed at the end of the test if it still runs."""
    started = []

    def start(function, *args):
        process = PROCESSES.Process(target=function, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_recorded(path):
    with Study.open(path, "search", SETTINGS) as study:
        for number in range(3):
            study.record(STAGE, number, generation(number))
        study.record("budget 64", 0, generation(7))
        study.put("validation", [{"name": "best", "ci95": (0.1, 0.3)}])
        before = study.generations(STAGE)
    with Study.open(path, "search", SETTINGS) as study:
        # `repr` tells 0.0 from -0.0 and every float from its neighbours.
        assert repr(study.generations(STAGE)) == repr(before) == repr(generations(3))
        assert study.generations("budget 64") == [[replace(entry, generation=0) for entry in generation(7)]]
        assert study.generations("budget 32") == []
        assert study.get("validation") == [{"name": "best", "ci95": [0.1, 0.3]}]
        assert study.get("chosen", "nothing") == "nothing"
    found = read_study(path)
    assert found.name == "search"
    assert found.storage == storage_url(path)
    assert found.settings == SETTINGS
    assert found.facts == {"validation": [{"name": "best", "ci95": [0.1, 0.3]}]}
    assert repr(found.stages[STAGE]) == repr(generations(3))


@pytest.mark.parametrize("given", [str, storage_url])
def test_a_report_is_not_written_over_the_study_it_shows(path, given, capsys):
    with Study.open(path, "search", SETTINGS) as study:
        study.record(STAGE, 0, [replace(entry, scores=None) for entry in generation(0)])
    before = path.read_bytes()
    assert main(["report", given(path), "--out", str(path)]) == 2
    assert "is read by this command" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_study_continues_where_it_ended(new_path):
    record(new_path, 2)
    record(new_path, 5)
    assert read_study(new_path).stages == {STAGE: generations(5)}


def test_a_study_can_be_read_while_it_is_written(path):
    with Study.open(path, "search", SETTINGS) as study:
        assert read_study(path).stages == {}
        study.record(STAGE, 0, generation(0))
        assert read_study(path).stages == {STAGE: generations(1)}


def test_of_a_generation_recorded_twice_the_first_counts(path):
    record(path, 2)
    storage = open_storage(locate(path), create=True)
    study_id = storage.get_study_id_from_name("search")
    twin = storage.get_all_trials(study_id)[1]
    twin.user_attrs["candidates_000"][0]["fitness"] = 2.0
    storage.create_new_trial(study_id, twin)
    close_storage(storage)
    assert read_study(path).stages == {STAGE: generations(2)}
    with Study.open(path, "search", SETTINGS) as study:
        study.record(STAGE, 1, generation(9))
        assert study.generations(STAGE) == generations(2)


def test_what_follows_a_missing_generation_is_left_out(path):
    record(path, 2)
    storage = open_storage(locate(path), create=True)
    study_id = storage.get_study_id_from_name("search")
    later = storage.get_all_trials(study_id)[1]
    later.user_attrs["generation"] = 3
    storage.create_new_trial(study_id, later)
    close_storage(storage)
    assert read_study(path).stages == {STAGE: generations(2)}


def test_generations_are_recorded_in_order(path):
    with Study.open(path, "search", SETTINGS) as study, pytest.raises(ValueError, match="generation 1"):
        study.record(STAGE, 1, generation(1))


def test_parameters_are_left_out_where_writing_them_would_slow_the_search(path):
    with Study.open(path, "search", SETTINGS) as study:
        for number in range(3):
            better = [replace(entry, fitness=1.0 + number, seconds=0.0) for entry in generation(number)]
            study.record(STAGE, number, better)
    storage = open_storage(locate(path), create=False)
    trials = optuna.load_study(study_name="search", storage=storage).trials
    assert [bool(trial.params) for trial in trials] == [True, False, False]
    close_storage(storage)


def test_optuna_reads_a_study(path):
    record(path, 4)
    storage = open_storage(locate(path), create=False)
    study = optuna.load_study(study_name="search", storage=storage)
    fittest = max((max(group, key=lambda entry: entry.fitness) for group in generations(4)), key=lambda e: e.fitness)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert study.best_value == fittest.fitness
    assert study.best_trial.user_attrs["generation"] == fittest.generation
    assert study.best_params == {f"layer_{i:02d}": round(sum(row) / 2) for i, row in enumerate(fittest.budgets)}
    assert optuna.search_space.intersection_search_space(study.trials[:1])["layer_00"].high == 1600
    assert study.trials[0].duration.total_seconds() == pytest.approx(sum(e.seconds for e in generation(0)), abs=1e-3)
    close_storage(storage)


def test_a_population_of_thousands_keeps_its_order(path):
    many = generation(0, candidates=1100)
    with Study.open(path, "search", SETTINGS) as study:
        study.record(STAGE, 0, many)
    assert read_study(path).stages == {STAGE: [many]}


def test_no_attribute_outgrows_mysql(path):
    large = generation(0, candidates=25, layers=80, heads=8)
    with Study.open(path, "search", SETTINGS) as study:
        study.record(STAGE, 0, large)
    storage = open_storage(locate(path), create=False)
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("search"))
    close_storage(storage)
    parts = [json.dumps(value) for key, value in trial.user_attrs.items() if key.startswith("candidates_")]
    assert len(parts) > 1
    assert max(map(len, parts)) < 2**16
    assert read_study(path).stages == {STAGE: [large]}


def test_nothing_is_printed(path, capfd):
    record(path, 2)
    read_study(path)
    assert capfd.readouterr() == ("", "")


def test_the_package_does_without_optuna_until_a_study_is_used():
    code = "import sys, evolkv; sys.exit('optuna' in sys.modules or 'sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- settings -------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_and_every_difference_is_named(path):
    record(path, 1)
    other = {**SETTINGS, "model": {"fingerprint": "xyz", "layers": 4}, "budget": 64}
    del other["seed"]
    with pytest.raises(StudyError) as error:
        Study.open(path, "search", other)
    message = str(error.value)
    assert "\n" not in message
    assert 'model.fingerprint: the study has "abc", now "xyz"' in message
    assert "model.layers: the study has nothing, now 4" in message
    assert "budget: the study has 128, now 64" in message
    assert "seed: the study has 0, now nothing" in message
    assert "sigma" not in message
    assert "--study" in message
    assert read_study(path).settings == SETTINGS


def test_studies_with_other_names_are_free_to_differ(path):
    record(path, 1)
    record(path, 2, name="other", settings={"budget": 64})
    assert read_study(path, "search").stages == {STAGE: generations(1)}
    assert read_study(path, "other").stages == {STAGE: generations(2)}
    with pytest.raises(StudyError, match="holds 2 studies; give the name of one: other, search"):
        read_study(path)


def test_studies_of_one_search_under_several_selectors_are_read_together(path):
    for name in ("search/snapkv", "search/keydiff"):
        record(path, 1, name=name)
    both = ["search/snapkv", "search/keydiff"]
    assert [found.name for found in read_studies(path)] == both
    assert [found.name for found in read_studies(path, "search")] == both
    assert [found.name for found in read_studies(path, "search/snapkv")] == both[:1]
    record(path, 1, name="other")
    assert [found.name for found in read_studies(path, "search")] == both
    with pytest.raises(StudyError, match="holds 3 studies"):
        read_studies(path)
    with pytest.raises(StudyError, match="holds 3 studies"):
        read_study(path)


def test_studies_whose_names_have_a_slash_are_not_of_one_search(path):
    for name in ("team/needles", "team/code"):
        record(path, 1, name=name)
    with pytest.raises(StudyError, match="holds 2 studies; give the name of one: team/code, team/needles"):
        read_studies(path)
    with pytest.raises(StudyError, match="unknown study 'team'"):
        read_studies(path, "team")
    record(path, 1, name="team/needles/snapkv:window=8")
    assert [found.name for found in read_studies(path, "team/needles")] == ["team/needles"]


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 513])
def test_names_that_cannot_be_are_refused(tmp_path, name):
    with pytest.raises(StudyError, match="printable"):
        Study.open(tmp_path / "study.db", name, SETTINGS)
    assert not list(tmp_path.iterdir())


# --- one writer at a time -------------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_has_the_study(path, start):
    held = PROCESSES.Event()
    holder = start(hold, path, "search", held)
    assert held.wait(30)
    with pytest.raises(StudyError, match=rf"in use by process {holder.pid} on {platform.node()} since 20"):
        Study.open(path, "search", SETTINGS)
    record(path, 1, name="other")
    holder.kill()
    holder.join()
    record(path, 1)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


def test_a_study_is_held_within_one_process_too(path):
    with Study.open(path, "search", SETTINGS), pytest.raises(StudyError, match=f"process {os.getpid()} "):
        Study.open(path, "search", SETTINGS)


def test_a_refused_study_is_let_go(path):
    record(path, 1)
    with pytest.raises(StudyError, match="other settings"):
        Study.open(path, "search", {})
    record(path, 2)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_study_without_a_generation_takes_other_settings(new_path):
    with Study.open(new_path, "search", {"budget": 1}) as study:
        assert not study.begun
    record(new_path, 1)
    assert read_study(new_path).settings == SETTINGS
    with pytest.raises(StudyError, match="other settings"):
        Study.open(new_path, "search", {"budget": 1})


def test_studies_begun_at_once_in_one_new_file_all_begin(new_path, start):
    together = [start(record, new_path, 3, f"study {i}") for i in range(3)]
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0, 0, 0]
    assert all(read_study(new_path, f"study {i}").stages == {STAGE: generations(3)} for i in range(3))


@pytest.fixture
def shared(tmp_path, tables):
    """A database and a study in it, as on a server: (storage, study id, location)."""
    path = tmp_path / "study.db"
    shutil.copy(tables, path)
    record(path, 1)
    storage = open_storage(locate(path), create=True)
    yield storage, storage.get_study_id_from_name("search"), locate(path)
    close_storage(storage)


def take(location, study_id, held):
    Lease(open_storage(location, create=True), study_id, settle=0)
    held.set()
    time.sleep(600)


def test_a_lease_is_refused_while_another_process_holds_it_and_free_once_that_is_killed(shared, start):
    storage, study_id, location = shared
    held = PROCESSES.Event()
    holder = start(take, location, study_id, held)
    assert held.wait(30)
    with pytest.raises(ClaimedError, match=f"process {holder.pid} "):
        Lease(*shared[:2], settle=0)
    holder.kill()
    holder.join()
    Lease(*shared[:2], settle=0).release()
    assert storage.get_study_user_attrs(study_id)[LEASE] is None


def test_a_lease_of_another_machine_lasts_until_it_is_no_longer_renewed(shared):
    storage, study_id, *_ = shared
    theirs = {"id": "0", "host": "elsewhere", "pid": 1, "since": "today", "started": 0.0}
    storage.set_study_user_attr(study_id, LEASE, {**theirs, "seen": time.time() - 50})
    with pytest.raises(ClaimedError, match="process 1 on elsewhere since today"):
        Lease(*shared[:2], settle=0)
    storage.set_study_user_attr(study_id, LEASE, {**theirs, "seen": time.time() - 70})
    Lease(*shared[:2], settle=0).release()


def test_a_lease_is_renewed(shared):
    storage, study_id, *_ = shared
    seen = lambda: storage.get_study_user_attrs(study_id)[LEASE]["seen"]  # noqa: E731
    lease = Lease(*shared[:2], seconds=0.4, settle=0)
    taken, patience = seen(), time.monotonic() + 60
    # A renewal comes each quarter of the time: after more than all of it the lease is there by its renewals alone.
    while seen() < taken + 0.4:
        assert time.monotonic() < patience
        time.sleep(0.01)
    with pytest.raises(ClaimedError):
        Lease(*shared[:2], settle=0)
    lease.check()
    lease.release()


def test_who_lost_its_lease_is_told(shared, monkeypatch):
    storage, study_id, *_ = shared
    lease = Lease(*shared[:2], settle=0)
    theirs = {"id": "0", "host": "elsewhere", "pid": 1, "since": "today", "started": 0.0, "seen": time.time() + 60}
    storage.set_study_user_attr(study_id, LEASE, theirs)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 40)
    with pytest.raises(ClaimedError, match="process 1 on elsewhere"):
        lease.check()
    lease.release()
    assert storage.get_study_user_attrs(study_id)[LEASE] == theirs


# --- what a kill leaves behind --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_killed_at_any_moment_goes_on_with_what_it_had(path, start):
    rng = random.Random(path.suffix)
    known = 0
    for _ in range(6):
        begun = PROCESSES.Event()
        recorder = start(record, path, 10_000, "search", SETTINGS, begun)
        assert begun.wait(30)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(recorder.pid, signal.SIGKILL)
        recorder.join()
        found = read_study(path).stages.get(STAGE, [])
        assert len(found) >= known
        assert found == generations(len(found))
        known = len(found)
    record(path, known + 2)
    assert repr(read_study(path).stages) == repr({STAGE: generations(known + 2)})
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


def test_what_a_kill_leaves_of_a_journals_lock_is_removed(tmp_path):
    path = tmp_path / "study.log"
    record(path, 1)
    for name in ("study.log.lock", "study.log.lock0a-1b.rename"):
        (tmp_path / name).symlink_to(os.path.join(tmp_path, ".", ".", "study.log"))
    (tmp_path / "study.log.lock-of-others.rename").symlink_to("elsewhere")
    record(path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["study.log", "study.log.lock-of-others.rename"]


@pytest.mark.slow
def test_a_study_killed_while_it_begins_can_begin_again(new_path, start):
    for delay in range(4):
        folder = new_path.parent / str(delay)
        opening = start(record, folder / new_path.name, 1)
        time.sleep(0.06 * delay)
        opening.kill()
        opening.join()
        record(folder / new_path.name, 2)
        assert read_study(folder / new_path.name).stages == {STAGE: generations(2)}
        assert [file.name for file in folder.iterdir()] == [new_path.name]


def test_a_study_killed_before_it_had_settings_is_new(path):
    storage = open_storage(locate(path), create=True)
    storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "search")
    close_storage(storage)
    record(path, 2)
    assert read_study(path).stages == {STAGE: generations(2)}


@pytest.mark.parametrize(
    "torn", [b"{", b'{"op_code":4,"worker_id":"0', b'{"op_code":2,"user_attr":{"a":"' + b"x" * 9000]
)
def test_an_unfinished_line_does_not_spoil_a_journal(tmp_path, torn):
    path = tmp_path / "study.log"
    record(path, 2)
    with path.open("ab") as file:
        file.write(torn)
    assert read_study(path).stages == {STAGE: generations(2)}
    record(path, 4)
    assert read_study(path).stages == {STAGE: generations(4)}
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("size", [1, 11, 40])
def test_a_journal_with_nothing_but_an_unfinished_line_is_new(tmp_path, size):
    path = tmp_path / "study.log"
    record(tmp_path / "whole.log", 1)
    path.write_bytes((tmp_path / "whole.log").read_bytes()[:size])
    record(path, 2)
    assert read_study(path).stages == {STAGE: generations(2)}


def append_forever(path):
    _AppendLock(str(path)).acquire()
    time.sleep(600)


def test_a_process_killed_while_it_appends_holds_nobody_up(tmp_path, start):
    path = tmp_path / "study.log"
    record(path, 1)
    appending = start(append_forever, path)
    link = path.with_name("study.log.lock")
    while not link.is_symlink():
        time.sleep(0.01)
    appending.kill()
    appending.join()
    assert link.is_symlink()
    _AppendLock(str(path)).acquire()
    link.unlink()
    record(path, 2)
    assert read_study(path).stages == {STAGE: generations(2)}


def test_a_journal_is_shared_with_other_programs(tmp_path):
    path = tmp_path / "study.log"
    record(path, 1)
    theirs = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="theirs")
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    record(path, 3)
    assert len(optuna.load_study(storage=theirs._storage, study_name="theirs").trials) == 2
    assert read_study(path).stages == {STAGE: generations(3)}


# --- where nothing can be written -----------------------------------------------------------------------------------


def fill(path, outcome):
    """Record generations until no file may grow any further."""
    limit = path.stat().st_size + 40_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # Optuna tries five times, with random pauses of up to two seconds; these are short ones.
    random.seed(8038)
    with Study.open(path, "search", SETTINGS) as study:
        number = 1
        try:
            while True:
                study.record(STAGE, number, generation(number))
                number += 1
        except RunError as error:
            outcome.send((number, str(error), study.generations(STAGE) == generations(number)))


def test_a_full_disk_is_reported_and_costs_nothing_that_was_recorded(path, start):
    record(path, 1)
    outcome, inside = PROCESSES.Pipe()
    start(fill, path, inside).join()
    number, message, remembered = outcome.recv()
    assert number > 1
    assert remembered
    assert "\n" not in message
    assert str(path) in message
    assert "make room" in message
    assert read_study(path).stages == {STAGE: generations(number)}
    record(path, number + 2)
    assert read_study(path).stages == {STAGE: generations(number + 2)}


@pytest.mark.parametrize("name", ["study.db", "study.log"])
def test_a_folder_that_cannot_be_written_to_is_reported(name):
    with pytest.raises(RunError, match=rf"^/proc/evolkv/{name} cannot be written to: [^\n]+$"):
        Study.open(f"/proc/evolkv/{name}", "search", SETTINGS)


def test_a_database_that_another_program_holds_is_reported(tmp_path, tables, monkeypatch):
    path = tmp_path / "study.db"
    shutil.copy(tables, path)
    record(path, 1)
    monkeypatch.setattr("evolkv.evolution.storage.SQLITE_PATIENCE", 0.01)
    with Study.open(path, "search", SETTINGS) as study:
        other = sqlite3.connect(path)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RunError, match="held by another program"):
            study.put("key", 1)
        other.close()
        study.put("key", 2)
    assert read_study(path).facts == {"key": 2}


# --- what is not a study --------------------------------------------------------------------------------------------


def write(path, content):
    path.write_bytes(content)
    return path


def foreign_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    return path


def foreign_study(path):
    optuna.create_study(storage=RDBStorage(f"sqlite:///{path}"), study_name="search").add_trial(
        optuna.create_trial(value=1.0)
    )
    return path


def with_header(path, header):
    path = path.with_suffix(".log")
    storage = open_storage(locate(path), create=True)
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "search")
    storage.set_study_user_attr(study_id, "evolkv", header)
    close_storage(storage)
    return path


NOT_STUDIES = {
    "a folder": (lambda path: path.mkdir() or path, "not a regular file"),
    "a text": (lambda path: write(path, b"# Notes\nNothing here\n"), "neither an SQLite file nor an Optuna journal"),
    "a log": (lambda path: write(path.with_suffix(".log"), b"starting\ndone"), "is not an Optuna journal"),
    "other tables": (foreign_database, "database of another program"),
    "a study of others": (foreign_study, "EvolKV"),
    "a newer one": (lambda path: with_header(path, {"format": "evolkv.study/2"}), "update EvolKV"),
    "no header": (lambda path: with_header(path, [1]), "damaged"),
    "no settings": (lambda path: with_header(path, {"format": "evolkv.study/1"}), "damaged"),
    "cut short": (lambda path: write(path, b"SQLite format 3\0" + b"\1" * 5000), "damaged"),
    "lines of others": (lambda path: write(path, b'{"op_code":77}\n{"op_code":78}\n'), "damaged or not"),
}


@pytest.mark.parametrize("what", NOT_STUDIES)
@pytest.mark.parametrize("use", [read_study, lambda path: Study.open(path, "search", SETTINGS)], ids=["read", "open"])
def test_what_is_not_a_study_is_refused_and_left_alone(tmp_path, what, use):
    make, message = NOT_STUDIES[what]
    path = make(tmp_path / "file.db")
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StudyError, match=message) as error:
        use(path)
    assert "\n" not in str(error.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert list(tmp_path.iterdir()) == [path]


def test_reading_makes_no_file(tmp_path):
    for name in ("study.db", "study.log"):
        with pytest.raises(StudyError, match="there is no file"):
            read_study(tmp_path / name)
        write(tmp_path / name, b"")
        with pytest.raises(StudyError, match="is empty"):
            read_study(tmp_path / name)
        assert (tmp_path / name).stat().st_size == 0


def test_a_name_that_is_not_there_gets_the_nearest(path):
    record(path, 1)
    with pytest.raises(StudyError, match=r"unknown study 'serach'\. Did you mean 'search'"):
        read_study(path, "serach")


@pytest.mark.parametrize(
    ("key", "value"),
    [("budgets", [[1.5]]), ("fitness", "high"), ("scores", {"a": 1}), ("seconds", None)],
)
def test_a_candidate_that_was_tampered_with_is_named(tmp_path, key, value):
    path = tmp_path / "study.log"
    record(path, 2)
    storage = open_storage(locate(path), create=True)
    study_id = storage.get_study_id_from_name("search")
    trial = storage.get_all_trials(study_id)[1]
    trial.user_attrs["candidates_000"][3][key] = value
    trial.user_attrs["generation"] = 2
    storage.create_new_trial(study_id, trial)
    close_storage(storage)
    with pytest.raises(StudyError, match=rf"damaged: trial 2, candidates\[3\]\.{key}"):
        read_study(path)


# --- storages by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space?and%20{more}#.dß", "50%?.journal"])
def test_a_path_and_its_url_are_one_storage(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    record(name, 1)
    record(storage_url(name), 2)
    record(storage_url(tmp_path / name), 3)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert read_study(tmp_path / name).stages == {STAGE: generations(3)}


def test_a_url_is_taken_as_it_is():
    for url in ("sqlite:///study.db", "journal:////tmp/study", "postgresql+psycopg://me:secret@host/db"):
        assert storage_url(url) == url
    assert storage_url("runs/study.db") == "sqlite:///runs/study.db"
    assert storage_url("/runs/study.journal") == "journal:////runs/study.journal"


def test_a_journal_is_known_by_its_content(tmp_path):
    record(tmp_path / "study.log", 1)
    moved = (tmp_path / "study.log").rename(tmp_path / "study.db")
    assert read_study(moved).stages == {STAGE: generations(1)}


def test_missing_folders_are_made(tmp_path):
    record(tmp_path / "runs" / "today" / "study.log", 1)
    assert read_study(tmp_path / "runs" / "today" / "study.log").stages == {STAGE: generations(1)}


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("", "empty"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("journal://study.log", "journal:///study.log"),
        ("redis://localhost", "unknown kind of storage 'redis'"),
        ("a:b://c", "not a URL"),
        ("mysql://me:secret@localhost/db", "needs the Python package 'MySQLdb'"),
        ("postgresql+nothing://me:secret@localhost/db", "no such database or driver"),
    ],
)
def test_storages_that_cannot_be_used_are_refused(storage, message):
    for use in (read_study, lambda url: Study.open(url, "search", SETTINGS)):
        with pytest.raises(StudyError, match=message) as error:
            use(storage)
        assert "secret" not in str(error.value)
        assert "\n" not in str(error.value)
