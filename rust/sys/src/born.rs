//! Children that are born: a forked child that goes on as a client of its own with the private regions it inherited.
//!
//! The state words lie in memory that the parent goes on changing, so `prepare` (`fork.rs`) copies them while no page moves. In
//! the child, while it has one thread, the copy is laid over the inherited table, at the same addresses, and the child's era is put into
//! every region that comes along: from then on they are its own, as if it had made them. The copy is plain memory; only
//! when the child meets a broker it becomes a memfd (`ClientTable::share`), so that a child which execs or exits at once pays
//! for a few system calls. Nothing here is needed for data to be right: where any step fails, the child stays unregistered.
//!
//! ```text
//!   parent   table  [memfd of the parent: words ...]        copy  [words]   made in prepare, unmapped after the fork
//!   child    table  [      copy, moved here        ]   then [memfd of the child: words ...]
//! ```
//!
//! Shared regions do not come along: `prepare` took them home, and both processes have them as plain memory.

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};
use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex};

use crate::error::SysError;
use crate::mapping::map_whole;
use crate::object::SharedMapping;
use crate::page_table::{ClientTable, WHAT};
use crate::protocol::{Kind, Memory, Page, Words};
use crate::region::Region;
use crate::registry::{self, Writer};
use crate::{fork, life};

/// Whether anybody calls [`inherit`] in children.
static EXPECTED: AtomicBool = AtomicBool::new(false);
/// This process's page table, once it has one.
static TABLE: AtomicPtr<ClientTable> = AtomicPtr::new(ptr::null_mut());

thread_local! {
    /// In a child: what it may be born with. Its only thread is the one that forked.
    static PENDING: Cell<Option<Snapshot>> = const { Cell::new(None) };
}

/// Says that children of fork() call [`inherit`]; without that no words are copied.
pub fn expect() {
    EXPECTED.store(true, Ordering::Release);
}

/// Says which table this life's regions have their words in.
pub fn use_table(table: &'static ClientTable) {
    TABLE.store(ptr::from_ref(table).cast_mut(), Ordering::Release);
}

/// A region that children may be born with.
pub fn known(region: Region) -> Arc<Region> {
    let region = Arc::new(region);
    registry::remember(&region);
    region
}

/// The words of a process's own private regions, as they were when it forked.
pub(crate) struct Snapshot {
    copy: SharedMapping,
    table: &'static ClientTable,
    /// The life that the words are from.
    era: u32,
    /// Whether pages that show frames are in these regions only.
    complete: bool,
    /// The child's process id, once it exists: a raw clone of it has another.
    process: u32,
}

/// In `prepare`, when no word is transient and shared regions are home.
pub(crate) fn snapshot(writer: &Writer) -> Option<Snapshot> {
    if !EXPECTED.load(Ordering::Acquire) {
        return None;
    }
    // SAFETY: null, or a table that lives as long as the process.
    let table = unsafe { TABLE.load(Ordering::Acquire).as_ref() }?;
    let era = fork::era()?;
    let copy = SharedMapping::anonymous(WHAT, table.mapping.length()).ok()?;
    let mut complete = true;
    let offset = table.words().as_ptr().addr() - table.mapping.pointer().addr();
    registry::for_each(writer, |area| {
        if area.era != era {
            // Inherited and never ours: what it shows is kept by pages that nobody of this life lets go.
            return;
        }
        let words = area.words.slice();
        match table.index_of(words).filter(|_| area.view.kind() == Kind::Private) {
            Some(first) => {
                // A word without a bit set costs no memory.
                for (to, from) in copy.words(offset + first as usize * 8, words.len()).iter().zip(words) {
                    match from.load(Ordering::Relaxed) {
                        0 => {}
                        word => to.store(word, Ordering::Relaxed),
                    }
                }
            }
            // A detached page of a shared region shows its frame until it is written.
            None => complete &= (0..area.words.pages()).all(|page| area.words.load(Page(page)).frame().is_none()),
        }
    });
    Some(Snapshot {
        copy,
        table,
        era,
        complete,
        process: 0,
    })
}

/// In the child of a fork.
pub(crate) fn keep(snapshot: Option<Snapshot>) {
    PENDING.set(snapshot.map(|snapshot| Snapshot {
        process: std::process::id(),
        ..snapshot
    }));
}

/// Drops what nobody was born with.
pub fn forget() {
    drop(PENDING.take());
}

/// What a child is about to be born with.
pub struct Inheritance {
    era: u32,
    table: &'static ClientTable,
    regions: Vec<Arc<Region>>,
    complete: bool,
}

/// In the child of a fork, while it has one thread and before it did anything with regions: lays the copied words over the table. `None`
/// where the child stays unregistered. Nothing is different for the program before [`Inheritance::begin`].
pub fn inherit() -> Option<Inheritance> {
    let snapshot = PENDING
        .take()
        .filter(|snapshot| snapshot.process == std::process::id())?;
    if !fork::is_unregistered() {
        return None;
    }
    let Snapshot {
        copy,
        table,
        era,
        mut complete,
        ..
    } = snapshot;
    let writer = registry::lock();
    let remembered = writer.iter().filter_map(|region| region.upgrade());
    let regions: Vec<Arc<Region>> = remembered.filter(|region| can_be_born(region, table, era)).collect();
    let born: HashSet<usize> = regions.iter().map(|region| region.address()).collect();
    registry::for_each(&writer, |area| {
        // One that another thread of the parent was making, ending or changing just now; or that it retired.
        complete &= area.era != era || area.view.kind() == Kind::Shared || born.contains(&area.view.base());
    });
    drop(writer);
    if regions.is_empty() {
        if complete {
            // It shows no frame, so it needs nobody to keep any.
            life::let_go(era);
        }
        return None;
    }
    move_over(copy, &table.mapping).ok()?;
    let slices = regions.iter().map(|region| (region.first_word(), region.pages()));
    Some(Inheritance {
        era,
        table: continued(table, slices),
        regions,
        complete,
    })
}

