//! What each message must keep to: its name, its descriptor, and how long its lists may be.
//!
//! Checked on both sides, so that a bug of ours shows where it is made and a hostile message where it arrives.

use ksmrs_sys::PAGE_SIZE;

use super::{
    Answer, Bits, MAX_ORDER_PAGES, MAX_RUN_PAGES, MAX_RUNS, MAX_STRETCHES, MAX_TEXT, Message, Question, Range,
    ToBroker, ToClient, WireError,
};

fn limit(what: &'static str, found: usize, limit: usize) -> Result<(), WireError> {
    if found <= limit {
        Ok(())
    } else {
        Err(WireError::Limit { what, found, limit })
    }
}

fn text(text: &str) -> Result<(), WireError> {
    limit("bytes of text", text.len(), MAX_TEXT)
}

fn span(first_word: u32, pages: u32) -> Result<(), WireError> {
    limit(
        "last word of a range",
        first_word as usize + pages as usize,
        u32::MAX as usize,
    )?;
    limit("empty ranges", usize::from(pages == 0), 0)
}

fn ranges(ranges: &[Range]) -> Result<(), WireError> {
    limit("ranges of an order", ranges.len(), MAX_RUNS)?;
    ranges.iter().try_for_each(|range| span(range.first_word, range.pages))
}

impl Message for ToBroker {
    fn name(&self) -> &'static str {
        match self {
            ToBroker::Hello { .. } => "Hello",
            ToBroker::Life { .. } => "Life",
            ToBroker::Table { .. } => "Table",
            ToBroker::Staging => "Staging",
            ToBroker::Join { .. } => "Join",
            ToBroker::Leave { .. } => "Leave",
            ToBroker::Scanned { .. } => "Scanned",
            ToBroker::Staged { .. } => "Staged",
            ToBroker::Mapped { .. } => "Mapped",
            ToBroker::Unmapped { .. } => "Unmapped",
            ToBroker::Failed { .. } => "Failed",
            ToBroker::Ask { .. } => "Ask",
            ToBroker::Bye { .. } => "Bye",
        }
    }

    fn carries_descriptor(&self) -> bool {
        matches!(
            self,
            ToBroker::Life { .. } | ToBroker::Table { .. } | ToBroker::Staging | ToBroker::Join { object: Some(_), .. }
        )
    }

    fn check(&self) -> Result<(), WireError> {
        match self {
            ToBroker::Hello {
                release,
                domain,
                stores,
                ..
            } => {
                limit("store numbers", stores.len(), 255)?;
                text(release)?;
                text(domain)
            }
            ToBroker::Join {
                first_word,
                pages,
                position,
                object,
                ..
            } => {
                let end = object.map_or(0, |object| {
                    object.offset.saturating_add(u64::from(*pages) * PAGE_SIZE as u64)
                });
                limit("end of a region in its object", end as usize, i64::MAX as usize)?;
                limit(
                    "position in an extent",
                    usize::from(*position),
                    usize::from(MAX_RUN_PAGES) - 1,
                )?;
                span(*first_word, *pages)
            }
            ToBroker::Staged {
                copied: Bits::Some(bytes),
                ..
            } => limit("bytes of a bitmap", bytes.len(), usize::from(MAX_RUN_PAGES).div_ceil(8)),
            ToBroker::Unmapped {
                unmapped: Bits::Some(bytes),
                ..
            } => limit("bytes of a bitmap", bytes.len(), MAX_ORDER_PAGES.div_ceil(8) as usize),
            ToBroker::Mapped { outcomes, .. } => limit("outcomes of an order", outcomes.len(), MAX_RUNS),
            ToBroker::Ask { question, .. } => match question {
                Question::Get(knob) => text(knob),
                Question::Set { knob, value } => text(knob).and_then(|()| text(value)),
                _ => Ok(()),
            },
            ToBroker::Bye { reason } => text(reason),
            _ => Ok(()),
        }
    }
}

impl Message for ToClient {
    fn name(&self) -> &'static str {
        match self {
            ToClient::Welcome { .. } => "Welcome",
            ToClient::Ready => "Ready",
            ToClient::Joined { .. } => "Joined",
            ToClient::Refused { .. } => "Refused",
            ToClient::Left { .. } => "Left",
            ToClient::Recall { .. } => "Recall",
            ToClient::Turn => "Turn",
            ToClient::Scan { .. } => "Scan",
            ToClient::Stage { .. } => "Stage",
            ToClient::Map { .. } => "Map",
            ToClient::Unmap { .. } => "Unmap",
            ToClient::Answer { .. } => "Answer",
            ToClient::Error { .. } => "Error",
            ToClient::Bye { .. } => "Bye",
        }
    }

    fn carries_descriptor(&self) -> bool {
        matches!(self, ToClient::Welcome { .. })
    }

    fn check(&self) -> Result<(), WireError> {
        match self {
            ToClient::Scan { ranges: list, .. } => ranges(list),
            ToClient::Unmap { ranges: list, .. } => {
                let pages = list.iter().map(|range| range.pages as usize).sum();
                limit("pages of an order", pages, MAX_ORDER_PAGES as usize)?;
                ranges(list)
            }
            ToClient::Stage { pages, .. } => limit("pages to stage", pages.len(), usize::from(MAX_RUN_PAGES)),
            ToClient::Map { runs, .. } => {
                limit("runs of an order", runs.len(), MAX_RUNS)?;
                let pages = runs.iter().map(|run| usize::from(run.pages)).sum();
                limit("pages of an order", pages, MAX_ORDER_PAGES as usize)?;
                runs.iter().try_for_each(|run| {
                    limit("pages of a run", usize::from(run.pages), usize::from(MAX_RUN_PAGES))?;
                    span(run.first_word, u32::from(run.pages))
                })
            }
            ToClient::Refused { reason, .. } | ToClient::Bye { reason } => text(reason),
            ToClient::Error { text: words, .. } => text(words),
            ToClient::Answer {
                answer: Answer::PageMap { stretches, .. },
                ..
            } => limit("stretches of a page map", stretches.len(), MAX_STRETCHES),
            _ => Ok(()),
        }
    }
}
