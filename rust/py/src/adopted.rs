//! Memory that the program made, while it takes part: `_ksmrs.Adopted`, a range of it, and `_ksmrs.Holding`, all of one object's.
//!
//! Relies on `python/ksmrs/_adopt.py` for whatever keeps the memory where it is; a range is adopted by `buffer.rs`, which promises that.
//! What ends here when an object dies runs no Python, so that neither a signal's handler nor the limit of recursion can keep it from
//! that. Dropping the last of a range gives the memory back with its bytes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use ksmrs_broker::client;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyWeakrefReference};

use crate::buffer;
use crate::error::IntoPython;
use crate::live::{self, Memory};
use crate::region;

/// A range of whole pages that the program made and opted in.
#[pyclass(frozen, module = "ksmrs._ksmrs")]
pub struct Adopted {
    memory: Arc<Memory>,
}

#[pymethods]
impl Adopted {
    /// Address of the first byte, a multiple of the page size.
    #[getter]
    fn address(&self) -> usize {
        self.memory.region.address()
    }

    /// Bytes, whole pages.
    #[getter]
    fn nbytes(&self) -> usize {
        self.memory.region.len()
    }

    /// Whether it is shared memory, whose object may outlive it.
    #[getter]
    fn shared(&self) -> bool {
        matches!(self.memory.region.kind(), client::Kind::Shared)
    }

    /// Whether every page of it was opted out.
    #[getter]
    fn unadvised(&self) -> bool {
        self.memory.region.is_unadvised()
    }

    /// One byte per page: its state, as in `ksmrs.PageState`.
    fn page_states<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        region::page_states(py, &self.memory.region)
    }

    /// Makes it the plain memory that it was, with its bytes; once more does nothing.
    fn give_back(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.memory.give_back()).into_python(py)
    }

    /// Lets go of memory that is being freed: private memory without its bytes, shared memory with them; once more does nothing.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.memory.abandon()).into_python(py)
    }

    /// No thread of ksmrs touches it from now on; it stays as it is. For the end of the interpreter.
    fn retire(&self, py: Python<'_>) {
        py.detach(|| self.memory.region.retire());
    }
}

/// The ranges of one object, which ended ones leave by themselves.
#[derive(Clone, Default)]
struct Ranges(Arc<Mutex<Vec<Arc<Memory>>>>);

impl Ranges {
    fn add(&self, memory: Arc<Memory>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }

    fn open(&self) -> Vec<Arc<Memory>> {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|memory| !memory.is_closed());
        ranges.clone()
    }

    fn is_open(&self) -> bool {
        let ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().any(|memory| !memory.is_closed())
    }
}

/// What of one object's memory takes part.
#[pyclass(frozen, module = "ksmrs._ksmrs")]
pub struct Holding {
    key: usize,
    ranges: Ranges,
}

impl Holding {
    /// Takes in a region just adopted.
    pub fn take(&self, region: Arc<client::Region>) {
        self.ranges.add(Memory::new(region, Some(self.key)));
    }
}

#[pymethods]
impl Holding {
    /// Of the object that is known by this number.
    #[new]
    fn new(key: usize) -> Holding {
        Holding {
            key,
            ranges: Ranges::default(),
        }
    }

    /// Whether any range takes part.
    #[getter]
    fn is_open(&self) -> bool {
        self.ranges.is_open()
    }

    /// The ranges that take part, as they came.
    fn regions(&self) -> Vec<Adopted> {
        let open = self.ranges.open().into_iter();
        open.map(|memory| Adopted { memory }).collect()
    }

    /// Ends all ranges when this array, whose memory begins at that address, is about to be freed, and takes its number out of `holds`.
    /// `abandons` says that nobody will look at its bytes any more. Returns a weak reference, for as long as whose life that is done.
    fn watch<'py>(
        &self,
        owner: &Bound<'py, PyAny>,
        address: usize,
        holds: Py<PyDict>,
        abandons: bool,
    ) -> PyResult<Bound<'py, PyWeakrefReference>> {
        watched(|watched| watched.insert(address, self.ranges.clone()));
        let watcher = Watcher {
            key: self.key,
            address,
            ranges: self.ranges.clone(),
            holds,
            abandons,
        };
        // Nobody but the reference has the watcher: see its drop.
        PyWeakrefReference::new_with(owner, Bound::new(owner.py(), watcher)?)
    }
}

