"""One writer a folder: a lock that lives in the folder, over hosts and file systems, and outlives no holder for long.

    FOLDER/NAME.lock      who holds it: user, host, process, job, since when; its time of change is the holder's pulse

Kernel locks (flock) are not shared between the hosts of many a Lustre or NFS mount, and a service that keeps leases is
not everywhere. Hard links are: `link` makes the file with its content, for one process alone, also over NFS. A holder
is dead, and its lock taken over, where

- it ran on this machine and its process is gone;
- it was an earlier start of the same job (Slurm's restart count, torchrun's);
- nothing was heard of it for `DEAD_SECONDS`, by this process's own clock, for clocks of hosts differ.
"""

import contextlib
import errno
import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

PULSE_SECONDS = 10.0
DEAD_SECONDS = 300.0
"""A holder elsewhere is dead after so long without a pulse."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock."""

    token: str
    """Of this hold alone."""
    user: str
    host: str
    pid: int
    machine: str
    """Boot and process-id space, in which `pid` and `began` are one process for ever; "" where neither is known."""
    began: str
    """When the process began, in the kernel's ticks."""
    job: str
    """Slurm's job, or torchrun's run; "" without either."""
    start: tuple[int, int] = (0, 0)
    """Which start of the job: Slurm's and torchrun's counts of restarts."""
    since: float = 0.0
    """Seconds since 1970, by the holder's clock."""

    @classmethod
    def this_process(cls) -> "Holder":
        job = os.environ.get("SLURM_JOB_ID")
        run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return cls(
            token=uuid.uuid4().hex,
            user=_user(),
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            began=_began(os.getpid()) or "",
            job=f"Slurm job {job}" if job else "" if run == "none" else f"torchrun {run}",
            start=(_count("SLURM_RESTART_COUNT"), _count("TORCHELASTIC_RESTART_COUNT")),
            since=time.time(),
        )

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended: it was one of this machine's."""
        return self.machine != "" and self.machine == _machine() and _began(self.pid) != self.began

    def is_earlier_start_for(self, other: "Holder") -> bool:
        """Whether `other` is a later start of the same job, for which this one has made way."""
        return self.job != "" and self.job == other.job and self.start < other.start

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        job = f", {self.job}" if self.job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}, since {since}"


class FolderInUse(ValueError):
    """Another process, which lives, writes into the folder."""


