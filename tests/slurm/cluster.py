"""A real Slurm on one machine, from Debian's packages, without systemd: `python tests/slurm/cluster.py up NAME`.

Each node is a slurmd in its own network, host name and mount namespace: own IP, own /dev with fake GPUs, own /dev/shm
and own local disk. Rendezvous, host names, cut cables and lost GPUs behave as on a cluster. Clusters of different
names live side by side: everything of one lies in /run/slurm-NAME, its nodes are NAME1, NAME2, ..., and programs find
it by SLURM_CONF. Needs root; `missing()` names what else is missing.
"""

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip")
INSTALL_LOCK = "/run/slurm-install.lock"
LOCK_SECONDS = 300
POLICY = "#!/bin/sh\n# written by sdlm_megatron's tests while they install Slurm\nexit 101\n"
FREEZER = Path("/sys/fs/cgroup/freezer")
PAPER_NODES = 64  # of partition "paper": full-size nodes that exist for --test-only


def missing() -> str:
    """Reason why no cluster can be started here; "" if one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons and network namespaces need root"
    if not shutil.which("apt-get") and not shutil.which("slurmctld"):
        return "neither Slurm nor apt-get to install it is available"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def install() -> None:
    """Installs Debian's Slurm packages where they are missing; none of them starts a daemon of its own.

    Two test workers call this at the same time. The file lock lets one of them install while the other waits. The
    check is made under the lock too: the programs exist as soon as dpkg has unpacked them, before they are configured.
    """
    with open(INSTALL_LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(shutil.which(program) for program in PROGRAMS):
            _install_packages()


def _install_packages() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # apt waits for a dpkg lock that another program holds (unattended upgrades, an image build) instead of failing
    get = ["apt-get", "-y", "-q", "-o", f"DPkg::Lock::Timeout={LOCK_SECONDS}"]
    install_packages = [*get, "install", "--no-install-recommends", *PACKAGES]
    with _no_daemons():
        if subprocess.run(install_packages, env=environment, capture_output=True).returncode == 0:
            return
        # a fresh image has no package lists
        subprocess.run([*get, "update"], env=environment, capture_output=True)
        done = subprocess.run(install_packages, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"apt-get could not install {' '.join(PACKAGES)}:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def _no_daemons() -> Iterator[None]:
    """While packages are installed, policy-rc.d forbids them to start their daemons."""
    policy = Path("/usr/sbin/policy-rc.d")
    # a file with our text was left by a test session that was killed; any other belongs to the machine
    ours = not policy.exists() or policy.read_text() == POLICY
    if ours:
        policy.write_text(POLICY)
        policy.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            policy.unlink()


def run(*command: str | Path, check: bool = True, **kwargs) -> str:
    """Output of a command; RuntimeError with its whole output if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def wait_for(condition: str, test: Callable[[], object], seconds: float) -> None:
    """Waits until `test()` is true; TimeoutError names `condition`."""
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition}: not after {seconds:g} s")
        time.sleep(0.1)


