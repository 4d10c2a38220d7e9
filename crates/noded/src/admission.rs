//! Whether a boot token can be taken: the checks of BOOT that need no kernel. Called by [`crate::node`]; the
//! token's tag was checked by `packetd`. Never changes anything.

use onde_wire::machine::{DISK_MIB_MAX, MEM_MIB_MAX, MEM_MIB_MIN, VCPUS_MAX, held_mib};
use onde_wire::packet::Status;
use onde_wire::plan::{self, Plan};
use onde_wire::token::{BootToken, Origin};

use crate::meter::burn_max;
use crate::node::Config;

/// Most micro-tokens that a payment token may be worth: with a 32-bit count the balance fits 64 bits.
const VALUE_MAX: u64 = u32::MAX as u64;

/// Disk that a VM of `mem_mib` takes when it is saved, MiB at most: its RAM with 24 bytes for each 128 KiB, and its state
/// (4 MiB at most). Also the size of the file, which its VMM cannot make larger.
pub fn saved_mib(mem_mib: u32) -> u32 {
    mem_mib + mem_mib / SAVED_SHARE + SAVED_BASE_MIB
}

const SAVED_BASE_MIB: u32 = 5;
const SAVED_SHARE: u32 = 4096;

/// Memory that a token's VM takes from the node, MiB, and its cgroup's limit. A clone's token says it whole: what its guest
/// writes beyond that would be memory that others paid for, so such a clone ends. A template is there twice while its
/// file is written.
pub fn reserve_mib(token: &BootToken) -> u32 {
    match token.origin {
        Origin::Loader => held_mib(token.mem_mib),
        Origin::Template => held_mib(token.mem_mib) + saved_mib(token.mem_mib),
        Origin::Clone(_) => token.held_mib,
    }
}

/// Whether a token asks for an amount of memory that its kind of VM can hold. Clones share memory, and no disk.
fn holds_enough(token: &BootToken) -> bool {
    if token.origin != Origin::Loader && token.disk_mib > 0 {
        return false;
    }
    match token.origin {
        Origin::Clone(_) => (CLONE_MIB_MIN..=held_mib(token.mem_mib)).contains(&token.held_mib),
        Origin::Loader | Origin::Template => token.held_mib == token.mem_mib,
    }
}

/// Least memory of a clone, MiB: its VMM (README, figures: 1.4 MiB) and the kernel's tables for it, before its guest has
/// written a page.
const CLONE_MIB_MIN: u32 = 4;

/// Checks a token against this node; whether there is room is the caller's question.
pub fn check(config: &Config, token: &BootToken, now_ms: u64) -> Result<(), Status> {
    if token.incarnation != config.incarnation {
        return Err(Status::OtherIncarnation);
    }
    if now_ms > token.expiry_ms {
        return Err(Status::Expired);
    }
    let sane = token.node == config.node
        && (MEM_MIB_MIN..=MEM_MIB_MAX).contains(&token.mem_mib)
        && (1..=VCPUS_MAX).contains(&token.vcpus)
        && token.disk_mib <= DISK_MIB_MAX
        && (1..=VALUE_MAX).contains(&token.value_micro)
        && holds_enough(token)
        && (1..=30).contains(&token.prefix_len)
        && is_guest_ipv4(&config.plan, token.ipv4)
        && is_guest_mac(config, token.mac);
    if !sane {
        return Err(Status::BadLimits);
    }
    // A VM that uses more processors at once than there are would only wait for itself.
    if token.vcpus > config.cpus || token.disk_mib > config.disk_mib {
        return Err(Status::NoRoom);
    }
    if token.first_count == 0 && burn_max(&token.prices, token) > 0 {
        return Err(Status::BadPayment);
    }
    Ok(())
}

/// Whether an address can be a guest's: a host's, and not one that the plan gives to nodes and mstraps.
fn is_guest_ipv4(plan: &Plan, ipv4: [u8; 4]) -> bool {
    (1..=223).contains(&ipv4[0]) && ipv4[0] != 127 && !is_nodes(plan, ipv4)
}

