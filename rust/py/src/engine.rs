//! The conversation with the broker as Python functions: connect, merge, counters, knobs, and the broker itself.
//!
//! Relies on `ksmrs_broker::client` for all of it. Counters leave as dictionaries under the kernel's names; the dataclasses
//! are made in Python.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use ksmrs_broker::BrokerOptions;
use ksmrs_broker::client::{self, ConnectOptions};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict};

use crate::error::IntoPython;

/// Says what the first use connects to.
#[pyfunction]
pub fn configure(
    py: Python<'_>,
    runtime_dir: Option<PathBuf>,
    embedded: bool,
    domain: String,
    broker_command: Vec<OsString>,
    dirty_tracking: bool,
) -> PyResult<()> {
    let embedded = embedded || broker_command.is_empty();
    client::configure(ConnectOptions {
        runtime_dir,
        embedded,
        domain,
        broker_command,
        dirty_tracking,
    })
    .into_python(py)
}

/// Connects, starting a broker where none runs.
#[pyfunction]
pub fn connect(py: Python<'_>) -> PyResult<()> {
    py.detach(client::connect).into_python(py)
}

/// Says goodbye to the broker.
#[pyfunction]
pub fn disconnect(py: Python<'_>) -> PyResult<()> {
    py.detach(client::disconnect).into_python(py)
}

/// Whether a broker is connected now.
#[pyfunction]
pub fn is_connected() -> bool {
    client::is_connected()
}

/// Scans and merges now; Ctrl-C ends the waiting.
#[pyfunction]
pub fn merge(py: Python<'_>, timeout: Option<f64>) -> PyResult<Bound<'_, PyDict>> {
    // A timeout beyond what a Duration holds is none.
    let timeout = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let report = interruptible(py, |interrupted| client::merge(timeout, interrupted))?;
    let dictionary = PyDict::new(py);
    dictionary.set_item("pages_merged", report.pages_merged)?;
    dictionary.set_item("rounds", report.rounds)?;
    dictionary.set_item("finished", report.finished)?;
    dictionary.set_item("seconds", report.elapsed_ms as f64 / 1e3)?;
    Ok(dictionary)
}

/// The counters of the domain; never starts a broker.
#[pyfunction]
pub fn stats(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    py.detach(client::stats).into_python(py)?.into_py_dict(py)
}

/// The counters of this process; never starts a broker.
#[pyfunction]
pub fn process_stats(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    py.detach(client::process_stats).into_python(py)?.into_py_dict(py)
}

/// Why regions of this process do not merge, one sentence each.
#[pyfunction]
pub fn not_merging() -> Vec<String> {
    client::not_merging()
}

/// "on" where pages that nobody writes are not read again, else "off: " and why.
#[pyfunction]
pub fn dirty_tracking() -> String {
    client::dirty_tracking()
}

/// How the broker is, or `None` where there is none; never starts one.
#[pyfunction]
pub fn status(py: Python<'_>) -> PyResult<Option<Bound<'_, PyDict>>> {
    let Some(status) = py.detach(client::status).into_python(py)? else {
        return Ok(None);
    };
    let dictionary = PyDict::new(py);
    dictionary.set_item("pid", status.pid)?;
    dictionary.set_item("release", status.release)?;
    dictionary.set_item("embedded", status.embedded)?;
    dictionary.set_item("clients", status.clients)?;
    dictionary.set_item("domains", status.domains)?;
    dictionary.set_item("uptime_seconds", status.uptime_ms as f64 / 1e3)?;
    dictionary.set_item("cpu_seconds", status.cpu_ms as f64 / 1e3)?;
    dictionary.set_item("resident_bytes", status.resident_bytes)?;
    dictionary.set_item("store_bytes", status.store_bytes)?;
    dictionary.set_item("huge_declined", status.huge_declined)?;
    Ok(Some(dictionary))
}

/// Process, client, region, whether that is shared memory, and a class for each page.
type RegionMap<'py> = (u32, u32, u32, bool, Bound<'py, PyBytes>);

/// What the pages of all regions of the domain count as; never starts a broker.
#[pyfunction]
pub fn page_map(py: Python<'_>) -> PyResult<Vec<RegionMap<'_>>> {
    let regions = py.detach(client::page_map).into_python(py)?;
    let region = |found: client::RegionMap| {
        let classes = PyBytes::new(py, &found.classes);
        (found.pid, found.client, found.region, found.shared, classes)
    };
    Ok(regions.into_iter().map(region).collect())
}

/// A knob's value, as the file of that name would hold it.
#[pyfunction]
pub fn get(py: Python<'_>, knob: &str) -> PyResult<String> {
    py.detach(|| client::get(knob)).into_python(py)
}

/// Turns a knob. As in the kernel, run=2 returns when nothing is merged any more, or after 10 s.
#[pyfunction]
pub fn set(py: Python<'_>, knob: &str, value: &str) -> PyResult<()> {
    py.detach(|| client::set(knob, value)).into_python(py)?;
    if (knob, value.trim()) == ("run", "2") {
        interruptible(py, client::wait_until_unmerged)?;
    }
    Ok(())
}

/// Waits for the engine without the interpreter's lock; a signal whose handler raises ends the waiting. Such handlers run in the main
/// thread alone, and no other may come back to an interpreter that perhaps ends meanwhile.
fn interruptible<T: Send>(
    py: Python<'_>,
    wait: impl FnOnce(&mut dyn FnMut() -> bool) -> Result<T, client::Error> + Send,
) -> PyResult<T> {
    let threading = py.import("threading")?;
    let main = threading.call_method0("main_thread")?.getattr("ident")?;
    let hears_signals = threading.call_method0("get_ident")?.eq(main)?;
    let mut signalled = None;
    let outcome = py.detach(|| {
        wait(&mut || {
            if hears_signals {
                signalled = Python::attach(|py| py.check_signals()).err();
            }
            signalled.is_some()
        })
    });
    match signalled {
        Some(raised) => Err(raised),
        None => outcome.into_python(py),
    }
}

/// In the child of a fork, before anything else of ksmrs: goes on with the private regions that the parent had. Never fails.
#[pyfunction]
pub fn born() {
    client::born();
}

/// Puts our SIGSEGV handler in front again.
#[pyfunction]
pub fn reassert_handler() {
    client::reassert_handler();
}

/// Runs a broker: as a daemon, returning the status to exit with once clients can connect (0), or in the foreground, until
/// nobody needs it any more. For a process that does nothing else.
#[pyfunction]
#[pyo3(signature = (runtime_dir = None, daemon = false))]
pub fn run_broker(py: Python<'_>, runtime_dir: Option<PathBuf>, daemon: bool) -> PyResult<i32> {
    let options = BrokerOptions {
        runtime_dir,
        ..BrokerOptions::default()
    };
    let status = if daemon {
        // With the GIL, so that no other thread runs in a process that is about to fork for good.
        ksmrs_broker::start_daemon(&options)
    } else {
        py.detach(|| ksmrs_broker::run_broker(&options, || ()).map(|_| 0))
    };
    // Not of ksmrs._errors: a broker has no package to import them from.
    status.map_err(|refused| PyRuntimeError::new_err(refused.to_string()))
}
