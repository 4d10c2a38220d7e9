//! The lab itself: nodes boot, die and come back; whatever ends a lab, nothing
//! of it stays. Needs root or user namespaces, and fails without.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use onde_lab::{Lab, Shape, State};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

const SHAPE: Shape =
    Shape { nodes: 1, memory_mib: 512, vcpus: 2, broker: false, keep_console: false };

/// A lab's folder of its own, in a place where a socket's path is short.
fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("onde-{name}-{}", std::process::id()));
    std::fs::remove_dir_all(&dir).ok();
    dir
}

fn up(dir: &Path) -> Lab {
    Lab::up(dir, &SHAPE, |_| {}).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Handles of all processes of the lab, to wait for their end.
fn processes(lab: &Lab) -> Vec<OwnedFd> {
    let status = lab.status().unwrap();
    let nodes = status.members.iter().map(|member| Pid::from_raw(member.pid as i32).unwrap());
    let all = nodes.chain([lab.keeper().unwrap()]);
    all.map(|pid| pidfd_open(pid, PidfdFlags::empty()).unwrap()).collect()
}

/// Waits for the end of `processes`.
fn check_ended(processes: Vec<OwnedFd>) {
    for process in processes {
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(poll(&mut ended, Some(&limit)).unwrap(), 1, "a process lives on");
    }
}

#[test]
fn nodes_die_and_come_back() {
    let dir = folder("life");
    let lab = up(&dir);
    assert!(lab.status().unwrap().is_ready());
    assert!(lab.console(1).unwrap().contains("onde: node ready"));

    lab.kill_node(1).unwrap();
    assert_eq!(lab.status().unwrap().members[0].state, State::Down);
    lab.boot_node(1).unwrap();
    assert!(lab.status().unwrap().is_ready());
    assert!(lab.boot_node(1).unwrap_err().to_string().contains("runs already"));
    assert!(lab.kill_node(2).unwrap_err().to_string().contains("no node 2"));

    // The same lab again is that lab; another shape is refused.
    assert_eq!(up(&dir).status().unwrap(), lab.status().unwrap());
    let larger = Shape { nodes: 3, ..SHAPE };
    let refused = Lab::up(&dir, &larger, |_| {}).unwrap_err().to_string();
    assert!(refused.contains("another lab"), "{refused}");

    let processes = processes(&lab);
    lab.down().unwrap();
    assert!(!dir.exists());
    check_ended(processes);
}

#[test]
fn nothing_stays_when_up_or_the_keeper_dies() {
    let dir = folder("death");
    let mut starter = Command::new(env!("CARGO_BIN_EXE_onde-lab"))
        .args(["up", "--nodes", "1", "--memory", "512", "--no-broker", "--dir"])
        .arg(&dir)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(starter.stderr.take().unwrap()).lines();
    // It says so when the nodes are on their way, long before they are ready.
    assert!(said.any(|line| line.unwrap().starts_with("processors")));
    let started = processes(&Lab::attach(&dir).unwrap());
    starter.kill().unwrap();
    starter.wait().unwrap();
    check_ended(started);
    assert!(!dir.exists());

    // A lab for now ends with whoever holds it.
    let lab = Lab::up_for_now(&dir, &SHAPE, &[]).unwrap();
    let started = processes(&lab);
    drop(lab);
    check_ended(started);
    assert!(!dir.exists());

    // A keeper that is killed takes its nodes along, and the next `up` finds its way.
    let lab = up(&dir);
    let started = processes(&lab);
    kill_process(lab.keeper().unwrap(), Signal::KILL).unwrap();
    check_ended(started);
    assert!(Lab::find(&dir).unwrap().is_none());
    up(&dir).down().unwrap();
    assert!(!dir.exists());
}