def alive(pid_file: Path) -> int:
    """Process id of a running daemon; 0 if it does not run."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return 0
    return pid


NODE_SCRIPT = r"""
set -e
lab=$1 name=$2 gpus=$3 disk=$4
hostname "$name"
mount --bind "$lab/hosts" /etc/hosts
dev=$lab/dev.$name; mkdir -p "$dev"; mount -t tmpfs -o mode=755 dev "$dev"
mkdir "$dev/shm" "$dev/pts"
for d in null zero full random urandom tty; do cp -a "/dev/$d" "$dev/$d"; done
for ((g = 0; g < gpus; g++)); do mknod -m 666 "$dev/nvidia$g" c 1 3; done
ln -s /proc/self/fd "$dev/fd"; ln -s fd/0 "$dev/stdin"; ln -s fd/1 "$dev/stdout"; ln -s fd/2 "$dev/stderr"
mount --bind /dev/pts "$dev/pts"; ln -s pts/ptmx "$dev/ptmx"
mount -t tmpfs -o mode=1777 shm "$dev/shm"
mount --rbind "$dev" /dev
mount -t tmpfs -o "mode=1777,size=$disk" disk "$lab/local"
exec /usr/sbin/slurmd -f "$lab/slurm.conf" -N "$name"
"""


class Cluster:
    """One cluster; the methods may be called from any process, all state lies in `self.lab`."""

    def __init__(self, name: str, nodes: int = 2, gpus: int = 8, local_disk: str = "1g") -> None:
        if not (name.isalpha() and name.islower() and len(name) <= 8):
            raise ValueError(f"name {name!r}: up to 8 lowercase letters")  # an interface name has at most 15 characters
        self.name, self.gpus, self.local_disk = name, gpus, local_disk
        self.nodes = [f"{name}{i + 1}" for i in range(nodes)]
        self.lab = Path(f"/run/slurm-{name}")
        self.local = self.lab / "local"  # a separate disk on every node
        self.conf = self.lab / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """Environment of programs that use this cluster, without that of any job this process may run in."""
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SDLM_"))}
        return {**outside, "SLURM_CONF": str(self.conf), "SDLM_DEVICE": "cpu"}  # the GPUs are fake

    # ------------------------------------------------------------------------------------------------ up and down
    def up(self) -> "Cluster":
        """Starts everything that does not run yet, and waits until all nodes are idle."""
        install()
        for folder in (self.lab, self.lab / "log", self.lab / "state", self.local):
            folder.mkdir(parents=True, exist_ok=True)
        self._munge()
        self._network()
        self._configure()
        if not alive(self.lab / "slurmctld.pid"):
            run("/usr/sbin/slurmctld", "-f", self.conf, env=self.env)
        for node in self.nodes:
            self.start(node)
        wait_for(f"all nodes idle (see {self.lab}/log)", self._ready, 60)
        return self

    def _ready(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T", check=False).split()
        return len(states) == len(self.nodes) and all(state in ("idle", "mixed", "allocated") for state in states)

    def down(self) -> None:
        """Ends jobs, daemons and networks, and removes the folder."""
        if alive(self.lab / "slurmctld.pid"):
            self.run("scancel", "--me", check=False)
            with_jobs = lambda: self.run("squeue", "-h", check=False)  # noqa: E731
            try:
                wait_for("jobs end", lambda: not with_jobs(), 15)
            except TimeoutError as error:
                print(f"{error}; continuing", file=sys.stderr)
        for daemon in ("slurmctld.pid", "munge/pid"):
            kill(alive(self.lab / daemon))
        for space in Path("/run/netns").glob(f"{self.name}[0-9]*"):
            for pid in run("ip", "netns", "pids", space.name).split():  # slurmd, and what a cut-off node still runs
                kill(int(pid))
            run("ip", "netns", "del", space.name, check=False)
            run("ip", "link", "del", f"v-{space.name}", check=False)
        run("ip", "link", "del", f"br-{self.name}", check=False)
        for group in FREEZER.glob(f"slurm_{self.name}[0-9]*"):
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):  # of a process that is still ending
                    os.rmdir(folder)
        shutil.rmtree(self.lab, ignore_errors=True)

    def _munge(self) -> None:
        folder = self.lab / "munge"
        if alive(folder / "pid"):
            return
        folder.mkdir(mode=0o755, exist_ok=True)
        key = folder / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        run(
            *("munged", "--force", f"--socket={folder}/socket", f"--key-file={key}", f"--pid-file={folder}/pid"),
            *(f"--log-file={folder}/log", f"--seed-file={folder}/seed"),
        )
        wait_for("munge's socket", (folder / "socket").exists, 5)

    def _network(self) -> None:
        """Creates a bridge, its own subnet, and a network namespace for each node."""
        number = self._number()
        if not Path(f"/sys/class/net/br-{self.name}").exists():
            run("ip", "link", "add", f"br-{self.name}", "type", "bridge")
            run("ip", "addr", "add", f"10.77.{number}.1/24", "dev", f"br-{self.name}")
            run("ip", "link", "set", f"br-{self.name}", "up")
        lines = ["127.0.0.1 localhost", f"10.77.{number}.1 {socket.gethostname()}"]
        for i, node in enumerate(self.nodes):
            lines.append(f"10.77.{number}.{11 + i} {node}")
            if Path(f"/run/netns/{node}").exists():
                continue
            run("ip", "netns", "add", node)
            run("ip", "link", "add", f"v-{node}", "type", "veth", "peer", "name", "eth0", "netns", node)
            run("ip", "link", "set", f"v-{node}", "master", f"br-{self.name}", "up")
            run("ip", "-n", node, "link", "set", "lo", "up")
            run("ip", "-n", node, "addr", "add", f"10.77.{number}.{11 + i}/24", "dev", "eth0")
            run("ip", "-n", node, "link", "set", "eth0", "up")
        (self.lab / "hosts").write_text("\n".join(lines) + "\n")

    def _number(self) -> int:
        """Number of this cluster, 1 to 199, unique on this machine."""
        file = self.lab / "number"
        with open("/run/slurm-numbers.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                taken = {int(other.read_text()) for other in Path("/run").glob("slurm-*/number")}
                file.write_text(str(next(n for n in range(1, 200) if n not in taken)))
        return int(file.read_text())

    def _configure(self) -> None:
        number, host = self._number(), socket.gethostname()
        # As on real clusters: with cgroup a signal reaches only the first process of a task, and the others end with
        # it. With linuxproc every process gets the signal.
        track = "cgroup" if os.access(FREEZER / "tasks", os.W_OK) else "linuxproc"
        shape = "CPUs=64 Boards=1 SocketsPerBoard=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000"
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        lines = [
            *(f"ClusterName={self.name}", f"SlurmctldHost={host}(10.77.{number}.1)", f"SlurmctldPort={20000 + number}"),
            *("SlurmUser=root", "SlurmdUser=root", "AuthType=auth/munge", "CredType=cred/munge"),
            # A requeued job starts only when its credential expired (default 120 s).
            f"AuthInfo=socket={self.lab}/munge/socket,cred_expire=5",
            *(f"StateSaveLocation={self.lab}/state", f"SlurmdSpoolDir={self.lab}/spool.%n"),
            *(f"SlurmctldPidFile={self.lab}/slurmctld.pid", f"SlurmdPidFile={self.lab}/slurmd.%n.pid"),
            *(f"SlurmctldLogFile={self.lab}/log/slurmctld.log", f"SlurmdLogFile={self.lab}/log/%n.log"),
            *(f"ProctrackType=proctrack/{track}", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none"),
            *("SwitchType=switch/none", "MpiDefault=none", "MailProg=/bin/true", "GresTypes=gpu", "JobRequeue=1"),
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory", "ReturnToService=2"),
            *("SlurmdParameters=config_overrides", "AccountingStorageType=accounting_storage/none"),
            *("SlurmctldTimeout=30", "SlurmdTimeout=15", "InactiveLimit=0", "KillWait=5", "MinJobAge=86400"),
            *("UnkillableStepTimeout=30", "SchedulerType=sched/backfill", "PropagateResourceLimitsExcept=MEMLOCK"),
            "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,bf_continue",
        ]
        for i, node in enumerate(self.nodes):
            address = f"NodeAddr=10.77.{number}.{11 + i} NodeHostname={node}"
            lines.append(f"NodeName={node} {address} {shape} {gres} State=UNKNOWN")
        lines.append(f"PartitionName=batch Nodes={','.join(self.nodes)} Default=YES DefaultTime=60 DefMemPerCPU=1000")
        # Cloud nodes that were never started: the scheduler plans with them, so --test-only checks jobs of full size.
        # Only --test-only may use "paper", as nothing ever starts there.
        lines.append(f"NodeName=paper[1-{PAPER_NODES}] {shape} Gres=gpu:8 State=CLOUD")
        lines.append(f"PartitionName=paper Nodes=paper[1-{PAPER_NODES}] MaxTime=7-0 DefMemPerCPU=1000")
        lines += ["SuspendProgram=/bin/true", "ResumeProgram=/bin/true", "SuspendTime=60000", "ResumeTimeout=60000"]
        (self.lab / "gres.conf").write_text(f"Name=gpu File=/dev/nvidia[0-{self.gpus - 1}]\n" if self.gpus else "")
        (self.lab / "cgroup.conf").write_text("ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n")
        self.conf.write_text("\n".join(lines) + "\n")

    # ------------------------------------------------------------------------------------------------ use
    def run(self, *command: str | Path, check: bool = True, **kwargs) -> str:
        """Output of a command that uses this cluster, such as `squeue`."""
        return run(*command, check=check, **{"env": self.env, **kwargs})

    def submit(self, *command: str | Path, **kwargs) -> int:
        """`sbatch --parsable COMMAND`; the job's number."""
        return int(self.run("sbatch", "--parsable", *command, **kwargs).strip())

    def job(self, job: int) -> dict[str, str]:
        """Fields of `scontrol show job`; {} for an unknown job."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job), check=False)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait(self, job: int, seconds: float, states: Sequence[str] = ()) -> str:
        """Waits until a job is in one of `states` (default: until it is over), and returns its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        state = lambda: self.job(job).get("JobState", "")  # noqa: E731
        wait_for(f"job {job} is {'/'.join(states) or 'over'}", lambda: state() in (states or over), seconds)
        return state()

    def inside(self, node: str, *command: str | Path, check: bool = True) -> str:
        """Output of a command that runs on a node, in all its namespaces."""
        spaces = ["nsenter", "-t", str(self.slurmd(node)), "--net", "--uts", "--mount"]
        return run(*spaces, *command, check=check, env=self.env)

    def slurmd(self, node: str) -> int:
        """Process id of a node's slurmd; 0 if it does not run."""
        return alive(self.lab / f"slurmd.{node}.pid")

    def start(self, node: str) -> None:
        """Starts a node's slurmd, with a fresh /dev and local disk."""
        if self.slurmd(node):
            return
        script = ["bash", "-c", NODE_SCRIPT, "node", str(self.lab), node, str(self.gpus), self.local_disk]
        spaces = ["nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--mount", "--propagation", "private"]
        run(*spaces, *script, env=self.env)

    def cut(self, node: str) -> None:
        """Disconnects a node: no packet gets in or out, no connection is closed."""
        run("ip", "link", "set", f"v-{node}", "down")

    def heal(self, node: str) -> None:
        """Reconnects a node."""
        run("ip", "link", "set", f"v-{node}", "up")

    def slow(self, node: str, rate: str = "") -> None:
        """Limits what a node sends to `rate`, such as "20mbit"; "" removes the limit. (Few kernels have netem.)"""
        self.inside(node, "tc", "qdisc", "del", "dev", "eth0", "root", check=False)
        if rate:
            self.inside(
                node, "tc", "qdisc", "add", "dev", "eth0", *f"root tbf rate {rate} burst 64k latency 400ms".split()
            )


def kill(pid: int) -> None:
    """Kills a process; does nothing for 0 or a process that has ended."""
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Command line, for manual use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "status", "cut", "heal", "sh"])
    parser.add_argument("name", help="name of the cluster; for cut, heal and sh, of the node")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command of sh")
    parser.add_argument("--nodes", type=int, default=2)
    args = parser.parse_args()
    cluster = Cluster(args.name.rstrip("0123456789"), args.nodes)
    if args.action == "up":
        reason = missing()
        if reason:
            sys.exit(reason)
        cluster.up()
        print(f"export SLURM_CONF={cluster.conf}")
    elif args.action == "down":
        cluster.down()
    elif args.action == "status":
        print(cluster.run("sinfo", "-N", "-l"), cluster.run("squeue"), sep="\n")
    elif args.action == "sh":
        print(cluster.inside(args.name, *args.command), end="")
    else:
        (cluster.cut if args.action == "cut" else cluster.heal)(args.name)


if __name__ == "__main__":
    main()
