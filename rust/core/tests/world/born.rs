//! Children that become clients: what they inherited is counted in their own name, and only then they let go of their parent's
//! life page.

use super::*;

impl World {
    /// A child of this process registers its private regions, writing to a page before and after if it likes to. What is shared
    /// stays with an unregistered child of the same epoch.
    pub fn bear(&mut self, id: ClientId, n: usize, content: Content) {
        let process = self.process(id);
        if process.children.is_empty() {
            return;
        }
        let lies = process.lies;
        let at = n % process.children.len();
        let mut child = process.children.remove(at);
        let born = self.join_client(lies);
        let areas = std::mem::take(&mut child.areas);
        let inherited = |number: u32| areas.iter().any(|range| within(*range, number));
        if let Some((_, page)) = child.pages.iter_mut().filter(|(number, _)| inherited(**number)).nth(n) {
            (page.own, page.must) = (Some(content), content);
        }
        for range in areas {
            let pages: Vec<Page> = range.iter().filter_map(|page| child.pages.remove(&page.0)).collect();
            let seen: Vec<Seen> = pages.iter().map(|page| self.named(page, lies)).collect();
            let birth = self
                .core
                .region_born(born, &seen, range.first.position())
                .expect("a region");
            assert!(
                lies || birth.uncounted == 0,
                "{} honest pages are not counted",
                birth.uncounted
            );
            let process = self.process(born);
            let range = PageRange {
                first: birth.first,
                pages: range.pages,
            };
            process.pages.extend(range.iter().map(|page| page.0).zip(pages));
            process.areas.insert(
                birth.region,
                Area {
                    kind: Kind::Private,
                    range,
                },
            );
        }
        if !child.pages.is_empty() {
            // Children are kept in the order of their forks.
            self.process(id).children.insert(at, child);
        }
    }

    fn named(&mut self, page: &Page, lies: bool) -> Seen {
        if lies && self.roll(2) == 0 {
            let slot = Slot(self.roll(2 * SLOTS));
            return [Seen::Merged(slot), Seen::Broken(slot), Seen::Held(Some(slot))][self.roll(3) as usize];
        }
        page.seen()
    }
}
