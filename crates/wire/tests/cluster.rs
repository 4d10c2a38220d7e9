//! The cluster file and the address plan.

mod sample;

use onde_wire::cluster::{Cluster, hex as from_hex};
use onde_wire::packet::Prices;
use onde_wire::plan::{Plan, SLOTS_MAX, mac};
use sample::*;

const FILE: &str = "\
# A laundromat.
secret = 000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F
network=198.18.0.0/15   # the lab
gateway=198.18.0.1

price.vcpu_s=800000
price.gib_s=200000
price.gib_sent=1000000
price.disk_gib_s=10000
keep_s=60
";

#[test]
fn a_cluster_file_says_what_it_says() {
    let cluster = Cluster::parse(FILE).unwrap();
    assert_eq!(cluster.secret, secret());
    assert_eq!(cluster.plan, Plan::new([198, 18, 0, 0], 15).unwrap());
    assert_eq!(cluster.gateway, [198, 18, 0, 1]);
    let prices =
        Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1_000_000, disk_gib_s: 10_000 };
    assert_eq!((cluster.prices, cluster.keep_s), (prices, 60));
}

#[test]
fn what_may_be_absent_is_free() {
    let short: Vec<&str> = FILE.lines().skip(1).take(2).collect();
    let cluster = Cluster::parse(&short.join("\r\n")).unwrap();
    assert_eq!((cluster.gateway, cluster.prices), ([0; 4], Prices::default()));
    assert_eq!(cluster.keep_s, 300);
}

#[test]
fn a_wrong_cluster_file_is_refused_with_its_line() {
    let cases = [
        ("", "cluster file, line 0: `secret` is missing"),
        ("network=198.18.0.0/15", "cluster file, line 0: `secret` is missing"),
        ("\nsecret", "cluster file, line 2: no `=` in it"),
        ("color=red", "cluster file, line 1: unknown name"),
        ("secret=00", "cluster file, line 1: not 64 hex digits"),
        ("network=198.18.0.0", "cluster file, line 1: not a /10 to /22"),
        ("gateway=198.18.0", "cluster file, line 1: not an IPv4 address"),
        ("price.gib_s=-1", "cluster file, line 1: not a price"),
        ("keep_s=-1", "cluster file, line 1: not a number of seconds"),
        ("price.gib_s=18446744073709551616", "cluster file, line 1: not a price"),
    ];
    for (text, expected) in cases {
        assert_eq!(Cluster::parse(text).err().unwrap().to_string(), expected, "{text:?}");
    }
    let secret_only = FILE.lines().nth(1).unwrap();
    let error = Cluster::parse(secret_only).err().unwrap();
    assert_eq!(error.to_string(), "cluster file, line 0: `network` is missing");
}

#[test]
fn only_hex_digits_are_hex() {
    assert_eq!(from_hex(&hex(&secret())), Some(secret()));
    for wrong in ["+f", "-1", " 1", "g0", "é"] {
        let text = format!("{wrong}{}", "0".repeat(64 - wrong.len()));
        assert_eq!(from_hex(&text), None, "{wrong:?}");
    }
}

#[test]
fn networks_of_any_other_size_are_refused() {
    for (text, good) in [
        ("198.18.0.0/15", true),
        (" 10.0.0.0/10 ", true),
        ("10.0.0.0/22", true),
        ("10.0.0.0/9", false),
        ("10.0.0.0/23", false),
        ("10.1.0.0/10", false),
        ("10.0.0.1/22", false),
        ("10.0.0.0/", false),
        ("10.0.0/15", false),
        ("/15", false),
    ] {
        assert_eq!(Plan::parse(text).is_some(), good, "{text:?}");
    }
}

#[test]
fn every_address_has_one_meaning() {
    let plan = Plan::new([198, 18, 0, 0], 15).unwrap();
    assert_eq!((plan.nodes_max(), plan.guests_max()), (255, 65_534));
    for (address, expected) in [
        (plan.node(0), [198, 18, 0, 1]),
        (plan.node(254), [198, 18, 254, 1]),
        (plan.mstrap(3, 0), [198, 18, 3, 2]),
        (plan.mstrap(3, SLOTS_MAX - 1), [198, 18, 3, 254]),
        (plan.owner(), [198, 18, 255, 1]),
        (plan.guest(0), [198, 19, 0, 1]),
        (plan.guest(plan.guests_max() - 1), [198, 19, 255, 254]),
    ] {
        assert_eq!(address, expected);
    }
    for prefix_len in 10..=22 {
        let plan = Plan::new([10, 0, 0, 0], prefix_len).unwrap();
        let last_node = plan.mstrap(plan.nodes_max(), SLOTS_MAX - 1);
        assert!(last_node < plan.guest(0), "/{prefix_len}: nodes below guests");
        let last = u32::from_be_bytes(plan.guest(plan.guests_max() - 1)) + 1;
        assert_eq!(last % (1 << (32 - prefix_len)), (1 << (32 - prefix_len)) - 1, "all of it");
    }
}

#[test]
fn a_mac_is_its_address() {
    assert_eq!(mac([198, 18, 1, 2]), [0x02, 0x4f, 198, 18, 1, 2]);
}
