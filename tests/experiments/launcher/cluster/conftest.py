"""A SLURM cluster of two nodes on this machine: no munge, cgroups or root, ready in a second."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from getpass import getuser
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]

# Partition `high` preempts jobs of `low`, which are requeued after 5 s; SLURM's own default is
# 120 s (cred_expire). No RequeueExit: only the program itself asks for a requeue.
_CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
MinJobAge=3600
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """`folder` has its configuration, state and logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        port, host = _free_ports(3), socket.gethostname().partition(".")[0]
        text = _CONF.format(
            folder=self.folder, host=host, user=getuser(), port=port, first=port + 1, last=port + 2
        )
        (self.folder / "slurm.conf").write_text(text.strip() + "\n")
        (self.folder / "state").mkdir()
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            (self.folder / f"spool-{node}").mkdir()
            self.start_node(node)
        until(self.idle, 60)

    def idle(self) -> bool:
        return self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def stop(self) -> None:
        for node in ("n1", "n2"):
            self._kill_steps(node)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()

    def lose_node(self, node: str) -> None:
        """As in a power cut: the daemon and all its processes are gone at once."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        self._kill_steps(node)
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def find_node(self, node: str) -> None:
        self.start_node(node)
        self.ask("scontrol", "update", f"nodename={node}", "state=resume")
        until(self.idle)

    def _kill_steps(self, node: str) -> None:
        # The daemons of the steps go first, because they would report the end of their tasks.
        for pid in _steps_of(f"{self.folder}/slurm.conf", node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ask(self, *command: str, check: bool = True) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=check).stdout.strip()

    def state(self, job: str) -> str:
        shown = self.ask("scontrol", "show", "job", "-o", job)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def log(self) -> str:
        return (self.folder / "slurmctld.log").read_text()

    def _start(self, name: str, *command: str) -> None:
        path = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        self._daemons[name] = subprocess.Popen(
            [str(path), *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def until(happens: Callable[[], object], seconds: float = 120) -> None:
    """Waits until it is true. The timeout only prevents hangs; it does not measure speed."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def _steps_of(conf: str, node: str) -> list[int]:
    """Returns all process ids of a node: the daemons of the steps, then their tasks."""
    tasks, daemons = [], set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_text(errors="replace").split("\0")
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # ended since
        if {f"SLURM_CONF={conf}", f"SLURMD_NODENAME={node}"} <= set(environment):
            tasks.append(int(path.name))
            daemons.add(int(parent))
    stepds = [pid for pid in daemons if "slurmstepd" in Path(f"/proc/{pid}/comm").read_text()]
    return stepds + tasks


def _free_ports(count: int) -> int:
    """Returns the first of this many neighbouring free ports."""
    for base in range(20000 + os.getpid() % 20000, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", base + offset))
            return base
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise OSError("no free ports")


@pytest.fixture(scope="session", name="until")
def until_fixture() -> Callable[..., None]:
    return until


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not (found and shutil.which("sbatch")):
        pytest.skip("SLURM is not installed: apt-get install slurmctld slurmd slurm-client")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
        os.environ.pop("SLURM_CONF", None)
