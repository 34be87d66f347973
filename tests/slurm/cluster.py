"""A real Slurm on this machine, with its own ports and key, and state and logs in one folder.

Nodes are `slurmd` processes, each with its own host name and process numbers, so that a node
can be lost as a whole. It needs root, and is independent of a Slurm that the machine has.
"""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
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
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP GraceTime=300
# Jobs in it preempt jobs in main.
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 MaxTime=INFINITE State=UP
PartitionName=scarce Nodes=n3,n1 MaxTime=INFINITE State=UP
"""
NODE = """
hostname {name}
mount --bind hosts /etc/hosts
[ {name} != n3 ] || mount --bind meminfo /proc/meminfo
exec slurmd -D -N {name} -f {folder}/slurm.conf
"""
NAMES = "n3", "n1", "n2"  # n3 is only in the partition scarce
NUM_GPUS = 8
"""GPUs of each node, as far as Slurm knows."""
SECONDS = 240


class SlurmCluster:
    """Nodes n1 and n2, and n3, which has almost no free memory."""

    def __init__(self, folder: Path):
        self.folder, self.small_disk = folder, folder / "small"
        self._processes: dict[str, subprocess.Popen] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self):
        """Start all nodes. Raises AssertionError with the daemons' logs if one does not start."""
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
        until(sock.exists, self._logs)
        self._run_daemon("slurmctld", "slurmctld", "-D", "-i", "-f", self.folder / "slurm.conf")
        for name in NAMES:
            self.start_node(name)
        until(lambda: self._idle() == {*NAMES}, self._logs)

    def stop(self):
        """End all jobs and processes of the cluster."""
        for name in NAMES:
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

    def start_node(self, name):
        script = NODE.format(name=name, folder=self.folder)
        namespaces = "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"
        self._run_daemon(name, "unshare", *namespaces, "sh", "-c", script)

    def kill_node(self, name):
        """End all processes of a node at once, as a power failure does."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def call(self, *command):
        """Run a command of Slurm, and return its output."""
        result = subprocess.run(
            [*map(str, command)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout.strip()

    def submit(self, *arguments):
        """Submit a job with `sbatch`, and return its number."""
        return self.call("sbatch", "--parsable", *arguments).split(";")[0]

    def state(self, job):
        """Return the state of a job, such as RUNNING."""
        return self._field(job, "JobState")

    def restarts(self, job):
        """Return how often a job was requeued."""
        return int(self._field(job, "Restarts"))

    def wait(self, job):
        """Wait until a job is over, and return its state. A job that is requeued is not over."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        until(lambda: self.state(job) in over, self._logs, interval=0.5)
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

    def _logs(self):
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
        lines = [f"127.0.0.1 {name}" for name in NAMES]
        (self.folder / "hosts").write_text("\n".join([hosts.rstrip(), *lines]) + "\n")
        memory = Path("/proc/meminfo").read_text()
        scarce = re.sub(r"(MemAvailable: +)\d+", r"\g<1>1000", memory)
        (self.folder / "meminfo").write_text(scarce)
        for number in range(NUM_GPUS):  # Slurm wants devices
            os.mknod(self.folder / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        gres = f"Name=gpu File={self.folder}/gpu[0-{NUM_GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        port, *ports = _free_ports(1 + len(NAMES))
        nodes = [
            # All have one address, as srun listens at one, and steps connect there.
            f"NodeName={name} NodeAddr=127.0.0.1 Port={node_port} CPUs=16 "
            f"RealMemory=16000 Gres=gpu:{NUM_GPUS} State=UNKNOWN Weight={weight}"
            # Jobs start on the first one.
            for weight, (name, node_port) in enumerate(zip(NAMES, ports, strict=True), start=1)
        ]
        text = CONFIGURATION.format(port=port, folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)


def until(is_true, describe, interval=0.1):
    """Wait until a condition is true."""
    deadline = time.monotonic() + SECONDS
    while not is_true():
        assert time.monotonic() < deadline, describe()
        time.sleep(interval)


def _free_ports(count):
    """Return different ports: they are held until all are chosen."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
