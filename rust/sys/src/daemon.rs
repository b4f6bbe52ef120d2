//! Leaving the terminal, the session and the working directory: how the broker becomes a process of its own.
//!
//! For a fresh process with a single thread, such as `ksmrs broker` right after its start. The launcher learns through a pipe
//! whether the daemon came up; nothing is waited for by time.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::descriptors;
use crate::error::{SysError, last_errno};
use crate::sigmask;

const WHAT: &str = "the broker process";

/// Which process returned from [`detach`].
pub enum Side {
    /// The one that called. It should exit with this status: 0 when the daemon reported success, else 1.
    Launcher(i32),
    /// The daemon: own session, `/` as directory, 0-2 on /dev/null, nothing else open.
    Daemon(Report),
}

/// The daemon's way to let its launcher go. Dropped without a word it reports failure.
pub struct Report(OwnedFd);

impl Report {
    /// The daemon is up.
    pub fn success(self) {
        // A launcher that is gone needs no answer.
        let _ = rustix::io::write(&self.0, &[1]);
    }
}

/// Forks twice around `setsid`; returns in the launcher once the daemon reported or died, and in the daemon.
///
/// # Errors
/// The kernel's errno, in the launcher. A daemon that fails on its way exits with status 1.
///
/// # Panics
/// Never; but it must not be called by a process with several threads, whose locks a child would inherit as they are.
pub fn detach() -> Result<Side, SysError> {
    // Whoever started us may have been a client thread, which blocks every signal; a daemon must end at SIGTERM.
    sigmask::unblock_all();
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(SysError::call("pipe", WHAT))?;
    // SAFETY: the caller has one thread, so the child may go on with everything that it inherits.
    let child = unsafe { libc::fork() };
    if child < 0 {
        let errno = last_errno();
        return Err(SysError::Call {
            call: "fork",
            what: WHAT,
            errno,
        });
    }
    if child > 0 {
        drop(write);
        let mut status = 0;
        // SAFETY: waits for the child made above, which exits at once; the status is a live local.
        while unsafe { libc::waitpid(child, &mut status, 0) } < 0
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        {}
        let mut byte = [0];
        let answer = loop {
            match rustix::io::read(&read, &mut byte) {
                Err(Errno::INTR) => continue,
                answer => break answer,
            }
        };
        return Ok(Side::Launcher(i32::from(answer != Ok(1))));
    }
    drop(read);
    let leave = |status: i32| -> ! {
        // SAFETY: ends this process, without the exit handlers of the program it is a copy of.
        unsafe { libc::_exit(status) }
    };
    if rustix::process::setsid().is_err() {
        leave(1);
    }
    // SAFETY: as above. The second child is no session leader and never gets a terminal again.
    match unsafe { libc::fork() } {
        0 => {}
        grandchild => leave(i32::from(grandchild < 0)),
    }
    if settle(&write).is_err() {
        leave(1);
    }
    Ok(Side::Daemon(Report(write)))
}

/// What the daemon changes about itself.
fn settle(write: &OwnedFd) -> Result<(), SysError> {
    rustix::process::chdir("/").map_err(SysError::call("chdir", WHAT))?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).map_err(SysError::call("open", WHAT))?;
    for number in 0..3 {
        // SAFETY: 0-2 belong to no owned descriptor; replacing them is what this is for.
        if unsafe { libc::dup2(null.as_raw_fd(), number) } < 0 {
            return Err(SysError::Call {
                call: "dup2",
                what: WHAT,
                errno: Errno::BADF,
            });
        }
    }
    if null.as_raw_fd() < 3 {
        // It was one of them already; closing it would undo that.
        std::mem::forget(null);
    } else {
        drop(null);
    }
    // One thread, one table: this closes for real, and that is wanted.
    descriptors::unshare_table_keeping(&[write.as_fd()])
}

/// Ends the daemon at once, without the exit handlers of the interpreter that it was forked from.
pub fn exit(status: i32) -> ! {
    // SAFETY: ends this process.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `daemon` in a forked copy of the test process, for `detach` needs a process with one thread.
    fn launch(daemon: fn(Report)) -> i32 {
        // SAFETY: the child has one thread and uses system calls and small allocations only; the allocator of glibc is usable
        // after fork.
        let child = unsafe { libc::fork() };
        if child == 0 {
            match detach() {
                Ok(Side::Launcher(status)) => exit(status),
                Ok(Side::Daemon(report)) => daemon(report),
                Err(_) => {}
            }
            exit(9);
        }
        let mut status = 0;
        // SAFETY: waits for the child made above; the status is a live local.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert!(libc::WIFEXITED(status));
        libc::WEXITSTATUS(status)
    }

    #[test]
    fn the_launcher_waits_for_the_daemons_word() {
        assert_eq!(launch(Report::success), 0);
        assert_eq!(
            launch(|_report| exit(0)),
            1,
            "a daemon that dies without a word is a failure"
        );
    }
}
