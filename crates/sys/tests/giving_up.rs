//! What a process has given up is gone: each test runs this program again and looks at how it dies.

use onde_sys::heap::SealableHeap;
use onde_sys::seccomp::{Allowed, allow_only, exit_now};
use std::hint::black_box;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

#[global_allocator]
static HEAP: SealableHeap = SealableHeap::new();

const EXIT: Allowed = Allowed::any(libc::SYS_exit_group);
/// Closing descriptor 99, which is not open, and no other.
const CLOSE_99: Allowed = Allowed::with(libc::SYS_close, 0, 99);

/// Runs `body`, the body of the test of this name, in a process of its own, and checks how that ends: by
/// this signal, or with this exit code where that is `Ok`.
fn check(name: &str, expected: Result<i32, i32>, body: fn()) {
    if std::env::var_os("ONDE_TEST_GIVING_UP").is_some() {
        body();
        exit_now(7);
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env("ONDE_TEST_GIVING_UP", "1")
        .status()
        .unwrap();
    assert_eq!(status.code().ok_or(status.signal().unwrap_or_default()), expected);
}

#[test]
fn an_allowed_call_is_allowed() {
    check("an_allowed_call_is_allowed", Ok(7), || allow_only(&[EXIT]).unwrap());
}

#[test]
fn any_other_call_kills() {
    check("any_other_call_kills", Err(libc::SIGSYS), || {
        allow_only(&[EXIT]).unwrap();
        black_box(std::process::id());
    });
}

#[test]
fn an_allowed_call_with_other_arguments_kills() {
    check("an_allowed_call_with_other_arguments_kills", Err(libc::SIGSYS), || {
        let file = std::fs::File::open("/dev/null").unwrap();
        allow_only(&[EXIT, CLOSE_99]).unwrap();
        drop(file);
    });
}

#[test]
fn an_allocation_after_the_seal_aborts() {
    check("an_allocation_after_the_seal_aborts", Err(libc::SIGABRT), || {
        HEAP.seal();
        black_box(Box::new(1));
    });
}

#[test]
fn what_was_allocated_before_the_seal_stays() {
    check("what_was_allocated_before_the_seal_stays", Ok(7), || {
        let before = black_box(vec![7; 10]);
        HEAP.seal();
        assert_eq!(black_box(&before).len(), 10);
        drop(before);
    });
}
