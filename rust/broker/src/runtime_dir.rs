//! The directory in which a user's clients and broker meet: socket, lock and log.
//!
//! Whoever can put a socket there can read what merges, so nothing in the directory is used before the directory is verified:
//! a real directory, ours, closed to everybody else, in a place where nobody else can swap it. After that everything goes
//! through its descriptor. Nothing here is ever deleted but an old socket, by who holds the lock.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use ksmrs_sys::SysError;
use ksmrs_sys::peer::{Listener, Peer};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::wire;

/// When the log is put aside and a new one begun.
const LOG_BYTES: u64 = 1 << 20;
const STICKY: u32 = 0o1000;
const WORLD_WRITABLE: u32 = 0o002;

/// Why a runtime directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeDirError {
    /// The path names no directory that could be created.
    #[error("{path:?} cannot be a runtime directory: it ends in no name; set KSMRS_RUNTIME_DIR to another")]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// A link, a file, or something else.
    #[error(
        "{path:?} is not a directory of its own but a link or a file; remove it or set KSMRS_RUNTIME_DIR to another"
    )]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else's.
    #[error("{path:?} belongs to uid {owner}, not {ours}; set KSMRS_RUNTIME_DIR to a directory of your own")]
    Owner {
        /// The path.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The effective user.
        ours: u32,
    },
    /// Open to others.
    #[error("{path:?} has mode {mode:04o}, not 0700; chmod 0700 it or set KSMRS_RUNTIME_DIR to another")]
    Mode {
        /// The path.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Anybody may rename it away.
    #[error(
        "{parent:?} is writable by everybody (mode {mode:04o}) without a sticky bit; set KSMRS_RUNTIME_DIR to a safe place"
    )]
    Parent {
        /// The directory that holds it.
        parent: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The kernel refused a step.
    #[error("{step} in {path:?}: {errno}")]
    Call {
        /// What was tried.
        step: &'static str,
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The socket.
    #[error("the socket in {path:?}: {error}")]
    Socket {
        /// The directory.
        path: PathBuf,
        /// What happened.
        error: SysError,
    },
}

/// A verified runtime directory, held open.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    fd: OwnedFd,
}

