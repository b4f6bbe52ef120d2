"""Forks of a process whose other threads are just asking ksmrs something, or are the first to use it.

What such a thread had locked stays locked in the child. Every child must come back from os.fork() and be a client like another.
"""

from __future__ import annotations

from children import Child

FORKED = """
def all_end(act, count):
    for _ in range(count):
        child = forked(act)
        try:
            wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the end of a child", 20)
        except AssertionError:
            os.kill(child, signal.SIGKILL)
            raise

def meets_the_broker():
    region = ksmrs.Region(1 << 20)
    ksmrs.merge(10)
    assert not ksmrs._ksmrs.status()["embedded"]
"""
POLLED = """
stop = threading.Event()
def poll():
    while not stop.is_set():
        ksmrs.stats()
poller = threading.Thread(target=poll)
poller.start()
"""
OTHER = """
region = ksmrs.Region(1 << 20)
ksmrs.connect()
print("up")
sys.stdin.read()
"""


def run(program: str) -> None:
    with Child(OTHER) as other:
        other.line()
        with Child(FORKED + program) as forking:
            forking.end()
        other.end_of_input()
        other.end()


def test_children_of_a_process_without_regions_that_is_asking_for_counters() -> None:
    run(POLLED + "all_end(lambda: None, 50); stop.set(); poller.join()")


def test_children_of_a_disconnected_process_that_is_asking_for_counters() -> None:
    run(
        "pair = [ksmrs.array(np.arange(1 << 17)) for _ in range(2)]; ksmrs.merge(10); ksmrs.disconnect()\n"
        + POLLED
        + "all_end(meets_the_broker, 5); stop.set(); poller.join()"
    )


def test_children_of_a_process_that_is_beginning() -> None:
    program = """
    beginning = threading.Thread(target=lambda: ksmrs.Region(1 << 20))
    beginning.start()
    time.sleep(chance * 0.004)
    all_end(meets_the_broker, 1)
    beginning.join()
    """
    for turn in range(12):
        run(f"chance = {turn / 12}\n" + "\n".join(line.strip() for line in program.splitlines()))
