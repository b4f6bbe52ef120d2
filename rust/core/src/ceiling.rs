//! Ceilings: how much CPU time each client's scanner and remapper may take in the background.
//!
//! Each client has an account that fills with what it says it spent and empties at `client_max_cpu` percent of the time that
//! passes. While it holds more than a tenth of a second is worth, the client is *held*: nothing is asked of it, and the pass waits for it
//! while all others go on. A report comes after the work, so in any stretch of time a client spends its percentage
//! of that stretch, of a tenth of a second more, and what one order of each of its two threads takes (orders in the background have 8192
//! pages at most). A merge on request and `run=2` ask all the same: somebody waits for those. Relies on being told; reads no clock.

use crate::region::ClientId;
use crate::tunables::run;
use crate::{Client, Core};
use std::time::Duration;

/// What may be spent at once.
const BURST: Duration = Duration::from_millis(100);

/// What a client spent.
#[derive(Debug, Default)]
pub(crate) struct Account {
    /// As of then, what has not been worked off.
    level: Duration,
    at: Duration,
    /// Until when nothing is asked.
    held: Option<Duration>,
    /// In all its life.
    pub total: Duration,
    /// Times that it was held.
    pub holds: u64,
}

fn percent(time: Duration, percent: u32) -> Duration {
    time * percent / 100
}

impl Account {
    /// So much was spent; until when the client is to be held, if it is.
    fn spend(&mut self, cpu: Duration, now: Duration, ceiling: u32) -> Option<Duration> {
        let worked_off = percent(now.saturating_sub(self.at), ceiling);
        self.level = self.level.saturating_sub(worked_off) + cpu;
        self.at = self.at.max(now);
        self.total += cpu;
        let over = self.level.saturating_sub(percent(BURST, ceiling));
        if over.is_zero() {
            return None;
        }
        self.holds += u64::from(self.held.is_none());
        Some(now + over * 100 / ceiling.max(1))
    }

    pub(crate) fn is_held(&self) -> bool {
        self.held.is_some()
    }
}

impl Core {
    /// CPU time that a client says its scanner and remapper took; the advisor hears of it too.
    pub fn client_spent(&mut self, id: ClientId, cpu: Duration, now: Duration) {
        self.now = self.now.max(now);
        self.spent(cpu);
        let ceiling = self.tunables.client_max_cpu;
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let until = client.account.spend(cpu, self.now, ceiling);
        let before = std::mem::replace(&mut client.account.held, until);
        self.held.extend(until.map(|until| (until, id)));
        if let Some(before) = before.filter(|before| Some(*before) != until) {
            self.held.remove(&(before, id));
        }
        self.refresh(id);
    }

    /// Whether ceilings hold anybody now: in the background they do.
    pub(crate) fn has_ceilings(&self) -> bool {
        self.tunables.run == run::RUN && !self.pace.is_requested()
    }

    /// Clients that may go on.
    pub(crate) fn let_go(&mut self, everybody: bool) {
        while let Some(&(until, id)) = self.held.first()
            && (everybody || until <= self.now)
        {
            self.held.pop_first();
            if let Some(client) = self.clients.get_mut(&id) {
                client.account.held = None;
                if everybody {
                    client.account.level = Duration::ZERO;
                }
            }
            self.refresh(id);
        }
    }

    pub(crate) fn clients_held(&self) -> u64 {
        self.clients.values().filter(|client| client.account.is_held()).count() as u64
    }
}

impl Client {
    /// In milliseconds.
    pub(crate) fn cpu(&self) -> u64 {
        u64::try_from(self.account.total.as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_account_is_worked_off_at_its_percentage() {
        let mut account = Account::default();
        assert_eq!(
            account.spend(10 * MS, 1000 * MS, 10),
            None,
            "a tenth of a second's worth"
        );
        assert_eq!(account.spend(3 * MS, 1000 * MS, 10), Some(1030 * MS));
        account.held = Some(1030 * MS);
        assert_eq!(account.spend(MS, 1010 * MS, 10), Some(1040 * MS));
        account.held = None;
        assert_eq!(account.spend(MS, 1040 * MS, 10), Some(1050 * MS));
        account.held = None;
        assert_eq!(account.spend(10 * MS, 9000 * MS, 10), None);
        assert_eq!((account.total, account.holds), (25 * MS, 2));
    }

    proptest! {
        /// Whoever asks for nothing while the account is held stays below the ceiling, whatever single orders take.
        #[test]
        fn no_stretch_of_time_has_more_than_its_percentage_and_one_order(
            ceiling in 1..200u32, orders in prop::collection::vec((0..40u64, 0..200u64), 1..60),
        ) {
            let (mut account, mut now) = (Account::default(), Duration::ZERO);
            let mut spent: Vec<(Duration, Duration)> = Vec::new();
            for (cpu, pause) in orders {
                now += pause as u32 * MS;
                let until = account.spend(cpu as u32 * MS, now, ceiling);
                spent.push((now, cpu as u32 * MS));
                now = until.unwrap_or(now).max(now);
            }
            for from in 0..spent.len() {
                let mut total = Duration::ZERO;
                for &(at, cpu) in &spent[from..] {
                    total += cpu;
                    let most = percent(at - spent[from].0 + BURST, ceiling) + 80 * MS;
                    prop_assert!(total <= most, "{total:?} of {most:?}");
                }
            }
        }
    }
}
