//! Places where a test may slow the engine down or kill it, to widen every window and to die at every step.
//!
//! They exist only with the cargo feature `mutants`; without it [`hit`] is nothing. `KSMRS_FAILPOINTS` names them, separated by
//! semicolons: `merge-frozen=delay:300` sleeps 300 us each time, `break-filled=kill@5` kills the process (SIGKILL) the fifth time.
//! Async-signal-safe once configured.

/// A step after which it matters what is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Failpoint {
    /// Pages were compared that a witness has an eye on; none is claimed yet.
    MergeCompared,
    /// Pages are in Freezing, not protected yet.
    MergeFreezing,
    /// Pages are Frozen, not compared yet.
    MergeFrozen,
    /// Pages are in Committing, the frames not mapped yet.
    MergeCommitting,
    /// The frames are mapped, the words still say Committing.
    MergeMapped,
    /// Shared pages show frames, their home pages are about to be freed.
    SettleClaimed,
    /// Home pages are freed, the words still say Committing.
    SettlePunched,
    /// A break owns its pages, home is still a hole.
    BreakClaimed,
    /// Home is complete, the frame still mapped.
    BreakFilled,
    /// Home is mapped, the words still say Homed.
    BreakMapped,
    /// A frozen page is being taken back by a writer.
    TakeBack,
    /// An unmerge owns private pages, not copied yet.
    UnmergeClaimed,
    /// Private pages are about to be copied to plain memory, for their region leaves.
    LeaveClaimed,
    /// A block of the heap was chosen to take part, and does not yet.
    BlockChosen,
    /// It is wanted still, and whoever opens it is alone.
    BlockWanted,
    /// A block of the heap counts as taking part, and none of its pages does yet.
    BlockOpens,
    /// A scan has its evidence and is about to mark the page.
    ScanEvidence,
    /// A write fault has arrived and nobody has looked at the page yet.
    FaultArrived,
    /// The broker filled frames and has told nobody.
    BrokerFilled,
    /// The broker is about to send an order to map frames.
    BrokerProposes,
    /// The broker owns pages of a client that stands still, to complete them at home.
    BrokerLends,
    /// The broker is about to free frames.
    BrokerPunches,
}

impl Failpoint {
    /// Every failpoint with its name.
    pub const ALL: [(&'static str, Failpoint); 22] = [
        ("merge-compared", Failpoint::MergeCompared),
        ("merge-freezing", Failpoint::MergeFreezing),
        ("merge-frozen", Failpoint::MergeFrozen),
        ("merge-committing", Failpoint::MergeCommitting),
        ("merge-mapped", Failpoint::MergeMapped),
        ("settle-claimed", Failpoint::SettleClaimed),
        ("settle-punched", Failpoint::SettlePunched),
        ("break-claimed", Failpoint::BreakClaimed),
        ("break-filled", Failpoint::BreakFilled),
        ("break-mapped", Failpoint::BreakMapped),
        ("take-back", Failpoint::TakeBack),
        ("unmerge-claimed", Failpoint::UnmergeClaimed),
        ("leave-claimed", Failpoint::LeaveClaimed),
        ("block-chosen", Failpoint::BlockChosen),
        ("block-wanted", Failpoint::BlockWanted),
        ("block-opens", Failpoint::BlockOpens),
        ("scan-evidence", Failpoint::ScanEvidence),
        ("fault-arrived", Failpoint::FaultArrived),
        ("broker-filled", Failpoint::BrokerFilled),
        ("broker-proposes", Failpoint::BrokerProposes),
        ("broker-lends", Failpoint::BrokerLends),
        ("broker-punches", Failpoint::BrokerPunches),
    ];
}

#[cfg(feature = "mutants")]
mod armed {
    use super::Failpoint;
    use core::sync::atomic::{AtomicU32, Ordering};

    struct Armed {
        delay_us: AtomicU32,
        /// Hits left until the process dies; 0: never.
        kill_in: AtomicU32,
        hits: AtomicU32,
    }

    static ARMED: [Armed; Failpoint::ALL.len()] = [const {
        Armed {
            delay_us: AtomicU32::new(0),
            kill_in: AtomicU32::new(0),
            hits: AtomicU32::new(0),
        }
    }; Failpoint::ALL.len()];

    /// Reads `KSMRS_FAILPOINTS`.
    ///
    /// # Errors
    /// What is not understood in it.
    pub fn configure() -> Result<(), String> {
        let Ok(text) = std::env::var("KSMRS_FAILPOINTS") else {
            return Ok(());
        };
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let unclear =
                || format!("KSMRS_FAILPOINTS: {part:?} is no failpoint=delay:MICROSECONDS or failpoint=kill@HIT");
            let (name, action) = part.split_once('=').ok_or_else(unclear)?;
            let found = Failpoint::ALL
                .iter()
                .find(|(known, _)| *known == name)
                .ok_or_else(unclear)?;
            let armed = &ARMED[found.1 as usize];
            if let Some(delay) = action.strip_prefix("delay:") {
                armed
                    .delay_us
                    .store(delay.parse().map_err(|_| unclear())?, Ordering::SeqCst);
            } else if let Some(hit) = action.strip_prefix("kill@") {
                armed
                    .kill_in
                    .store(hit.parse().map_err(|_| unclear())?, Ordering::SeqCst);
            } else {
                return Err(unclear());
            }
        }
        Ok(())
    }

    /// How often anybody came by this place.
    pub fn hits(point: Failpoint) -> u32 {
        ARMED[point as usize].hits.load(Ordering::SeqCst)
    }

    /// Does what the test asked for at this place.
    pub fn hit(point: Failpoint) {
        let armed = &ARMED[point as usize];
        armed.hits.fetch_add(1, Ordering::SeqCst);
        let delay = armed.delay_us.load(Ordering::Relaxed);
        if delay != 0 {
            let time = rustix::thread::Timespec {
                tv_sec: i64::from(delay / 1_000_000),
                tv_nsec: i64::from(delay % 1_000_000) * 1000,
            };
            let _ = rustix::thread::nanosleep(&time);
        }
        if armed.kill_in.load(Ordering::Relaxed) != 0 && armed.kill_in.fetch_sub(1, Ordering::SeqCst) == 1 {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }
}

#[cfg(feature = "mutants")]
pub use armed::{configure, hit, hits};

/// Nothing, without the feature.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn hit(_point: Failpoint) {}
