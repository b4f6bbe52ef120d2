//! A small working stand-in for a client: pages are vectors, "mapping a frame" is a word and a comparison.
//!
//! It speaks the real wire with real tables, staging areas and life pages, so that the broker under test is the broker that
//! ships. It never remaps memory. What a test wants to be hostile it does by hand.
#![allow(dead_code, reason = "each test file uses its part")]

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use ksmrs_broker::runtime_dir::RuntimeDir;
use ksmrs_broker::wire::*;
use ksmrs_broker::{BrokerOptions, Started, run_broker};
use ksmrs_sys::checksum::{ChecksumWord, Checksummer};
use ksmrs_sys::life::LifePage;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::peer::Wait;
use ksmrs_sys::staging::Staging;
use ksmrs_sys::store::StoreFile;
use ksmrs_sys::{PAGE_SIZE, Slot, State, StoreNumber, Word};

pub const STORE_SLOTS: u32 = 4096;
pub const CAPACITY: u32 = 4096;
/// Long enough for any machine; nothing waits for it to pass.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub type Page = [u8; PAGE_SIZE];

pub fn page(content: u32) -> Page {
    let mut page = [0; PAGE_SIZE];
    page[..4].copy_from_slice(&content.to_le_bytes());
    page
}

/// A broker in a thread, in a directory of its own.
pub struct Broker {
    pub path: PathBuf,
    thread: Option<JoinHandle<Started>>,
}

