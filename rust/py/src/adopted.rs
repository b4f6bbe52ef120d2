//! `_ksmrs.Adopted`: memory that the program made, while it takes part.
//!
//! Relies on `python/ksmrs/_adopt.py` for whatever keeps the memory where it is; made by `buffer.rs`, which promises that. Dropping
//! one gives the memory back with its bytes.

use std::sync::Arc;

use ksmrs_broker::client;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::IntoPython;
use crate::live::{self, Memory};
use crate::region;

/// A range of whole pages that the program made and opted in.
#[pyclass(frozen, module = "ksmrs._ksmrs")]
pub struct Adopted {
    memory: Arc<Memory>,
}

impl Adopted {
    /// Takes a region just adopted into the table of live memory.
    pub fn new(region: Arc<client::Region>) -> Adopted {
        Adopted {
            memory: Memory::new(region),
        }
    }
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
        py.detach(|| self.memory.region.give_back()).into_python(py)?;
        self.memory.close();
        Ok(())
    }

    /// Lets go of memory that is being freed: private memory without its bytes, shared memory with them; once more does nothing.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.memory.region.abandon()).into_python(py)?;
        self.memory.close();
        Ok(())
    }

    /// No thread of ksmrs touches it from now on; it stays as it is. For the end of the interpreter.
    fn retire(&self, py: Python<'_>) {
        py.detach(|| self.memory.region.retire());
    }
}

/// The ranges of open regions that a range of bytes touches: address, bytes, and whether the program made it.
#[pyfunction]
pub fn regions_touching(address: usize, nbytes: usize) -> Vec<(usize, usize, bool)> {
    live::touching(address, nbytes)
        .into_iter()
        .map(|memory| {
            let region = &memory.region;
            (region.address(), region.len(), region.is_adopted())
        })
        .collect()
}
