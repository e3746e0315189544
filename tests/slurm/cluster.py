"""A real SLURM cluster on one machine: pretend nodes with pretend GPUs, loopback only."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "scontrol"]
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]

CONFIG = """\
ClusterName=longhaul
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
SchedulerParameters=bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
  PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NAMESPACE = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
"""In front of a node's daemon: a host name and processes of its own."""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 Boards=1"
    " SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:h100:8\n"
)


def free_ports(count: int) -> list[int]:
    """Return ports that were all free at the same moment."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def can_cut_power() -> bool:
    """Return whether a node can be a namespace of its own, whose end takes all of it along."""
    return os.geteuid() == 0 and not subprocess.run([*NAMESPACE, "true"]).returncode


class Cluster:
    """Starts on entering, stops what it started on leaving, and keeps to its own folder."""

    def __init__(self, *, nodes: int) -> None:
        # short, because a socket's path may have 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.powered: dict[str, subprocess.Popen[bytes]] = {}
        self.separate = can_cut_power()
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            names = ("key", "pid", "seed", "log")
            files = [f"--{name}-file={self.folder}/munge.{name}" for name in names]
            socket_path = self.folder / "munge.sock"
            self._daemon("munged", "--force", "--foreground", f"--socket={socket_path}", *files)
            wait_until(socket_path.exists, timeout_s=20, what="munge's socket")
            self._daemon("slurmctld", "-D")
            for node in self.nodes:
                self.power_on(node)
            wait_until(self._all_idle, timeout_s=60, what="idle nodes")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(
        self, *command: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Return the ended command; its output is text, stderr among stdout."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    def submit(self, *command: str, **environment: str) -> str:
        """Return the new job's number. `command` is sbatch's: options, script, arguments."""
        answer = self.run("sbatch", "--parsable", *command, **environment)
        assert answer.returncode == 0, answer.stdout
        return answer.stdout.split()[-1]

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM says of a job, by SLURM's names: JobState, Restarts, ..."""
        words = self.run("scontrol", "show", "job", "-o", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, timeout_s: float) -> dict[str, str]:
        """Return the job once it is in one of the states."""
        wait_until(
            lambda: self.job(number).get("JobState") in states,
            timeout_s=timeout_s,
            what=f"job {number} in state {' or '.join(states)}",
        )
        return self.job(number)

    def power_on(self, node: str) -> None:
        """Start a node."""
        command = ["slurmd", "-D", "-N", node]
        if self.separate:
            begin = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
            hosts = str(self.folder / "hosts")
            command = [*NAMESPACE, "sh", "-c", begin, "sh", node, hosts, *command]
        self._daemon(*command)
        self.powered[node] = self.daemons[-1]

    def cut_power(self, node: str) -> None:
        """End everything that runs on a node, at once."""
        assert self.separate, "a node that is no namespace cannot be cut off"
        daemon = self.powered.pop(node)
        self.daemons.remove(daemon)
        daemon.kill()  # unshare, which takes its processes along
        daemon.wait()

    def start_now(self, number: str) -> None:
        """Start a requeued job without the 121 s that SLURM holds it."""
        self.wait_for(number, "PENDING", timeout_s=60)
        # in the second of its requeue it would be refused ("Job credential revoked": the first
        # attempt's, and only the second tells them apart)
        time.sleep(2)
        self.run("scontrol", "update", f"jobid={number}", "StartTime=now")

    def _configure(self) -> None:
        (self.folder / "spool").mkdir()
        (self.folder / "state").mkdir()
        devices = self.folder / "dev"
        devices.mkdir()
        for number in range(8):
            # slurmd counts a GPU for each device file and checks nothing else about it
            (devices / f"nvidia{number}").symlink_to("/dev/null")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=h100 File={devices}/nvidia[0-7]\n")
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        port, *ports = free_ports(1 + len(self.nodes))
        text = CONFIG.format(host=socket.gethostname(), port=port, user=_user(), folder=self.folder)
        for name, node_port in zip(self.nodes, ports, strict=True):
            text += NODE.format(name=name, port=node_port)
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{len(self.daemons)}-{command[0]}.out", "ab") as output:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _all_idle(self) -> bool:
        states = self.run(
            "sinfo", "--noheader", "--Node", "--partition=train", "--format=%T"
        ).stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _stop(self) -> None:
        if self.run("scontrol", "ping").returncode == 0:
            self.run("scancel", "--user", _user())
            wait_until(lambda: not self._busy(), timeout_s=30, what="the jobs' end")
        namespaces = self.powered.values() if self.separate else ()
        for daemon in reversed(self.daemons):
            # a namespace's first process, unshare, does not hear TERM
            daemon.send_signal(signal.SIGKILL if daemon in namespaces else signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)

    def _busy(self) -> str:
        return self.run("squeue", "--noheader").stdout.strip()


def wait_until(condition: Callable[[], object], *, timeout_s: float, what: str) -> None:
    """Return when the condition holds; TimeoutError names `what` after timeout_s."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.2)


def _user() -> str:
    return subprocess.run(["id", "-un"], stdout=subprocess.PIPE, text=True).stdout.strip()
