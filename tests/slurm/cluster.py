"""A real Slurm of a few nodes on this machine: own ports, key, state and logs in one folder.

Nodes are `slurmd` processes, each with a host name and process numbers of its own, so that a node
can be lost as a whole. Needs root, and nothing of the machine's own Slurm, if it has one.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Until a credential expires, a job that is requeued does not start again: 2 minutes otherwise.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.log
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=5
SlurmdTimeout=15
MinJobAge=86400
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=300
# Jobs of this one preempt those of main.
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=INFINITE State=UP
"""
NODE = """
hostname {name}
mount --bind hosts /etc/hosts
{more}
slurmd -D -N {name} -f {folder}/slurm.conf
"""
SECONDS = 60


class SlurmCluster:
    """Started with `start`, ended with `stop`, in any state."""

    def __init__(self, folder: Path, num_nodes: int = 2, num_cpus: int = 8, num_gpus: int = 0):
        self.folder, self.small_disk = folder, folder / "small"
        self.names = [f"n{number}" for number in range(1, num_nodes + 1)]
        self._num_cpus, self._num_gpus = num_cpus, num_gpus
        self._processes: dict[str, subprocess.Popen] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self):
        """Every node idle, or an AssertionError with what the daemons said."""
        (self.folder / "state").mkdir(parents=True)
        self.small_disk.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m", "none", self.small_disk], check=True
        )
        self.folder.chmod(0o755)
        self._write_files()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        sock, files = self.folder / "munge.sock", self.folder / "munged"
        self._run_daemon(
            "munged",
            *("munged", "--foreground", "--force", f"--socket={sock}", f"--key-file={key}"),
            *(f"--pid-file={files}.pid", f"--log-file={files}.log", f"--seed-file={files}.seed"),
        )
        self._until(sock.exists)
        self._run_daemon("slurmctld", "slurmctld", "-D", "-i", "-f", self.folder / "slurm.conf")
        for name in self.names:
            self.start_node(name)
        self.wait_for_nodes()

    def stop(self):
        """Every job and process that it started."""
        for name in self.names:
            self.kill_node(name)
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        subprocess.run(["umount", "--lazy", self.small_disk], check=True)

    def start_node(self, name, more=""):
        """Again, too, after `kill_node`. more: what is to be done there first."""
        script = NODE.format(name=name, folder=self.folder, more=more)
        namespaces = "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"
        self._run_daemon(name, "unshare", *namespaces, "sh", "-c", script)

    def kill_node(self, name):
        """As when its power fails: all that runs on it goes at once."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def call(self, *command, **settings):
        """Run a command of Slurm's: what it prints."""
        result = subprocess.run(
            [*map(str, command)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            **settings,
        )
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout.strip()

    def submit(self, *arguments, **settings):
        """`sbatch`: the job's number."""
        return self.call("sbatch", "--parsable", *arguments, **settings).split(";")[0]

    def state(self, job):
        """Of a job, such as RUNNING."""
        return self._field(job, "JobState")

    def restarts(self, job):
        """How often it began again."""
        return int(self._field(job, "Restarts"))

    def wait_for_nodes(self):
        """Until all are idle."""
        self._until(lambda: self._idle() == set(self.names))

    def wait(self, job, seconds=SECONDS):
        """Until it is over: its state. A job that is requeued is not over."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        self._until(lambda: self.state(job) in over, seconds)
        return self.state(job)

    def _field(self, job, name):
        shown = self.call("scontrol", "show", "job", job)
        return next(part for part in shown.split() if part.startswith(f"{name}=")).split("=")[1]

    def _idle(self):
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return set(shown.stdout.split())

    def _until(self, holds, seconds=SECONDS):
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self._said()
            time.sleep(0.1)

    def _said(self):
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1000:]}"
            for path in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        )

    def _run_daemon(self, name, *command):
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [*map(str, command)],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def _write_files(self):
        hosts = Path("/etc/hosts").read_text()
        lines = [f"127.0.0.1 {name}" for name in self.names]
        (self.folder / "hosts").write_text("\n".join([hosts.rstrip(), *lines]) + "\n")
        gpus = [self.folder / f"gpu{number}" for number in range(self._num_gpus)]
        for gpu in gpus:  # Slurm wants devices
            os.mknod(gpu, 0o666 | 0o020000, os.makedev(1, 3))
        gres = f"Name=gpu File={self.folder}/gpu[0-{len(gpus) - 1}]\n" if gpus else ""
        (self.folder / "gres.conf").write_text(gres)
        nodes = [
            # One address for all: srun listens at one, and steps call back there.
            f"NodeName={name} NodeAddr=127.0.0.1 Port={_free_port()} CPUs={self._num_cpus} "
            f"RealMemory=8000 Gres=gpu:{self._num_gpus} State=UNKNOWN"
            for name in self.names
        ]
        text = CONFIGURATION.format(port=_free_port(), folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)


def _free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
