//! What a client does just when the broker reads its words: the broker's mapping of them cannot be read until then, and the fault does it.

mod fake;
mod regions;

use fake::{Broker, FakeClient, page, receive};
use ksmrs_broker::wire::{Bits, Question, ToBroker, ToClient};
use ksmrs_sys::Word;
use ksmrs_sys::life::LifePage;
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::peer::Wait;
use regions::{PAGE, alone};
use rustix::mm::{MprotectFlags, mprotect};
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

const PAGES: u32 = 8;
const SIGSEGV: i32 = 11;
/// Whose words are about to be read, and where the broker reads them.
static TABLE: AtomicPtr<ClientTable> = AtomicPtr::new(ptr::null_mut());
static SEEN_AT: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
}

/// The client is in its second epoch, and its pages show nothing any more.
extern "C" fn at_a_glance(_: i32) {
    // SAFETY: null, or a table that outlives the glance; atomic stores and raw system calls only. Any other fault ends the process.
    unsafe {
        let Some(table) = TABLE.swap(ptr::null_mut(), Ordering::SeqCst).as_ref() else {
            signal(SIGSEGV, 0);
            return;
        };
        table.set_epoch(2);
        let words = table.words()[..PAGES as usize].iter();
        words.for_each(|word| word.store(Word::PRIVATE.0, Ordering::SeqCst));
        mprotect(words_at(SEEN_AT.load(Ordering::SeqCst)), PAGE, MprotectFlags::READ).unwrap();
    }
}

fn words_at(address: usize) -> *mut std::ffi::c_void {
    ptr::with_exposed_provenance_mut(address)
}

/// The broker's mapping of the first words of a table: of the same object, but read-only.
fn seen_at(table: &ClientTable) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mappings = maps.lines().map(|line| {
        let mut fields = line.split_whitespace();
        let mut ends = fields
            .next()
            .unwrap()
            .split('-')
            .map(|end| usize::from_str_radix(end, 16).unwrap());
        let range: Range<usize> = ends.next().unwrap()..ends.next().unwrap();
        (range, fields.next().unwrap(), fields.nth(2).unwrap())
    });
    let mappings: Vec<_> = mappings.collect();
    let words = table.words().as_ptr().expose_provenance();
    let (own, _, inode) = mappings.iter().find(|(range, ..)| range.contains(&words)).unwrap();
    let brokers = |(_, access, of): &&(Range<usize>, &str, &str)| of == inode && *access == "r--s";
    mappings.iter().find(brokers).unwrap().0.start + words - own.start
}

/// The client turned its life page, forked and gave its pages up, all between its report and the broker's look at the words: the child
/// shows the frame in the second epoch.
fn given_up_at_a_glance(client: &mut FakeClient, report: ToBroker) {
    // What was sent before is read, and no Scan is answered until this is.
    let (id, question) = (u32::MAX, Question::Stats);
    client.send(ToBroker::Ask { id, question });
    let mut later = Vec::new();
    loop {
        match receive(&client.connection).unwrap().0 {
            ToClient::Answer { id: u32::MAX, .. } => break,
            order => later.push(order),
        }
    }
    for index in 0..PAGES {
        client.pages[index as usize] = page(100 + index);
    }
    let (next, next_fd) = LifePage::new().unwrap();
    let seen_at = seen_at(&client.table);
    SEEN_AT.store(seen_at, Ordering::SeqCst);
    TABLE.store(&raw mut client.table, Ordering::SeqCst);
    // SAFETY: a handler of the right type; the broker's own mapping, which nobody else reads and which is as it was after the fault.
    unsafe {
        signal(SIGSEGV, at_a_glance as *const () as usize);
        mprotect(words_at(seen_at), PAGE, MprotectFlags::empty()).unwrap();
    }
    client.send(report);
    let life = ToBroker::Life { epoch: 2 };
    client.connection.send(&life, Some(next_fd.as_fd()), Wait::Yes).unwrap();
    client.counter("frames");
    assert!(TABLE.load(Ordering::SeqCst).is_null(), "the words were read");
    client.epoch = 2;
    drop(client.life.replace(next));
    later.into_iter().for_each(|order| client.carry_out(order));
    let child = client.turn_life();
    client.keeps("store_bytes", 4096, "a child of the second epoch shows the frame");
    drop(child);
    client.until("store_bytes", 0);
}

#[test]
fn what_was_mapped_and_given_up_belongs_to_the_epoch_after_the_words() {
    alone(
        "what_was_mapped_and_given_up_belongs_to_the_epoch_after_the_words",
        60,
        || {
            let broker = Broker::start("glance-map");
            let mut client = FakeClient::new(&broker);
            client.join([7; PAGES as usize]);
            let ToClient::Map { order, runs, .. } =
                client.work_until(|message| matches!(message, ToClient::Map { .. }))
            else {
                unreachable!("the filter lets nothing else through")
            };
            let outcomes = runs.iter().map(|run| client.map(run)).collect();
            assert_eq!(client.merged(), PAGES as usize);
            let report = ToBroker::Mapped {
                order,
                outcomes,
                cpu_micros: 0,
            };
            given_up_at_a_glance(&mut client, report);
        },
    );
}

#[test]
fn what_was_not_unmapped_but_given_up_belongs_to_the_epoch_after_the_words() {
    alone(
        "what_was_not_unmapped_but_given_up_belongs_to_the_epoch_after_the_words",
        60,
        || {
            let broker = Broker::start("glance-unmap");
            let mut client = FakeClient::new(&broker);
            client.join([7; PAGES as usize]);
            client.merge();
            assert_eq!(client.merged(), PAGES as usize);
            client.set("run", "2");
            let ToClient::Unmap { order, .. } = client.work_until(|message| matches!(message, ToClient::Unmap { .. }))
            else {
                unreachable!("the filter lets nothing else through")
            };
            let unmapped = Bits::None;
            given_up_at_a_glance(&mut client, ToBroker::Unmapped { order, unmapped });
        },
    );
}
