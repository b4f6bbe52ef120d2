//! Meeting a broker: the one that listens, a daemon started for the purpose, or one in a thread of this process.
//!
//! Runs in a client thread, so that no descriptor of it is ever the program's. The daemon is started by a command (the program's
//! own interpreter), which returns once a broker listens.

use super::{ConnectOptions, Error};
use crate::runtime_dir::{self, RuntimeDir};
use crate::serve::{BrokerOptions, serve_embedded};
use ksmrs_sys::peer::Peer;
use ksmrs_sys::sigmask;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A broker may end, idle, between its starter's success and our connect; then it is started again.
const TRIES: u32 = 3;
/// What is kept of a failing starter's words.
const MAX_COMPLAINT: usize = 500;

/// A socket to a broker.
pub(super) fn meet(options: &ConnectOptions) -> Result<Peer, Error> {
    if options.embedded || options.broker_command.is_empty() {
        return embed();
    }
    let path = options.runtime_dir.clone().unwrap_or_else(runtime_dir::default_path);
    let directory = RuntimeDir::open(&path)?;
    for _ in 0..TRIES {
        if let Some(peer) = directory.connect()? {
            return Ok(peer);
        }
        start(options)?;
    }
    Err(Error::Start(
        "it ended again at once; see its log in the runtime directory".to_owned(),
    ))
}

/// Runs the command that starts a daemon, and waits until it says that a broker listens.
fn start(options: &ConnectOptions) -> Result<(), Error> {
    let Some((program, arguments)) = options.broker_command.split_first() else {
        return Err(Error::Start("no command to start it with".to_owned()));
    };
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output);
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let complaint: String = String::from_utf8_lossy(&output.stderr)
                .trim()
                .chars()
                .take(MAX_COMPLAINT)
                .collect();
            Err(Error::Start(format!("{}: {complaint}", output.status)))
        }
        // The program reaped our child (it waits for any): what counts is whether a broker listens now.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::CHILD.raw_os_error()) => Ok(()),
        Err(error) => Err(Error::Start(format!("{}: {error}", program.to_string_lossy()))),
    }
}

fn embed() -> Result<Peer, Error> {
    let (ours, theirs) = Peer::pair()?;
    let thread = std::thread::Builder::new()
        .name("ksmrs-broker".to_owned())
        .spawn(move || {
            sigmask::Blocked::for_good();
            if let Err(error) = serve_embedded(theirs.into_fd(), &BrokerOptions::default()) {
                tracing::error!(%error, "the embedded broker ends");
            }
        });
    thread.map_err(|error| Error::Start(format!("no thread for it: {error}")))?;
    Ok(ours)
}

/// How long to wait before the next try to meet a broker, after so many failures in a row.
pub(super) fn pause_after(failures: u32) -> Duration {
    Duration::from_millis(100 << failures.min(8))
}