class FolderLock:
    """Holds FOLDER/NAME.lock from `take` to `release`.

    Args:
        what: is held, for messages: `--save runs/a`.
        say: shows the user a line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        what: str,
        name: str = "run",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._path, self._what, self._say = folder / f"{name}.lock", what, say
        self.beside: Callable[[], None] = lambda: None
        """Called with every pulse, in the lock's thread."""
        self._own = Holder.this_process()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_lost = False
        """Another process has taken it over, which held this one for dead."""

    def take(self) -> None:
        """Take the lock, at once or when its holder is found to be dead.

        Raises:
            FolderInUse: it is held by a process that lives.
            OSError: nothing can be written there.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._own = Holder.this_process()
        while not self._create(self._path):
            held = _read(self._path)
            if held is None:
                continue  # released meanwhile
            holder, _ = held
            if holder is not None and holder.is_earlier_start_for(self._own):
                reason = "an earlier start of this job"
            elif holder is not None and holder.is_gone:
                reason = "which has ended without releasing it"
            elif self._is_silent(holder):
                reason = f"of which nothing was heard for {DEAD_SECONDS:.0f} s"
            else:
                continue
            if self._take_over(holder):
                self._say(f"{self._what} was held by {holder or 'a damaged lock'}, {reason}: taken over")
                break
        self._closed.clear()
        self._thread = threading.Thread(target=self._beat, name="folder-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Free the folder, if it is still held. May be called again."""
        self._closed.set()
        if self._thread is None:
            return
        self._thread.join(PULSE_SECONDS)
        self._thread = None
        with suppress(OSError):
            if self._is_own():
                self._path.unlink()

    def check(self) -> None:
        """See that the lock is still this process's, before something is changed that it guards.

        Raises:
            FolderInUse: it was taken over.
        """
        with suppress(OSError):  # a file system's bad moment says nothing
            self.is_lost = self.is_lost or not self._is_own()
        if self.is_lost:
            held = _read(self._path)
            raise FolderInUse(
                f"{self._what} was taken over by {held[0] if held and held[0] else 'another process'}: nothing more "
                "is written there; see that one run at a time has it"
            )

    @property
    def token(self) -> str:
        """What tells this hold from any other."""
        return self._own.token

    # ----------------------------------------------------------------------------------------------------------- taking

    def _create(self, path: Path) -> bool:
        """Whether this process has made the file `path`, with itself in it."""
        temporary = path.with_name(f"{path.name}.{self._own.token}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(self._own), file)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                # Over NFS the answer to a link that was made can be lost, and the question asked again.
                return temporary.stat().st_nlink == 2
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._create_exclusively(path)
            return True
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _create_exclusively(self, path: Path) -> bool:
        """The same where the file system has no hard links."""
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(asdict(self._own), file)
        except FileExistsError:
            return False
        return True

    def _is_silent(self, holder: Holder | None) -> bool:
        """Watch the lock until its holder shows a pulse (FolderInUse), releases it (False), or is silent for too long.

        An age by the file system's clock counts as silence seen, but for two pulses.
        """
        first = _read(self._path)
        if first is None:
            return False
        age = max(0.0, self._now_there() - first[1])
        wanted = max(DEAD_SECONDS - age, 2.5 * PULSE_SECONDS)
        started, told = time.monotonic(), False
        while True:
            if (now := _read(self._path)) is None or (now[0] and now[0].token) != (holder and holder.token):
                return False
            same_machine = holder is not None and holder.machine == _machine() != ""
            if now[1] != first[1] or same_machine:
                raise FolderInUse(
                    f"{self._what} is in use by {holder or 'another process'}, alive "
                    f"{max(0.0, self._now_there() - now[1]):.0f} s ago: wait for it, stop it, or give another folder"
                )
            silent = time.monotonic() - started
            if silent > wanted:
                return True
            if silent > 1.5 * PULSE_SECONDS and not told:
                told = True
                self._say(
                    f"{self._what} is held by {holder or 'a damaged lock'}, of which nothing was heard for "
                    f"{age + silent:.0f} s: it is taken over in {wanted - silent:.0f} s if that stays so; if it is "
                    f"known to be dead, remove {self._path}"
                )
            time.sleep(min(1.0, PULSE_SECONDS / 4))

    def _take_over(self, dead: Holder | None) -> bool:
        """Put this process into the dead one's place, unless another does.

        The claim's name holds the dead one's token, so of all who found it dead one makes the claim.
        """
        claim = self._path.with_name(f"{self._path.name}.{dead.token if dead else 'damaged'}.claim")
        if not self._create(claim):
            held = _read(claim)
            if held is not None and ((held[0] is not None and held[0].is_gone) or self._now_there() - held[1] > 60):
                with suppress(OSError):  # it was killed in these few lines
                    claim.unlink()
            time.sleep(0.2)
            return False
        try:
            now = _read(self._path)
            if now is None or (now[0] and now[0].token) != (dead and dead.token):
                return False  # whoever claimed before has the lock by now
            os.replace(claim, self._path)
            return True
        finally:
            with suppress(OSError):
                claim.unlink()

    def _now_there(self) -> float:
        """The time, by the clock of whoever stamps the folder's files."""
        probe = self._path.with_name(f"{self._path.name}.{self._own.token}.now")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            with suppress(OSError):
                probe.unlink()

    # ---------------------------------------------------------------------------------------------------------- holding

    def _beat(self) -> None:
        while not self._closed.wait(PULSE_SECONDS):
            with suppress(OSError):
                if self._is_own():
                    os.utime(self._path)
                elif not self._path.exists():  # somebody has cleaned up
                    self.is_lost = not self._create(self._path)
                else:
                    self.is_lost = True
            self.beside()

    def _is_own(self) -> bool:
        """Whether the file names this process. Raises OSError where it cannot be read."""
        with self._path.open(encoding="utf-8") as file:
            found = _parsed(file.read(10_000))
        return found is not None and found.token == self._own.token


def is_held_by_another(folder: Path, token: str | None, name: str = "run") -> bool:
    """Whether a process holds the folder that is not known to be gone, under another token than `token`."""
    found = None
    with suppress(OSError):
        found = _read(folder / f"{name}.lock")
    holder = found[0] if found is not None else None
    if holder is None or holder.token == token or holder.is_gone:
        return False
    return not holder.is_earlier_start_for(Holder.this_process())


def holder_of(folder: Path, name: str = "run") -> tuple[Holder | None, float] | None:
    """Who holds the folder (None: the lock is damaged) and the seconds since its last pulse; None where nobody does.

    By this machine's clock and the file system's, since nothing is written to ask for the latter.
    """
    try:
        found = _read(folder / f"{name}.lock")
    except OSError:
        return None
    return None if found is None else (found[0], max(0.0, time.time() - found[1]))


@contextmanager
def held(folder: Path, *, what: str, name: str, say: Callable[[str], None] = print) -> Iterator[FolderLock]:
    """Holds a lock as long as the context lasts; see `FolderLock`."""
    lock = FolderLock(folder, what=what, name=name, say=say)
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def _read(path: Path) -> tuple[Holder | None, float] | None:
    """The holder (None of a damaged file) and its last pulse; None where there is no file.

    The file is opened: over NFS that asks the server, where `stat` may answer from a cache.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return _parsed(file.read(10_000)), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _parsed(text: str) -> Holder | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        values = json.loads(text)
        known = {field.name: values[field.name] for field in fields(Holder)}
        return Holder(**known | {"start": tuple(known["start"])})
    return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose users have no names
        return str(os.getuid())


def _count(variable: str) -> int:
    text = os.environ.get(variable, "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """Start of a process of this machine; None where there is none, or one that has ended and waits for its parent."""
    try:
        state, *rest = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
