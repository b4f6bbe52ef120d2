//! The record of a frame: eleven bytes, for there is one for every other page of a domain.
//!
//! Six of checksum, and five in which two counts, the life and a mark are packed. A third count, of pages with memory of their own
//! over the slot, is small for nearly all frames and has five bits; where it is larger, `frame.rs` keeps it elsewhere. Never says what
//! a count means for a frame, that is `rmap.rs`.

use crate::checksum::Checksum;

/// Where a slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Nobody's.
    Free,
    /// Being filled; no client knows of it.
    Filling,
    /// Holds a content and never changes it.
    Filled,
    /// The same, but another slot has the content now: nobody is sent here any more, and whoever is here follows.
    Moved,
    /// The same, but no page shows it any more, and so its content is nobody's: it waits for those who may be on their way here, and
    /// for children whom nobody knows. As where the kernel finds a stable node stale.
    Stale,
    /// Its memory is about to be given back; no client shows it.
    Doomed,
    /// Its memory was given back, but pages still lie over it.
    Punched,
}

impl Life {
    const ALL: [Life; 7] = [
        Life::Free,
        Life::Filling,
        Life::Filled,
        Life::Moved,
        Life::Stale,
        Life::Doomed,
        Life::Punched,
    ];
}

/// Bits of the packed five bytes: where each field begins, and how many it has.
struct Field {
    at: u32,
    bits: u32,
}

const HELD: Field = Field { at: 0, bits: 16 };
const SHOWN: Field = Field { at: 16, bits: 15 };
const COVERED: Field = Field { at: 31, bits: 5 };
const LIFE: Field = Field { at: 36, bits: 3 };
const DUP: Field = Field { at: 39, bits: 1 };

impl Field {
    const fn most(&self) -> u64 {
        (1 << self.bits) - 1
    }
}

/// So many covering pages, or more: the record does not say how many.
pub(crate) const CROWDED: u32 = COVERED.most() as u32;

#[derive(Clone, Copy)]
pub(crate) struct Frame {
    checksum: [u8; 6],
    packed: [u8; 5],
}

impl Frame {
    /// A slot that is nobody's.
    pub(crate) const FREE: Frame = Frame {
        checksum: [0; 6],
        packed: [0; 5],
    };

    fn get(&self, field: &Field) -> u32 {
        (wide(&self.packed) >> field.at & field.most()) as u32
    }

    fn set(&mut self, field: &Field, value: u32) {
        // A broker that ends is replaced; one that miscounts frees what somebody shows.
        assert!(
            u64::from(value) <= field.most(),
            "{value} does not fit {} bits",
            field.bits
        );
        let rest = wide(&self.packed) & !(field.most() << field.at);
        narrow(&mut self.packed, rest | u64::from(value) << field.at);
    }

    pub(crate) fn checksum(&self) -> Checksum {
        Checksum(wide(&self.checksum))
    }

    pub(crate) fn set_checksum(&mut self, checksum: Checksum) {
        narrow(&mut self.checksum, checksum.0);
    }

    pub(crate) fn life(&self) -> Life {
        Life::ALL[self.get(&LIFE) as usize]
    }

    pub(crate) fn set_life(&mut self, life: Life) {
        self.set(&LIFE, life as u32);
    }

    /// Whether it is one of several frames of its content.
    pub(crate) fn is_dup(&self) -> bool {
        self.get(&DUP) == 1
    }

    pub(crate) fn set_dup(&mut self, dup: bool) {
        self.set(&DUP, u32::from(dup));
    }

    /// Pages that show it.
    pub(crate) fn shown(&self) -> u32 {
        self.get(&SHOWN)
    }

    pub(crate) fn set_shown(&mut self, pages: u32) {
        self.set(&SHOWN, pages);
    }

    /// Proposals unanswered, detached pages, and what was given up but may still be shown (limbo).
    pub(crate) fn held(&self) -> u32 {
        self.get(&HELD)
    }

    pub(crate) fn hold(&mut self) {
        self.set(&HELD, self.held() + 1);
    }

    pub(crate) fn let_go(&mut self) {
        self.set(&HELD, self.held() - 1);
    }

    /// Pages with memory of their own inside a mapping of it; [`CROWDED`] if they are as many or more.
    pub(crate) fn covered(&self) -> u32 {
        self.get(&COVERED)
    }

    pub(crate) fn set_covered(&mut self, pages: u32) {
        self.set(&COVERED, pages);
    }

    /// What `max_page_sharing` limits: pages that show it, and those on their way to it or from it. Not those that were written and
    /// only lie over its slot still, for as long as their mappings stay.
    pub(crate) fn sharing(&self) -> u32 {
        self.shown() + self.held()
    }

    /// Whether its memory is needed.
    pub(crate) fn is_wanted(&self) -> bool {
        self.sharing() > 0
    }
}

fn wide<const BYTES: usize>(bytes: &[u8; BYTES]) -> u64 {
    let mut all = [0; 8];
    all[..BYTES].copy_from_slice(bytes);
    u64::from_le_bytes(all)
}

fn narrow<const BYTES: usize>(bytes: &mut [u8; BYTES], value: u64) {
    bytes.copy_from_slice(&value.to_le_bytes()[..BYTES]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_eleven_bytes_and_its_fields_do_not_disturb_each_other() {
        assert_eq!(size_of::<Frame>(), 11);
        let mut frame = Frame::FREE;
        frame.set_checksum(Checksum(Checksum::MASK - 5));
        frame.set_shown(SHOWN.most() as u32);
        frame.set_covered(CROWDED);
        for _ in 0..HELD.most() {
            frame.hold();
        }
        for life in Life::ALL {
            frame.set_life(life);
            for dup in [true, false] {
                frame.set_dup(dup);
                assert_eq!((frame.life(), frame.is_dup()), (life, dup));
            }
        }
        assert_eq!(frame.checksum(), Checksum(Checksum::MASK - 5));
        assert_eq!(
            (frame.shown(), frame.covered(), frame.held()),
            (0x7fff, CROWDED, 0xffff)
        );
        frame.let_go();
        frame.set_shown(0);
        assert_eq!((frame.shown(), frame.covered(), frame.held()), (0, CROWDED, 0xfffe));
        assert!(frame.is_wanted());
    }
}