impl Broker {
    pub fn start(name: &str) -> Broker {
        let path = std::env::temp_dir().join(format!("ksmrs-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let options = BrokerOptions {
            runtime_dir: Some(path.clone()),
            idle: Some(Duration::from_millis(200)),
            store_slots: Some(STORE_SLOTS),
        };
        let (up, is_up) = mpsc::channel();
        let thread = std::thread::spawn(move || run_broker(&options, || up.send(()).unwrap()).unwrap());
        is_up.recv_timeout(PATIENCE).unwrap();
        Broker {
            path,
            thread: Some(thread),
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path.join(format!("broker-{VERSION}.log"))).unwrap_or_default()
    }

    /// Waits until the log says so.
    pub fn logged(&self, words: &str) {
        wait_for(
            || self.log().contains(words),
            || format!("{words:?} in the log:\n{}", self.log()),
        );
    }

    pub fn connect(&self) -> ClientEnd {
        connect(&self.path)
    }

    /// Waits for the idle exit.
    pub fn ended(mut self) -> Started {
        let started = self.thread.take().unwrap().join().unwrap();
        assert!(RuntimeDir::open(&self.path).unwrap().connect().unwrap().is_none());
        started
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            thread.join().unwrap();
        }
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

pub fn connect(path: &Path) -> ClientEnd {
    ClientEnd::over(
        RuntimeDir::open(path)
            .unwrap()
            .connect()
            .unwrap()
            .expect("a broker listens"),
    )
}

pub fn wait_for(mut condition: impl FnMut() -> bool, what: impl Fn() -> String) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {}", what());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The next message, or a panic after PATIENCE.
pub fn receive(connection: &ClientEnd) -> Result<(ToClient, Option<OwnedFd>), WireError> {
    let mut fds = [rustix::event::PollFd::new(connection, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    assert_ne!(
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap(),
        0,
        "the broker is silent"
    );
    connection.receive(&mut ReceiveBuffer::new(), Wait::No)
}

pub fn hello(stores: Vec<u8>) -> ToBroker {
    ToBroker::Hello {
        release: "test".into(),
        domain: "default".into(),
        pid: std::process::id(),
        stores,
        born: None,
    }
}

pub fn hello_of_a_child(parent: Lineage) -> ToBroker {
    ToBroker::Hello {
        release: "test".into(),
        domain: "default".into(),
        pid: std::process::id(),
        stores: vec![parent.store],
        born: Some(parent),
    }
}

/// A client that plays by the rules.
pub struct FakeClient {
    pub connection: ClientEnd,
    pub table: ClientTable,
    pub staging: Staging,
    pub life: Option<LifePage>,
    pub epoch: u32,
    /// What its children say.
    pub lineage: Lineage,
    pub store: StoreFile,
    pub number: StoreNumber,
    pub checksummer: Checksummer,
    /// Contents by word index.
    pub pages: Vec<Page>,
    /// Of regions that it joins.
    pub kind: Kind,
    next_region: u32,
    next_ask: u32,
}

impl FakeClient {
    pub fn new(broker: &Broker) -> FakeClient {
        FakeClient::over(broker.connect())
    }

    pub fn over(connection: ClientEnd) -> FakeClient {
        FakeClient::greeting(connection, &hello(vec![]))
    }

    /// A forked child of `parent`: its pages and words are the parent's as they are now. It has joined nothing yet.
    pub fn born(broker: &Broker, parent: &FakeClient) -> FakeClient {
        let mut child = FakeClient::greeting(broker.connect(), &hello_of_a_child(parent.lineage.clone()));
        child.pages.clone_from(&parent.pages);
        for index in 0..CAPACITY {
            child.store_word(index, parent.word(index));
        }
        child
    }

    pub fn greeting(connection: ClientEnd, hello: &ToBroker) -> FakeClient {
        connection.send(hello, None, Wait::Yes).unwrap();
        let (
            ToClient::Welcome {
                client,
                key,
                store,
                slots,
            },
            Some(fd),
        ) = receive(&connection).unwrap()
        else {
            panic!("no Welcome")
        };
        let (life, life_fd) = LifePage::new().unwrap();
        let (table, table_fd) = ClientTable::create(CAPACITY).unwrap();
        let (staging, staging_fd) = Staging::create().unwrap();
        connection
            .send(&ToBroker::Life { epoch: 1 }, Some(life_fd.as_fd()), Wait::Yes)
            .unwrap();
        connection
            .send(&ToBroker::Table { pages: CAPACITY }, Some(table_fd.as_fd()), Wait::Yes)
            .unwrap();
        connection
            .send(&ToBroker::Staging, Some(staging_fd.as_fd()), Wait::Yes)
            .unwrap();
        assert_eq!(receive(&connection).unwrap().0, ToClient::Ready);
        FakeClient {
            connection,
            table,
            staging,
            life: Some(life),
            epoch: 1,
            lineage: Lineage { client, store, key },
            store: StoreFile::vet(fd, slots).unwrap(),
            number: StoreNumber(store),
            checksummer: Checksummer::new(&key),
            pages: vec![[0; PAGE_SIZE]; CAPACITY as usize],
            kind: Kind::Private,
            next_region: 0,
            next_ask: 0,
        }
    }

    pub fn send(&self, message: ToBroker) {
        self.connection.send(&message, None, Wait::Yes).unwrap();
    }

    /// Joins a region with these contents; returns the region and its first word.
    pub fn join(&mut self, contents: impl IntoIterator<Item = u32>) -> (u32, u32) {
        let contents: Vec<Page> = contents.into_iter().map(page).collect();
        let pages = contents.len() as u32;
        let first_word = self.table.take(pages).unwrap();
        self.pages[first_word as usize..][..contents.len()].copy_from_slice(&contents);
        let (region, answer) = self.ask_to_join(first_word, pages, 0);
        assert_eq!(answer, ToClient::Joined { region, uncounted: 0 });
        (region, first_word)
    }

    /// Asks to join a region; its number, and the answer.
    fn ask_to_join(&mut self, first_word: u32, pages: u32, flags: u32) -> (u32, ToClient) {
        let region = self.next_region;
        self.next_region += 1;
        self.send(ToBroker::Join {
            region,
            kind: self.kind,
            first_word,
            pages,
            position: (first_word % 512) as u16,
            flags,
            object: None,
        });
        let answer = self.work_until(|message| matches!(message, ToClient::Joined { .. } | ToClient::Refused { .. }));
        (region, answer)
    }

    /// Joins words that name frames already; how many pages were not counted, or why it was refused.
    pub fn join_born(&mut self, first_word: u32, pages: u32) -> Result<u32, String> {
        match self.ask_to_join(first_word, pages, BORN).1 {
            ToClient::Joined { uncounted, .. } => Ok(uncounted),
            ToClient::Refused { reason, .. } => Err(reason),
            _ => unreachable!("the filter lets nothing else through"),
        }
    }

    pub fn leave(&mut self, (region, first_word): (u32, u32), pages: u32) {
        for word in first_word..first_word + pages {
            self.store_word(word, Word::PRIVATE.with_state(State::Leaving));
        }
        self.send(ToBroker::Leave { region });
        self.work_until(|message| *message == ToClient::Left { region });
        self.table.give_back(first_word, pages);
    }

    /// A new life page; returns the old one, which stays mapped until it is dropped, as by a forked child.
    pub fn turn_life(&mut self) -> LifePage {
        let (life, fd) = LifePage::new().unwrap();
        self.epoch += 1;
        self.connection
            .send(&ToBroker::Life { epoch: self.epoch }, Some(fd.as_fd()), Wait::Yes)
            .unwrap();
        self.life.replace(life).unwrap()
    }

    pub fn word(&self, index: u32) -> Word {
        Word(self.table.words()[index as usize].load(Ordering::Acquire))
    }

    pub fn store_word(&self, index: u32, word: Word) {
        self.table.words()[index as usize].store(word.0, Ordering::Release);
    }

    /// A write to a page: its frame is left behind.
    pub fn write(&mut self, index: u32, content: u32) {
        self.pages[index as usize] = page(content);
        if self.word(index).state() == State::Merged {
            self.store_word(index, self.word(index).with_state(State::Broken));
        }
    }

    pub fn frame(&self, slot: Slot) -> Page {
        let mut frame = [0; PAGE_SIZE];
        rustix::io::pread(&self.store, &mut frame, u64::from(slot.0) * PAGE_SIZE as u64).unwrap();
        frame
    }

    /// Every merged page shows what was written to it.
    pub fn verify(&self) {
        for (index, content) in self.pages.iter().enumerate() {
            let word = self.word(index as u32);
            if let (State::Merged, Some((number, slot))) = (word.state(), word.frame()) {
                assert_eq!(number, self.number);
                assert_eq!(&self.frame(slot), content, "page {index} shows a wrong frame {slot:?}");
            }
        }
    }

    pub fn merged(&self) -> usize {
        (0..CAPACITY)
            .filter(|&index| self.word(index).state() == State::Merged)
            .count()
    }

    /// Carries out orders until a message that is none of them comes and fits.
    pub fn work_until(&mut self, wanted: impl Fn(&ToClient) -> bool) -> ToClient {
        loop {
            let (message, _) = receive(&self.connection).unwrap();
            if wanted(&message) {
                return message;
            }
            self.carry_out(message);
        }
    }

    pub fn carry_out(&mut self, message: ToClient) {
        let answer = match message {
            ToClient::Scan {
                order, pass, ranges, ..
            } => {
                for index in ranges
                    .iter()
                    .flat_map(|range| range.first_word..range.first_word + range.pages)
                {
                    let checksum = self.checksummer.page(&self.pages[index as usize]);
                    let word = &self.table.checksums()[index as usize];
                    if ChecksumWord(word.load(Ordering::Relaxed)).checksum48() != Some(checksum) {
                        word.store(ChecksumWord::new(checksum, pass).0, Ordering::Relaxed);
                    }
                }
                ToBroker::Scanned {
                    order,
                    counts: ScanCounts::default(),
                }
            }
            ToClient::Stage { order, pages } => {
                for (index, &word) in pages.iter().enumerate() {
                    self.staging.write_page(index as u32, &self.pages[word as usize]);
                }
                ToBroker::Staged {
                    order,
                    copied: Bits::All,
                    cpu_micros: 0,
                }
            }
            ToClient::Map { order, runs, .. } => {
                let outcomes = runs.iter().map(|run| self.map(run)).collect();
                ToBroker::Mapped {
                    order,
                    outcomes,
                    cpu_micros: 0,
                }
            }
            ToClient::Unmap { order, ranges, .. } => {
                for index in ranges
                    .iter()
                    .flat_map(|range| range.first_word..range.first_word + range.pages)
                {
                    self.store_word(index, Word::PRIVATE);
                }
                ToBroker::Unmapped {
                    order,
                    unmapped: Bits::All,
                }
            }
            // When it turns, each test says.
            ToClient::Turn => return,
            other => panic!("unexpected {other:?}"),
        };
        self.send(answer);
    }

    /// Shows the frames of a run where they are equal.
    pub fn map(&mut self, run: &Run) -> RunOutcome {
        let merged = Bits::collect(u32::from(run.pages), |i| {
            let index = run.first_word + i;
            let zero = run.slot == Slot::ZERO.0;
            let slot = if zero { Slot::ZERO } else { Slot(run.slot + i) };
            let frame = if zero { [0; PAGE_SIZE] } else { self.frame(slot) };
            let equal = frame == self.pages[index as usize];
            if equal {
                let state = if zero { State::Zero } else { State::Merged };
                self.store_word(index, Word::PRIVATE.with_state(state).with_frame(self.number, slot));
            }
            equal
        });
        RunOutcome { merged, failure: None }
    }

    pub fn ask(&mut self, question: Question) -> Result<Answer, (ErrorCode, String)> {
        let asked = self.next_ask;
        self.next_ask += 1;
        self.send(ToBroker::Ask { id: asked, question });
        let answers = |message: &ToClient| matches!(message, ToClient::Answer { id, .. } | ToClient::Error { id, .. } if *id == asked);
        match self.work_until(answers) {
            ToClient::Answer { answer, .. } => Ok(answer),
            ToClient::Error { code, text, .. } => Err((code, text)),
            _ => unreachable!("the filter lets nothing else through"),
        }
    }

    pub fn merge(&mut self) -> MergeReport {
        match self
            .ask(Question::Merge {
                timeout_ms: Some(PATIENCE.as_millis() as u64),
            })
            .unwrap()
        {
            Answer::Merged(report) => report,
            other => panic!("{other:?}"),
        }
    }

    pub fn counter(&mut self, name: &str) -> i64 {
        let Answer::Stats(counters) = self.ask(Question::Stats).unwrap() else {
            panic!("no counters")
        };
        counters
            .iter()
            .find(|(known, _)| known == name)
            .unwrap_or_else(|| panic!("no counter {name}"))
            .1
    }

    pub fn set(&mut self, knob: &str, value: &str) {
        assert_eq!(
            self.ask(Question::Set {
                knob: knob.into(),
                value: value.into()
            }),
            Ok(Answer::Set)
        );
    }

    /// Works until it is offered frames, and maps them; the broker hears of it after something else happened.
    pub fn merge_and_then(&mut self, happens: impl FnOnce(&FakeClient)) {
        let ToClient::Map { order, runs, .. } = self.work_until(|message| matches!(message, ToClient::Map { .. }))
        else {
            unreachable!("the filter lets nothing else through")
        };
        let outcomes = runs.iter().map(|run| self.map(run)).collect();
        happens(self);
        self.send(ToBroker::Mapped {
            order,
            outcomes,
            cpu_micros: 0,
        });
    }

    /// Works for a while, through which a counter keeps its value.
    pub fn keeps(&mut self, name: &str, value: i64, why: &str) {
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(300) {
            assert_eq!(self.counter(name), value, "{name}: {why}");
        }
    }

    /// Works until a counter has a value.
    pub fn until(&mut self, name: &str, value: i64) {
        let begun = std::time::Instant::now();
        loop {
            let found = self.counter(name);
            if found == value {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{name} is {found}, not {value}");
        }
    }
}
