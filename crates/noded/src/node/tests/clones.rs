//! Templates and clones: who pays for what, and what a clone may hold.

use super::*;

fn make_template(bench: &mut Bench, job: u8) {
    bench.make(BootTemplate(job));
    bench.make(Says(job, Vmm::Resumed));
    bench.make(Says(job, Vmm::Saved));
    bench.make(Status(job));
}

#[test]
fn clones_pay_for_their_own_and_the_last_one_for_the_template() {
    const TOO_BIG: u32 = 1000;
    let mut bench = check_in(
        Bench::new(config()),
        &[
            (BootTemplate(1), "booted .2 with 3000000"),
            // Not yet.
            (BootClone(2, 1, 8), "NoTemplate"),
            (Says(1, Vmm::Resumed), "Save"),
            (BootClone(2, 1, 8), "NoTemplate"),
            (Says(1, Vmm::Saved), ""),
            // Its memory, which is not its disk.
            (Wait(2000), ""),
            (Status(1), "template None spent 19531 left 2980469 burn 19532 for 152 s"),
            (BootClone(2, 9, 8), "NoTemplate"),
            (BootClone(2, 1, TOO_BIG), "BadLimits"),
            // Who asks last is answered, when the guest runs.
            (BootClone(2, 1, 8), ""),
            (BootClone(2, 1, 8), ""),
            (Says(2, Vmm::Resumed), "booted .3 with 3000000 Go"),
            (BootClone(2, 1, 8), "booted .3 with 3000000"),
            (BootClone(3, 1, 8), ""),
            (Dies(3), "NodeFault"),
            (BootClone(4, 1, 8), ""),
            (Says(4, Vmm::Resumed), "booted .5 with 3000000 Go"),
            (BootClone(5, 2, 8), "NoTemplate"),
            (Stop(1), "certificate 3 spent 26933 unused 2973067"),
            (BootClone(5, 1, 8), "NoTemplate"),
        ],
    );
    // One of the two answers for the template's pages, then the other.
    let held = |bench: &Bench| [2, 4].map(|job| bench.node.jobs[&[job; 16]].job.held_mib());
    let before = held(&bench);
    assert_eq!(before.iter().sum::<u32>(), SAVED_MIB + 8 + 8);
    let heir = if before[0] > 8 { 2 } else { 4 };
    bench.make(Stop(heir));
    assert_eq!(bench.node.jobs[&[6 - heir; 16]].job.held_mib(), SAVED_MIB + 8);
    bench.make(Stop(6 - heir));
    assert_eq!(bench.node.mem_mib_free, config().mem_mib);
}

#[test]
fn more_clones_fit_than_can_be_uploaded_to() {
    let mut bench = Bench::new(Config { mem_mib: u32::MAX / 2, ..config() });
    make_template(&mut bench, 0);
    let mut boot = |index: u32| {
        let ipv4 = config().plan.guest(1000 + index);
        let mut job = [0xFF; 16];
        job[1..5].copy_from_slice(&index.to_be_bytes());
        let origin = Origin::Clone([0; 16]);
        let (mac, held_mib) = (plan::mac(ipv4), 8);
        let token = BootToken { job, ipv4, mac, origin, held_mib, ..samples::token(1) };
        let packet = Request::Boot(token, [0; 32]).emit(7, &job, &Key::new(&[0; 32]));
        bench.node.step(1000, Event::Packet([0; COOKIE_SIZE], packet))
    };
    let made = (1..=VMS_MAX).filter(|index| matches!(boot(*index)[..], [Effect::Create(..)]));
    assert_eq!(made.count() as u32, VMS_MAX);
    assert!(matches!(boot(VMS_MAX + 1)[..], [Effect::Reply(..)]), "it is full");
}

#[test]
fn a_clone_that_wants_more_than_it_bought_is_told_so() {
    let mut bench = Bench::new(config());
    make_template(&mut bench, 1);
    bench.make(BootClone(2, 1, 8));
    bench.make(Says(2, Vmm::Resumed));
    bench.step(Event::OutOfMemory(bench.slot(2)));
    bench.make(Dies(2));
    assert!(bench.make(Status(2)).starts_with("ended OutOfMemory"));
}
