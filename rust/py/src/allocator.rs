//! NumPy's allocator: large arrays live in memory of `ksmrs_broker::client`'s heap, which merges.
//!
//! Speaks two C interfaces: NumPy's (NEP 49: a capsule named `mem_handler` with a `PyDataMem_Handler`, and the table of its C API) and,
//! for that capsule, CPython's. NumPy looks a handler up in the context of each thread, where only the default one is everywhere; so the
//! functions *behind the default handler* are replaced, in place. Where that cannot be, a handler of ours is set context by context.
//!
//! The functions here may be called by any thread, before, while and after merging is on: memory is told by its address, and whatever
//! is not the heap's goes to the functions that were there, once `adopted.rs` has let go of it. They are never taken out again, for
//! arrays of the heap may be freed at any later time. They take no lock that is held while Python runs.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use ksmrs_broker::client;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::adopted;
use crate::error::IntoPython;

type Malloc = unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void;
type Calloc = unsafe extern "C" fn(*mut c_void, usize, usize) -> *mut c_void;
type Realloc = unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void, *mut c_void, usize);

/// NumPy's `PyDataMemAllocator`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Allocator {
    context: *mut c_void,
    malloc: Malloc,
    calloc: Calloc,
    realloc: Realloc,
    free: Free,
}

/// NumPy's `PyDataMem_Handler`, version 1.
#[repr(C)]
struct Handler {
    name: [c_char; 127],
    version: u8,
    allocator: Allocator,
}

const VERSION: u8 = 1;
const CAPSULE: &CStr = c"mem_handler";
/// Where NumPy's table of C functions has what is needed here, in every version since 1.22.
const SET_HANDLER: usize = 304;
const DEFAULT_HANDLER: usize = 306;
const FEATURE_VERSION: usize = 211;
/// The C API of NumPy 1.22, the first with handlers.
const HANDLERS_SINCE: c_uint = 0xf;

/// The functions that were there before, with their context.
struct Before(Allocator);

// SAFETY: function pointers, and a context that NumPy hands to them on any thread.
unsafe impl Send for Before {}
// SAFETY: as above; nothing of it changes.
unsafe impl Sync for Before {}

static BEFORE: OnceLock<Before> = OnceLock::new();
/// Bytes from which on the heap lends; none while merging is off.
static AT_LEAST: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The functions that were there before ours, without which ours are not called.
fn before() -> Option<&'static Allocator> {
    BEFORE.get().map(|before| &before.0)
}

fn lent(bytes: usize) -> Option<client::Fresh> {
    (bytes >= AT_LEAST.load(Ordering::Relaxed))
        .then(|| client::lend(bytes))
        .flatten()
}

unsafe extern "C" fn malloc(_context: *mut c_void, bytes: usize) -> *mut c_void {
    if let Some(fresh) = lent(bytes) {
        return ptr::with_exposed_provenance_mut(fresh.address);
    }
    let Some(before) = before() else {
        return ptr::null_mut();
    };
    // SAFETY: NumPy's own function and context, called as NumPy calls us.
    unsafe { (before.malloc)(before.context, bytes) }
}

unsafe extern "C" fn calloc(_context: *mut c_void, count: usize, size: usize) -> *mut c_void {
    let bytes = count.checked_mul(size);
    if let Some(bytes) = bytes
        && let Some(fresh) = lent(bytes)
    {
        let start: *mut u8 = ptr::with_exposed_provenance_mut(fresh.address);
        if !fresh.zeros {
            // SAFETY: just lent, at least as long, and nobody else's.
            unsafe { start.write_bytes(0, bytes) };
        }
        return start.cast();
    }
    let Some(before) = before() else {
        return ptr::null_mut();
    };
    // SAFETY: as in `malloc`.
    unsafe { (before.calloc)(before.context, count, size) }
}