/// Held by the one broker of a directory; the kernel releases it with the process.
#[derive(Debug)]
pub struct BrokerLock(#[expect(dead_code, reason = "held, not read")] OwnedFd);

/// Where clients and broker of this user meet: `$KSMRS_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/ksmrs`, else
/// `$TMPDIR/ksmrs-$UID`.
pub fn default_path() -> PathBuf {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(path) = variable("KSMRS_RUNTIME_DIR") {
        return path;
    }
    if let Some(base) = variable("XDG_RUNTIME_DIR") {
        return base.join("ksmrs");
    }
    let uid = rustix::process::geteuid().as_raw();
    variable("TMPDIR")
        .unwrap_or_else(|| "/tmp".into())
        .join(format!("ksmrs-{uid}"))
}

/// The socket's name: brokers of different protocol versions live side by side.
fn file_name(ending: &str) -> String {
    format!("broker-{}.{ending}", wire::VERSION)
}

impl RuntimeDir {
    /// Creates the directory if it is missing, verifies it, and holds it open.
    ///
    /// # Errors
    /// [`RuntimeDirError`], one variant for each thing that can be wrong with it.
    pub fn open(path: &Path) -> Result<RuntimeDir, RuntimeDirError> {
        RuntimeDir::open_or(path, true)
    }

    /// The same, but a missing directory is ENOENT: for those who only want to know whether there is a broker.
    ///
    /// # Errors
    /// As [`RuntimeDir::open`].
    pub fn open_existing(path: &Path) -> Result<RuntimeDir, RuntimeDirError> {
        RuntimeDir::open_or(path, false)
    }

    fn open_or(path: &Path, create: bool) -> Result<RuntimeDir, RuntimeDirError> {
        let path = path.to_path_buf();
        let failed = |step| {
            let path = path.clone();
            move |errno| RuntimeDirError::Call { step, path, errno }
        };
        let Some(name) = path.file_name() else {
            return Err(RuntimeDirError::NoName { path });
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let above =
            rustix::fs::open(&parent, flags | OFlags::PATH, Mode::empty()).map_err(failed("opening its parent"))?;
        let mode = rustix::fs::fstat(&above)
            .map_err(failed("fstat of its parent"))?
            .st_mode;
        if mode & WORLD_WRITABLE != 0 && mode & STICKY == 0 {
            return Err(RuntimeDirError::Parent {
                parent,
                mode: mode & 0o7777,
            });
        }
        if create {
            match rustix::fs::mkdirat(&above, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed("creating it")(errno)),
            }
        }
        let fd = match rustix::fs::openat(&above, name, flags | OFlags::NOFOLLOW | OFlags::RDONLY, Mode::empty()) {
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(RuntimeDirError::NotADirectory { path }),
            answer => answer.map_err(failed("opening it"))?,
        };
        let stat = rustix::fs::fstat(&fd).map_err(failed("fstat"))?;
        let ours = rustix::process::geteuid().as_raw();
        if stat.st_uid != ours {
            return Err(RuntimeDirError::Owner {
                path,
                owner: stat.st_uid,
                ours,
            });
        }
        if stat.st_mode & 0o7777 & !STICKY != 0o700 {
            return Err(RuntimeDirError::Mode {
                path,
                mode: stat.st_mode & 0o7777,
            });
        }
        Ok(RuntimeDir { path, fd })
    }

    /// The path that was verified, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> RuntimeDirError {
        let path = self.path.clone();
        move |errno| RuntimeDirError::Call { step, path, errno }
    }

    /// Connects to the broker; `None` when none listens.
    ///
    /// # Errors
    /// [`RuntimeDirError::Socket`].
    pub fn connect(&self) -> Result<Option<Peer>, RuntimeDirError> {
        match Peer::connect(&self.fd, &file_name("socket")) {
            Ok(peer) => Ok(Some(peer)),
            Err(error) => match error.errno().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
                _ => Err(RuntimeDirError::Socket {
                    path: self.path.clone(),
                    error,
                }),
            },
        }
    }

    /// Takes the lock that makes its holder the directory's broker; `None` when another process has it.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn lock(&self) -> Result<Option<BrokerLock>, RuntimeDirError> {
        let file = self.file(&file_name("lock"), OFlags::RDWR)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(BrokerLock(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(self.failed("locking")(errno)),
        }
    }

    /// Listens in the place of any earlier broker; the lock proves that none is alive.
    ///
    /// # Errors
    /// [`RuntimeDirError::Socket`].
    pub fn listen(&self, _lock: &BrokerLock) -> Result<Listener, RuntimeDirError> {
        self.remove_socket(_lock)?;
        Listener::bind(&self.fd, &file_name("socket")).map_err(|error| RuntimeDirError::Socket {
            path: self.path.clone(),
            error,
        })
    }

    /// Removes the socket, so that clients start a new broker instead of reaching one that is about to end.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn remove_socket(&self, _lock: &BrokerLock) -> Result<(), RuntimeDirError> {
        match rustix::fs::unlinkat(&self.fd, file_name("socket"), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.failed("removing the old socket")(errno)),
        }
    }

    fn file(&self, name: &str, flags: OFlags) -> Result<OwnedFd, RuntimeDirError> {
        let flags = flags | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR).map_err(self.failed("opening lock or log"))
    }

    /// The broker's log, bounded: at 1 MiB it becomes `.log.1` and a new one begins.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn log(&self) -> Result<LogFile, RuntimeDirError> {
        let directory = self.fd.try_clone().map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            self.failed("duplicating its descriptor")(errno)
        })?;
        let directory = RuntimeDir {
            path: self.path.clone(),
            fd: directory,
        };
        let file = directory.file(&file_name("log"), OFlags::WRONLY | OFlags::APPEND)?;
        let bytes = rustix::fs::fstat(&file)
            .map_err(directory.failed("fstat of the log"))?
            .st_size
            .max(0) as u64;
        Ok(LogFile { directory, file, bytes })
    }
}

