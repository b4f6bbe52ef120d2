//! Blocking signals around code that owns words, by the raw system call; and the priority of client threads.
//!
//! The C library keeps two of its own signals out of every mask it sets; a thread cancelled by one of them while it owns a word
//! would leave a page transient for ever. SIGSEGV and SIGBUS stay open: the owner may fault itself.

const BLOCKED: u64 = !((1 << (libc::SIGSEGV - 1)) | (1 << (libc::SIGBUS - 1)));
/// The kernel's sigset_t on every 64-bit architecture.
const MASK_BYTES: usize = size_of::<u64>();

/// The mask for `rt_sigaction`.
pub(crate) const fn handler_mask() -> u64 {
    BLOCKED
}

/// All signals but SIGSEGV and SIGBUS are blocked in this thread until dropped.
pub struct Blocked {
    before: u64,
}

impl Blocked {
    /// Blocks them.
    #[must_use]
    pub fn new() -> Blocked {
        Blocked {
            before: set(libc::SIG_BLOCK, BLOCKED),
        }
    }

    /// Blocks them for the rest of the thread's life.
    pub fn for_good() {
        set(libc::SIG_BLOCK, BLOCKED);
    }
}

impl Default for Blocked {
    fn default() -> Blocked {
        Blocked::new()
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        set(libc::SIG_SETMASK, self.before);
    }
}

/// Unblocks everything in this thread: for a process that was started from a thread of ours.
pub fn unblock_all() {
    set(libc::SIG_SETMASK, 0);
}

/// Makes the calling thread yield to the program's own: it works when there is nothing better to do.
pub fn lower_priority() {
    const NICE: i32 = 10;
    // SAFETY: no pointers. For 0, PRIO_PROCESS means the calling thread on Linux; a refusal leaves the priority as it is.
    unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, NICE) };
}

fn set(how: i32, mask: u64) -> u64 {
    let mut before = 0u64;
    // SAFETY: both pointers are to live words of the size that is passed along; the call cannot fail with these arguments.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const mask,
            &raw mut before,
            MASK_BYTES,
        )
    };
    before
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_restores_what_was_blocked() {
        let now = || set(libc::SIG_BLOCK, 0);
        let start = now();
        let outer = Blocked::new();
        assert_eq!(
            now() & BLOCKED,
            BLOCKED & !(1 << (libc::SIGKILL - 1)) & !(1 << (libc::SIGSTOP - 1))
        );
        drop(Blocked::new());
        assert_ne!(now(), start);
        drop(outer);
        assert_eq!(now(), start);
    }
}
