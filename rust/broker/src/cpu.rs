//! CPU time that merging takes: read once per order or turn, never per page.
//!
//! The kernel's advisor weighs what ksmd spent; here that work is done by the broker's thread and by two threads of each client.
//! Each reads its own clock. What a client reports is its word alone, so it is believed only as far as its two threads can have
//! run since it reported last.

use std::time::Duration;

/// Scanner and remapper.
const CLIENT_THREADS: u32 = 2;

/// What the calling thread has spent in its life.
pub(crate) fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// A thread's own stopwatch: the time from look to look.
#[derive(Debug)]
pub(crate) struct Stopwatch(Duration);

impl Stopwatch {
    /// Begins now.
    pub(crate) fn start() -> Stopwatch {
        Stopwatch(thread_time())
    }

    /// What the calling thread spent since the last look.
    pub(crate) fn lap(&mut self) -> Duration {
        let before = std::mem::replace(&mut self.0, thread_time());
        self.0.saturating_sub(before)
    }
}

/// What a client says that it spent, as far as that can be.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    last: Duration,
}

impl Claims {
    /// A report that came at that time.
    pub(crate) fn take(&mut self, micros: u32, now: Duration) -> Duration {
        let most = now.saturating_sub(self.last).saturating_mul(CLIENT_THREADS);
        self.last = now;
        Duration::from_micros(micros.into()).min(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopwatch_counts_work_and_not_sleep() {
        let mut stopwatch = Stopwatch::start();
        let begun = std::time::Instant::now();
        std::thread::sleep(Duration::from_millis(50));
        let slept = stopwatch.lap();
        assert!(slept < begun.elapsed() / 2, "{slept:?}");
        while thread_time() < stopwatch.0 + Duration::from_millis(5) {
            std::hint::spin_loop();
        }
        assert!(stopwatch.lap() >= Duration::from_millis(5));
    }

    #[test]
    fn nobody_spends_more_than_two_threads_can() {
        let mut claims = Claims::default();
        let ms = Duration::from_millis;
        assert_eq!(claims.take(3_000, ms(10)), ms(3));
        assert_eq!(claims.take(30_000, ms(20)), ms(20));
        assert_eq!(claims.take(u32::MAX, ms(20)), ms(0));
    }
}
