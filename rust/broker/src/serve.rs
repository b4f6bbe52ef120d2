//! Entry points of the broker: in the foreground, as a daemon, or inside a client.
//!
//! One broker per user and protocol version: the lock in the runtime directory decides. Who finds another broker at work is
//! done. The daemon's launcher returns only when clients can connect.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ksmrs_sys::SysError;
use ksmrs_sys::daemon::{self, Side};
use ksmrs_sys::peer::Peer;
use rustix::io::Errno;
use rustix::process::Resource;

use crate::conduct::Conductor;
use crate::runtime_dir::{self, BrokerLock, RuntimeDir, RuntimeDirError};

/// Without clients for so long, a broker ends.
pub const IDLE: Duration = Duration::from_secs(60);
/// How long a second broker waits for the first, which has the lock, to listen or to let go.
const STARTING: Duration = Duration::from_secs(10);
const STARTING_PAUSE: Duration = Duration::from_millis(2);

/// How a broker runs.
#[derive(Clone, Debug, Default)]
pub struct BrokerOptions {
    /// Where to meet clients; else as [`runtime_dir::default_path`] says.
    pub runtime_dir: Option<PathBuf>,
    /// When to end without clients; else `$KSMRS_IDLE_SECONDS`, else [`IDLE`].
    pub idle: Option<Duration>,
    /// Slots of each frame store; else twice the machine's memory.
    pub store_slots: Option<u32>,
}

/// Why a broker did not come up, or ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The runtime directory.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// The kernel refused something that a broker cannot do without.
    #[error(transparent)]
    System(#[from] SysError),
    /// Waiting for events failed.
    #[error("poll: {0}")]
    Poll(Errno),
    /// Somebody holds the lock and does not listen.
    #[error("another broker holds the lock in {path:?} but does not listen; its log is beside it")]
    Stuck {
        /// The directory.
        path: PathBuf,
    },
}

/// What became of an attempt to start a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// This one served until it was idle.
    Served,
    /// Another one serves already.
    Another,
}

impl BrokerOptions {
    fn directory(&self) -> Result<RuntimeDir, RuntimeDirError> {
        RuntimeDir::open(&self.runtime_dir.clone().unwrap_or_else(runtime_dir::default_path))
    }

    fn idle(&self) -> Duration {
        let variable = || std::env::var("KSMRS_IDLE_SECONDS").ok()?.parse::<f64>().ok();
        let seconds = || variable().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        self.idle.or_else(seconds).unwrap_or(IDLE)
    }
}

/// Becomes the directory's broker, or finds that there is one.
fn claim(directory: &RuntimeDir) -> Result<Option<BrokerLock>, BrokerError> {
    let begun = Instant::now();
    loop {
        if let Some(lock) = directory.lock()? {
            return Ok(Some(lock));
        }
        if directory.connect()?.is_some() {
            return Ok(None);
        }
        if begun.elapsed() > STARTING {
            return Err(BrokerError::Stuck {
                path: directory.path().to_path_buf(),
            });
        }
        // Between its lock and its socket, or between its last client and its end: both are short.
        std::thread::sleep(STARTING_PAUSE);
    }
}

/// Serves in the foreground until idle. `up` is called once clients can connect, also where another broker serves already.
///
/// # Errors
/// [`BrokerError`].
pub fn run_broker(options: &BrokerOptions, up: impl FnOnce()) -> Result<Started, BrokerError> {
    let directory = options.directory()?;
    let Some(lock) = claim(&directory)? else {
        up();
        return Ok(Started::Another);
    };
    let level = std::env::var("KSMRS_LOG").ok().and_then(|level| level.parse().ok());
    let log = tracing_subscriber::fmt()
        .with_writer(Mutex::new(directory.log()?))
        .with_ansi(false)
        .with_target(false)
        .with_max_level(level.unwrap_or(tracing::Level::INFO))
        .finish();
    tracing::subscriber::with_default(log, || {
        let served = serve(options, &directory, &lock, up);
        if let Err(error) = &served {
            tracing::error!(%error, "the broker ends");
        }
        served.map(|()| Started::Served)
    })
}

fn serve(
    options: &BrokerOptions,
    directory: &RuntimeDir,
    lock: &BrokerLock,
    up: impl FnOnce(),
) -> Result<(), BrokerError> {
    let listener = directory.listen(lock)?;
    let idle = options.idle();
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(
        pid = std::process::id(),
        version,
        protocol = crate::wire::VERSION,
        ?idle,
        "the broker listens"
    );
    let mut conductor = Conductor::new(Some(listener), options.store_slots);
    up();
    let ran = conductor.run(idle).map_err(BrokerError::Poll);
    // Who connects from here on finds no socket, or an end that closes, and starts another broker.
    directory.remove_socket(lock)?;
    conductor.close();
    tracing::info!("the broker ends, idle");
    ran
}

/// Starts a broker as a daemon. Returns the status that the calling process should exit with: 0 once clients can connect,
/// whoever serves them. The daemon itself never returns from here.
///
/// Only for a process with a single thread.
///
/// # Errors
/// [`BrokerError`], before anything was started: a runtime directory that cannot be used, or no process.
pub fn start_daemon(options: &BrokerOptions) -> Result<i32, BrokerError> {
    let directory = options.directory()?;
    if directory.connect()?.is_some() {
        return Ok(0);
    }
    // The daemon's directory is /, and it opens this one by its path again.
    let path = std::path::absolute(directory.path()).unwrap_or_else(|_| directory.path().to_path_buf());
    drop(directory);
    let options = BrokerOptions {
        runtime_dir: Some(path),
        ..options.clone()
    };
    match daemon::detach()? {
        Side::Launcher(status) => Ok(status),
        Side::Daemon(report) => {
            raise_limits();
            let status = match run_broker(&options, || report.success()) {
                Ok(_) => 0,
                Err(_) => 1,
            };
            daemon::exit(status)
        }
    }
}

/// A client is a socket and a few life pages, and the usual soft limit of 1024 is soon reached; and whoever started this broker may
/// have limited its own files to less than another's objects.
fn raise_limits() {
    for resource in [Resource::Nofile, Resource::Fsize] {
        let mut limit = rustix::process::getrlimit(resource);
        limit.current = limit.maximum;
        // Where it cannot be raised it stays; accepting pauses when descriptors run out.
        let _ = rustix::process::setrlimit(resource, limit);
    }
}

/// Serves one client over its socket, in a thread of that client, until it closes the socket.
///
/// # Errors
/// [`BrokerError`].
pub fn serve_embedded(socket: OwnedFd, options: &BrokerOptions) -> Result<(), BrokerError> {
    let mut conductor = Conductor::new(None, options.store_slots);
    conductor.connected(Peer::from_fd(socket));
    let ran = conductor.run(Duration::ZERO).map_err(BrokerError::Poll);
    conductor.close();
    ran
}
