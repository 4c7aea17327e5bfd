"""Output: many processes and threads, one pipe or file; no line is lost, and none is torn."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing, suppress

import pytest

from monitoring.log_output import Output

from .conftest import ROOT, project_environment, wait_until

THREADS = 4
LINES = 60

WRITE = f"""
import django, logging, random, sys, threading
django.setup()
from monitoring.logging import log_to
log_to("stdout")
logger = logging.getLogger("writer")
process = sys.argv[1]
def work(number):
    dice = random.Random(number)
    for count in range({LINES}):
        size = dice.choice([10, 300, 3000, 5000, 9000, 20_000])
        extra = {{"by": f"{{process}}-{{number}}-{{count}}", "text": "x" * size}}
        logger.info("line %s of %s", count, number, extra=extra)
threads = [threading.Thread(target=work, args=(number,)) for number in range({THREADS})]
sys.stdin.read(1)
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def writers(count, stdout):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(number)],
            env=project_environment(),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=stdout,
        )
        for number in range(count)
    ]
    for process in started:  # all at once, when the last one is ready
        process.stdin.write(b"x")
        process.stdin.close()
    return started


def check_lines(data, processes):
    said = [json.loads(line)["by"] for line in data.decode().split("\n")[:-1]]
    assert data.endswith(b"\n")
    expected = [f"{p}-{t}-{n}" for p in range(processes) for t in range(THREADS) for n in range(LINES)]
    assert sorted(said) == sorted(expected)
    for writer in {name.rpartition("-")[0] for name in said}:  # each thread's in its order
        numbers = [int(name.rpartition("-")[2]) for name in said if name.startswith(f"{writer}-")]
        assert numbers == sorted(numbers)


def test_pipe_of_several_processes_with_a_slow_reader():
    read_end, write_end = os.pipe()
    processes = writers(4, write_end)
    os.close(write_end)
    data = b""
    # In pieces of no round size, so that the pipe is nearly full all the time.
    while piece := os.read(read_end, 1500):
        data += piece
    os.close(read_end)
    assert [process.wait(30) for process in processes] == [0] * 4
    check_lines(data, 4)


def test_file_of_several_processes(tmp_path):
    with (tmp_path / "log").open("ab") as file:
        processes = writers(2, file)
        assert [process.wait(30) for process in processes] == [0] * 2
    check_lines((tmp_path / "log").read_bytes(), 2)


@pytest.fixture
def pipe():
    """A full pipe: (read end, its Output)."""
    read_end, write_end = os.pipe()
    output = Output(write_end)
    yield read_end, output
    for end in (read_end, write_end):
        with suppress(OSError):
            os.close(end)


def fill(output):
    os.set_blocking(output.descriptor, False)
    written = 0
    for size in (4096, 1):
        try:
            while True:
                written += os.write(output.descriptor, b"." * size)
        except BlockingIOError:
            pass
    return written


def read(descriptor, size):
    data = b""
    while len(data) < size:
        data += os.read(descriptor, size - len(data))
    return data


@pytest.mark.parametrize("blocking", [True, False])
def test_full_pipe_is_waited_for(pipe, blocking):
    read_end, output = pipe
    filled = fill(output)
    os.set_blocking(output.descriptor, blocking)
    line = b"a" * 10_000 + b"\n"
    thread = threading.Thread(target=output.write, args=(line,))
    thread.start()
    assert read(read_end, filled) == b"." * filled
    assert read(read_end, len(line)) == line
    thread.join(10)
    assert output.lost == 0


def test_reader_that_is_gone_raises_nothing(pipe):
    read_end, output = pipe
    os.close(read_end)
    output.write(b"one\n")
    output.write(b"two\n")
    assert output.lost == 2


def test_full_disk_raises_nothing():
    with closing(open("/dev/full", "wb", buffering=0)) as full:
        output = Output(full.fileno())
        output.write(b"one\n")
        assert output.lost == 1


def test_file_that_is_closed_raises_nothing(tmp_path):
    with (tmp_path / "log").open("wb") as file:
        output = Output(file.fileno())
    output.write(b"one\n")
    assert output.lost == 1


def test_line_after_a_torn_one_stands_by_itself(tmp_path):
    """A file that may grow to 10 bytes only takes the beginning of a line."""
    code = f"""
import os, resource, signal, sys
from monitoring.log_output import Output
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
output = Output(os.open({str(tmp_path / "log")!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
output.write(b"a line of twenty...\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
output.write(b"whole\\n")
print(output.lost)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "1\n"
    assert (tmp_path / "log").read_text() == "a line of \nwhole\n"


def test_line_of_a_signal_handler_goes_behind_the_one_it_interrupts(pipe):
    read_end, output = pipe
    filled = fill(output)
    os.set_blocking(output.descriptor, True)
    outer, inner = b"a" * 10_000 + b"\n", b"inner\n"
    data = []

    def interrupt_and_read():
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: interrupted)
        data.append(read(read_end, filled + len(outer) + len(inner)))

    interrupted = []

    def on_signal(*_):
        output.write(inner)
        interrupted.append(True)

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        thread = threading.Thread(target=interrupt_and_read)
        threading.Timer(0, lambda: (wait_until(lambda: output._is_writing), thread.start())).start()
        output.write(outer)
        thread.join(20)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert data[0][filled:] == outer + inner


def test_line_that_a_signal_handler_tears_is_finished_first(pipe):
    read_end, output = pipe
    filled = fill(output)
    os.set_blocking(output.descriptor, True)
    line = b"a" * 10_000 + b"\n"

    class Stop(Exception):
        pass

    def on_signal(*_):
        raise Stop

    def interrupt():
        wait_until(lambda: output._is_writing)
        read(read_end, 8192)  # room for the beginning of the line
        wait_until(lambda: fill_of(read_end) >= filled - 8192 + 4096)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Stop):
            output.write(line)
        thread.join(20)
    finally:
        signal.signal(signal.SIGUSR1, before)
    reader = []
    thread = threading.Thread(target=lambda: reader.append(read(read_end, filled - 8192 + len(line) + 5)))
    thread.start()
    output.write(b"next\n")
    thread.join(20)
    assert reader[0][filled - 8192 :] == line + b"next\n"


def fill_of(descriptor):
    import array
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


HOLD = """
import fcntl, sys
fcntl.lockf(1, fcntl.LOCK_EX)
sys.stderr.write("held")
sys.stderr.flush()
sys.stdin.read()
"""


def test_process_that_stands_still_with_the_pipe_is_not_waited_for_long(pipe, monkeypatch):
    read_end, output = pipe
    output._patience_seconds = 0.2
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=output.descriptor, stderr=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stderr.read(4) == b"held"
            os.kill(holder.pid, signal.SIGSTOP)
            output.write(b"one\n")
            output.write(b"two\n")
            assert read(read_end, 8) == b"one\ntwo\n"
            assert output._patience_seconds == 0  # the second one did not wait at all
        finally:
            holder.kill()
    output.write(b"three\n")
    assert output._patience_seconds > 0
    assert output.lost == 0


def test_process_that_was_forked_amidst_a_line_writes_its_own(pipe):
    read_end, output = pipe
    output._lock.acquire()
    output._is_writing = True
    output._lines.append(b"the parent's\n")
    pid = os.fork()
    if pid == 0:
        output.forked()
        thread = threading.Thread(target=output.write, args=(b"the child's\n",))
        thread.start()
        thread.join(10)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert read(read_end, 12) == b"the child's\n"
