//! Write leases on named objects: whoever opens one waits until its pages are back in it.
//!
//! A write lease (F_SETLEASE) is refused while the object is open anywhere else, and afterwards makes the kernel hold every
//! opener until the lease is given up, `lease-break-time` at most. It belongs to the open file description, which the program, its
//! remapper and the broker share, so it outlives each of them; whoever holds it must therefore give it up by name. The
//! kernel's signal goes to a thread that blocks it: nobody is ever interrupted, and the state is asked for instead.

use crate::error::{SysError, last_errno};
use crate::object::TMPFS_MAGIC;
use crate::sharers::ObjectId;
use crate::sysctl;
use core::mem::MaybeUninit;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

const WHAT: &str = "shared object";

/// `struct f_owner_ex`, which libc lacks for this target.
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    id: libc::pid_t,
}

const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// A descriptor of an object, opened by its program, that can be leased and written back to.
#[derive(Debug)]
pub struct Description {
    fd: OwnedFd,
}

impl Description {
    /// Finds the program's own description of an object among its descriptors (that of `mmap` included) and takes a copy. For a
    /// thread with a descriptor table of its own.
    ///
    /// # Errors
    /// There is none that will do, or the kernel does not let us look.
    pub fn find(id: ObjectId) -> Result<Description, SysError> {
        let failed = |call| move |errno| SysError::call(call, "the program's descriptors")(errno);
        let entries = fs::read_dir("/proc/self/fd")
            .map_err(|error| failed("readdir")(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        let mut refused = None;
        for entry in entries.flatten() {
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(number) = number.filter(|_| ObjectId::behind(&entry.path()) == Some(id)) else {
                continue;
            };
            let process = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())
                .map_err(failed("pidfd_open"))?;
            // The number may have been closed, or mean something else, since it was looked at.
            let fd = match rustix::process::pidfd_getfd(process, number, rustix::process::PidfdGetfdFlags::empty()) {
                Ok(fd) => fd,
                Err(Errno::BADF) => continue,
                Err(errno) => return Err(failed("pidfd_getfd")(errno)),
            };
            match Description::vet(fd, id) {
                Ok(description) => return Ok(description),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.unwrap_or(SysError::Vetting {
            what: WHAT,
            reason: "the program has it open no more, and a lease needs a descriptor".to_owned(),
        }))
    }

    /// Looks at a descriptor that is said to be of this object.
    ///
    /// # Errors
    /// [`SysError::Vetting`] with what is wrong with it.
    pub fn vet(fd: OwnedFd, id: ObjectId) -> Result<Description, SysError> {
        let wrong = |reason: String| SysError::Vetting { what: WHAT, reason };
        let stat = rustix::fs::fstat(&fd).map_err(SysError::call("fstat", WHAT))?;
        if (stat.st_dev, stat.st_ino) != (id.device, id.inode) || stat.st_mode & 0o170_000 != 0o100_000 {
            return Err(wrong(format!(
                "it is inode {} of device {:#x}",
                stat.st_ino, stat.st_dev
            )));
        }
        let system = rustix::fs::fstatfs(&fd).map_err(SysError::call("fstatfs", WHAT))?;
        if system.f_type as u64 != TMPFS_MAGIC {
            return Err(wrong(format!("it is on file system {:#x}, not tmpfs", system.f_type)));
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(SysError::call("F_GETFL", WHAT))?;
        if flags & OFlags::RWMODE != OFlags::RDWR || flags.contains(OFlags::APPEND) {
            return Err(wrong(format!(
                "open flags {:#x}: it must be O_RDWR, and not O_APPEND",
                flags.bits()
            )));
        }
        Ok(Description { fd })
    }

    /// The object's size in bytes.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn size(&self) -> Result<u64, SysError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(SysError::call("fstat", WHAT))?;
        Ok(stat.st_size as u64)
    }

    /// Bytes that its file system still has room for; `None` where it has no limit.
    pub fn room(&self) -> Option<u64> {
        let system = rustix::fs::fstatfs(&self.fd).ok()?;
        (system.f_blocks > 0).then(|| system.f_bavail.saturating_mul(system.f_bsize as u64))
    }

    /// Takes the write lease.
    ///
    /// # Errors
    /// EAGAIN while the object is open elsewhere, EACCES if it is another user's.
    pub fn lease(&self) -> Result<(), SysError> {
        block_the_signal();
        let owner = Owner {
            kind: F_OWNER_TID,
            id: rustix::thread::gettid().as_raw_nonzero().get(),
        };
        // SAFETY: the kernel reads the struct, which is a live local of its layout.
        let owned = unsafe { libc::fcntl(self.fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) };
        check(owned, "F_SETOWN_EX")?;
        self.set_lease(libc::F_WRLCK)
    }

    /// Whether the lease stands and nobody waits for its end.
    pub fn is_leased(&self) -> bool {
        // SAFETY: asks for a number.
        unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_GETLEASE) == libc::F_WRLCK }
    }

