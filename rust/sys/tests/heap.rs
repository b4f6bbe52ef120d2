//! The heap on real memory, without a broker: blocks that are freed while they are being opened.

use ksmrs_sys::heap::{self, Supply};
use ksmrs_sys::page_table::ClientTable;
use ksmrs_sys::region::Region;
use ksmrs_sys::{State, fork, signal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

const PAGES: u32 = 1 << 17;
/// Too large to be kept with its bytes, which would wait for ten seconds.
const BLOCK: usize = 34 << 20;

static ARENAS: Mutex<Vec<Arc<Region>>> = Mutex::new(Vec::new());

fn table() -> &'static ClientTable {
    static TABLE: OnceLock<ClientTable> = OnceLock::new();
    TABLE.get_or_init(|| ClientTable::create(PAGES).unwrap().0)
}

fn make(pages: u32) -> Option<Arc<Region>> {
    let arena = Arc::new(Region::arena(table(), pages).ok()?);
    ARENAS.lock().unwrap().push(arena.clone());
    Some(arena)
}

fn end(arena: Arc<Region>) {
    ARENAS
        .lock()
        .unwrap()
        .retain(|other| other.address() != arena.address());
    arena.close();
    table().give_back(arena.first_word(), arena.pages());
}

/// A page that takes part without being lent could merge, and then show a frame where zeros are expected.
#[test]
fn no_free_page_takes_part_whatever_was_being_opened() {
    fork::begin_life(|_| ()).unwrap();
    signal::install().unwrap();
    assert!(heap::begin(Supply { make, end }));
    let done = AtomicBool::new(false);
    let (mut opened, mut closed) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for pass in (1..=u16::MAX).cycle() {
                heap::pass_began(pass);
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for turn in 0..2000 {
            let block = heap::lend(BLOCK).expect("room for a block");
            // Freed before, while and after it is opened.
            for _ in 0..turn % 7 * 40 {
                std::hint::spin_loop();
            }
            if turn % 3 == 0 {
                while heap::held().open == 0 {
                    std::hint::spin_loop();
                }
            }
            match heap::held().open {
                0 => closed += 1,
                _ => opened += 1,
            }
            assert!(heap::free(block.address));
            let arenas = ARENAS.lock().unwrap();
            let stuck: usize = arenas
                .iter()
                .map(|arena| {
                    arena
                        .page_states()
                        .iter()
                        .filter(|state| **state != State::Held)
                        .count()
                })
                .sum();
            assert_eq!(stuck, 0, "turn {turn}: pages of free blocks take part");
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(opened > 100 && closed > 100, "{opened} opened, {closed} not");
    let big = heap::lend(PAGES as usize * 4096);
    assert_eq!(big, None, "more than the table has");
    assert!(!heap::free(0x1000));
}
