//! Reading memory that others may be writing: copy a page out, or compare two pages.
//!
//! The program, the kernel and other processes write region pages whenever they like, so no reference may ever point at them.
//! Everything here goes through volatile loads: each load is whatever was there at that moment, and the caller decides what a
//! torn copy means (a checksum is only a hint; a comparison counts only while the page is frozen). Copies are kept at page
//! boundaries.

use crate::object::PAGE_SIZE;

/// The widest load that is a single instruction everywhere we run.
#[cfg(target_arch = "x86_64")]
type Lane = core::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Lane = u64;

const LANES: usize = PAGE_SIZE / size_of::<Lane>();
/// Lanes of a cache line.
const LANES_OF_LINE: usize = 64 / size_of::<Lane>();

/// A page's bytes, aligned as one.
///
/// `rep movsb`, which the kernel copies with, takes four times as long where the low 12 bits of the target are just above the
/// source's (AMD EPYC: 3.2 us a page instead of 0.8), and that is where malloc puts large buffers.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct PageBytes(pub(crate) [u8; PAGE_SIZE]);

impl PageBytes {
    pub(crate) const ZEROS: PageBytes = PageBytes([0; PAGE_SIZE]);
}

/// Consecutive pages to copy into.
pub(crate) struct PageBuffer(Box<[PageBytes]>);

impl PageBuffer {
    pub(crate) fn new(pages: u32) -> PageBuffer {
        PageBuffer(vec![PageBytes::ZEROS; pages as usize].into())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: a page is its bytes and nothing else, and the slice is borrowed meanwhile.
        unsafe { core::slice::from_raw_parts(self.0.as_ptr().cast(), size_of_val(&*self.0)) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; any bytes make a page.
        unsafe { core::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), size_of_val(&*self.0)) }
    }
}

/// Asks for the same line of the page after this one: pages are read one after the other, and the processor's own prefetching
/// ends with each of them. Never faults, whatever is there.
#[inline(always)]
fn prefetch_next_page(line: *const Lane) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(line.wrapping_byte_add(PAGE_SIZE).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

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
    for lane in (0..LANES).step_by(LANES_OF_LINE) {
        prefetch_next_page(from.wrapping_add(lane));
        for i in lane..lane + LANES_OF_LINE {
            // SAFETY: within both pages, which the caller promises; the target is written unaligned.
            unsafe { to.add(i).write_unaligned(from.add(i).read_volatile()) };
        }
    }
}

/// Whether two pages hold the same bytes.
///
/// # Safety
/// As for [`copy_out`], for both.
pub(crate) unsafe fn equal(a: *const u8, b: *const u8) -> bool {
    let (a, b) = (a.cast::<Lane>(), b.cast::<Lane>());
    for lane in (0..LANES).step_by(LANES_OF_LINE) {
        prefetch_next_page(a.wrapping_add(lane));
        prefetch_next_page(b.wrapping_add(lane));
        let mut equal = Comparison::new();
        for i in lane..lane + LANES_OF_LINE {
            // SAFETY: within both pages, which the caller promises; page alignment aligns the lanes.
            unsafe { equal.and(a.add(i).read_volatile(), b.add(i).read_volatile()) };
        }
        if !equal.holds() {
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
    static ZEROS: PageBytes = PageBytes::ZEROS;
    // SAFETY: the caller promises the page; the other is one.
    unsafe { equal(page, ZEROS.0.as_ptr()) }
}

/// Whether all lanes were equal so far: their differences, or-ed together.
struct Comparison(Lane);

#[cfg(target_arch = "x86_64")]
impl Comparison {
    #[inline(always)]
    fn new() -> Comparison {
        // SAFETY: SSE2 is part of every x86-64; so in all of these.
        Comparison(unsafe { core::arch::x86_64::_mm_setzero_si128() })
    }

    #[inline(always)]
    fn and(&mut self, x: Lane, y: Lane) {
        use core::arch::x86_64::{_mm_or_si128, _mm_xor_si128};
        // SAFETY: as above.
        self.0 = unsafe { _mm_or_si128(self.0, _mm_xor_si128(x, y)) };
    }

    #[inline(always)]
    fn holds(&self) -> bool {
        use core::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_setzero_si128};
        // SAFETY: as above.
        unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(self.0, _mm_setzero_si128())) == 0xffff }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Comparison {
    fn new() -> Comparison {
        Comparison(0)
    }

    fn and(&mut self, x: Lane, y: Lane) {
        self.0 |= x ^ y;
    }

    fn holds(&self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts() {
        let mut a = Box::new(PageBytes::ZEROS);
        let mut b = Box::new(PageBytes::ZEROS);
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
