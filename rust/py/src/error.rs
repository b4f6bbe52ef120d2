//! From the client's errors to Python's, each on purpose.
//!
//! The classes live in `ksmrs._errors`, since an exception with two bases is easier said in Python; they are looked up by
//! name when one is raised. Never loses the number or the next step that the Rust error names.

use ksmrs_broker::client::{Error, SysError};
use ksmrs_broker::wire::ErrorCode;
use pyo3::call::PyCallArgs;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;

/// Turns the client's results into Python's.
pub trait IntoPython<T> {
    /// The value, or the error as its Python class.
    fn into_python(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> IntoPython<T> for Result<T, Error> {
    fn into_python(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|refused| from_client(py, refused))
    }
}

/// An error of `ksmrs._errors` by its name.
pub fn named(py: Python<'_>, class: &str, text: String) -> PyErr {
    raised(py, class, (text,))
}

/// A region that was closed before.
pub fn closed(py: Python<'_>) -> PyErr {
    named(
        py,
        "ClosedRegionError",
        "the region was closed: make a new one".to_owned(),
    )
}

/// An object without a buffer, or with one that it doesn't give away now.
pub fn foreign(py: Python<'_>, refused: &PyErr) -> PyErr {
    if refused.is_instance_of::<PyBufferError>(py) {
        named(py, "ForeignMemoryError", refused.value(py).to_string())
    } else {
        refused.clone_ref(py)
    }
}

fn raised<'py>(py: Python<'py>, class: &str, arguments: impl PyCallArgs<'py>) -> PyErr {
    let made = py
        .import("ksmrs._errors")
        .and_then(|errors| errors.getattr(class))
        .and_then(|class| class.call1(arguments));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(broken) => broken,
    }
}

/// The Python class of an error of the client.
pub fn from_client(py: Python<'_>, refused: Error) -> PyErr {
    let text = refused.to_string();
    if let Error::System(_) = refused
        && let Some(errno) = refused.errno()
    {
        return raised(py, "SystemCallError", (errno, text));
    }
    let class = match refused {
        Error::System(SysError::Unfit { .. }) => "ForeignMemoryError",
        Error::System(SysError::Pinned { .. }) => "PinnedError",
        Error::Size { .. } | Error::Range { .. } => "ArgumentError",
        Error::Refused {
            code: ErrorCode::InvalidValue,
            ..
        } => "ArgumentError",
        Error::Refused {
            code: ErrorCode::UnknownKnob,
            ..
        } => "UnknownKnobError",
        Error::Closed => "ClosedRegionError",
        Error::Off(_) => "UnsupportedError",
        // What is left is about the broker: its directory, its socket, its answers.
        _ => "BrokerError",
    };
    named(py, class, text)
}
