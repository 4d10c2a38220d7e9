//! `/init` of the guest that `cargo xtask bench` boots: says that user space is reached and idles.
//! The same file boots under `vmm` and under its peer. Never part of what is shipped.
#![forbid(unsafe_code)]

/// What the benchmarks look for on the guest's console.
const MARK: &str = "onde-bench: user space";

fn main() {
    println!("{MARK}");
    loop {
        std::thread::park();
    }
}
