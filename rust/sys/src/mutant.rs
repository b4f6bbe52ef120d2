//! Deliberate errors, chosen at run time, that the model and the oracle must catch.
//!
//! They exist only with the cargo feature `mutants`; without it [`active`] is a constant `false` and the compiler drops every
//! branch. Nothing here ever runs in a wheel (a test checks that).

/// An error in the protocol that somebody could make, and that must not survive the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutant {
    /// Pages are compared without being write-protected.
    NoFreeze = 1,
    /// The comparison is made before the write-protection.
    CompareBeforeFreeze = 2,
    /// The home page is freed before the frame is mapped over the view.
    PunchBeforeMap = 3,
    /// The fault handler makes a page writable without owning its word.
    HandlerWithoutClaim = 4,
    /// A page is declared Frozen before it is protected.
    NoFreezing = 5,
    /// A scan's evidence is applied to whatever the word has become since.
    NoGeneration = 6,
    /// A scan arms pages after it read them.
    ArmAfterRead = 7,
    /// What was compared before the freeze is vouched for before it, too.
    WitnessAskedEarly = 8,
    /// A break fills the home of pages, too, that had it all along and are being written.
    BridgeFilled = 9,
    /// The broker takes pages that are being copied from their frames, to leave, for written.
    LeavingCovers = 10,
}

impl Mutant {
    /// Every mutant of this crate with its name.
    pub const ALL: [(&'static str, Mutant); 10] = [
        ("no-freeze", Mutant::NoFreeze),
        ("compare-before-freeze", Mutant::CompareBeforeFreeze),
        ("punch-before-map", Mutant::PunchBeforeMap),
        ("handler-without-claim", Mutant::HandlerWithoutClaim),
        ("no-freezing", Mutant::NoFreezing),
        ("no-generation", Mutant::NoGeneration),
        ("arm-after-read", Mutant::ArmAfterRead),
        ("witness-asked-early", Mutant::WitnessAskedEarly),
        ("bridge-filled", Mutant::BridgeFilled),
        ("leaving-covers", Mutant::LeavingCovers),
    ];
}

#[cfg(feature = "mutants")]
mod chosen {
    use super::Mutant;
    use std::sync::atomic::{AtomicU8, Ordering};

    static CHOSEN: AtomicU8 = AtomicU8::new(0);

    /// Whether this error is to be made.
    pub fn active(mutant: Mutant) -> bool {
        CHOSEN.load(Ordering::Relaxed) == mutant as u8
    }

    /// Chooses a mutant by name, or none; false if there is no such mutant here.
    pub fn choose(name: Option<&str>) -> bool {
        let Some(name) = name else {
            CHOSEN.store(0, Ordering::Relaxed);
            return true;
        };
        let found = Mutant::ALL.iter().find(|(known, _)| *known == name);
        if let Some((_, mutant)) = found {
            CHOSEN.store(*mutant as u8, Ordering::Relaxed);
        }
        found.is_some()
    }
}

#[cfg(feature = "mutants")]
pub use chosen::{active, choose};

/// Whether this error is to be made: never, without the feature.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn active(_mutant: Mutant) -> bool {
    false
}
