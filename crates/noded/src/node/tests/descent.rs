//! The way down and up again: running, low, on disk, purged; by SUSPEND and by a balance that ends.

use super::*;

/// The sample node with a gigabyte of disk. A VM of 128 MiB keeps back 1 299 micro-tokens a second for 120 s on disk, and
/// 48 251 for what it can use between two looks.
fn with_disk() -> Bench {
    Bench::new(Config { disk_mib: 1000, ..config() })
}

fn check_disk(moves: &[(Move, &str)]) -> Bench {
    check_in(with_disk(), moves)
}

const BOOTED: (Move, &str) = (Boot(1), "booted .2 with 3000000");
const RESUMED: (Move, &str) = (Says(1, Vmm::Resumed), "Go");

#[test]
fn a_balance_that_ends_leads_to_disk_and_a_payment_back() {
    check_disk(&[
        BOOTED,
        RESUMED,
        (Busy(1), ""),
        (Wait(1000), ""),
        (Status(1), "running None spent 512330 left 2487670 burn 25000 for 91 s, kept 120 s"),
        // All but the reserve of 204 131 is used up after 3 389 ms.
        (Wait(2385), ""),
        (Wait(10), "Save"),
        (Status(1), "low None spent 2798431 left 201569 burn 825008 for 0 s, kept 120 s"),
        // The node writes: nobody pays for that.
        (Wait(9000), ""),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        (
            Status(1),
            "suspended None spent 2798431 left 201569 burn 977 for 206 s, wakes for 8252642",
        ),
        (Console(1, 0), "\"the end\" at 4993 of 5000"),
        (Boot(1), "Ended"),
        // 100 MiB at 10 000 a GiB-second.
        (Wait(100_000), ""),
        (
            Status(1),
            "suspended None spent 2896087 left 103913 burn 977 for 106 s, wakes for 8350298",
        ),
        (Pay(1, 8), "paid 8 left 5103913"),
        (
            Status(1),
            "suspended None spent 2896087 left 5103913 burn 977 for 5224 s, wakes for 3350298",
        ),
        (Pay(1, 30), "paid 30 left 27103913"),
        (Wait(4000), ""),
        RESUMED,
        // Disk while it was read, and nothing of the reading itself.
        (Status(1), "running None spent 2899993 left 27100007 burn 825008 for 32 s, kept 120 s"),
        (Wait(10_000), ""),
        (Stop(1), "certificate 30 spent 3150086 unused 26849914"),
    ]);
}

