"""A run that gets a stop signal saves, says so, and later continues as the same run."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.stream.loader import outlive_stop_signals
from lightning_modules.checkpoint import newest_whole, preemption
from lightning_modules.checkpoint.preemption import Preempted, StopSignals, signals, stops_at
from tests.helpers.tiny_run import Ranks, Tiny, read_checkpoint, read_metrics, read_seen, train

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# The process


@pytest.mark.parametrize("number", NUMBERS)
def test_outside_of_a_training_a_signal_stops_at_once(number):
    before = [signal.getsignal(n) for n in NUMBERS]
    mine = StopSignals()

    def run() -> None:
        try:
            send(number)
        finally:
            send(signal.SIGTERM)  # while it saves: this second signal changes nothing

    with pytest.raises((Preempted, KeyboardInterrupt)) as caught, mine.listen():
        run()
    assert caught.type is (KeyboardInterrupt if number == signal.SIGINT else Preempted)
    assert mine.received == signal.Signals(number).name
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_in_a_training_a_signal_is_noted_alone():
    mine = StopSignals()
    with mine.listen():
        with mine.deferred():
            assert mine.received is None
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                send(number)
            assert mine.received == "SIGUSR1"
        with mine.deferred():
            assert mine.received == "SIGUSR1", "a stop that is under way is not forgotten"
    with mine.listen():
        assert mine.received is None


def test_lightnings_exit_is_a_ctrl_c_again():
    def leave() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does

    with pytest.raises(KeyboardInterrupt), signals.listen():
        leave()
    with pytest.raises(SystemExit), signals.listen():
        raise SystemExit(1)


def test_a_forked_child_takes_no_part():
    mine = StopSignals()
    with mine.listen():
        child = os.fork()
        if not child:
            while True:
                time.sleep(1)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(child, number)
        time.sleep(0.05)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0) == (child, signal.SIGTERM)
        assert mine.received is None


def test_workers_outlive_the_signals_of_their_job():
    def killed(batch: int) -> None:
        for worker in multiprocessing.active_children():
            for number in (*NUMBERS, signal.SIGINT):
                os.kill(worker.pid or 0, number)

    loader = DataLoader(
        range(40), batch_size=None, num_workers=2, worker_init_fn=outlive_stop_signals
    )
    seen = []
    for item in loader:
        if item == 3:
            killed(item)
        seen.append(int(item))
    assert seen == list(range(40))


@pytest.mark.parametrize(
    ("walltime", "seconds"), [("00:01:40", 100), ("1-00:00:00", 86400), (90, 90), (1e6, 1e6)]
)
def test_walltime_counts_from_the_start_of_the_process(walltime, seconds):
    end = preemption._STARTED + seconds
    now = time.time()
    expected = max(end - 30, (now + end) / 2) if end > now else None
    assert stops_at(walltime, 30) == pytest.approx(expected, abs=1)


def test_a_fork_starts_when_it_is_forked(monkeypatch):
    """As a job of a multirun does: its walltime is not that of the process it comes from."""
    monkeypatch.setattr(preemption, "_STARTED", 0.0)
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writing, str(stops_at(1000, 100)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert float(os.read(reading, 100)) == pytest.approx(time.time() + 900, abs=30)
    os.close(reading)
    os.close(writing)
    assert preemption._STARTED == 0.0


def test_slurms_end_counts_unless_it_is_over(monkeypatch):
    now = time.time()
    assert stops_at(None, 120) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + 1000)))
    assert stops_at(None, 120) == pytest.approx(now + 880, abs=2)
    assert stops_at(None, 2000) == pytest.approx(now + 500, abs=2), "half of the time is used"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now - 10)))
    assert stops_at(None, 120) is None
    with pytest.raises(ValueError, match=r"walltime=tomorrow is not a duration.*24:00:00"):
        stops_at("tomorrow", 120)


# A training

OPTIONS = {"accumulate_grad_batches": 2, "val_check_interval": 0.25}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder, **OPTIONS)
    return folder


def assert_same_run(cut, whole, tolerance=0.0):
    assert read_seen(cut) == read_seen(whole), "no micro-batch twice, none left out"
    torch.testing.assert_close(
        read_checkpoint(cut)["state_dict"],
        read_checkpoint(whole)["state_dict"],
        rtol=tolerance,
        atol=tolerance,
    )
    assert len(read_metrics(cut)) == len(read_metrics(whole))
    assert tolerance or read_metrics(cut) == read_metrics(whole)


class Stopping(Tiny):
    """Sends itself a signal in a batch of training or validation, counted from 1."""

    number = signal.SIGTERM
    batches = validations = 0

    def training_step(self, batch, batch_idx):
        self.batches -= 1
        if self.batches == 0:
            send(self.number)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validations -= 1
        if self.validations == 0:
            send(self.number)
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("number", "batches", "validations", "step"),
    [
        (signal.SIGTERM, 1, 0, 1),
        (signal.SIGINT, 5, 0, 3),
        (signal.SIGUSR1, 6, 0, 3),
        (signal.SIGTERM, 24, 0, 12),
        (signal.SIGUSR2, 48, 0, 24),
        (signal.SIGINT, 0, 2, 4),
        (signal.SIGTERM, 0, 14, 12),
        (signal.SIGTERM, 0, 32, 24),
    ],
)
def test_the_step_ends_and_the_run_goes_on_from_there(
    number, batches, validations, step, whole, tmp_path, caplog
):
    """In either micro-batch of a step, before and within validations, at the end of an epoch."""
    module = Stopping(tmp_path)
    module.number, module.batches, module.validations = number, batches, validations
    before = [signal.getsignal(n) for n in NUMBERS]
    with pytest.raises((Preempted, KeyboardInterrupt)), signals.listen():
        train(tmp_path, module=module, last={"every_n_steps": 1000}, **OPTIONS)
    assert [signal.getsignal(n) for n in NUMBERS] == before
    name = signal.Signals(number).name
    line = f"stopped after step {step} ({name}): the same command goes on from there"
    assert line in caplog.messages
    assert read_checkpoint(tmp_path)["global_step"] == step
    train(tmp_path, **OPTIONS)
    assert_same_run(tmp_path, whole)


def test_time_runs_out(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 0.5))
    module = Tiny(tmp_path, at_batch=lambda *_: time.sleep(0.05))
    with pytest.raises(Preempted) as caught:
        train(tmp_path, module=module, last={"walltime_margin_s": 0.2}, **OPTIONS)
    assert caught.value.reason == "walltime"
    assert 0 < read_checkpoint(tmp_path)["global_step"] < 24
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    train(tmp_path, **OPTIONS)
    assert_same_run(tmp_path, whole)


# Two ranks


@pytest.mark.parametrize(
    ("number", "ranks", "code"),
    [
        (signal.SIGTERM, (0,), 75),
        (signal.SIGTERM, (1,), 75),
        (signal.SIGUSR2, (0, 1), 75),
        (signal.SIGINT, (0, 1), 130),
    ],
)
def test_ranks_stop_together_whoever_is_told(number, ranks, code, whole, tmp_path):
    options = {"val_check_interval": 0.25}
    pair = Ranks(tmp_path, 2, slow=0.05, options=options).start()
    pair.wait_for_step(4)
    pair.signal(number, *ranks)
    assert pair.wait(60) == [code, code], pair.said()
    assert f"({signal.Signals(number).name}): the same command" in pair.said()
    assert newest_whole(tmp_path / "checkpoints") == tmp_path / "checkpoints/last.ckpt"
    again = Ranks(tmp_path, 2, options=options).start()
    assert again.wait(60) == [0, 0], again.said()
    assert_same_run(tmp_path, whole, 1e-6)


def test_the_whole_job_is_told_workers_and_all(tmp_path):
    run = Ranks(tmp_path, slow=0.05, options={"workers": 2}).start()
    run.wait_for_step(3)
    os.killpg(run.processes[0].pid, signal.SIGTERM)
    assert run.wait(60) == [75], run.said()
    assert read_checkpoint(tmp_path)["global_step"] == len(read_seen(tmp_path))


def test_a_second_ctrl_c_kills(tmp_path):
    run = Ranks(tmp_path, slow=60).start()
    run.wait_for_step(0)
    run.signal(signal.SIGINT, 0)
    time.sleep(0.2)
    assert run.processes[0].is_alive()
    run.signal(signal.SIGINT, 0)
    assert run.wait(10) == [-signal.SIGINT]
