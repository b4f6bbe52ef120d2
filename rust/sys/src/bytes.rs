//! Reading memory that others may be writing: copy a page out, or compare two pages.
//!
//! The program, the kernel and other processes write region pages whenever they like, so no reference may ever point at them.
//! Everything here goes through volatile loads: each load is whatever was there at that moment, and the caller decides what a
//! torn copy means (a checksum is only a hint; a comparison counts only while the page is frozen).

use crate::object::PAGE_SIZE;

/// The widest load that is a single instruction everywhere we run.
#[cfg(target_arch = "x86_64")]
type Lane = core::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Lane = u64;

const LANES: usize = PAGE_SIZE / size_of::<Lane>();

/// Copies a page out.
///
/// # Safety
/// `page` is page-aligned, mapped readable for the whole call, and cannot vanish under it (a truncated object would raise SIGBUS).
pub(crate) unsafe fn copy_out(page: *const u8, into: &mut [u8; PAGE_SIZE]) {
    // SAFETY: the caller's promise; the reference is good for a page.
    unsafe { copy_to(page, into.as_mut_ptr()) }
}

/// Copies a page to where others may be reading.
///
/// # Safety
/// As for [`copy_out`]; `to` is good for a page of writes, and not the same page.
pub(crate) unsafe fn copy_to(page: *const u8, to: *mut u8) {
    let (from, to) = (page.cast::<Lane>(), to.cast::<Lane>());
    for lane in 0..LANES {
        // SAFETY: within both pages, which the caller promises; the target is written unaligned.
        unsafe { to.add(lane).write_unaligned(from.add(lane).read_volatile()) };
    }
}

/// Whether two pages hold the same bytes.
///
/// # Safety
/// As for [`copy_out`], for both.
pub(crate) unsafe fn equal(a: *const u8, b: *const u8) -> bool {
    const AT_ONCE: usize = 8;
    let (a, b) = (a.cast::<Lane>(), b.cast::<Lane>());
    for lane in (0..LANES).step_by(AT_ONCE) {
        let mut differ = 0;
        for i in lane..lane + AT_ONCE {
            // SAFETY: within both pages, which the caller promises; page alignment aligns the lanes.
            let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
            differ |= difference(x, y);
        }
        if differ != 0 {
            return false;
        }
    }
    true
}

/// Whether a page holds zeros only.
///
/// # Safety
/// As for [`copy_out`].
pub(crate) unsafe fn is_zero(page: *const u8) -> bool {
    const ZEROS: &Zeros = &Zeros([0; PAGE_SIZE]);
    // SAFETY: the caller promises the page; the constant is a page, aligned as one.
    unsafe { equal(page, ZEROS.0.as_ptr()) }
}

#[repr(align(4096))]
struct Zeros([u8; PAGE_SIZE]);

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn difference(x: Lane, y: Lane) -> u64 {
    use core::arch::x86_64::{_mm_cvtsi128_si64, _mm_unpackhi_epi64, _mm_xor_si128};
    // SAFETY: SSE2 is part of every x86-64.
    unsafe {
        let xor = _mm_xor_si128(x, y);
        (_mm_cvtsi128_si64(xor) | _mm_cvtsi128_si64(_mm_unpackhi_epi64(xor, xor))) as u64
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn difference(x: Lane, y: Lane) -> u64 {
    x ^ y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts() {
        let mut a = Box::new(Zeros([0; PAGE_SIZE]));
        let mut b = Box::new(Zeros([0; PAGE_SIZE]));
        for at in 0..PAGE_SIZE {
            a.0[at] = (at % 251) as u8;
        }
        // SAFETY: boxed, page-aligned pages of this test.
        unsafe {
            copy_out(a.0.as_ptr(), &mut b.0);
            assert_eq!(a.0, b.0);
            assert!(equal(a.0.as_ptr(), b.0.as_ptr()) && !is_zero(a.0.as_ptr()));
            for at in 0..PAGE_SIZE {
                b.0[at] ^= 1;
                assert!(!equal(a.0.as_ptr(), b.0.as_ptr()), "byte {at}");
                b.0[at] ^= 1;
            }
            b.0.fill(0);
            assert!(is_zero(b.0.as_ptr()));
            for at in 0..PAGE_SIZE {
                b.0[at] = 0x80;
                assert!(!is_zero(b.0.as_ptr()), "byte {at}");
                b.0[at] = 0;
            }
        }
    }
}