/// What a weak reference calls at the end of the object that it watches.
#[pyclass(frozen, module = "ksmrs._ksmrs")]
struct Watcher {
    key: usize,
    address: usize,
    ranges: Ranges,
    holds: Py<PyDict>,
    abandons: bool,
}

/// The ranges of watched arrays, by where the arrays' memory begins. Whoever locks it has the interpreter's lock.
static WATCHED: LazyLock<Mutex<HashMap<usize, Ranges>>> = LazyLock::new(Mutex::default);
/// How many there are.
static WATCHES: AtomicUsize = AtomicUsize::new(0);

fn watched<T>(change: impl FnOnce(&mut HashMap<usize, Ranges>) -> T) -> T {
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    let done = change(&mut watched);
    WATCHES.store(watched.len(), Ordering::Release);
    done
}

/// NumPy is about to free this memory. From NumPy 2.5 on it does before it calls weak references.
pub fn freed(address: usize) {
    if WATCHES.load(Ordering::Acquire) == 0 {
        return;
    }
    let Some(ranges) = watched(|watched| watched.remove(&address)) else {
        return;
    };
    for memory in ranges.open() {
        // Private memory of an array's own: that cannot fail.
        let _ = memory.abandon();
    }
}

impl Watcher {
    /// The memory that it watched may be another array's by now.
    fn ends(&self) {
        watched(|watched| {
            let ours = watched
                .get(&self.address)
                .is_some_and(|ranges| Arc::ptr_eq(&ranges.0, &self.ranges.0));
            ours.then(|| watched.remove(&self.address))
        });
    }
}

#[pymethods]
impl Watcher {
    fn __call__(&self, py: Python<'_>, _reference: &Bound<'_, PyAny>) {
        self.ends();
        let open = self.ranges.open();
        py.detach(|| {
            for memory in &open {
                // Without memory for copies of bytes that hardly anybody will look at: what must not be is a merged page in free memory.
                if self.abandons || memory.give_back().is_err() {
                    let _ = memory.abandon();
                }
            }
        });
        // It may have been taken out before.
        let _ = self.holds.bind(py).del_item(self.key);
    }
}

impl Drop for Watcher {
    /// Python drops it with its reference; and where it could not call it, at the limit of recursion, right after that, while the object's
    /// memory is still there.
    fn drop(&mut self) {
        self.ends();
        for memory in self.ranges.open().iter().filter(|memory| !memory.region.is_retired()) {
            // Else it stays a region: see `client::Region`'s drop.
            let _ = memory.give_back();
        }
    }
}

/// Has what is held looked at after garbage collections: in `gc.callbacks`, from which no exception comes out, so it runs no Python in
/// the thread that hears signals.
#[pyclass(frozen, module = "ksmrs._ksmrs")]
pub struct AfterCollection {
    holds: Py<PyDict>,
    collect: Py<PyAny>,
}

/// Looking at each hold in each young collection would make a program with many of them slow.
const FEW: usize = 64;

#[pymethods]
impl AfterCollection {
    #[new]
    fn new(holds: Py<PyDict>, collect: Py<PyAny>) -> AfterCollection {
        AfterCollection { holds, collect }
    }

    fn __call__(&self, py: Python<'_>, phase: &str, info: &Bound<'_, PyDict>) -> PyResult<()> {
        let oldest = || {
            info.get_item("generation")
                .is_ok_and(|is| is.is_some_and(|is| is.eq(2).unwrap_or(false)))
        };
        if phase != "stop" || self.holds.bind(py).len() > FEW && !oldest() {
            return Ok(());
        }
        if rustix::thread::gettid() == rustix::process::getpid() {
            buffer::soon(py, &self.collect);
            return Ok(());
        }
        self.collect.call0(py).map(drop)
    }
}

/// The ranges of open regions that a range of bytes touches: address, bytes, and the number of the object that the program made it as.
#[pyfunction]
pub fn regions_touching(address: usize, nbytes: usize) -> Vec<(usize, usize, Option<usize>)> {
    live::touching(address, nbytes)
        .into_iter()
        .map(|memory| (memory.region.address(), memory.region.len(), memory.holder()))
        .collect()
}
