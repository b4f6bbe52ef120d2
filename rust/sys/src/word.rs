//! The state word of a page: its layout and nothing else.
//!
//! One `u64` per page lives in the page table that a client shares with its broker. Whoever moves a page owns its word by
//! compare-and-swap (`protocol.rs`); whoever only looks believes the word and nothing else. This file never touches memory,
//! atomics or system calls, so that client, broker, signal handler and model checker read the very same bits.
//!
//! ```text
//!  63            32 31     24 23            8 7      4 3      0
//! +----------------+---------+---------------+--------+--------+
//! |      slot      |  store  |  generation   | origin | state  |
//! +----------------+---------+---------------+--------+--------+
//!                   `----------- the half that a futex sees ----'
//! ```
//!
//! Of the four bits of the origin the upper two are marks: cancelled (7) and lent (6).
//! A zeroed table is a table of Private pages. Store 0 means "no store", so a slot is only read under a store number.

use core::fmt;

/// Where a page is in its life; DESIGN.md tells who may move it from where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Its own memory, writable.
    Private = 0,
    /// The remapper is write-protecting it.
    Freezing = 1,
    /// Write-protected while the remapper compares.
    Frozen = 2,
    /// Compared equal; the remapper is mapping the frame over it.
    Committing = 3,
    /// Shows a frame of the store.
    Merged = 4,
    /// All zero, without any memory.
    Zero = 5,
    /// A writer or an unmerge is giving it memory back.
    Breaking = 6,
    /// Within a break of a shared page: the home page is complete and newer than the frame.
    Homed = 7,
    /// Private region: own memory again, still inside a mapping of its slot.
    Broken = 8,
    /// Shared region, emergency: a private copy outside the object, to be brought home later.
    Detached = 9,
    /// Out of the protocol on request, writable; keeps the slot it lies over.
    Held = 10,
    /// Its region is ending.
    Leaving = 11,
}

impl State {
    const ALL: [State; 12] = [
        State::Private,
        State::Freezing,
        State::Frozen,
        State::Committing,
        State::Merged,
        State::Zero,
        State::Breaking,
        State::Homed,
        State::Broken,
        State::Detached,
        State::Held,
        State::Leaving,
    ];

    /// Whether somebody owns a word in this state, so that everyone else waits for it to change; but see [`Word::is_owned`].
    pub const fn is_transient(self) -> bool {
        matches!(
            self,
            State::Freezing | State::Committing | State::Breaking | State::Homed | State::Leaving
        )
    }

    /// Whether the page is on its way from one place to another: it may be read where it was, and nobody knows what maps it.
    pub const fn is_in_motion(self) -> bool {
        self.is_transient() || matches!(self, State::Frozen)
    }

    /// The state's name as docs, stats and errors spell it.
    pub const fn name(self) -> &'static str {
        match self {
            State::Private => "private",
            State::Freezing => "freezing",
            State::Frozen => "frozen",
            State::Committing => "committing",
            State::Merged => "merged",
            State::Zero => "zero",
            State::Breaking => "breaking",
            State::Homed => "homed",
            State::Broken => "broken",
            State::Detached => "detached",
            State::Held => "held",
            State::Leaving => "leaving",
        }
    }
}

/// What a frozen page was, and goes back to when its merge is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Origin {
    /// From [`State::Private`].
    Private = 0,
    /// From [`State::Broken`].
    Broken = 1,
    /// From [`State::Detached`].
    Detached = 2,
    /// From [`State::Merged`]: migrating, or leaving an old store.
    Merged = 3,
}

impl Origin {
    /// The resting state behind this origin.
    pub const fn state(self) -> State {
        match self {
            Origin::Private => State::Private,
            Origin::Broken => State::Broken,
            Origin::Detached => State::Detached,
            Origin::Merged => State::Merged,
        }
    }

