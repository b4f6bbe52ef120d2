//! `_ksmrs.Survey`: reads other processes' memory and counts what merging would save.
//!
//! Relies on `ksmrs_broker::survey` for everything that is read or counted; `python/ksmrs/_survey.py` times the steps and gives the
//! numbers their names. Reads and hashes without the interpreter's lock.

use std::time::Duration;

use ksmrs_broker::survey::{self, Figures, Kind, Knobs, Outcome, Share, Stage};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

/// A dictionary of values under their names.
macro_rules! dictionary {
    ($py:expr; $($name:ident = $value:expr),+ $(,)?) => {{
        let dictionary = PyDict::new($py);
        $(dictionary.set_item(stringify!($name), $value)?;)+
        dictionary
    }};
}

/// A survey on its way.
#[pyclass(module = "ksmrs._ksmrs")]
pub struct Survey {
    survey: survey::Survey,
}

#[pymethods]
impl Survey {
    /// Bytes of memory for each page that is kept.
    #[classattr]
    const BYTES_PER_PAGE: usize = survey::BYTES_PER_PAGE;

    /// The most processes that one survey can take in.
    #[classattr]
    const MOST_PROCESSES: usize = survey::MOST_PROCESSES;

    /// `memory` bytes at most, and this fraction of all contents at most; mappings of fewer pages are passed over.
    #[new]
    fn new(memory: usize, fraction: f64, least_pages: u64) -> PyResult<Survey> {
        match survey::Survey::new(memory, fraction, least_pages) {
            Ok(survey) => Ok(Survey { survey }),
            Err(refused) => Err(os_error(refused.errno(), &refused)),
        }
    }

    /// Takes a process in; OSError with the kernel's errno where it may not be looked at.
    fn add(&mut self, py: Python<'_>, pid: u32) -> PyResult<()> {
        if self.survey.found().len() >= survey::MOST_PROCESSES {
            let text = format!(
                "{} processes are the most that one survey takes",
                survey::MOST_PROCESSES
            );
            return Err(PyValueError::new_err(text));
        }
        let added = py.detach(|| self.survey.add(pid));
        added.map_err(|refused| os_error(refused.errno(), &refused))
    }

    /// Works for about so many seconds: the stage it is in, pages done of it and in all; the stage is "done" at the end.
    fn step(&mut self, py: Python<'_>, seconds: f64) -> (&'static str, u64, u64) {
        let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        py.detach(|| self.survey.step(time));
        let (stage, done, all) = self.survey.progress();
        let stage = match stage {
            Stage::Look => "look",
            Stage::LookAgain => "look again",
            Stage::Compare => "compare",
            Stage::Done => "done",
        };
        (stage, done, all)
    }

    /// The fractions of all contents and of all windows that were kept, and how many pages that is.
    fn kept(&self) -> (f64, f64, usize) {
        let (contents, windows) = self.survey.fractions();
        (contents, windows, self.survey.pages_kept())
    }

    /// Counts, as dictionaries: knobs are max_page_sharing and use_zero_pages of each engine; `mappings` is the budget of a process.
    fn tally<'py>(
        &mut self,
        py: Python<'py>,
        ksmrs: (u64, bool),
        kernel: (u64, bool),
        mappings: u64,
    ) -> PyResult<Bound<'py, PyDict>> {
        let knobs = |(max_page_sharing, use_zero_pages): (u64, bool)| Knobs {
            max_page_sharing: max_page_sharing.max(2),
            use_zero_pages,
        };
        let tally = py.detach(|| self.survey.tally(knobs(ksmrs), knobs(kernel), mappings));
        let mut processes = Vec::new();
        for (found, share) in self.survey.found().iter().zip(&tally.shares) {
            let kinds = PyDict::new(py);
            for (kind, figures) in Kind::ALL.into_iter().zip(&found.kinds) {
                if figures.mappings > 0 {
                    kinds.set_item(kind.name(), figures_of(py, figures)?)?;
                }
            }
            processes.push(dictionary!(py;
                pid = found.pid,
                ended = found.ended,
                zeros = found.zeros,
                share = share_of(py, share)?,
                kinds = kinds,
            ));
        }
        let shifts = &self.survey.shifts;
        let shifts = shifts.iter().map(|shift| {
            let pid = |process: usize| self.survey.found()[process].pid;
            (
                pid(shift.process),
                shift.address,
                shift.pages,
                pid(shift.other),
                shift.other_address,
            )
        });
        Ok(dictionary!(py;
            ksmrs = outcome(py, &tally.ksmrs)?,
            kernel = outcome(py, &tally.kernel)?,
            duplicates_between = tally.duplicates_between,
            processes = processes,
            shifts = shifts.collect::<Vec<_>>(),
        ))
    }

    /// A byte for each page of a process that was kept, by its place among those added: its class, in the order of addresses.
    fn classes<'py>(&self, py: Python<'py>, process: usize) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.survey.classes(process))
    }
}

fn os_error(errno: Option<i32>, refused: &dyn std::fmt::Display) -> PyErr {
    // With an errno Python chooses the class (PermissionError, ProcessLookupError).
    PyOSError::new_err((errno, refused.to_string()))
}

fn outcome<'py>(py: Python<'py>, outcome: &Outcome) -> PyResult<Bound<'py, PyDict>> {
    Ok(dictionary!(py;
        pages = outcome.pages,
        pages_shared = outcome.pages_shared,
        pages_sharing = outcome.pages_sharing,
        ksm_zero_pages = outcome.ksm_zero_pages,
        pages_volatile = outcome.pages_volatile,
        squares = outcome.squares,
    ))
}

fn share_of<'py>(py: Python<'py>, share: &Share) -> PyResult<Bound<'py, PyDict>> {
    Ok(dictionary!(py;
        pages_zero = share.pages_zero,
        duplicates_within = share.duplicates_within,
        duplicates_between = share.duplicates_between,
        pages_volatile = share.pages_volatile,
        ksm_merging_pages = share.ksm_merging_pages,
        pages_unmerged_by_budget = share.pages_unmerged_by_budget,
        pages_out_of_phase = share.pages_out_of_phase,
    ))
}

fn figures_of<'py>(py: Python<'py>, figures: &Figures) -> PyResult<Bound<'py, PyDict>> {
    Ok(dictionary!(py;
        mappings = figures.mappings,
        pages = figures.pages,
        pages_present = figures.present,
        pages_swapped = figures.swapped,
        pages_shared_already = figures.shared,
        pages_read = figures.read,
        pages_merged_already = figures.merged,
        pages_fit = figures.fit,
        pages_fit_for_kernel = figures.kernel,
    ))
}
