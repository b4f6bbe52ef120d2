//! The process at the other end of a connection: whether it still runs. Never signals it.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

/// A process that stays the same one though its number be taken again.
pub(crate) struct Process(OwnedFd);

impl Process {
    /// The process of that number; `None` where the kernel does not know it by that number.
    pub(crate) fn of(pid: u32) -> Option<Process> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok().map(Process)
    }

    /// Whether it is no more; another program that it executed is the same process.
    pub(crate) fn has_exited(&self) -> bool {
        let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut ready, Some(&at_once)) == Ok(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_seen() {
        assert!(!Process::of(std::process::id()).unwrap().has_exited());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        child.wait().unwrap();
        assert!(process.has_exited());
        assert!(Process::of(0).is_none());
    }
}