    /// The origin of a page that is about to be frozen; `None` for pages that are never frozen.
    pub const fn of(state: State) -> Option<Origin> {
        match state {
            State::Private => Some(Origin::Private),
            State::Broken => Some(Origin::Broken),
            State::Detached => Some(Origin::Detached),
            State::Merged => Some(Origin::Merged),
            _ => None,
        }
    }
}

/// The number that a client knows a broker's store by; 0 is no store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreNumber(pub u8);

/// A page of a frame store; [`Slot::ZERO`] is the frame that needs no memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

impl Slot {
    /// The all-zero content, which has no frame.
    pub const ZERO: Slot = Slot(u32::MAX);

    /// The slot `pages` further on.
    #[must_use]
    pub const fn plus(self, pages: u32) -> Slot {
        Slot(self.0 + pages)
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Slot::ZERO {
            f.write_str("Slot(zero)")
        } else {
            write!(f, "Slot({})", self.0)
        }
    }
}

const STATE_MASK: u64 = 0xf;
const ORIGIN_SHIFT: u32 = 4;
const ORIGIN_MASK: u64 = 0x3;
/// Set by a writer that could not thaw one page at the mapping limit: the remapper must thaw the run.
const CANCEL_BIT: u64 = 1 << 7;
/// Set by a broker that completed, or is completing, the home page of a client that stands still.
const LENT_BIT: u64 = 1 << 6;
const GENERATION_SHIFT: u32 = 8;
const GENERATION_MASK: u64 = 0xffff;
const STORE_SHIFT: u32 = 24;
const STORE_MASK: u64 = 0xff;
const SLOT_SHIFT: u32 = 32;

/// A page's state word, as loaded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Word(pub u64);

impl Word {
    /// What a fresh table holds: Private, generation 0, no slot.
    pub const PRIVATE: Word = Word(0);

    /// The state; `None` for the four bit patterns that mean nothing (a hostile or damaged table).
    pub const fn checked_state(self) -> Option<State> {
        let bits = (self.0 & STATE_MASK) as usize;
        if bits < State::ALL.len() {
            Some(State::ALL[bits])
        } else {
            None
        }
    }

    /// The state of a word of our own table. The four meaningless patterns read as Leaving, which everyone leaves alone.
    pub const fn state(self) -> State {
        match self.checked_state() {
            Some(state) => state,
            None => State::Leaving,
        }
    }

    /// What the page was before it was frozen.
    pub const fn origin(self) -> Origin {
        match (self.0 >> ORIGIN_SHIFT) & ORIGIN_MASK {
            0 => Origin::Private,
            1 => Origin::Broken,
            2 => Origin::Detached,
            _ => Origin::Merged,
        }
    }

    /// Raised at each commit, so that an observation made before it can never be mistaken for one made after.
    pub const fn generation(self) -> u16 {
        ((self.0 >> GENERATION_SHIFT) & GENERATION_MASK) as u16
    }

    /// The store and slot that the page shows or lies over, if any.
    pub const fn frame(self) -> Option<(StoreNumber, Slot)> {
        let store = ((self.0 >> STORE_SHIFT) & STORE_MASK) as u8;
        if store == 0 {
            None
        } else {
            Some((StoreNumber(store), Slot((self.0 >> SLOT_SHIFT) as u32)))
        }
    }

    /// Whether a writer at the mapping limit asked for the whole run to be thawed.
    pub const fn is_cancelled(self) -> bool {
        self.0 & CANCEL_BIT != 0
    }

    /// The same word with the cancel mark.
    #[must_use]
    pub const fn cancelled(self) -> Word {
        Word(self.0 | CANCEL_BIT)
    }

    /// The same word without the cancel mark.
    #[must_use]
    pub const fn uncancelled(self) -> Word {
        Word(self.0 & !CANCEL_BIT)
    }

    /// Whether its broker has to do with the page: Breaking, it fills the home page; Homed, that is complete and nobody's.
    pub const fn is_lent(self) -> bool {
        self.0 & LENT_BIT != 0
    }

