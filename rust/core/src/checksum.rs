//! Checksums: what core knows of a page's content.
//!
//! 48 bits of a hash keyed per domain, computed by whoever can read the memory. A checksum only ever proposes: every merge is
//! compared byte by byte by the client that maps it, so a collision costs work and never data. The trees file pages and
//! frames by checksum in hash tables: nothing ever asks for an order, so none is kept.
//!
//! While nodes count (`merge_across_nodes=0`) whoever computes it puts the page's NUMA node into the high 8 bits. Equal contents on
//! two nodes are then two checksums, and there are a pair of trees for each node without a second tree.

/// 48 bits of keyed xxh3-64; while nodes count, the page's node above 40 of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Checksum(pub u64);

impl Checksum {
    /// The bits that count.
    pub const MASK: u64 = (1 << 48) - 1;

    /// Bits of the hash where there is a node above them.
    const BESIDE_A_NODE: u32 = 40;

    /// The node of a page of which nobody knows where its memory is.
    pub const NO_NODE: u8 = u8::MAX;

    /// What a page of this content has on a node, while nodes count.
    #[must_use]
    pub const fn on_node(self, node: u8) -> Checksum {
        Checksum(self.content(true).0 | (node as u64) << Checksum::BESIDE_A_NODE)
    }

    /// The node, while nodes count.
    pub(crate) const fn node(self) -> u8 {
        (self.0 >> Checksum::BESIDE_A_NODE) as u8
    }

    /// What of it is the content's, wherever the page is.
    #[must_use]
    pub(crate) const fn content(self, nodes_count: bool) -> Checksum {
        if nodes_count {
            Checksum(self.0 & ((1 << Checksum::BESIDE_A_NODE) - 1))
        } else {
            self.masked()
        }
    }

    /// The same checksum without anything above its 48 bits.
    #[must_use]
    pub const fn masked(self) -> Checksum {
        Checksum(self.0 & Checksum::MASK)
    }

    /// The 32 bits that candidates are filed under. One content has another on each node, for a candidate has nothing but its tag.
    pub(crate) const fn tag(self) -> u32 {
        (self.0 ^ self.0 >> 32) as u32
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_has_a_checksum_and_a_tag_on_each_node() {
        let plain = Checksum(0x8123_4567_89ab);
        let (mut checksums, mut tags) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        for node in 0..=Checksum::NO_NODE {
            let there = plain.on_node(node);
            assert_eq!((there.node(), there.content(true)), (node, plain.content(true)));
            assert_eq!(there.on_node(3), plain.on_node(3));
            checksums.insert(there);
            tags.insert(there.tag());
        }
        assert_eq!((checksums.len(), tags.len()), (256, 256));
        assert_ne!(
            plain.content(false),
            Checksum(plain.0 ^ 1 << 47).content(false),
            "all 48 count"
        );
    }
}