#[test]
fn what_nobody_pays_for_is_purged_when_it_was_said_and_not_before() {
    let mut bench = check_disk(&[
        BOOTED,
        RESUMED,
        (Busy(1), ""),
        (Wait(3395), "Save"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        (
            Status(1),
            "suspended None spent 2798431 left 201569 burn 977 for 206 s, wakes for 8252642",
        ),
        (Wait(205_000), ""),
        (Status(1), "suspended None spent 2998626 left 1374 burn 977 for 1 s, wakes for 8452837"),
        (Wait(3000), ""),
        (Status(1), "purged OutOfTokens spent 3000000 left 0 burn 0 for 0 s"),
        (Pay(1, 50), "Ended"),
        (Wake(1), "Ended"),
        (Suspend(1), "Ended"),
        (Stop(1), "certificate 3 spent 3000000 unused 0"),
    ]);
    bench.make(Boot(2));
    assert!(bench.heard.starts_with("Expired"), "{}", bench.heard);
    assert_eq!((bench.node.disk_mib_free, bench.files.len()), (1000, 0));
}

#[test]
fn suspend_and_wake_by_hand() {
    check_disk(&[
        BOOTED,
        (Suspend(1), "NotYet"),
        (Wake(1), "booting"),
        RESUMED,
        (Wait(2000), ""),
        (Suspend(1), "running Save"),
        (Suspend(1), "running"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        (Suspend(1), "suspended"),
        (Status(1), "suspended None spent 50018 left 2949982 burn 977 for 3019 s"),
        // It sleeps until it is woken, whatever is paid.
        (Pay(1, 60), "paid 60 left 59949982"),
        (Wait(10_000), ""),
        (Wake(1), "suspended"),
        (Wake(1), "suspended"),
        RESUMED,
        (Wake(1), "running"),
        (Status(1), "running None spent 59783 left 59940217 burn 25009 for 2388 s, kept 120 s"),
        // And again.
        (Suspend(1), "running Save"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        (Stop(1), "certificate 60 spent 59783 unused 59940217"),
        (Stop(1), "certificate 60 spent 59783 unused 59940217"),
    ]);
}

#[test]
fn waking_takes_money_and_memory() {
    let held = held_mib(128);
    let bench = Bench::new(Config { disk_mib: 1000, mem_mib: held, ..config() });
    check_in(
        bench,
        &[
            BOOTED,
            RESUMED,
            (Suspend(1), "running Save"),
            (Says(1, Vmm::Saved), ""),
            (Dies(1), ""),
            (Boot(2), "booted .3 with 3000000"),
            (Wake(1), "NoMemory"),
            (Status(1), "suspended None spent 0 left 3000000 burn 977 for 3070 s"),
            (Stop(2), "certificate 3 spent 0 unused 3000000"),
            (Wake(1), "suspended"),
            RESUMED,
            (Busy(1), ""),
            (Wait(1000), ""),
            (Suspend(1), "running Save"),
            (Says(1, Vmm::Saved), ""),
            (Dies(1), ""),
            (Wake(1), "Unpaid"),
            (Pay(1, 40), "paid 40 left 39174985"),
            (Wake(1), "suspended"),
        ],
    );
}

#[test]
fn who_waits_for_memory_wakes_when_there_is_some() {
    let held = held_mib(128);
    let bench = Bench::new(Config { disk_mib: 1000, mem_mib: held, ..config() });
    let mut bench = check_in(
        bench,
        &[
            BOOTED,
            RESUMED,
            (Busy(1), ""),
            (Wait(3395), "Save"),
            (Says(1, Vmm::Saved), ""),
            (Dies(1), ""),
            (Boot(2), "booted .3 with 3000000"),
            (Pay(1, 60), "paid 60 left 57201569"),
            (Wait(5000), ""),
            (Stop(2), "certificate 3 spent 125046 unused 2874954"),
        ],
    );
    bench.make(Wait(1500));
    assert_eq!(bench.vms.values().map(|vm| vm.job).collect::<Vec<_>>(), [1]);
}

#[test]
fn what_does_not_wake_up_stays_on_disk_until_somebody_asks() {
    for end in [Dies(1), Says(1, Vmm::Fault(9)), Wait(90_000)] {
        let mut bench = check_disk(&[
            BOOTED,
            (Pay(1, 60), "paid 60 left 60000000"),
            RESUMED,
            (Suspend(1), "running Save"),
            (Says(1, Vmm::Saved), ""),
            (Dies(1), ""),
            (Wake(1), "suspended"),
            (end, ""),
        ]);
        if matches!(end, Says(..)) {
            bench.make(Dies(1));
        }
        assert!(bench.vms.is_empty(), "{end:?}");
        check_in(bench, &[(Wait(5000), ""), (Wake(1), "suspended"), RESUMED, (Wake(1), "running")]);
    }
    // One that cannot even be started.
    let mut bench = check_disk(&[
        BOOTED,
        RESUMED,
        (Suspend(1), "running Save"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
    ]);
    bench.fails_to_create = true;
    bench = check_in(bench, &[(Wake(1), "suspended"), (Wait(3000), "")]);
    bench.fails_to_create = false;
    check_in(bench, &[(Wake(1), "suspended"), RESUMED, (Wake(1), "running")]);
}

#[test]
fn nobody_who_overheard_suspend_or_wake_can_have_it_done_again() {
    check_disk(&[
        BOOTED,
        RESUMED,
        (Suspend(1), "running Save"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        // Before its turn, and after it.
        (WakeAgain(1, 0), "suspended"),
        (Wake(1), "suspended"),
        RESUMED,
        (SuspendAgain(1, 0), "running"),
        (Wait(1000), ""),
        (Suspend(1), "running Save"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        (WakeAgain(1, 1), "suspended"),
        (Wait(1000), ""),
        (SuspendAgain(1, 0), "suspended"),
        (Wake(1), "suspended"),
        RESUMED,
    ]);
}

#[test]
fn what_cannot_be_saved_goes_on_and_is_purged_at_zero() {
    // A file that cannot be written.
    check_disk(&[
        BOOTED,
        RESUMED,
        (Busy(1), ""),
        (Wait(3395), "Save"),
        (Wait(2000), ""),
        (Says(1, Vmm::NotSaved), ""),
        // What the attempt took is not charged.
        (Status(1), "low None spent 2798431 left 201569 burn 825008 for 0 s"),
        // Its owner may try again.
        (Suspend(1), "low Save"),
        (Says(1, Vmm::NotSaved), ""),
        (Wait(300), ""),
        (Status(1), "purged OutOfTokens spent 3000000 left 0 burn 0 for 0 s"),
    ]);
    // No disk, or none left.
    for disk_mib in [0, 132] {
        let bench = Bench::new(Config { disk_mib, ..config() });
        check_in(
            bench,
            &[
                BOOTED,
                RESUMED,
                (Suspend(1), "NoDisk"),
                (Busy(1), ""),
                (Wait(3650), ""),
                (Status(1), "purged OutOfTokens spent 3000000 left 0 burn 0 for 0 s"),
            ],
        );
    }
}

#[test]
fn what_ends_on_the_way_to_disk_and_back_has_ended() {
    for (end, verdict) in [
        (Dies(1), "ended Fault spent 25009 left 2974991 burn 0 for 0 s"),
        (Stop(1), "stopped Stopped spent 25009 left 2974991 burn 0 for 0 s"),
        (Wait(90_000), "ended Fault spent 25009 left 2974991 burn 0 for 0 s"),
    ] {
        let mut bench =
            check_disk(&[BOOTED, RESUMED, (Wait(1000), ""), (Suspend(1), "running Save")]);
        bench.make(end);
        check_in(bench, &[(Status(1), verdict), (Wake(1), "Ended")]);
    }
    // STOP while it wakes up.
    let stored = [
        BOOTED,
        RESUMED,
        (Suspend(1), "running Save"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        (Wake(1), "suspended"),
        (Stop(1), "certificate 3 spent 0 unused 3000000"),
    ];
    let bench = check_disk(&stored);
    assert!(bench.vms.is_empty() && bench.files.is_empty());
    // A VMM that dies when it has said that the guest runs: the file is the past, and nobody goes back to it.
    let awake = [&stored[..6], &[RESUMED, (Dies(1), "")]].concat();
    check_in(check_disk(&awake), &[(Status(1), "ended Fault spent 0 left 3000000 burn 0 for 0 s")]);
}

#[test]
fn a_payment_while_it_is_written_wakes_it_up_again() {
    let mut bench = check_disk(&[
        BOOTED,
        RESUMED,
        (Busy(1), ""),
        (Wait(3395), "Save"),
        (Pay(1, 60), "paid 60 left 57201569"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
    ]);
    bench.make(Wait(1500));
    check_in(bench, &[RESUMED, (Wake(1), "running")]);
}

/// Nothing is kept back while a VM boots: it is told of no more time on disk than it can still pay for.
#[test]
fn what_booting_used_up_is_not_promised() {
    check_disk(&[
        BOOTED,
        (Busy(1), ""),
        (Wait(3550), ""),
        RESUMED,
        (Status(1), "running None spent 2927133 left 72867 burn 825009 for 0 s, kept 18 s"),
        (Wait(20), "Save"),
        (Status(1), "low None spent 2939508 left 60492 burn 825009 for 0 s, kept 46 s"),
        (Says(1, Vmm::Saved), ""),
        (Dies(1), ""),
        (Status(1), "suspended None spent 2939508 left 60492 burn 977 for 61 s, wakes for 8393729"),
    ]);
}

#[test]
fn a_stall_of_the_node_costs_nobody_anything() {
    check(&[
        BOOTED,
        RESUMED,
        (Wait(1000), ""),
        (Stall(5000), ""),
        (Status(1), "running None spent 15530 left 2984470 burn 25000 for 119 s"),
        (Stall(5001), ""),
        (Status(1), "running None spent 15530 left 2984470 burn 25000 for 119 s"),
        (Wait(1000), ""),
        (Status(1), "running None spent 30986 left 2969014 burn 25000 for 118 s"),
    ]);
}

/// Whatever anybody does to a job that sleeps, it is not purged before the time that it was last told of.
#[test]
fn deadlines_are_kept() {
    for seed in 0..60 {
        let (mut dice, mut bench) = (Dice(seed), with_disk());
        for the_move in [Boot(1), Says(1, Vmm::Resumed), Busy(1)] {
            bench.make(the_move);
        }
        let mut paid = 3 + dice.throw(20) as u32;
        bench.make(Pay(1, paid));
        while bench.make(Wait(1 + dice.throw(700))) != "Save" {}
        bench.make(Says(1, Vmm::Saved));
        bench.make(Dies(1));
        let mut purged_from_ms = 0;
        loop {
            let status = bench.node.jobs[&[1; 16]].job.status(bench.now_ms);
            match status.stage.name() {
                "suspended" => {}
                "purged" => break,
                other => panic!("{other}, seed {seed}"),
            }
            purged_from_ms = purged_from_ms.max(bench.now_ms + status.purge_s * 1000);
            match dice.throw(9) {
                0 if paid < 26 => {
                    paid += 1;
                    bench.make(Pay(1, paid));
                }
                1 => _ = bench.make(Stall(dice.throw(20_000))),
                _ => _ = bench.make(Wait(dice.throw(30_000))),
            }
        }
        assert!(bench.now_ms >= purged_from_ms, "purged too early, seed {seed}");
    }
}
