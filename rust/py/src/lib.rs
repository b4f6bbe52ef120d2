//! Presents: the extension module `ksmrs._ksmrs`, a table of contents.
//!
//! Each file says what it exports to Python; `python/ksmrs` makes the public names out of it. Unsafe code is in `buffer.rs`
//! and `allocator.rs` alone.
#![deny(unsafe_code)]

mod adopted;
#[allow(unsafe_code)]
mod allocator;
mod buffer;
mod engine;
mod error;
mod live;
mod region;
mod survey;

/// The extension module.
#[pyo3::pymodule]
mod _ksmrs {
    use std::sync::atomic::{AtomicBool, Ordering};

    use pyo3::exceptions::PyImportError;
    use pyo3::prelude::*;

    static LOADED: AtomicBool = AtomicBool::new(false);

    /// Regions, threads and the fault handler belong to the process, which an interpreter beside the first can't share.
    #[pymodule_init]
    fn once(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        if LOADED.swap(true, Ordering::AcqRel) {
            let text = "ksmrs is loaded in this process already: it works in one interpreter, not in subinterpreters";
            return Err(PyImportError::new_err(text));
        }
        // `ksmrs/__init__.py` sees to it that children of os.fork() call `born`.
        ksmrs_broker::client::expect_births();
        #[cfg(feature = "mutants")]
        if let Ok(name) = std::env::var("KSMRS_MUTANT")
            && !(ksmrs_sys::mutant::choose(Some(&name)) | ksmrs_core::mutant::choose(&name))
        {
            return Err(PyImportError::new_err(format!("unknown mutant {name:?}")));
        }
        #[cfg(feature = "mutants")]
        ksmrs_sys::failpoint::configure().map_err(PyImportError::new_err)?;
        Ok(())
    }

    #[pymodule_export]
    use super::adopted::{Adopted, AfterCollection, Holding, regions_touching};
    #[pymodule_export]
    use super::allocator::{begin_heap, end_heap, heap_bytes, is_lent, replace_numpy_functions, set_numpy_handler};
    #[pymodule_export]
    use super::buffer::extent;
    #[pymodule_export]
    use super::engine::{
        born, configure, connect, dirty_tracking, disconnect, get, is_connected, merge, not_merging, page_map,
        process_stats, reassert_handler, run_broker, set, stats, status,
    };
    #[pymodule_export]
    use super::region::{Pin, Region, advise, pin};
    #[pymodule_export]
    use super::survey::Survey;

    /// Bytes of a page.
    #[pymodule_export]
    const PAGE_SIZE: usize = super::live::PAGE_SIZE;

    /// Bytes that ksmrs needs for each page that takes part, as `general_profit` counts them.
    #[pymodule_export]
    const METADATA_PER_PAGE: u64 = ksmrs_broker::METADATA_PER_PAGE;

    /// Bytes of the largest region: what a page table's 32-bit page numbers can tell apart, less than an address space.
    #[pymodule_export]
    const MAX_NBYTES: usize = 1 << 43;
}