    /// How long the kernel lets somebody wait for a lease to end before it ends it itself; zero: for ever.
    pub fn break_time() -> Duration {
        Duration::from_secs(sysctl::read("fs/lease-break-time").unwrap_or(45))
    }

    /// Gives the lease up: whoever waits goes on.
    ///
    /// # Errors
    /// EAGAIN if there is none.
    pub fn release(&self) -> Result<(), SysError> {
        self.set_lease(libc::F_UNLCK)
    }

    fn set_lease(&self, kind: libc::c_int) -> Result<(), SysError> {
        // SAFETY: no pointers.
        let done = unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_SETLEASE, kind) };
        check(done, "F_SETLEASE")
    }
}

impl AsFd for Description {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(answer: libc::c_int, call: &'static str) -> Result<(), SysError> {
    if answer >= 0 {
        return Ok(());
    }
    Err(SysError::call(call, WHAT)(last_errno()))
}

/// A broken lease sends SIGIO, whose default ends the process.
fn block_the_signal() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is initialised by sigemptyset before it is used; a null pointer asks for no old mask.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGIO);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), core::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A named object of a page.
    fn make_named(name: &str) -> (String, OwnedFd, ObjectId) {
        let name = format!("/ksmrs-test-{}-{name}", std::process::id());
        let flags = rustix::shm::OFlags::CREATE | rustix::shm::OFlags::EXCL | rustix::shm::OFlags::RDWR;
        let fd = rustix::shm::open(&name, flags, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let id = ObjectId::of(&fd).unwrap();
        (name, fd, id)
    }

    #[test]
    fn an_opener_waits_for_the_lease_to_be_given_up() {
        let (name, fd, id) = make_named("lease");
        let description = Description::find(id).unwrap();
        assert_eq!(description.size().unwrap(), 4096);
        assert!(!description.is_leased());
        description.lease().unwrap();
        assert!(description.is_leased());
        let path = format!("/dev/shm{name}");
        std::thread::scope(|scope| {
            let opener = scope.spawn(|| std::fs::File::open(&path).unwrap());
            while description.is_leased() {
                std::thread::yield_now();
            }
            assert!(!opener.is_finished());
            description.release().unwrap();
            let second = opener.join().unwrap();
            assert!(description.lease().is_err(), "it is open elsewhere");
            drop(second);
            description.lease().unwrap();
        });
        rustix::shm::unlink(&name).unwrap();
        drop(fd);
    }

    #[test]
    fn what_cannot_be_leased_is_not_taken_for_it() {
        let (name, fd, id) = make_named("vet");
        let path = format!("/dev/shm{name}");
        let reader: OwnedFd = std::fs::File::open(&path).unwrap().into();
        assert!(Description::vet(reader, id).is_err());
        let appender: OwnedFd = std::fs::OpenOptions::new()
            .read(true)
            .append(true)
            .open(&path)
            .unwrap()
            .into();
        assert!(
            Description::vet(appender, id)
                .unwrap_err()
                .to_string()
                .contains("O_APPEND")
        );
        let other = ObjectId {
            inode: id.inode + 1,
            ..id
        };
        assert!(Description::vet(fd.try_clone().unwrap(), other).is_err());
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(Description::vet(null, id).is_err());
        rustix::shm::unlink(&name).unwrap();
    }
}
