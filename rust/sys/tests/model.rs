//! The page-state protocol under the model checker: every interleaving of remapper, writers, scanner and unmerge.

mod kernel_model;

use kernel_model::*;
use ksmrs_sys::protocol::Kind;

#[test]
fn shared_merge_and_two_writers() {
    explore(2, || merge_and_two_writers(Kind::Shared));
}

#[test]
fn private_merge_and_two_writers() {
    explore(2, || merge_and_two_writers(Kind::Private));
}

#[test]
fn shared_merge_and_reader() {
    explore(3, || merge_and_reader(Kind::Shared));
}

#[test]
fn private_merge_and_reader() {
    explore(3, || merge_and_reader(Kind::Private));
}

#[test]
fn comparing_before_the_freeze_loses_no_write() {
    explore(2, witnessed_merge_and_two_writers);
    explore(2, witnessed_merge_and_scanner);
}

#[test]
fn frames_move_under_two_writers() {
    explore(2, || migration_and_two_writers(Kind::Shared));
    explore(2, || migration_and_two_writers(Kind::Private));
}

#[test]
fn frames_move_under_a_reader_and_an_unmerge() {
    explore(3, || migration_and_unmerge(Kind::Shared));
    explore(3, || migration_and_unmerge(Kind::Private));
}

#[test]
fn a_widened_break_takes_only_what_it_owns() {
    explore(4, widened_break);
}

#[test]
fn a_break_that_bridges_a_page_loses_no_write_to_it() {
    explore(2, bridging_break);
    explore(2, bridging_break_downwards);
}

#[test]
fn a_break_without_room_for_all_it_takes_along_changes_nothing() {
    explore(1, bridging_break_without_room);
}

#[test]
fn shared_unmerge_under_writer_and_remapper() {
    explore(2, || unmerge_and_writer(Kind::Shared));
}

#[test]
fn private_unmerge_under_writer_and_remapper() {
    explore(2, || unmerge_and_writer(Kind::Private));
}

#[test]
fn shared_leave_under_writer_and_remapper() {
    explore(2, || leave_and_writer(Kind::Shared));
}

#[test]
fn private_leave_under_writer_and_remapper() {
    explore(2, || leave_and_writer(Kind::Private));
}

#[test]
fn old_evidence_changes_nothing() {
    explore(4, stale_evidence);
}

#[test]
fn breaks_succeed_at_the_mapping_limit() {
    explore(3, at_the_mapping_limit);
}

#[test]
fn an_object_mapped_elsewhere_keeps_its_home() {
    explore(3, not_alone);
}

#[test]
fn detached_pages_come_home_under_a_writer() {
    explore(4, homecoming);
}

#[test]
fn a_detached_page_comes_home_under_writer_and_remapper() {
    explore(3, detached_leaves);
}

#[test]
fn lent_pages_keep_what_everyone_writes() {
    explore(3, || lent_under_a_writer(1));
    explore(2, || lent_under_a_writer(2));
}

#[test]
fn pages_are_lent_while_they_leave() {
    explore(3, lent_while_they_leave);
}

#[test]
fn nothing_is_freed_of_an_object_that_somebody_opened() {
    explore(3, lent_in_a_merge);
}

#[test]
fn a_slow_handler_leaves_no_page_read_only() {
    explore(4, || slow_handler(Kind::Shared));
    explore(4, || slow_handler(Kind::Private));
}
