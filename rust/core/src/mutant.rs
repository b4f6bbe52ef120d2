//! Mutants: deliberate errors, chosen at run time, that a proof must catch.
//!
//! Only the cargo feature `mutants` can choose one; without it [`active`] is `false` for the compiler too, and no wheel has it.

/// A deliberate error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutant {
    /// What a client gives up is released at once, whoever still shows it.
    FrameFreedEarly = 1,
    /// A client that does not answer loses its proposals.
    ProposalFreedOnTimeout = 2,
    /// The seal of any epoch releases what was given up in every epoch.
    NoEpoch = 3,
    /// What a forked child shows is said to be counted in its own name, and is not.
    BornUncounted = 4,
    /// Once a child is registered, what anybody gave up is released, though children that are not may show it.
    UnregisteredForgotten = 5,
    /// A frame that moved loses its memory before its pages followed.
    MovedFrameFreed = 6,
    /// A held page of shared memory is taken for one that has memory of its own.
    HeldCovers = 7,
}

impl Mutant {
    /// All of them, by the name that chooses them.
    pub const ALL: [(&'static str, Mutant); 7] = [
        ("frame-freed-early", Mutant::FrameFreedEarly),
        ("proposal-freed-on-timeout", Mutant::ProposalFreedOnTimeout),
        ("no-epoch", Mutant::NoEpoch),
        ("born-uncounted", Mutant::BornUncounted),
        ("unregistered-forgotten", Mutant::UnregisteredForgotten),
        ("moved-frame-freed", Mutant::MovedFrameFreed),
        ("held-covers", Mutant::HeldCovers),
    ];
}

/// The mutant at work, 0 for none.
#[cfg(feature = "mutants")]
pub static CHOSEN: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Chooses a mutant by name, or none by an empty name; returns whether there is one of that name.
#[cfg(feature = "mutants")]
pub fn choose(name: &str) -> bool {
    let chosen = Mutant::ALL
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(0, |&(_, mutant)| mutant as u8);
    CHOSEN.store(chosen, std::sync::atomic::Ordering::Relaxed);
    chosen != 0 || name.is_empty()
}

/// Whether this mutant is at work.
#[cfg(feature = "mutants")]
pub fn active(mutant: Mutant) -> bool {
    CHOSEN.load(std::sync::atomic::Ordering::Relaxed) == mutant as u8
}

/// Whether this mutant is at work.
#[cfg(not(feature = "mutants"))]
pub const fn active(_: Mutant) -> bool {
    false
}
