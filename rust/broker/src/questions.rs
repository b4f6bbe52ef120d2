//! Questions of clients: counters, knobs, the state of the broker, and merges on request.
//!
//! Everything is answered at once but a merge, which is answered when core says it is over or when its time is up.

use std::time::Duration;

use ksmrs_core::{ClientId, Kind, MergeTicket, PageNumber, TunableError, Tunables};

use crate::domain::Domain;
use crate::offence::Offence;
use crate::session::Session;
use crate::wire::{Answer, Counters, ErrorCode, MAX_STRETCHES, MergeReport, Question, Stretch, ToClient};

/// Merges on request that one client may have open.
const MAX_MERGES: usize = 64;

/// A merge that somebody waits for.
#[derive(Debug)]
pub(crate) struct PendingMerge {
    ticket: MergeTicket,
    client: ClientId,
    id: u32,
    since: Duration,
    deadline: Option<Duration>,
    merges_before: u64,
}

fn count(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Names and values, written once.
macro_rules! counters {
    ($from:expr; $($name:ident),* $(,)?) => {
        vec![$((stringify!($name).to_owned(), count($from.$name))),*]
    };
}

impl Domain {
    /// The domain's counters under the kernel's names.
    fn counters(&self) -> Counters {
        let stats = self.core.stats();
        let mut counters: Counters = counters!(stats; pages_shared, pages_sharing, pages_unshared, pages_volatile,
            pages_skipped, pages_scanned, pages_scanned_again, full_scans, stable_node_chains, stable_node_dups, ksm_zero_pages, cow_ksm, frames,
            frames_huge, frames_huge_declined, saved_bytes, regions, clients, clients_at_max_cpu, clients_unplanned, pages_proposed, merges, pages_migrated,
            pages_unmerged_by_budget, pages_unmerged_in_huge_pages, regions_rested, pages_disbelieved, references_in_limbo);
        counters.push(("general_profit".to_owned(), stats.general_profit));
        counters.push(("pages_to_scan".to_owned(), self.core.tunables().pages_to_scan.into()));
        if let Ok(bytes) = self.store.allocated() {
            counters.push(("store_bytes".to_owned(), count(bytes)));
        }
        counters.push(("metadata_bytes".to_owned(), count(self.core.metadata_bytes() as u64)));
        counters
    }

    fn client_counters(&self, client: ClientId) -> Counters {
        let stats = self.core.client_stats(client);
        let mut counters: Counters = counters!(stats; ksm_rmap_items, ksm_merging_pages, ksm_zero_pages,
            cpu_milliseconds, times_at_max_cpu);
        counters.push(("ksm_process_profit".to_owned(), stats.ksm_process_profit));
        counters
    }

    /// What pages count as from one on; who their clients are the caller knows.
    pub(crate) fn page_map(&self, from: u32, pid_of: impl Fn(ClientId) -> u32) -> Answer {
        let (stretches, next) = self.core.page_map(PageNumber(from), MAX_STRETCHES);
        let stretch = |found: ksmrs_core::Stretch| Stretch {
            pid: pid_of(found.client),
            client: found.client.0,
            region: found.region.0,
            shared: found.kind == Kind::Shared,
            first: found.first,
            pages: found.pages,
            class: found.class as u8,
        };
        Answer::PageMap {
            stretches: stretches.into_iter().map(stretch).collect(),
            next: next.map(|page| page.0),
        }
    }

    /// Answers everything but [`Question::Status`] and [`Question::PageMap`], which are about all sessions.
    pub(crate) fn ask(
        &mut self,
        session: &mut Session,
        id: u32,
        question: Question,
        now: Duration,
    ) -> Result<(), Offence> {
        let answer = match question {
            Question::Stats => Ok(Answer::Stats(self.counters())),
            Question::ProcessStats => Ok(Answer::ProcessStats(self.client_counters(session.id))),
            Question::Get(knob) => self.core.get(&knob).map(Answer::Value),
            Question::Knobs => {
                let value = |&name: &&str| self.core.get(name).map(|value| (name.to_owned(), value));
                Tunables::NAMES
                    .iter()
                    .map(value)
                    .collect::<Result<Vec<_>, _>>()
                    .map(Answer::Knobs)
            }
            Question::Set { knob, value } => {
                let set = self.core.set(&knob, &value);
                if set.is_ok() {
                    tracing::info!(domain = self.name, client = session.id.0, knob, value, "knob set");
                }
                set.map(|()| Answer::Set)
            }
            Question::Merge { timeout_ms } => return self.begin_merge(session, id, timeout_ms, now),
            Question::Status | Question::PageMap { .. } => return Ok(()),
        };
        let message = match answer {
            Ok(answer) => ToClient::Answer { id, answer },
            Err(error) => {
                let code = match error {
                    TunableError::Unknown { .. } => ErrorCode::UnknownKnob,
                    TunableError::Invalid { .. } | TunableError::Busy { .. } | TunableError::Advised => {
                        ErrorCode::InvalidValue
                    }
                };
                ToClient::Error {
                    id,
                    code,
                    text: error.to_string().chars().take(500).collect(),
                }
            }
        };
        session.send(&message, None)
    }

    fn begin_merge(
        &mut self,
        session: &mut Session,
        id: u32,
        timeout_ms: Option<u64>,
        now: Duration,
    ) -> Result<(), Offence> {
        if self.merges.iter().filter(|merge| merge.client == session.id).count() >= MAX_MERGES {
            let text = format!("{MAX_MERGES} merges of this client are not over yet; wait for one of them");
            return session.send(
                &ToClient::Error {
                    id,
                    code: ErrorCode::NotNow,
                    text,
                },
                None,
            );
        }
        self.merges.push(PendingMerge {
            ticket: self.core.request_merge(now),
            client: session.id,
            id,
            since: now,
            deadline: timeout_ms.and_then(|ms| now.checked_add(Duration::from_millis(ms))),
            merges_before: self.core.stats().merges,
        });
        Ok(())
    }

    /// Answers the merges that are over or whose time is up. Returns the next deadline.
    pub(crate) fn answer_merges(
        &mut self,
        now: Duration,
        sessions: &mut std::collections::BTreeMap<u32, Session>,
    ) -> Option<Duration> {
        let mut index = 0;
        while let Some(merge) = self.merges.get(index) {
            let report = match self.core.merge_finished(merge.ticket) {
                Some(report) => MergeReport {
                    pages_merged: report.merged,
                    rounds: report.rounds,
                    finished: true,
                    elapsed_ms: report.nanoseconds / 1_000_000,
                },
                None if merge.deadline.is_some_and(|deadline| deadline <= now) => {
                    self.core.cancel_merge(merge.ticket);
                    MergeReport {
                        pages_merged: self.core.stats().merges - merge.merges_before,
                        rounds: 0,
                        finished: false,
                        elapsed_ms: (now - merge.since).as_millis() as u64,
                    }
                }
                None => {
                    index += 1;
                    continue;
                }
            };
            let merge = self.merges.swap_remove(index);
            if let Some(session) = sessions.get_mut(&merge.client.0)
                && let Err(offence) = session.send(
                    &ToClient::Answer {
                        id: merge.id,
                        answer: Answer::Merged(report),
                    },
                    None,
                )
            {
                tracing::debug!(client = merge.client.0, %offence, "merge report not sent");
            }
        }
        self.merges.iter().filter_map(|merge| merge.deadline).min()
    }

    /// Nobody waits for this client's merges any more.
    pub(crate) fn drop_merges(&mut self, client: ClientId) {
        let core = &mut self.core;
        self.merges.retain(|merge| {
            let keep = merge.client != client;
            if !keep {
                core.cancel_merge(merge.ticket);
            }
            keep
        });
    }
}
