from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Self, final
from weakref import ReferenceType

from typing_extensions import disjoint_base

__all__ = [
    "MAX_NBYTES",
    "METADATA_PER_PAGE",
    "PAGE_SIZE",
    "Adopted",
    "AfterCollection",
    "Holding",
    "Pin",
    "Region",
    "Survey",
    "advise",
    "begin_heap",
    "born",
    "configure",
    "connect",
    "dirty_tracking",
    "disconnect",
    "end_heap",
    "extent",
    "get",
    "heap_bytes",
    "is_connected",
    "is_lent",
    "merge",
    "not_merging",
    "page_map",
    "pin",
    "process_stats",
    "reassert_handler",
    "regions_touching",
    "replace_numpy_functions",
    "run_broker",
    "set",
    "set_numpy_handler",
    "stats",
    "status",
]

PAGE_SIZE: int
MAX_NBYTES: int
METADATA_PER_PAGE: int

@disjoint_base
class Region:
    def __new__(cls, nbytes: int, shared: bool = False, object: int | None = None) -> Self: ...
    @property
    def nbytes(self) -> int:
        """Size in bytes, as asked for."""
    @property
    def shared(self) -> bool:
        """Whether the memory is a shared object, not private anonymous memory."""
    @property
    def closed(self) -> bool:
        """Whether the region was closed."""
    @property
    def address(self) -> int:
        """Address of the first byte, a multiple of 2 MiB."""
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...
    def page_states(self) -> bytes:
        """Return one byte per page: its state, as in `ksmrs.PageState`."""
    def items(self) -> int:
        """Count the pages that show a frame or, as the last scan saw them, have memory."""
    def leave(self) -> None:
        """Unmerge everything and take the memory out of ksmrs; it stays mapped while anybody can see it."""

@final
class Adopted:
    @property
    def address(self) -> int:
        """Address of the first byte, a multiple of the page size."""
    @property
    def nbytes(self) -> int:
        """Bytes, whole pages."""
    @property
    def shared(self) -> bool:
        """Whether it is shared memory, whose object may outlive it."""
    @property
    def unadvised(self) -> bool:
        """Whether every page of it was opted out."""
    def page_states(self) -> bytes:
        """Return one byte per page: its state, as in `ksmrs.PageState`."""
    def give_back(self) -> None:
        """Make it the plain memory that it was, with its bytes; once more does nothing."""
    def abandon(self) -> None:
        """Let go of memory that is being freed: private memory without its bytes, shared memory with them."""
    def retire(self) -> None:
        """No thread of ksmrs touches it from now on; it stays as it is. For the end of the interpreter."""

@final
class AfterCollection:
    def __new__(cls, holds: dict[int, Any], collect: Callable[[], None]) -> Self: ...
    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        """Have `collect` called soon after a garbage collection: a callback for `gc.callbacks`."""

@final
class Holding:
    def __new__(cls, key: int) -> Self: ...
    @property
    def is_open(self) -> bool:
        """Whether any range takes part."""
    def adopt(self, address: int, nbytes: int, exclusive: bool) -> None:
        """Opt in memory of the object that is known by this key: whole pages, in place, while the object is held."""
    def regions(self) -> list[Adopted]:
        """Return the ranges that take part, as they came."""
    def watch(self, owner: Any, address: int, holds: dict[int, Any], abandons: bool) -> ReferenceType[Any]:
        """End all ranges when `owner` is about to be freed, as long as the reference lives, and take the key out of `holds`.

        Its memory begins at `address`. `abandons` says that nobody will look at the bytes any more.
        """

@final
class Pin:
    def release(self) -> None:
        """Let the pages go; once more does nothing."""

@final
class Survey:
    BYTES_PER_PAGE: int
    MOST_PROCESSES: int
    def __new__(cls, memory: int, fraction: float, least_pages: int) -> Self: ...
    def add(self, pid: int) -> None:
        """Take a process in, before the first step; OSError where it may not be looked at."""
    def step(self, seconds: float) -> tuple[str, int, int]:
        """Work for about so long without the interpreter's lock: the stage, pages of it done and in all; the last is "done"."""
    def kept(self) -> tuple[float, float, int]:
        """Return the fractions of contents and of windows that were kept, and how many pages that is."""
    def tally(self, ksmrs: tuple[int, bool], kernel: tuple[int, bool], mappings: int) -> dict[str, Any]:
        """Count for each engine's max_page_sharing and use_zero_pages, and a process's budget of mappings."""
    def classes(self, process: int) -> bytes:
        """Return the class of each page of a process that was kept, by address."""

def extent(buffer: Any) -> tuple[int, int]: ...
def regions_touching(address: int, nbytes: int) -> list[tuple[int, int, int | None]]: ...
def replace_numpy_functions() -> bool: ...
def set_numpy_handler() -> None: ...
def begin_heap(at_least: int) -> None: ...
def end_heap() -> None: ...
def is_lent(address: int) -> bool: ...
def heap_bytes() -> tuple[int, int, int, int]: ...
def advise(address: int, nbytes: int, mergeable: bool) -> None: ...
def pin(address: int, nbytes: int) -> Pin: ...
def configure(
    runtime_dir: str | PathLike[str] | None,
    embedded: bool,
    domain: str,
    broker_command: Sequence[str],
    dirty_tracking: bool,
) -> None: ...
def connect() -> None: ...
def disconnect() -> None: ...
def is_connected() -> bool: ...
def merge(timeout: float | None) -> dict[str, Any]: ...
def stats() -> dict[str, int]: ...
def process_stats() -> dict[str, int]: ...
def not_merging() -> list[str]: ...
def dirty_tracking() -> str: ...
def status() -> dict[str, Any] | None: ...
def page_map() -> list[tuple[int, int, int, bool, bytes]]: ...
def get(knob: str) -> str: ...
def set(knob: str, value: str) -> None: ...
def born() -> None: ...
def reassert_handler() -> None: ...
def run_broker(runtime_dir: str | PathLike[str] | None = None, daemon: bool = False) -> int: ...