unsafe extern "C" fn realloc(_context: *mut c_void, memory: *mut c_void, bytes: usize) -> *mut c_void {
    let Some(before) = before() else {
        return ptr::null_mut();
    };
    let address = memory.expose_provenance();
    let Some((used, room)) = client::lent(address) else {
        // SAFETY: as in `malloc`; memory that is not the heap's is theirs, or null.
        return unsafe { (before.realloc)(before.context, memory, bytes) };
    };
    // Half of it for nothing is as much as a block may waste.
    if bytes <= room && bytes >= room / 2 {
        client::resize(address, bytes);
        return memory;
    }
    // SAFETY: ours, and as in `malloc`.
    let moved = unsafe { malloc(ptr::null_mut(), bytes.max(1)) };
    if !moved.is_null() {
        // SAFETY: both are as long; the new memory is nobody's yet, and the old one the caller's.
        unsafe { ptr::copy_nonoverlapping(memory.cast::<u8>().cast_const(), moved.cast::<u8>(), used.min(bytes)) };
        client::free(address);
    }
    moved
}

unsafe extern "C" fn free(_context: *mut c_void, memory: *mut c_void, bytes: usize) {
    let address = memory.expose_provenance();
    if client::free(address) {
        return;
    }
    adopted::freed(address);
    if let Some(before) = before() {
        // SAFETY: as in `malloc`; memory that is not the heap's is theirs, or null.
        unsafe { (before.free)(before.context, memory, bytes) }
    }
}

fn refused(why: &str) -> PyErr {
    PyRuntimeError::new_err(format!("NumPy's allocator cannot be had: {why}"))
}

/// NumPy's table of C functions; it is imported if it was not.
fn numpy_api(py: Python<'_>) -> PyResult<*const *mut c_void> {
    let module = py
        .import("numpy._core._multiarray_umath")
        .or_else(|_| py.import("numpy.core._multiarray_umath"))?;
    let capsule = module.getattr("_ARRAY_API")?;
    // SAFETY: any object may be asked; NumPy's capsule has no name.
    let api: *const *mut c_void = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), ptr::null()) }.cast();
    if api.is_null() {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: every version of NumPy has this entry at this place, a function of this type.
    let features = unsafe {
        let version: unsafe extern "C" fn() -> c_uint = std::mem::transmute(*api.add(FEATURE_VERSION));
        version()
    };
    if features < HANDLERS_SINCE {
        return Err(refused("this NumPy is older than 1.22"));
    }
    Ok(api)
}

/// The default handler: static memory of NumPy's.
fn default_handler(py: Python<'_>) -> PyResult<*mut Handler> {
    let api = numpy_api(py)?;
    // SAFETY: since that version this entry is the address of a global variable that holds the capsule.
    let handler: *mut Handler = unsafe {
        let capsule = *(*api.add(DEFAULT_HANDLER)).cast::<*mut ffi::PyObject>();
        ffi::PyCapsule_GetPointer(capsule, CAPSULE.as_ptr())
    }
    .cast();
    if handler.is_null() {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a capsule of that name holds a handler, whose first two members every version has.
    let version = unsafe { (*handler).version };
    if version == VERSION {
        Ok(handler)
    } else {
        Err(refused(&format!(
            "its default handler has version {version}, not {VERSION}"
        )))
    }
}

/// Whether the program may write there.
fn is_writable(address: usize, bytes: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().any(|line| {
        let mut words = line.split(' ');
        let range = words.next().and_then(|range| range.split_once('-'));
        let ends = range.map(|(start, end)| (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)));
        let holds = matches!(ends, Some((Ok(start), Ok(end))) if start <= address && address + bytes <= end);
        holds && words.next().is_some_and(|access| access.starts_with("rw"))
    })
}

