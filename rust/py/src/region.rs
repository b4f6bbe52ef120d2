//! `_ksmrs.Region` and what is done to ranges of it.
//!
//! Relies on `ksmrs_broker::client::Region` for the memory; its drop unmaps, so it is only let go once no export is left.
//! Never holds the GIL while it waits for the kernel or the broker.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ksmrs_broker::client::{self, Kind};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{self, IntoPython};
use crate::live::{self, Memory};

/// Mergeable memory that ksmrs made.
#[pyclass(subclass, weakref, frozen, module = "ksmrs._ksmrs")]
pub struct Region {
    /// `None` once it was closed and nobody can see it any more.
    memory: Mutex<Option<Arc<Memory>>>,
    exports: AtomicUsize,
    nbytes: usize,
    kind: Kind,
}

impl Region {
    fn memory(&self, py: Python<'_>) -> PyResult<Arc<Memory>> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone();
        memory
            .filter(|memory| !memory.is_closed())
            .ok_or_else(|| error::closed(py))
    }

    /// Counts an export in; its address and length.
    pub fn export(&self, py: Python<'_>) -> PyResult<(usize, usize)> {
        let memory = self.memory(py)?;
        self.exports.fetch_add(1, Ordering::AcqRel);
        Ok((memory.region.address(), self.nbytes))
    }

    /// Counts an export out; the last one of a closed region frees it.
    pub fn export_ended(&self) {
        self.exports.fetch_sub(1, Ordering::AcqRel);
        self.let_go_if_unseen();
    }

    fn let_go_if_unseen(&self) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let unseen = self.exports.load(Ordering::Acquire) == 0;
        let gone = memory.take_if(|memory| unseen && memory.is_closed());
        drop(memory);
        // Unmapped here, unless a pin or an advice is still at it.
        drop(gone);
    }
}

/// One byte per page, or a MemoryError where there is no room for them.
pub fn page_states<'py>(py: Python<'py>, region: &client::Region) -> PyResult<Bound<'py, PyBytes>> {
    let states = region.page_states();
    PyBytes::new_with(py, states.len(), |bytes| {
        bytes.copy_from_slice(&states);
        Ok(())
    })
}

#[pymethods]
impl Region {
    #[new]
    #[pyo3(signature = (nbytes, shared = false, object = None))]
    fn new(py: Python<'_>, nbytes: usize, shared: bool, object: Option<i32>) -> PyResult<Region> {
        let kind = if shared || object.is_some() {
            Kind::Shared
        } else {
            Kind::Private
        };
        let made = py.detach(|| match object {
            None => client::Region::new(nbytes, kind),
            Some(number) => client::Region::named(nbytes, number),
        });
        let region = made.into_python(py)?;
        let memory = Mutex::new(Some(Memory::new(region, None)));
        Ok(Region {
            memory,
            exports: AtomicUsize::new(0),
            nbytes,
            kind,
        })
    }

    /// Size in bytes, as asked for.
    #[getter]
    fn nbytes(&self) -> usize {
        self.nbytes
    }

    fn __len__(&self) -> usize {
        self.nbytes
    }

    /// Whether the memory is a shared object, not private anonymous memory.
    #[getter]
    fn shared(&self) -> bool {
        matches!(self.kind, Kind::Shared)
    }

    /// Whether the region was closed.
    #[getter]
    fn closed(&self) -> bool {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.as_ref().is_none_or(|memory| memory.is_closed())
    }

    /// Address of the first byte, a multiple of 2 MiB.
    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.memory(py)?.region.address())
    }

    /// One byte per page: its state, as in `ksmrs.PageState`.
    fn page_states<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        page_states(py, &self.memory(py)?.region)
    }

    /// Pages that show a frame or, as the last scan saw them, have memory.
    fn items(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.memory(py)?.region.items())
    }

    /// Unmerges everything and takes the memory out of ksmrs; it stays mapped while anybody can see it.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        let Ok(memory) = self.memory(py) else { return Ok(()) };
        if !memory.close() {
            return Ok(());
        }
        // Nobody can look at it any more, and nobody begins to: closed regions export nothing. So nothing needs copying.
        let seen = self.exports.load(Ordering::Acquire) != 0;
        if seen && let Err(refused) = py.detach(|| memory.region.leave()) {
            memory.reopen();
            return Err(error::from_client(py, refused));
        }
        drop(memory);
        self.let_go_if_unseen();
        Ok(())
    }
}

/// Opts the whole pages of a range in or out.
#[pyfunction]
pub fn advise(py: Python<'_>, address: usize, nbytes: usize, mergeable: bool) -> PyResult<()> {
    let within = live::find(py, address, nbytes)?;
    let pages = within.whole_pages();
    if pages.is_empty() {
        let text = format!(
            "no whole page of {} bytes lies in the {nbytes} bytes at {address:#x}",
            live::PAGE_SIZE
        );
        return Err(error::named(py, "ArgumentError", text));
    }
    let region = &within.memory.region;
    py.detach(|| {
        if mergeable {
            region.advise_mergeable(pages)
        } else {
            region.advise_unmergeable(pages)
        }
    })
    .into_python(py)
}

/// Gives every page that a range touches memory of its own, until the pin is released.
#[pyfunction]
pub fn pin(py: Python<'_>, address: usize, nbytes: usize) -> PyResult<Pin> {
    let within = live::find(py, address, nbytes)?;
    let pages = within.touched_pages();
    if !pages.is_empty() {
        py.detach(|| within.memory.region.pin(pages.clone())).into_python(py)?;
    }
    Ok(Pin {
        held: Mutex::new(Some((within.memory, pages))),
    })
}

/// Pages that are left alone while this lives.
#[pyclass(frozen, module = "ksmrs._ksmrs")]
pub struct Pin {
    held: Mutex<Option<(Arc<Memory>, Range<usize>)>>,
}

#[pymethods]
impl Pin {
    /// Lets the pages go; once more does nothing.
    fn release(&self) {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((memory, pages)) = held.filter(|(_, pages)| !pages.is_empty()) {
            memory.region.unpin(pages);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.release();
    }
}
