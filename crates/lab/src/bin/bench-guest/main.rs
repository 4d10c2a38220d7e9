//! The guest of `cargo xtask bench`. As `/init` it says that user space is reached, and idles; the same file boots
//! under `vmm` and under its peer. With `bench.ipv4=` on the kernel's command line, or as a program with the
//! argument `echo`, it answers probes and writes memory ([`echo`]). Never part of what is shipped.
#![forbid(unsafe_code)]

mod echo;

/// What the benchmarks look for on the guest's console.
const MARK: &str = "onde-bench: user space";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let served = match (arguments.next().as_deref(), arguments.next()) {
        (Some("echo"), dirty_mib) => echo::serve(dirty_mib.as_deref().unwrap_or("0")),
        (Some("used"), _) => match echo::used() {
            Ok(kib) => return println!("{kib}"),
            Err(error) => Err(error),
        },
        _ => {
            println!("{MARK}");
            echo::boot()
        }
    };
    if let Err(error) = served {
        println!("onde-bench: {error:#}");
    }
    loop {
        std::thread::park();
    }
}
