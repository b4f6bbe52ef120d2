//! How the stand-in carries orders out: the client's work, its report, and what the broker reads and fills then.

use super::*;

impl World {
    /// Asks core for up to `most` decisions; `false` once it waits.
    pub fn pump(&mut self, most: usize) -> bool {
        for _ in 0..most {
            match self.core.next(self.now) {
                Next::Do(decision) => self.take(decision),
                Next::WaitUntil(at) if at <= self.now => {}
                Next::WaitUntil(_) | Next::Idle => return false,
            }
        }
        true
    }

    /// When core wants to be asked again.
    pub fn wait(&mut self) -> Next {
        loop {
            match self.core.next(self.now) {
                Next::Do(decision) => self.take(decision),
                next => return next,
            }
        }
    }

    fn take(&mut self, decision: Decision) {
        let (id, order, report) = match decision {
            Decision::Punch { first, pages } => {
                for slot in (first.0..first.0 + pages).map(Slot) {
                    self.check_punch(slot);
                    self.store[slot.0 as usize] = None;
                }
                return;
            }
            Decision::Move { frames } => return self.move_frames(&frames),
            Decision::Scan {
                client,
                order,
                pass,
                nodes,
                ranges,
            } => {
                self.scans += 1;
                (client, order, Report::Scan { ranges, pass, nodes })
            }
            Decision::Stage { client, order, pages } => {
                assert!(pages.len() <= 512);
                (
                    client,
                    order,
                    Report::Stage {
                        pages,
                        copies: Vec::new(),
                    },
                )
            }
            Decision::Map { client, order, runs } => {
                self.runs.extend(&runs);
                assert!(runs.len() <= 2048 && runs.iter().all(|run| (1..=512).contains(&run.pages)));
                (client, order, Report::Map { runs, alone: true })
            }
            Decision::Unmap {
                client, order, ranges, ..
            } => (client, order, Report::Unmap { ranges }),
        };
        let process = self.processes.get_mut(&id).expect("orders go to processes that live");
        assert!(!process.dead, "an order for a lost client");
        let stages = |open: &Open| matches!(open.report, Report::Stage { .. });
        process.open.push(Open {
            order,
            report,
            done: false,
        });
        assert!(process.open.len() <= 2, "more than two orders are open");
        assert!(
            process.open.iter().filter(|open| stages(open)).count() <= 1,
            "two Stage orders are open"
        );
    }

    /// The client works on one of its orders, unless it is stopped.
    pub fn work(&mut self, id: ClientId, n: usize) {
        let refuses = self.disk_trouble && self.roll(4) == 0;
        let store = &self.store;
        let process = self.processes.get_mut(&id).expect("a process");
        let count = process.open.len();
        if process.stopped || count == 0 || process.open[n % count].done {
            return;
        }
        let Process {
            pages,
            open,
            areas,
            accompanied,
            ..
        } = process;
        let shared = |number| is_shared(areas, number);
        let open = &mut open[n % count];
        open.done = true;
        match &mut open.report {
            Report::Scan { ranges, pass, nodes } => {
                for number in numbers(ranges) {
                    let Some(page) = pages.get_mut(&number) else { continue };
                    page.word = match page.word {
                        Word::Merged(slot) if page.own.is_some() => Word::Broken(slot),
                        Word::Zero if page.own.is_some() => Word::Private,
                        word => word,
                    };
                    let Some(own) = page.own else {
                        if let Word::Detached(_) = page.word {
                            page.checksum = None;
                        }
                        continue;
                    };
                    let plain = checksum_of(own);
                    let now = if *nodes { plain.on_node(page.node) } else { plain };
                    if page.checksum.is_none_or(|(before, _)| before != now) {
                        page.checksum = Some((now, *pass));
                    }
                }
            }
            Report::Stage { pages: wanted, copies } => {
                let copy = |page: &PageNumber| pages.get(&page.0).and_then(|page| page.own).filter(|_| !refuses);
                *copies = wanted.iter().map(copy).collect();
            }
            Report::Map { runs, alone } => {
                *alone = !*accompanied;
                for (number, slot) in runs.iter().flat_map(|run| run.iter()) {
                    let tried = *alone || !shared(number.0);
                    let Some(page) = pages.get_mut(&number.0).filter(|_| tried) else {
                        continue;
                    };
                    let content = if slot == Slot::ZERO {
                        Some(0)
                    } else {
                        store[slot.0 as usize]
                    };
                    let holds = match page.word {
                        Word::Private | Word::Broken(_) => page.own,
                        Word::Merged(shown) | Word::Detached(shown) => page.own.or(store[shown.0 as usize]),
                        _ => continue,
                    };
                    if holds == content {
                        page.word = if slot == Slot::ZERO {
                            Word::Zero
                        } else {
                            page.node = self.core.node_of(slot).unwrap_or(page.node);
                            Word::Merged(slot)
                        };
                        page.own = None;
                    }
                }
            }
            Report::Unmap { ranges } => {
                for number in numbers(ranges) {
                    let Some(page) = pages.get_mut(&number).filter(|_| !refuses) else {
                        continue;
                    };
                    page.own = Some(page.must);
                    page.word = match page.word {
                        Word::Merged(slot) if !shared(number) => Word::Broken(slot),
                        Word::Merged(_) | Word::Zero | Word::Detached(_) => Word::Private,
                        word => word,
                    };
                }
            }
        }
    }

