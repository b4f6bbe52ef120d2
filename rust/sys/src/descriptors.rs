//! A descriptor table of one's own: client and broker threads keep their descriptors where the program cannot close them.
//!
//! A program may close every descriptor it sees (`os.closerange(3, 65536)`) or count them; a thread that left the shared table
//! is not touched by that. Call it first thing in a thread, before anything is opened. It never closes a descriptor of the
//! program: the closing happens in the thread's own copy.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::error::{SysError, last_errno};

/// 0, 1 and 2 stay what they are.
const FIRST: u32 = 3;

/// Gives the calling thread its own descriptor table, empty but for 0-2. Threads that it spawns share the new table.
///
/// Only for a thread of a process whose other threads keep the old table: on a process's only thread it would close for real.
///
/// # Errors
/// ENOSYS before Linux 5.9, EPERM or ENOSYS under a seccomp filter: merging is off then, and says so.
pub fn unshare_table() -> Result<(), SysError> {
    close_range(FIRST, u32::MAX, libc::CLOSE_RANGE_UNSHARE as libc::c_int)
}

/// The same, but the thread's table also keeps a copy of these descriptors, under their numbers.
///
/// # Errors
/// As [`unshare_table`].
pub fn unshare_table_keeping(kept: &[BorrowedFd<'_>]) -> Result<(), SysError> {
    let mut numbers: Vec<u32> = kept
        .iter()
        .map(|fd| fd.as_raw_fd() as u32)
        .filter(|&number| number >= FIRST)
        .collect();
    numbers.sort_unstable();
    let last = numbers.last().map_or(FIRST, |&last| last + 1);
    // The first call makes the table private; only then may the gaps be closed.
    close_range(last, u32::MAX, libc::CLOSE_RANGE_UNSHARE as libc::c_int)?;
    let mut from = FIRST;
    for number in numbers {
        if from < number {
            close_range(from, number - 1, 0)?;
        }
        from = number + 1;
    }
    Ok(())
}

/// A copy of a descriptor of the program's, known by its number only.
///
/// # Errors
/// EBADF if the number means nothing.
pub fn copy_of(number: RawFd) -> Result<OwnedFd, SysError> {
    const LOWEST: libc::c_int = 3;
    // SAFETY: makes a new descriptor or fails; the number is only looked up.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, LOWEST) };
    if copy < 0 {
        let errno = last_errno();
        return Err(SysError::Call {
            call: "fcntl(F_DUPFD_CLOEXEC)",
            what: "the object's descriptor",
            errno,
        });
    }
    // SAFETY: made just above, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn close_range(first: u32, last: u32, flags: libc::c_int) -> Result<(), SysError> {
    // SAFETY: with the unshare flag, or after it, this changes the calling thread's own table; our callers run it before they
    // open anything, so no owned descriptor of this thread goes away under it.
    let answer = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if answer == 0 {
        return Ok(());
    }
    let errno = last_errno();
    Err(SysError::Call {
        call: "close_range",
        what: "the thread's descriptor table",
        errno,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn is_open(number: i32) -> bool {
        // SAFETY: asks about a number, changes nothing.
        unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
    }

    #[test]
    fn a_thread_loses_its_copies_and_the_program_none() {
        let (one, two) = rustix::pipe::pipe().unwrap();
        let numbers = [one.as_raw_fd(), two.as_raw_fd()];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare_table().unwrap();
                assert!(numbers.iter().all(|&number| !is_open(number)));
            });
        });
        assert!(numbers.iter().all(|&number| is_open(number)));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare_table_keeping(&[two.as_fd()]).unwrap();
                assert!(!is_open(numbers[0]) && is_open(numbers[1]));
            });
        });
        assert!(numbers.iter().all(|&number| is_open(number)));
    }
}