fn can_be_born(region: &Region, table: &ClientTable, era: u32) -> bool {
    region.era.load(Ordering::Relaxed) == era
        && region.kind() == Kind::Private
        && !region.is_closed()
        && table.index_of(region.words.slice()) == Some(region.first_word())
        // A thread of the parent was changing them: nobody knows how far it came, and the lock stays locked.
        && region.holds.try_lock().is_ok()
}

impl Inheritance {
    /// The table, with the words as they were at the fork.
    pub fn table(&self) -> &'static ClientTable {
        self.table
    }

    /// The regions that come along.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Makes the regions this process's own: a life begins. Still with one thread, but for one that waits to be told of it.
    /// The parent's life pages are then in [`life::inherited`], to be let go when a broker has counted what the regions show; where
    /// other memory may show frames as well they are not, and stay mapped for good.
    ///
    /// # Errors
    /// As [`fork::begin_life`].
    pub fn begin(&self, in_child: fn(bool)) -> Result<u32, SysError> {
        let era = fork::begin_life(in_child)?;
        if self.complete {
            life::inherit(self.era, era);
        }
        for region in &self.regions {
            region.in_use.reset();
            if let Some(parts) = &region.parts {
                parts.changing.reset();
            }
            region.tracking.reset();
            region.era.store(era, Ordering::Release);
        }
        let born: HashSet<usize> = self.regions.iter().map(|region| region.address()).collect();
        registry::belong(era, |base| born.contains(&base));
        use_table(self.table);
        Ok(era)
    }
}

/// The same table as another life sees it: what no region of it has is free.
fn continued(table: &ClientTable, slices: impl Iterator<Item = (u32, u32)>) -> &'static ClientTable {
    let mut lent: Vec<(u32, u32)> = slices.collect();
    lent.sort_unstable();
    let (mut free, mut from) = (BTreeMap::new(), 0);
    for (first, pages) in lent {
        if from < first {
            free.insert(from, first - from);
        }
        from = first + pages;
    }
    if from < table.capacity {
        free.insert(from, table.capacity - from);
    }
    let mapping = &table.mapping;
    // SAFETY: the parent's table is never unmapped, and neither is this one, for both are leaked.
    let mapping =
        unsafe { SharedMapping::of_range(mapping.pointer(), mapping.length(), crate::object::Access::ReadWrite) };
    Box::leak(Box::new(ClientTable {
        mapping,
        capacity: table.capacity,
        free: Mutex::new(free),
    }))
}

/// Moves a copy over a table of the same length, which nobody uses.
fn move_over(copy: SharedMapping, table: &SharedMapping) -> Result<(), SysError> {
    assert_eq!(copy.length(), table.length(), "a copy is as long as its table");
    let (from, to, bytes) = (copy.pointer().cast(), table.pointer().cast(), copy.length());
    // SAFETY: both ranges are ours. The table's owner is a leaked ClientTable, whose words nobody loads or stores in a process that is
    // not registered; should the kernel have unmapped it before it failed, nobody ever will.
    unsafe { rustix::mm::mremap_fixed(from, bytes, bytes, MremapFlags::MAYMOVE, to) }
        .map_err(SysError::call("mremap", WHAT))?;
    core::mem::forget(copy);
    Ok(())
}

impl ClientTable {
    /// Makes the table of a process that was born, plain memory so far, one that a broker can see; its descriptor. Whoever is at
    /// the words meanwhile waits at the gate, and finds them as they were.
    ///
    /// # Errors
    /// No memory for it; the table stays as it was.
    pub fn share(&self) -> Result<OwnedFd, SysError> {
        let (fresh, fd) = ClientTable::create(self.capacity)?;
        fork::while_still(|writer| {
            registry::for_each(writer, |area| {
                let words = area.words.slice();
                if let Some(first) = self.index_of(words) {
                    copy_words(words, &fresh.words()[first as usize..][..words.len()]);
                }
            });
            drop(fresh);
            map_over(&fd, &self.mapping)
        })?;
        Ok(fd)
    }
}

fn copy_words(from: &[AtomicU64], to: &[AtomicU64]) {
    for (from, to) in from.iter().zip(to) {
        match from.load(Ordering::SeqCst) {
            0 => {}
            word => to.store(word, Ordering::SeqCst),
        }
    }
}

/// Maps an object over a table, whose words it holds already.
fn map_over(fd: impl AsFd, table: &SharedMapping) -> Result<(), SysError> {
    let (address, bytes) = (table.pointer().cast(), table.length());
    let map = || -> Result<(), Errno> {
        // SAFETY: the range is the table's own, and what it held is in the object: whoever looks at it sees the same words before and after.
        unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(address, bytes, access, MapFlags::SHARED | MapFlags::FIXED, &fd, 0).map(|_| ())
        }
    };
    map_whole(address, bytes, map).map_err(SysError::call("mmap", WHAT))?;
    // SAFETY: the table's own range; the advice only keeps it out of core dumps.
    let _ = unsafe { rustix::mm::madvise(address, bytes, rustix::mm::Advice::LinuxDontDump) };
    Ok(())
}