/// Whether the plan gives an address to nodes: its lower half.
fn is_nodes(plan: &Plan, ipv4: [u8; 4]) -> bool {
    let number = u32::from_be_bytes;
    (number(plan.node(0)) - 1..number(plan.guest(0)) - 1).contains(&number(ipv4))
}

/// Whether a MAC can be a guest's: one interface's, not the node's own, and none that mstraps use.
fn is_guest_mac(config: &Config, mac: [u8; 6]) -> bool {
    let planned = [mac[2], mac[3], mac[4], mac[5]];
    let is_mstrap = mac == plan::mac(planned) && is_nodes(&config.plan, planned);
    mac[0] & 1 == 0 && mac != [0; 6] && mac != config.mac && !is_mstrap
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{config, token};
    use onde_wire::machine::fits_mib;

    fn check_that(change: impl FnOnce(&mut BootToken), expect: Result<(), Status>) {
        let mut token = token(1);
        change(&mut token);
        assert_eq!(check(&config(), &token, 1000), expect, "{token:?}");
    }

    #[test]
    fn takes_what_makes_sense_and_nothing_else() {
        check_that(|_| {}, Ok(()));
        check_that(|t| t.incarnation = [9; 16], Err(Status::OtherIncarnation));
        check_that(|t| t.expiry_ms = 999, Err(Status::Expired));
        check_that(|t| t.expiry_ms = 1000, Ok(()));
        check_that(|t| t.node = [0; 16], Err(Status::BadLimits));
        check_that(|t| (t.mem_mib, t.held_mib) = (63, 63), Err(Status::BadLimits));
        check_that(|t| (t.mem_mib, t.held_mib) = (65537, 65537), Err(Status::BadLimits));
        check_that(|t| t.held_mib = 127, Err(Status::BadLimits));
        check_that(|t| t.vcpus = 0, Err(Status::BadLimits));
        check_that(|t| t.vcpus = 3, Err(Status::NoRoom));
        check_that(|t| t.disk_mib = 1, Err(Status::NoRoom));
        check_that(|t| t.value_micro = 0, Err(Status::BadLimits));
        check_that(|t| t.value_micro = VALUE_MAX + 1, Err(Status::BadLimits));
        check_that(|t| t.first_count = 0, Err(Status::BadPayment));
        check_that(|t| t.prefix_len = 0, Err(Status::BadLimits));
    }

    #[test]
    fn a_guest_cannot_take_the_address_of_a_node() {
        for ipv4 in [[198, 18, 0, 1], [198, 18, 200, 77], [127, 0, 0, 1], [224, 0, 0, 1], [0; 4]] {
            check_that(|t| t.ipv4 = ipv4, Err(Status::BadLimits));
        }
        for mac in [[0; 6], [1, 2, 3, 4, 5, 6], config().mac, plan::mac([198, 18, 3, 2])] {
            check_that(|t| t.mac = mac, Err(Status::BadLimits));
        }
        check_that(|t| t.ipv4 = [10, 0, 0, 1], Ok(()));
    }

    #[test]
    fn only_a_clone_may_hold_less_than_its_memory() {
        let clone = |held_mib| {
            move |t: &mut BootToken| (t.origin, t.held_mib) = (Origin::Clone([1; 16]), held_mib)
        };
        check_that(clone(CLONE_MIB_MIN - 1), Err(Status::BadLimits));
        check_that(clone(CLONE_MIB_MIN), Ok(()));
        check_that(clone(held_mib(128)), Ok(()));
        check_that(clone(held_mib(128) + 1), Err(Status::BadLimits));
        check_that(|t| t.origin = Origin::Template, Ok(()));
    }

    #[test]
    fn what_hello_calls_free_fits() {
        for free in [0, 24, 25, 100, 1024, 70_000, u32::MAX / 2] {
            let fits = fits_mib(free);
            assert!(held_mib(fits) <= free || fits == 0, "{fits} in {free}");
        }
        assert_eq!(fits_mib(held_mib(512)), 512);
    }
}