impl AsFd for RuntimeDir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A log that cannot fill the disk.
#[derive(Debug)]
pub struct LogFile {
    directory: RuntimeDir,
    file: OwnedFd,
    bytes: u64,
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > LOG_BYTES {
            let (current, old) = (file_name("log"), file_name("log.1"));
            rustix::fs::renameat(&self.directory.fd, &current, &self.directory.fd, &old)?;
            self.file = self
                .directory
                .file(&current, OFlags::WRONLY | OFlags::APPEND)
                .map_err(io::Error::other)?;
            self.bytes = 0;
        }
        let wrote = rustix::io::write(&self.file, line)?;
        self.bytes += wrote as u64;
        Ok(wrote)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A fresh directory that is gone after the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("ksmrs-dir-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Scratch(path)
        }

        fn join(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_missing_directory_is_created_closed() {
        let scratch = Scratch::new("create");
        let path = scratch.join("ksmrs");
        assert!(RuntimeDir::open_existing(&path).is_err());
        let directory = RuntimeDir::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(directory.connect().unwrap().is_none());
        RuntimeDir::open(&path).unwrap();
    }

    #[test]
    fn links_open_modes_and_files_are_refused() {
        let scratch = Scratch::new("refuse");
        let (real, link) = (scratch.join("real"), scratch.join("link"));
        RuntimeDir::open(&real).unwrap();
        symlink(&real, &link).unwrap();
        assert!(matches!(
            RuntimeDir::open(&link),
            Err(RuntimeDirError::NotADirectory { .. })
        ));
        chmod(&real, 0o750);
        assert!(matches!(
            RuntimeDir::open(&real),
            Err(RuntimeDirError::Mode { mode: 0o750, .. })
        ));
        let file = scratch.join("file");
        std::fs::write(&file, b"").unwrap();
        assert!(matches!(
            RuntimeDir::open(&file),
            Err(RuntimeDirError::NotADirectory { .. })
        ));
        assert!(matches!(
            RuntimeDir::open(Path::new("/")),
            Err(RuntimeDirError::NoName { .. })
        ));
        let open = scratch.join("open");
        std::fs::create_dir(&open).unwrap();
        chmod(&open, 0o777);
        assert!(matches!(
            RuntimeDir::open(&open.join("ksmrs")),
            Err(RuntimeDirError::Parent { .. })
        ));
        chmod(&open, 0o1777);
        assert!(RuntimeDir::open(&open.join("ksmrs")).is_ok());
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused() {
        // Root owns these two everywhere; as root, /proc/1 stands for "somebody else" no longer, so ownership is given away.
        let scratch = Scratch::new("owner");
        let path = scratch.join("theirs");
        RuntimeDir::open(&path).unwrap();
        let path = if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            path
        } else {
            PathBuf::from("/usr")
        };
        assert!(matches!(RuntimeDir::open(&path), Err(RuntimeDirError::Owner { .. })));
    }

    #[test]
    fn one_broker_at_a_time() {
        let scratch = Scratch::new("lock");
        let directory = RuntimeDir::open(&scratch.join("ksmrs")).unwrap();
        let lock = directory.lock().unwrap().unwrap();
        assert!(directory.lock().unwrap().is_none());
        let listener = directory.listen(&lock).unwrap();
        assert!(directory.connect().unwrap().is_some());
        drop(listener);
        assert!(
            directory.connect().unwrap().is_none(),
            "a socket without a listener is no broker"
        );
        directory.listen(&lock).unwrap();
        drop(lock);
        assert!(directory.lock().unwrap().is_some());
    }

    #[test]
    fn the_log_is_bounded() {
        let scratch = Scratch::new("log");
        let path = scratch.join("ksmrs");
        let mut log = RuntimeDir::open(&path).unwrap().log().unwrap();
        let line = [b'x'; 1000];
        for _ in 0..3000 {
            log.write_all(&line).unwrap();
        }
        let sizes: Vec<u64> = std::fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|&size| size > 0 && size <= LOG_BYTES), "{sizes:?}");
    }
}
