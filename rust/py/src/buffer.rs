//! Python's buffer protocol, both ways: regions export their bytes, and other objects tell where theirs are.
//!
//! The one file of this crate that speaks CPython's C interface. Relies on [`crate::region::Region`] for memory that outlives
//! its exports: every export holds a reference to the Python object, which holds the mapping. Also adopts memory that such
//! objects own, and has the interpreter look soon whether anybody refers to them still. Never reads or writes the memory itself, and never
//! makes a slice of it.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use ksmrs_broker::client::{self, Foreign};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::adopted::Holding;
use crate::error::{self, IntoPython};
use crate::region::Region;

#[pymethods]
impl Region {
    /// Exports the region as writable bytes.
    ///
    /// # Safety
    /// Called by the interpreter only, with a `view` that it may fill.
    #[allow(unsafe_code)]
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let exported = slf.get().export(slf.py());
        let (address, nbytes) = match exported {
            Ok(extent) => extent,
            Err(refused) => {
                // SAFETY: `view` is the interpreter's; a failed export must leave its owner empty.
                unsafe { (*view).obj = ptr::null_mut() };
                return Err(refused);
            }
        };
        let bytes = ptr::with_exposed_provenance_mut(address);
        // SAFETY: `view` is the interpreter's to fill. `address..address + nbytes` is mapped and writable until the last
        // export is released: FillInfo takes a reference to `slf` for the view, and `Region` counts the export made above.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), bytes, nbytes as ffi::Py_ssize_t, 0, flags) };
        if filled == 0 {
            return Ok(());
        }
        slf.get().export_ended();
        Err(PyErr::fetch(slf.py()))
    }

    /// Counts an export out.
    ///
    /// # Safety
    /// Called by the interpreter only, once for each view that `__getbuffer__` filled.
    #[allow(unsafe_code)]
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.export_ended();
    }
}

#[pymethods]
impl Holding {
    /// Opts in memory that the program made, private or shared: whole pages, in place. `_adopt.py` holds the object that the memory belongs
    /// to before it calls this, and until the range has been given back or abandoned.
    #[allow(unsafe_code)]
    fn adopt(&self, py: Python<'_>, address: usize, nbytes: usize, exclusive: bool) -> PyResult<()> {
        let adopted = py.detach(|| {
            // SAFETY: the caller holds an export of the buffer, or watches an array that owns it: its weak reference keeps it from being
            // resized, and that or the function that NumPy frees its memory with (`allocator.rs`) ends the range before it is freed.
            // Neither can be unmapped, moved or resized until then. What the program does to the mapping behind its owner's
            // back (mprotect, mremap through ctypes) cannot be excluded; the documentation of `madvise` names it.
            let foreign = unsafe { Foreign::look(address..address + nbytes, exclusive) }?;
            client::Region::adopt(foreign)
        });
        self.take(adopted.into_python(py)?);
        Ok(())
    }
}

/// Where the bytes of any object with the buffer protocol are: first address and length, strides of either sign included.
#[pyfunction]
pub fn extent(buffer: &Bound<'_, PyAny>) -> PyResult<(usize, usize)> {
    let view = PyUntypedBuffer::get(buffer).map_err(|refused| error::foreign(buffer.py(), &refused))?;
    if view.suboffsets().is_some() {
        return Err(error::named(
            buffer.py(),
            "ForeignMemoryError",
            "the buffer is an array of pointers, not one range of memory".to_owned(),
        ));
    }
    let (mut low, mut high) = (view.buf_ptr().addr(), view.buf_ptr().addr());
    for (&count, &stride) in view.shape().iter().zip(view.strides()) {
        match count {
            0 => return Ok((low, 0)),
            _ if stride < 0 => low -= (count - 1) * stride.unsigned_abs(),
            _ => high += (count - 1) * stride.unsigned_abs(),
        }
    }
    Ok((low, high + view.item_size() - low))
}

/// What [`soon`] has called.
static SOON: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
/// It will be.
static DUE: AtomicBool = AtomicBool::new(false);

/// Has the main thread call this where it could hear a signal; what it raises then goes to the program. The first callable is called always.
#[allow(unsafe_code)]
pub fn soon(py: Python<'_>, call: &Py<PyAny>) {
    SOON.get_or_init(py, || call.clone_ref(py));
    if !DUE.swap(true, Ordering::AcqRel) {
        // SAFETY: the function may be called at any time, with whatever pointer.
        let full = unsafe { ffi::Py_AddPendingCall(Some(call_it), ptr::null_mut()) } != 0;
        if full {
            DUE.store(false, Ordering::Release);
        }
    }
}

extern "C" fn call_it(_: *mut c_void) -> c_int {
    DUE.store(false, Ordering::Release);
    let called = Python::try_attach(|py| {
        SOON.get(py)
            .map_or(Ok(()), |call| call.call0(py).map(drop))
            .map_err(|raised| raised.restore(py))
    });
    match called {
        Some(Err(())) => -1,
        _ => 0,
    }
}
