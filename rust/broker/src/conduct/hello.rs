//! A client says Hello: whose domain it enters, and what its words call the domain's store.
//!
//! A number that no word of the client has yet, nor did while an earlier connection of its process is remembered, whose words it goes on
//! with; but for a forked child its parent's, whose words it has. Relies on the key to tell
//! that the child means this store. Nothing of a client is believed that could hurt another.

use super::Conductor;
use crate::departed::Departed;
use crate::domain::Domain;
use crate::offence::Offence;
use crate::session::{Phase, Session};
use crate::wire::{Lineage, ToClient};
use ksmrs_sys::{StoreNumber, sysctl};
use std::collections::BTreeSet;

/// Domains of one broker; each has a store of its own.
const MAX_DOMAINS: usize = 64;
const MAX_DOMAIN_NAME: usize = 64;
/// Store numbers fit 8 bits, and 0 is none.
const STORE_NUMBERS: std::ops::RangeInclusive<u8> = 1..=255;

impl Conductor {
    /// What a forked child's words call this domain's store, if they name it: as its parent's do, whether that is still connected
    /// or not. A parent that is gone has no child, for each keeps a life page of it until it is counted itself.
    pub(super) fn lineage(&self, name: &str, born: &Lineage) -> Option<StoreNumber> {
        let number = StoreNumber(born.store);
        let connected = |session: &Session| session.domain.as_deref() == Some(name) && session.store == number;
        let departed =
            |departed: &Departed| departed.id.0 == born.client && departed.domain == name && departed.store == number;
        let known = self.sessions.get(&born.client).is_some_and(connected) || self.departed.iter().any(departed);
        let same_store = self.domains.get(name).is_some_and(|domain| domain.key == born.key);
        (known && same_store).then_some(number)
    }

    pub(super) fn hello(
        &mut self,
        id: u32,
        release: &str,
        name: String,
        pid: u32,
        stores: &[u8],
        born: Option<StoreNumber>,
    ) -> Result<(), Offence> {
        let Some(session) = self.sessions.get_mut(&id) else {
            return Ok(());
        };
        session.expect("Hello", Phase::Silent)?;
        session.says = pid;
        let process = session.process_key();
        let connected = self
            .sessions
            .values()
            .filter(|session| session.process_key() == process);
        let departed = self.departed.iter().filter(|departed| departed.process_key == process);
        let earlier: BTreeSet<StoreNumber> = connected
            .map(|session| session.store)
            .chain(departed.map(|departed| departed.store))
            .collect();
        let Some(session) = self.sessions.get_mut(&id) else {
            return Ok(());
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.len() > MAX_DOMAIN_NAME || !name.chars().all(is_plain) {
            return Err(Offence::DomainName {
                name: name.chars().take(MAX_DOMAIN_NAME).collect(),
            });
        }
        let is_free = |number: &u8| !stores.contains(number) && !earlier.contains(&StoreNumber(*number));
        let free = || STORE_NUMBERS.into_iter().find(is_free);
        let Some(number) = born.map(|store| store.0).or_else(free) else {
            return Err(Offence::TooMany {
                what: "stores that a process's words may name",
                limit: STORE_NUMBERS.len(),
            });
        };
        if !self.domains.contains_key(&name) {
            if self.domains.len() >= MAX_DOMAINS {
                self.domains.retain(|_, domain| !domain.is_vacant());
            }
            if self.domains.len() >= MAX_DOMAINS {
                return Err(Offence::TooMany {
                    what: "domains",
                    limit: MAX_DOMAINS,
                });
            }
            self.domains.insert(name.clone(), Domain::new(&name, self.store_slots)?);
        }
        let Some(domain) = self.domains.get_mut(&name) else {
            return Ok(());
        };
        let store_fd = domain.store.read_only()?;
        domain.core.client_joined(session.id);
        // Merging may use a third.
        if let Some(maximum) = sysctl::read("vm/max_map_count").and_then(|maximum| u32::try_from(maximum).ok()) {
            domain.core.set_budget(session.id, maximum / 3);
        }
        session.store = StoreNumber(number);
        session.is_born = born.is_some();
        session.phase = Phase::Welcome;
        tracing::info!(
            client = id,
            pid = session.credentials.pid,
            says = pid,
            release,
            domain = name,
            born = born.is_some(),
            "client joined"
        );
        session.domain = Some(name);
        let welcome = ToClient::Welcome {
            client: id,
            key: domain.key,
            store: number,
            slots: domain.store.slots(),
        };
        session.send(&welcome, Some(store_fd))
    }
}
