//! Checksums: what core knows of a page's content.
//!
//! 48 bits of a hash keyed per domain, computed by whoever can read the memory. A checksum only ever proposes: every merge is
//! compared byte by byte by the client that maps it, so a collision costs work and never data. The trees file pages and
//! frames by checksum in hash tables: nothing ever asks for an order, so none is kept.

/// 48 bits of keyed xxh3-64.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Checksum(pub u64);

impl Checksum {
    /// The bits that count.
    pub const MASK: u64 = (1 << 48) - 1;

    /// The same checksum without anything above its 48 bits.
    #[must_use]
    pub const fn masked(self) -> Checksum {
        Checksum(self.0 & Checksum::MASK)
    }

    /// The 32 bits that candidates are filed under.
    pub(crate) const fn tag(self) -> u32 {
        self.0 as u32
    }
}

impl std::fmt::Debug for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checksum({:012x})", self.0)
    }
}

/// The table's hash of a tag; the multiplier (2^64 over the golden ratio) reaches the high bits, which hashbrown needs too.
pub(crate) const fn spread(tag: u32) -> u64 {
    let wide = (tag as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    wide ^ wide >> 32
}
