//! Follows a chain of indices through memory, each load waiting for the one before it: what `benches/read_merged.py` times.
//!
//! A library with one C function, which that bench builds and loads into the process whose memory it is. Relies on the
//! caller for everything; writes nothing, and is in no wheel.

/// Where so many steps lead from word `from`, each word holding the index of the next.
///
/// # Safety
///
/// `words` must be readable at every index that the chain comes to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn chase(words: *const u64, from: u64, steps: u64) -> u64 {
    let mut at = from;
    for _ in 0..steps {
        // SAFETY: the caller promises that `at` is an index of memory that can be read; volatile, since the memory may be
        // remapped meanwhile, and so that every load happens.
        at = unsafe { words.add(at as usize).read_volatile() };
    }
    at
}