    /// A report arrives; the broker reads the words only now.
    pub fn report(&mut self, id: ClientId, n: usize) {
        let process = self.process(id);
        let count = process.open.len();
        if count == 0 || !process.open[n % count].done {
            return;
        }
        let Open { order, report, .. } = process.open.remove(n % count);
        let (epoch, lies) = (Epoch(process.epoch), process.lies);
        if lies && self.roll(4) == 0 {
            return self.core.order_refused(order, epoch);
        }
        match report {
            Report::Scan { ranges, pass, .. } => {
                let seen: Vec<Observation> = numbers(&ranges).map(|number| self.look(id, number, pass)).collect();
                self.core.scanned(order, &(epoch, &seen[..]), self.now);
            }
            Report::Stage { copies, .. } => self.fill(order, &copies),
            Report::Map { runs, alone } => {
                let outcomes: Vec<RunOutcome> = runs.iter().map(|run| self.outcome(id, *run, alone)).collect();
                self.core.mapped(order, epoch, &outcomes);
            }
            Report::Unmap { ranges } => {
                let seen: Vec<Seen> = numbers(&ranges).map(|number| self.look(id, number, 0).seen).collect();
                self.core.unmapped(order, epoch, &seen);
            }
        }
    }

    fn look(&mut self, id: ClientId, number: u32, pass: u16) -> Observation {
        if self.process(id).lies && self.roll(3) == 0 {
            let slot = Slot(self.roll(SLOTS));
            let seen = [
                Seen::Own,
                Seen::Merged(slot),
                Seen::Zero,
                Seen::Broken(slot),
                Seen::Detached(slot),
                Seen::Held(Some(slot)),
            ];
            let seen = seen[self.roll(6) as usize];
            let content = self.roll(CONTENTS);
            return Observation {
                seen,
                checksum: Some((checksum_of(content), false)),
            };
        }
        let Some(page) = self.process(id).pages.get(&number) else {
            return Observation {
                seen: Seen::Foreign,
                checksum: None,
            };
        };
        Observation {
            seen: page.seen(),
            checksum: page.checksum.map(|(checksum, at)| (checksum, at == pass)),
        }
    }

    fn outcome(&mut self, id: ClientId, run: Run, alone: bool) -> RunOutcome {
        let refused = !alone && is_shared(&self.process(id).areas, run.first.0);
        let mut outcome = RunOutcome {
            failure: refused.then_some(RunFailure::NotAlone),
            ..RunOutcome::default()
        };
        for (i, (number, slot)) in run.iter().enumerate() {
            let lie = self.process(id).lies && self.roll(3) == 0;
            let Some(page) = self.process(id).pages.get(&number.0) else {
                continue;
            };
            let bit = 1 << (i % 64);
            match page.word {
                _ if lie => outcome.merged[i / 64] |= bit,
                Word::Merged(shown) | Word::Detached(shown) if shown == slot => outcome.merged[i / 64] |= bit,
                Word::Zero if slot == Slot::ZERO => outcome.merged[i / 64] |= bit,
                Word::Broken(over) | Word::Held(Some(over)) if over == slot => outcome.covering[i / 64] |= bit,
                _ => {}
            }
        }
        outcome
    }

    /// Copies frames; the new ones are nobody's yet.
    fn move_frames(&mut self, frames: &[(Slot, Slot)]) {
        assert!(frames.len() <= 512 && frames.is_sorted_by_key(|&(_, to)| to));
        self.largest_move = self.largest_move.max(frames.len());
        let mapped = self.mapped_slots();
        let mut checksums = Vec::new();
        for &(from, to) in frames {
            self.moves += 1;
            assert_eq!(
                self.store[to.0 as usize], None,
                "{to:?} is filled while it has a content"
            );
            assert_eq!(mapped.get(&to), None, "{to:?} is filled under a page");
            self.filled_on.insert(to, self.core.node_of(from));
            let content = self.store[from.0 as usize].expect("a frame that moves has a content");
            if self.disk_trouble && self.roll(16) == 0 {
                checksums.push(None);
            } else {
                self.store[to.0 as usize] = Some(content);
                checksums.push(Some(checksum_of(content)));
            }
        }
        self.core.moved(&checksums);
    }

    fn fill(&mut self, order: OrderId, copies: &[Option<Content>]) {
        let fills = self.core.staged(order, &|index| copies[index].is_some());
        let mut checksums = Vec::new();
        let mapped = self.mapped_slots();
        for fill in fills {
            for i in 0..fill.pages {
                let slot = fill.slot.stepped(u32::from(i));
                // I3, I4: nobody has a mapping over a slot that is filled.
                assert_eq!(
                    self.store[slot.0 as usize], None,
                    "{slot:?} is filled while it has a content"
                );
                assert_eq!(mapped.get(&slot), None, "{slot:?} is filled under a page");
                self.filled_on.insert(slot, fill.node);
                let content = copies[usize::from(fill.staging_index + i)].expect("only copied pages are filled");
                if self.disk_trouble && self.roll(16) == 0 {
                    checksums.push(None);
                } else {
                    self.store[slot.0 as usize] = Some(content);
                    checksums.push(Some(checksum_of(content)));
                }
            }
        }
        self.core.filled(order, &checksums);
    }

    /// Everybody works and reports until core has nothing more to do at this time.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            self.pump(1000);
            let ids: Vec<ClientId> = self.processes.keys().copied().collect();
            let mut worked = false;
            for id in ids {
                while self
                    .processes
                    .get(&id)
                    .is_some_and(|process| !process.open.is_empty() && !process.stopped)
                {
                    self.work(id, 0);
                    self.report(id, 0);
                    worked = true;
                }
            }
            if !worked {
                return;
            }
        }
        panic!("core finds something to do for ever");
    }

    pub fn merge(&mut self) -> ksmrs_core::MergeReport {
        let ticket = self.core.request_merge(self.now);
        for _ in 0..100 {
            self.settle();
            if let Some(report) = self.core.merge_finished(ticket) {
                return report;
            }
            self.now += Duration::from_secs(10);
        }
        panic!("a merge on request does not end: {:?}", self.core.stats());
    }
}
