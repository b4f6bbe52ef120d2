//! The checksum of a page, and the word that remembers it.
//!
//! Keyed xxh3-64 cut to 48 bits: the key is the domain's secret, so that nobody outside can look for pages that collide or
//! recognise contents. Equal checksums only ever *suggest* equal pages; whoever maps a frame has compared.

use crate::error::SysError;
use crate::object::PAGE_SIZE;
use twox_hash::XxHash3_64;

/// Length of a domain's key.
pub const KEY_BYTES: usize = 16;
const CHECKSUM_BITS: u32 = 48;
const CHECKSUM_MASK: u64 = (1 << CHECKSUM_BITS) - 1;
/// Bits of the hash where a page's NUMA node stands above them.
const BESIDE_A_NODE: u32 = 40;
/// xxh3 wants at least 136 bytes of secret; 192 is what its authors use.
const SECRET_BYTES: usize = 192;

/// A fresh key from the kernel.
///
/// # Errors
/// The kernel's errno.
pub fn random_key() -> Result<[u8; KEY_BYTES], SysError> {
    let mut key = [0; KEY_BYTES];
    // Requests of up to 256 bytes are answered whole.
    rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())
        .map_err(SysError::call("getrandom", "a domain's key"))?;
    Ok(key)
}

/// Computes checksums under one domain's key.
#[derive(Clone)]
pub struct Checksummer {
    secret: [u8; SECRET_BYTES],
}

impl Checksummer {
    /// Spreads the key over a secret.
    pub fn new(key: &[u8; KEY_BYTES]) -> Checksummer {
        let mut secret = [0; SECRET_BYTES];
        let seed = u64::from_le_bytes(key[8..].try_into().unwrap_or_default());
        for (index, part) in secret.chunks_exact_mut(8).enumerate() {
            let word = XxHash3_64::oneshot_with_seed(seed.wrapping_add(index as u64), key);
            part.copy_from_slice(&word.to_le_bytes());
        }
        Checksummer { secret }
    }

    /// The page's checksum: 48 bits, never 0 (which means "none yet").
    pub fn page(&self, page: &[u8; PAGE_SIZE]) -> u64 {
        self.bytes(page)
    }

    /// The same of any bytes.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> u64 {
        let hash = XxHash3_64::oneshot_with_secret(&self.secret, bytes).expect("the secret is long enough");
        (hash & CHECKSUM_MASK).max(1)
    }

    /// The checksum of a page of zeros.
    pub fn zero_page(&self) -> u64 {
        self.page(&[0; PAGE_SIZE])
    }
}

impl core::fmt::Debug for Checksummer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Checksummer(secret)")
    }
}

/// A checksum with the NUMA node of its page in the high 8 of the 48 bits, for pages that merge with those of their node only.
pub(crate) const fn on_node(checksum48: u64, node: u8) -> u64 {
    let hash = without_node(checksum48);
    // A page has a checksum, whatever its bits.
    (if hash == 0 { 1 } else { hash }) | (node as u64) << BESIDE_A_NODE
}

/// What of a checksum that has a node in it is the content's.
pub(crate) const fn without_node(checksum48: u64) -> u64 {
    checksum48 & ((1 << BESIDE_A_NODE) - 1)
}

/// A page's checksum word: the checksum in the low 48 bits, in the high 16 the pass in which it took this value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct ChecksumWord(pub u64);

impl ChecksumWord {
    /// No checksum yet.
    pub const NONE: ChecksumWord = ChecksumWord(0);

    /// A checksum that took its value in this pass.
    pub const fn new(checksum48: u64, pass16: u16) -> ChecksumWord {
        ChecksumWord(checksum48 & CHECKSUM_MASK | (pass16 as u64) << CHECKSUM_BITS)
    }

    /// The checksum; `None` before the first one.
    pub const fn checksum48(self) -> Option<u64> {
        match self.0 & CHECKSUM_MASK {
            0 => None,
            checksum => Some(checksum),
        }
    }

    /// The pass (modulo 2^16) in which the checksum took its value.
    pub const fn pass16(self) -> u16 {
        (self.0 >> CHECKSUM_BITS) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_decides_the_checksum() {
        let page = [7; PAGE_SIZE];
        let one = Checksummer::new(&[1; KEY_BYTES]);
        let other = Checksummer::new(&[2; KEY_BYTES]);
        assert_eq!(one.page(&page), Checksummer::new(&[1; KEY_BYTES]).page(&page));
        assert_ne!(one.page(&page), other.page(&page));
        assert_ne!(one.page(&page), one.zero_page());
        let mut last_byte = page;
        last_byte[PAGE_SIZE - 1] = 8;
        assert_ne!(one.page(&page), one.page(&last_byte));
    }

    #[test]
    fn a_node_stands_above_forty_bits() {
        for checksum in [CHECKSUM_MASK, 0xff << 40 | 9] {
            let there = on_node(checksum, 3);
            assert_eq!((there >> 40, without_node(there)), (3, checksum & 0xff_ffff_ffff));
            assert_eq!(on_node(there, 0), without_node(checksum), "the other node is gone");
        }
        assert_eq!(on_node(0xff << 40, 0), 1, "it is not none");
    }

    #[test]
    fn the_word_keeps_both_halves() {
        let word = ChecksumWord::new(CHECKSUM_MASK, 0xabcd);
        assert_eq!((word.checksum48(), word.pass16()), (Some(CHECKSUM_MASK), 0xabcd));
        assert_eq!(ChecksumWord::NONE.checksum48(), None);
    }
}