/// Replaces the functions behind NumPy's default handler, once; false where its memory cannot be written, and where somebody else replaced
/// ours: memory that theirs made is nothing to what was there before.
#[pyfunction]
pub fn replace_numpy_functions(py: Python<'_>) -> PyResult<bool> {
    let handler = default_handler(py)?;
    // SAFETY: NumPy's static memory, valid for ever; read as long as nobody but us writes to it, with the GIL.
    let now = unsafe { (*handler).allocator };
    if std::ptr::fn_addr_eq(now.free, free as Free) {
        return Ok(true);
    }
    let before = BEFORE.get_or_init(|| Before(now));
    if !std::ptr::fn_addr_eq(now.free, before.0.free) {
        return Ok(false);
    }
    // SAFETY: only the address is taken.
    let place = unsafe { &raw mut (*handler).allocator };
    if !is_writable(place.expose_provenance(), size_of::<Allocator>()) {
        return Ok(false);
    }
    let put = |place: *mut *mut c_void, function: *mut c_void| {
        // SAFETY: an aligned pointer in writable memory that lives for ever. Another thread may call what it reads there meanwhile, the old
        // function or the new one, whole either way: ours pass on what is not theirs.
        unsafe { AtomicPtr::from_ptr(place) }.store(function, Ordering::Release);
    };
    // SAFETY: only addresses of members are taken.
    unsafe {
        // What can take the heap's memory back comes before what lends it.
        put((&raw mut (*place).free).cast(), free as *mut c_void);
        put((&raw mut (*place).realloc).cast(), realloc as *mut c_void);
        put((&raw mut (*place).calloc).cast(), calloc as *mut c_void);
        put((&raw mut (*place).malloc).cast(), malloc as *mut c_void);
    }
    Ok(true)
}

/// Sets a handler of ours in the calling thread's context, for NumPy whose default one cannot be changed.
#[pyfunction]
pub fn set_numpy_handler(py: Python<'_>) -> PyResult<()> {
    static OURS: OnceLock<Py<PyAny>> = OnceLock::new();
    let default = default_handler(py)?;
    let ours = match OURS.get() {
        Some(ours) => ours.clone_ref(py),
        None => {
            // SAFETY: as in `replace_numpy_functions`.
            BEFORE.get_or_init(|| Before(unsafe { (*default).allocator }));
            let ours = new_handler(py)?;
            OURS.get_or_init(|| ours).clone_ref(py)
        }
    };
    let api = numpy_api(py)?;
    // SAFETY: since that version this entry is a function of this type; it takes a capsule that holds a handler, and keeps a reference.
    let previous = unsafe {
        let set: unsafe extern "C" fn(*mut ffi::PyObject) -> *mut ffi::PyObject =
            std::mem::transmute(*api.add(SET_HANDLER));
        Bound::from_owned_ptr_or_err(py, set(ours.as_ptr()))
    };
    previous.map(drop)
}

fn new_handler(py: Python<'_>) -> PyResult<Py<PyAny>> {
    let mut name = [0; 127];
    for (to, from) in name.iter_mut().zip(c"ksmrs".to_bytes()) {
        *to = *from as c_char;
    }
    let handler = Box::leak(Box::new(Handler {
        name,
        version: VERSION,
        allocator: Allocator {
            context: ptr::null_mut(),
            malloc,
            calloc,
            realloc,
            free,
        },
    }));
    // SAFETY: the handler is never freed, nor is the name; what comes back is a new reference, or an error is set.
    unsafe {
        let capsule = ffi::PyCapsule_New(ptr::from_mut(handler).cast(), CAPSULE.as_ptr(), None);
        Bound::from_owned_ptr_or_err(py, capsule).map(Bound::unbind)
    }
}

/// Has NumPy's arrays of at least so many bytes be lent from the heap from now on.
#[pyfunction]
pub fn begin_heap(py: Python<'_>, at_least: usize) -> PyResult<()> {
    py.detach(client::begin_heap).into_python(py)?;
    AT_LEAST.store(at_least.max(1), Ordering::Release);
    Ok(())
}

/// Has none be lent from now on, and gives those that are memory of their own.
#[pyfunction]
pub fn end_heap(py: Python<'_>) -> PyResult<()> {
    AT_LEAST.store(usize::MAX, Ordering::Release);
    py.detach(client::end_heap).into_python(py)
}

/// Whether memory that the heap lent begins at this address.
#[pyfunction]
pub fn is_lent(address: usize) -> bool {
    client::lent(address).is_some()
}

/// Bytes of the heap: of addresses, lent, taking part, kept for the next arrays.
#[pyfunction]
pub fn heap_bytes() -> (usize, usize, usize, usize) {
    let held = client::held();
    (held.arenas, held.lent, held.open, held.kept)
}

const _: c_int = {
    // As NumPy's header has it: 127 bytes of name, one of version, then pointers.
    assert!(std::mem::offset_of!(Handler, allocator) == 128 && size_of::<Allocator>() == 5 * size_of::<usize>());
    0
};
