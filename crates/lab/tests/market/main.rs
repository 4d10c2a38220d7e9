//! The main job on virtual metal, end to end: real tokens buy real VMs, programs run in them, change comes
//! back; and everything that can go wrong on the way. One lab serves all cases, one after another, since two
//! emulated nodes are all that a small machine carries. Needs root or user namespaces, and fails without.
//!
//! `cargo test -p onde-lab --test market -- WORD` runs the cases with WORD in their name; with `ONDE_ROUNDS=N` in the
//! environment all of them N times, in the same lab.

mod descent;
mod disk;
mod failures;
mod forks;
mod migrations;
mod programs;
mod snapshots;
mod tokens;
mod wallets;
mod witness;
mod world;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use world::World;

type Case = (&'static str, fn(&World) -> Result<()>);

const CASES: [Case; 39] = [
    ("program_gives_the_same_bytes_as_at_home", programs::same_bytes),
    ("input_errors_and_exit_status_carry_through", programs::pipes_and_status),
    ("detached_program_is_found_again", programs::detached),
    ("own_kernel_boots_pays_stops_and_gives_change", programs::own_kernel),
    ("smp_guest_sees_its_processors", programs::processors),
    ("snapshot_wakes_up_twice", snapshots::wakes_up_twice),
    ("clones_share_a_template", snapshots::clones_share_a_template),
    ("forks_are_themselves", forks::are_themselves),
    ("fork_without_room_harms_no_other", forks::without_room),
    ("fork_of_a_vm_that_runs_dry_fails_in_words", forks::source_dry),
    ("hot_writer_moves_and_is_forked", forks::hot_writer),
    ("suspended_by_hand_goes_on_and_gives_change", descent::by_hand),
    ("dry_job_sleeps_is_paid_and_goes_on", descent::dry_then_paid),
    ("dry_job_is_purged_when_it_was_said", descent::purged_in_time),
    ("vm_moves_to_and_fro_whole", migrations::to_and_fro),
    ("move_that_is_cut_leaves_one_vm", migrations::cut_anywhere),
    ("move_into_a_stopped_vm_leaves_it_where_it_was", migrations::target_stopped),
    ("move_with_failing_nodes_leaves_one_vm", migrations::nodes_fail),
    ("vm_moves_by_itself_and_when_its_node_is_drained", migrations::by_itself_and_drained),
    ("disk_goes_along", disk::goes_along),
    ("node_is_as_before", programs::node_is_as_before),
    ("wrong_boot_token_is_not_answered", tokens::wrong),
    ("boot_token_of_another_node_is_not_answered", tokens::other_node),
    ("expired_boot_token_is_refused", tokens::expired),
    ("boot_token_of_another_life_is_refused", tokens::other_incarnation),
    ("more_than_the_node_has_is_refused", tokens::too_large),
    ("boot_token_starts_one_vm_once", tokens::replayed),
    ("payment_is_counted_once_and_checked", tokens::payments),
    ("other_loader_is_refused", tokens::other_loader),
    ("upload_that_breaks_off_harms_nobody", tokens::broken_upload),
    ("what_cannot_run_costs_nothing", failures::cannot_run),
    ("vm_without_tokens_is_purged", failures::out_of_tokens),
    ("job_without_progress_is_not_paid", wallets::without_progress),
    ("budget_is_a_hard_stop", wallets::budget),
    ("killed_wallet_goes_on_where_it_was", wallets::killed),
    ("guest_pays_by_itself_while_nobody_else_does", wallets::purse),
    ("chain_ends_and_the_job_goes_on", wallets::chain_ends),
    ("node_lost_unused_tokens_come_back", failures::node_lost),
    ("broker_away_vm_goes_on", failures::broker_away),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let chosen: Vec<_> = CASES
        .iter()
        .filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(&**word)))
        .collect();
    if chosen.is_empty() {
        println!("0 passed, 0 failed");
        return ExitCode::SUCCESS;
    }
    let world = match World::up() {
        Ok(world) => world,
        Err(error) => {
            println!("the lab does not come up: {error:#}\n0 passed, {} failed", chosen.len());
            return ExitCode::FAILURE;
        }
    };
    let rounds =
        std::env::var("ONDE_ROUNDS").map_or(1, |text| text.parse().expect("a number of rounds"));
    let all = || std::iter::repeat_n(&chosen, rounds).flatten();
    let failed = all().filter(|case| !passes(&world, case)).count();
    let down = world.down();
    if let Err(error) = &down {
        println!("the lab does not go down: {error:#}");
    }
    println!("{} passed, {failed} failed", all().count() - failed);
    if failed == 0 && down.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn passes(world: &World, (name, case): &Case) -> bool {
    let begun = Instant::now();
    let done = case(world);
    let verdict = if done.is_ok() { "ok" } else { "FAILED" };
    println!("test {name} ... {verdict} ({:.1} s)", begun.elapsed().as_secs_f64());
    if let Err(error) = &done {
        println!("  {error:#}");
        for job in world.stop_all() {
            println!("  left behind: {job}");
        }
        print!("{}", [1, 2].map(|node| world::console_tail(&world.lab, node)).concat());
    }
    done.is_ok()
}