    /// The same word with the lent mark.
    #[must_use]
    pub const fn lent(self) -> Word {
        Word(self.0 | LENT_BIT)
    }

    /// The same word without the lent mark.
    #[must_use]
    pub const fn unlent(self) -> Word {
        Word(self.0 & !LENT_BIT)
    }

    /// Whether somebody owns the word.
    pub const fn is_owned(self) -> bool {
        let state = self.state();
        state.is_transient() && !(matches!(state, State::Homed) && self.is_lent())
    }

    /// The same page in another state; frame, origin and generation stay.
    #[must_use]
    pub const fn with_state(self, state: State) -> Word {
        Word(self.0 & !STATE_MASK | state as u64)
    }

    /// The same page with its origin noted.
    #[must_use]
    pub const fn with_origin(self, origin: Origin) -> Word {
        Word(self.0 & !(ORIGIN_MASK << ORIGIN_SHIFT) | (origin as u64) << ORIGIN_SHIFT)
    }

    /// The same page showing, or lying over, this frame.
    #[must_use]
    pub const fn with_frame(self, store: StoreNumber, slot: Slot) -> Word {
        let kept = self.0 & !(STORE_MASK << STORE_SHIFT) & 0xffff_ffff;
        Word(kept | (store.0 as u64) << STORE_SHIFT | (slot.0 as u64) << SLOT_SHIFT)
    }

    /// The same page over no store at all.
    #[must_use]
    pub const fn without_frame(self) -> Word {
        self.with_frame(StoreNumber(0), Slot(0))
    }

    /// The same page one generation on; a commit does this.
    #[must_use]
    pub const fn next_generation(self) -> Word {
        let next = self.generation().wrapping_add(1) as u64;
        Word(self.0 & !(GENERATION_MASK << GENERATION_SHIFT) | next << GENERATION_SHIFT)
    }

    /// The half that a futex waits on.
    pub const fn futex_half(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.checked_state().map_or("?", State::name))?;
        if let Some((store, slot)) = self.frame() {
            write!(f, "({}:{:?})", store.0, slot)?;
        }
        write!(f, "#{}<-{}", self.generation(), self.origin().state().name())?;
        if self.is_lent() {
            f.write_str("+")?;
        }
        if self.is_cancelled() { f.write_str("!") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fields_do_not_disturb_each_other(bits: u64, store in 1u8.., slot: u32) {
            let word = Word(bits);
            let framed = word.with_frame(StoreNumber(store), Slot(slot));
            prop_assert_eq!(framed.frame(), Some((StoreNumber(store), Slot(slot))));
            prop_assert_eq!(framed.futex_half() & 0x00ff_ffff, word.futex_half() & 0x00ff_ffff);
            prop_assert_eq!(framed.next_generation().generation(), word.generation().wrapping_add(1));
            prop_assert_eq!(framed.next_generation().frame(), framed.frame());
            prop_assert_eq!(framed.without_frame().frame(), None);
            for state in State::ALL {
                let moved = framed.with_state(state).with_origin(Origin::Detached);
                prop_assert_eq!(moved.state(), state);
                prop_assert_eq!(moved.origin(), Origin::Detached);
                prop_assert_eq!(moved.frame(), framed.frame());
                prop_assert_eq!(moved.generation(), framed.generation());
                prop_assert!(moved.lent().is_lent() && !moved.lent().unlent().is_lent());
                prop_assert_eq!(moved.lent().unlent(), moved.unlent());
                prop_assert!(moved.cancelled().is_cancelled() && !moved.cancelled().uncancelled().is_cancelled());
            }
        }
    }

    #[test]
    fn a_zeroed_table_is_private() {
        assert_eq!(Word(0).state(), State::Private);
        assert_eq!(Word(0).frame(), None);
        assert_eq!(Word(15).checked_state(), None);
    }
}
