//! Whoever waits in the fault handler keeps nobody from anything but its page.

mod tracked;

use ksmrs_sys::SysError;
use ksmrs_sys::page_table::{ClientTable, TableView};
use ksmrs_sys::protocol::{Kind, Page, Span};
use ksmrs_sys::region::Region;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;
use tracked::*;

const PAGES: u32 = 4;

/// Microseconds that this process has computed.
fn computed() -> i64 {
    // SAFETY: plain data, for which zeros are valid and which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &raw mut usage), 0);
        usage
    };
    let micros = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
    micros(usage.ru_utime) + micros(usage.ru_stime)
}

#[test]
fn regions_come_and_go_while_a_writer_waits_for_a_lent_page() {
    begin();
    let (table, fd) = ClientTable::create(2 * UNIT).unwrap();
    let table: &'static ClientTable = Box::leak(Box::new(table));
    // Leaked, for none may end in a panic.
    let region = Box::leak(Box::new(Region::create(table, PAGES, Kind::Shared).unwrap()));
    for page in 0..PAGES {
        word(region.address(), page).store(u64::from(page) + 1, Ordering::Relaxed);
    }
    let whole = Span {
        first: Page(0),
        pages: PAGES,
    };
    assert_eq!(Frames::of_pages(PAGES).merge(region, whole), PAGES as usize);
    let view = TableView::open(&fd, 2 * UNIT).unwrap();
    let ((owns, owned), (go_on, stopped)) = (channel(), channel::<()>());
    std::thread::scope(|threads| {
        // A broker that is stopped in the middle of lending the pages.
        let (first_word, view) = (region.first_word(), &view);
        threads.spawn(move || {
            let stops = |_, _, _| {
                owns.send(()).unwrap();
                stopped.recv().unwrap();
                Err(SysError::Closed)
            };
            view.lend(first_word, PAGES, |_| true, stops).unwrap_err();
        });
        owned.recv().unwrap();
        let base = region.address();
        let writer = threads.spawn(move || word(base, 0).store(9, Ordering::Relaxed));
        std::thread::sleep(Duration::from_millis(100));
        let before = computed();
        std::thread::sleep(Duration::from_millis(400));
        let spent = computed() - before;
        let (made, done) = channel();
        threads.spawn(move || {
            Region::create(table, PAGES, Kind::Private).unwrap().close();
            made.send(()).unwrap();
        });
        let in_time = done.recv_timeout(Duration::from_secs(5)).is_ok();
        let waits = !writer.is_finished();
        go_on.send(()).unwrap();
        assert!(in_time, "another region waited for the stopped broker");
        assert!(waits && spent < 100_000, "the writer waits asleep: {spent} us");
        writer.join().unwrap();
        assert_eq!(word(base, 0).load(Ordering::Relaxed), 9);
        assert_eq!(word(base, 1).load(Ordering::Relaxed), 2);
    });
}
