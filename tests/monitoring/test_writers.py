"""Other writers get the numbers of metrics.jsonl, and never stop a run."""

import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from sd3_jax.errors import UserError
from sd3_jax.monitoring import metrics, writers

CONFIG = {"optim": {"lr": 1e-3}}
ROWS = [
    (1, "train", {"loss": 1.5, "lr": 1e-3, "note": "text"}),
    (2, "val", {"loss": float("inf"), "loss_t0.5": 2.0}),
]


class Service(ModuleType):
    """Both clients' functions, in the names of neither's package."""

    def __init__(self):
        super().__init__("service")
        self.lines, self.opened, self.closed, self.fails = [], [], 0, lambda: None

    def init(self, **options):
        self.opened.append(options["id"])
        log = lambda values: self._log(values.pop("step"), values)
        run = dict(id="run-1", log=log, define_metric=lambda *a, **k: None)
        return SimpleNamespace(**run, finish=self.end_run)

    def start_run(self, run_id=None, run_name=None):
        self.opened.append(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

    def log_dict(self, values, name):
        assert (values, name) == (CONFIG, "config.json")

    def log_metrics(self, values, step):
        self._log(step, values)

    def end_run(self):
        self.closed += 1

    def _log(self, step, values):
        self.fails()
        self.lines.append((step, values))


@pytest.fixture
def service():
    return Service()


@pytest.fixture(params=writers.WRITERS)
def name(request, service, monkeypatch):
    monkeypatch.setitem(sys.modules, request.param, service)
    return request.param


def run(workdir, name, rows=ROWS, process_index=0):
    opened = writers.open_all([name], workdir, CONFIG)
    about = dict(total_steps=2, process_index=process_index, writers=opened)
    with metrics.Metrics(workdir, **about) as log:
        for row in rows:
            log.write(*row)
    return opened[0]


def test_a_writer_gets_the_numbers_of_the_file(name, service, tmp_path):
    run(tmp_path, name)
    wanted = []
    for row in metrics.read(tmp_path):
        numbers = {k: x for k, x in row.items() if isinstance(x, float) and k != "time"}
        named = {f"{row['kind']}/{k}": x for k, x in numbers.items()}
        wanted.append((row["step"], named))
    assert service.lines == wanted and len(wanted) == 2 and service.closed == 1


def test_a_run_that_goes_on_is_the_same_run_there(name, service, tmp_path):
    run(tmp_path, name)
    run(tmp_path, name)
    assert service.opened == [None, "run-1"]
    assert json.loads((tmp_path / writers.IDS).read_text()) == {name: "run-1"}


def test_only_the_first_process_writes(name, service, tmp_path):
    run(tmp_path, name, process_index=1)
    assert not service.lines and not service.opened


@pytest.mark.parametrize("error", [OSError("no\nroute"), ValueError("x"), KeyError(1)])
def test_a_writer_that_fails_is_told_of_once_and_counted(
    name, service, tmp_path, caplog, error
):
    def fails():
        raise error

    service.fails = fails
    sender = run(tmp_path, name, rows=ROWS * 3)
    assert sender.failed == sender.total == 6
    assert len(metrics.read(tmp_path)) == 6
    told = [
        r.getMessage() for r in caplog.records if r.name == "sd3_jax.monitoring.writers"
    ]
    assert len(told) == 2 and all(line.startswith(name) for line in told)
    assert "lacks 6 of 6 lines" in told[1] and "\n" not in told[0]


def test_a_writer_that_hangs_holds_nothing_up(name, service, tmp_path, monkeypatch):
    gate = threading.Event()
    service.fails = gate.wait
    monkeypatch.setattr(writers, "WAITING", 2)
    (sender,) = writers.open_all([name], tmp_path, CONFIG)
    for step in range(9):
        sender.write(step, "train", {"loss": 1.0})
    assert sender.failed >= 6
    sender.close(seconds=0.01)
    gate.set()


def test_a_package_that_is_missing_is_one_line(monkeypatch, tmp_path):
    for name in writers.WRITERS:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(UserError, match=rf"pip install {name}") as error:
            writers.open_all([name], tmp_path, CONFIG)
        assert f'config.train.writers: "{name}"' in str(error.value)


def test_a_folder_of_the_service_s_name_is_not_its_package(monkeypatch, tmp_path):
    """wandb leaves ./wandb behind, which imports where wandb is not installed."""
    for name in writers.WRITERS:
        (tmp_path / name).mkdir()
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(UserError, match=f"{name} is a folder, not the package"):
            writers.clients([name])
        monkeypatch.delitem(sys.modules, name)  # or later tests would import it
