//! Asking a broker that runs already, from a process that has no business with it otherwise (`ksmrs stat`): connect, say hello,
//! ask, and go. Never starts a broker, and leaves nothing behind.

use super::{ConnectOptions, Error};
use crate::runtime_dir::{self, RuntimeDir, RuntimeDirError};
use crate::wire::{Answer, ClientEnd, Question, ReceiveBuffer, ToBroker, ToClient};
use ksmrs_sys::descriptors;
use ksmrs_sys::peer::Wait;
use rustix::io::Errno;

/// Asks in a thread with descriptors of its own; `None` where no broker listens.
pub(super) fn ask_running(options: &ConnectOptions, question: Question) -> Result<Option<Answer>, Error> {
    if options.embedded {
        return Ok(None);
    }
    let path = options.runtime_dir.clone().unwrap_or_else(runtime_dir::default_path);
    let domain = options.domain.clone();
    let asker = std::thread::Builder::new()
        .name("ksmrs-query".to_owned())
        .spawn(move || {
            descriptors::unshare_table()?;
            let directory = match RuntimeDir::open_existing(&path) {
                Err(RuntimeDirError::Call {
                    errno: Errno::NOENT, ..
                }) => return Ok(None),
                directory => directory?,
            };
            let Some(peer) = directory.connect()? else {
                return Ok(None);
            };
            converse(&ClientEnd::over(peer), domain, question).map(Some)
        });
    let asker = asker.map_err(|error| Error::Off(format!("no thread to ask with: {error}")))?;
    asker.join().unwrap_or(Err(Error::Lost))
}

fn converse(end: &ClientEnd, domain: String, question: Question) -> Result<Answer, Error> {
    let hello = ToBroker::Hello {
        release: env!("CARGO_PKG_VERSION").to_owned(),
        domain,
        pid: std::process::id(),
        stores: Vec::new(),
        born: None,
    };
    end.send(&hello, None, Wait::Yes)?;
    end.send(&ToBroker::Ask { id: 1, question }, None, Wait::Yes)?;
    let mut buffer = ReceiveBuffer::new();
    loop {
        match end.receive(&mut buffer, Wait::Yes)?.0 {
            ToClient::Answer { id: 1, answer } => return Ok(answer),
            ToClient::Error { id: 1, code, text } => return Err(Error::Refused { code, text }),
            ToClient::Bye { reason } => return Err(Error::Start(format!("it said goodbye: {reason}"))),
            _ => {}
        }
    }
}
