//! One node as a QEMU command line, and what runs its processor. Starts
//! nothing; the keeper does.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::kernel::KernelCache;
use crate::network;
use crate::programs;
use crate::status::Shape;

const QEMU: &str = "qemu-system-x86_64";
/// Bytes of a node's scratch device; its file takes only what the node writes there.
const SCRATCH_SIZE: u64 = 2 << 30;

/// What runs the nodes' processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's own virtualisation, nested.
    Kvm,
    /// Emulation of an AMD processor with SVM and nested paging: slow, and the same everywhere.
    Tcg,
}

impl Accelerator {
    /// The best that this host has. A host's `/dev/kvm` may be there and yet unable to nest.
    pub fn detect() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let capable = flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
        let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if capable && usable { Self::Kvm } else { Self::Tcg }
    }

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// QEMU keeps translated code for ever as long as it fits, by default in 1 GiB. Code of the VMs that came and went
    /// stays listed by its page, and each byte written to such a page walks the list: after a hundred VMs, zeroing a
    /// page for the next one took a minute, and the node hung. 64 MiB hold what runs at one time; when they are full, all is
    /// forgotten. With 32 MiB that is so often that a VM takes up to ten times as long to move, and a clone to start.
    ///
    /// The processor does not claim fast string instructions (`erms`): kernels would clear and copy pages byte by byte
    /// with them, which emulation does one byte a turn. By the word it is eight times as fast, and to clear a VM's
    /// memory was a quarter of what a node spent on its start.
    fn options(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi,tb-size=64", "-cpu", "max,+svm,+npt,-erms"],
        }
    }
}

/// The command that runs node `node`; its serial console is the command's output.
pub fn command(
    node: u8,
    shape: &Shape,
    accelerator: Accelerator,
    kernel: &KernelCache,
    image: &Path,
    scratch: &Path,
) -> Result<Command> {
    make_scratch(scratch)?;
    let mut qemu = tied(programs::required(QEMU)?.as_os_str());
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"])
        .args(accelerator.options())
        .args(["-m", &shape.memory_mib.to_string(), "-smp", &shape.vcpus.to_string()])
        .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        .args(["-netdev", &netdev(node), "-device", &card(node)])
        .args(["-device", "virtio-rng-pci"])
        .args(["-drive", &drive(scratch), "-device", "virtio-blk-pci,drive=scratch"])
        .args(["-append", &command_line(node, accelerator)])
        .arg("-kernel")
        .arg(&kernel.vmlinux)
        .arg("-initrd")
        .arg(image);
    Ok(qemu)
}

fn command_line(node: u8, accelerator: Accelerator) -> String {
    // A kernel that panics resets, which ends its QEMU, which the keeper sees.
    let mut line = format!("console=ttyS0 quiet panic=-1 onde.node={node} onde.scratch=vda");
    if accelerator == Accelerator::Tcg {
        // An emulated processor has no side channels to close, and its time stamp counter is the
        // host's: sparing both kinds of caution saves a fifth of the boot.
        line.push_str(" mitigations=off cryptomgr.notests tsc=reliable no_timer_check");
        // A node that counts the counter itself, while others boot beside it, has seconds of a third.
        line.push_str(&format!(" tsc_early_khz={}", onde_sys::tsc::khz()));
    }
    line
}

/// A file as large as a node's scratch device and with nothing in it.
fn make_scratch(scratch: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(scratch);
    let made = file.and_then(|file| file.set_len(SCRATCH_SIZE));
    made.with_context(|| format!("cannot write {}", scratch.display()))
}

/// What is on it is worth nothing after a crash: the host need not write it down.
fn drive(scratch: &Path) -> String {
    // A comma in a value is doubled.
    let file = scratch.display().to_string().replace(',', ",,");
    format!("file={file},format=raw,if=none,id=scratch,cache=unsafe,discard=unmap")
}

fn netdev(node: u8) -> String {
    format!("tap,id=net,ifname={},script=no,downscript=no", network::tap(node))
}

fn card(node: u8) -> String {
    // No option ROM: the node boots from the kernel given, not from the network.
    format!("virtio-net-pci,netdev=net,romfile=,mac={}", network::node_mac(node))
}

/// A command for `program` that the kernel kills when the keeper dies, however it dies.
pub fn tied(program: &std::ffi::OsStr) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
