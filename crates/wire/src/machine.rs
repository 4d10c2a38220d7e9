//! The machine a guest sees, as numbers: guest-physical addresses, registers of
//! the control device, the info page, the cold machine state, and the messages
//! between `noded` and `vmm`. `vmm` builds this machine; `mstrap`, the loader,
//! `agent` and `client` live in it or describe it. Nothing here does I/O.

mod space;

pub use space::{Space, fits_mib, held_mib};

use crate::bytes::{Reader, Writer};
use crate::token::PaymentToken;

/// Size of a page of guest memory, bytes.
pub const PAGE_SIZE: u64 = 4096;

/// RAM runs from 0 to here, and goes on at [`RAM_HIGH_START`].
pub const RAM_LOW_END: u64 = 0xC000_0000;
/// RAM above the 3-4 GiB hole starts here.
pub const RAM_HIGH_START: u64 = 0x1_0000_0000;
/// Least memory of a VM: Debian's kernel with a small initramfs wants about this.
pub const MEM_MIB_MIN: u32 = 64;
/// Most memory of a VM: what the identity map in BOOT has room for.
pub const MEM_MIB_MAX: u32 = 64 * 1024;
/// The disk's bytes, where the token bought a disk: what virtio-blk serves, seen as memory, so that a disk travels as
/// memory does. What is never written there takes no room.
pub const DISK_START: u64 = 0x18_0000_0000;
/// Most disk of a VM: what lies between [`DISK_START`] and the end of what MIRROR shows.
pub const DISK_MIB_MAX: u32 = 32 * 1024;
/// Most vCPUs of a VM: one MADT of one page, one xAPIC id of 8 bits.
pub const VCPUS_MAX: u16 = 64;

/// BOOT window: bootstrap RAM where mstrap and the loader live; gone soon after RESUME.
pub const BOOT_START: u64 = 0xC000_0000;
/// Size of the BOOT window, bytes.
pub const BOOT_SIZE: u64 = 8 << 20;
/// The VMM's identity map (2 MiB pages) and GDT lie in BOOT below this.
pub const BOOT_TABLES_SIZE: u64 = 1 << 20;
/// mstrap's ELF segments, its .bss and its stack lie in `MSTRAP_START..LOADER_START`.
pub const MSTRAP_START: u64 = BOOT_START + BOOT_TABLES_SIZE;
/// A loader is a flat image put here, entered at its first byte.
pub const LOADER_START: u64 = BOOT_START + (4 << 20);
/// Most bytes of a loader image; the rest of BOOT is zeroed RAM for its data and stack.
pub const LOADER_SIZE_MAX: u32 = 1 << 20;

/// Control device: one page of registers, every access an exit to the VMM.
pub const CONTROL_START: u64 = 0xD000_0000;
/// Info page: one read-only page of memory shared with `noded`, no exits.
pub const INFO_START: u64 = 0xD000_1000;
/// BITMAP window, read only: one bit a page, in the order of [`Space`], as little-endian u64 words; what HARVEST found.
pub const BITMAP_START: u64 = 0xC0_0000_0000;
/// MIRROR window: RAM and disk once more, read only; address a is at `MIRROR_START + a`. Root in the guest can map
/// this through `/dev/mem`, which hides RAM itself.
pub const MIRROR_START: u64 = 0x80_0000_0000;
/// FROZEN window, read only: what FREEZE saved, see [`Frozen`].
pub const FROZEN_START: u64 = 0xA0_0000_0000;
/// Most pages that FREEZE copies (16 MiB): what a VM's memory allowance has room for beyond its RAM, and
/// what a link of 1 Gbit/s carries in 130 ms. With more dirty pages FREEZE does nothing.
pub const FROZEN_PAGES_MAX: u64 = 4096;
/// First virtio-mmio device; the n-th is `VIRTIO_STRIDE` further. Its registers read as memory does, without an exit.
pub const VIRTIO_START: u64 = 0xD001_0000;
/// Distance between two virtio-mmio devices, bytes.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// First global interrupt of a virtio-mmio device; the n-th has this plus n.
pub const VIRTIO_GSI: u32 = 5;
/// Position of the network device.
pub const VIRTIO_NET: u64 = 0;
/// Position of the entropy device.
pub const VIRTIO_RNG: u64 = 1;
/// Position of the disk, where the token bought one.
pub const VIRTIO_BLK: u64 = 2;
/// Global interrupt of the serial port at I/O port 0x3F8.
pub const SERIAL_GSI: u32 = 4;
/// Global interrupt of the ACPI generic event device (power button).
pub const GED_GSI: u32 = 9;
/// I/O port of the serial console.
pub const SERIAL_PORT: u16 = 0x3F8;

/// ACPI tables: RSDP first, the rest behind it, up to `ACPI_END`.
pub const ACPI_START: u64 = 0xE_0000;
/// End of the area of the ACPI tables, which every memory map reserves.
pub const ACPI_END: u64 = 0x10_0000;

/// Registers of the control device: offsets in its page, little endian.
pub mod control {
    /// u64, read: [`MAGIC`].
    pub const REG_MAGIC: u64 = 0x000;
    /// u32, read: version of this contract, 1.
    pub const REG_VERSION: u64 = 0x008;
    /// u64, write: guest-physical address of a machine state; the VMM resets every device,
    /// takes the state and runs it. Returns only on failure, with RESULT set.
    pub const REG_RESUME: u64 = 0x010;
    /// u32, read: result of the last command, one of `RESULT_*`.
    pub const REG_RESULT: u64 = 0x018;
    /// u32, write: the index of the payment token that lies in TOKEN; done when the write returns.
    pub const REG_PAY: u64 = 0x020;
    /// u32, write: milliseconds (at most 1000); returns when the network device has
    /// something for the guest or the time is over. For bare-metal waits without interrupts.
    pub const REG_IDLE: u64 = 0x028;
    /// u32, write: 1 starts to note which pages are written, 0 ends it. At the start no page of RAM is noted, and of the
    /// disk those which were ever written.
    pub const REG_TRACK: u64 = 0x030;
    /// u32, write (any value): the pages written since TRACK or the last HARVEST go to the BITMAP window.
    pub const REG_HARVEST: u64 = 0x034;
    /// u32, write: [`ROLE_MOVED`] or [`ROLE_FORKED`], the role of the copy. Stops all vCPUs, saves the machine state and
    /// the pages written since the last HARVEST into the FROZEN window, and goes on; from then on no frame
    /// leaves but those of FLOW, until ABORT or COMMIT. A machine that RESUMEs the saved state goes on at the same
    /// instruction. RESULT is OK in both; `RESULT_TOO_MANY` where more than `FROZEN_PAGES_MAX` pages are dirty (they
    /// stay so); `RESULT_INVALID` before TRACK and between FREEZE and ABORT.
    pub const REG_FREEZE: u64 = 0x038;
    /// u32, read: in a copy, the role that FREEZE was told; [`ROLE_SOURCE`] in a machine that is none, and in one that was
    /// saved after it became one.
    pub const REG_ROLE: u64 = 0x03C;
    /// u32, write (any value): ends this machine after FREEZE, for good.
    pub const REG_COMMIT: u64 = 0x048;
    /// u32, write (any value): undoes FREEZE: frames leave again, FROZEN is empty, its pages are dirty again.
    pub const REG_ABORT: u64 = 0x04C;
    /// u64, write: the one TCP connection that is let out after FREEZE: the peer's IPv4 address in bytes 0-3, its port in
    /// 4-5, the own port in 6-7, all in network order; 0 for none. What it holds at FREEZE counts; may be written in
    /// halves. From FREEZE on frames leave under the MAC of the bootstrap, so that bridges which have learned where
    /// the copy is are not misled, and frames for that MAC come in as the guest's. No ARP leaves.
    pub const REG_FLOW: u64 = 0x050;
    /// u32, write: the IPv4 address, in network order, to which ICMP echo requests are let out after FREEZE, too: the
    /// node that knows whether a copy runs; 0 for none. What it holds at FREEZE counts.
    pub const REG_JUDGE: u64 = 0x058;
    /// u64, write: guest-physical address of a machine state; RESULT says whether RESUME would take it. Changes nothing.
    /// For a loader that tells its client before the machine which could tell is gone.
    pub const REG_CHECK: u64 = 0x060;
    /// u8, read and write: ACPI sleep control register (S5 is type 5).
    pub const REG_SLEEP_CONTROL: u64 = 0x040;
    /// u8, read and write: ACPI sleep status register.
    pub const REG_SLEEP_STATUS: u64 = 0x041;
    /// u8, write: [`RESET_VALUE`] resets, which ends the VM (its memory came from the customer).
    pub const REG_RESET: u64 = 0x042;
    /// u32, read: event bits of the generic event device; bit 0 is the power button. Read clears.
    pub const REG_EVENT: u64 = 0x044;
    /// 32 bytes, write: payment token for PAY.
    pub const REG_TOKEN: u64 = 0x100;

    /// "ONDECTRL".
    pub const MAGIC: u64 = u64::from_le_bytes(*b"ONDECTRL");
    /// Version of the contract.
    pub const VERSION: u32 = 1;
    /// What to write to `REG_RESET`.
    pub const RESET_VALUE: u8 = 1;

    /// The command was done.
    pub const RESULT_OK: u32 = 0;
    /// The register's value made no sense.
    pub const RESULT_INVALID: u32 = 1;
    /// A machine state that this VMM cannot read: malformed, or another version's.
    pub const RESULT_UNREADABLE: u32 = 2;
    /// The payment token was not accepted.
    pub const RESULT_REFUSED: u32 = 3;
    /// More pages are dirty than FREEZE copies; nothing was done.
    pub const RESULT_TOO_MANY: u32 = 4;
    /// A machine state with other memory, disk or vCPUs than this VM has.
    pub const RESULT_OTHER_SHAPE: u32 = 5;
    /// A machine state whose guest saw a processor with other features than this node's.
    pub const RESULT_OTHER_CPU: u32 = 6;

    /// Role of a machine that was not resumed.
    pub const ROLE_SOURCE: u32 = 0;
    /// Role of a copy whose source ends.
    pub const ROLE_MOVED: u32 = 1;
    /// Role of a copy whose source goes on.
    pub const ROLE_FORKED: u32 = 2;
}

/// Console ring: a memory file of a header page and `CONSOLE_RING_SIZE` bytes. The header's
/// first u64 counts all bytes ever written; byte i lies at `PAGE_SIZE + i % CONSOLE_RING_SIZE`.
pub const CONSOLE_RING_SIZE: u64 = 64 << 10;

/// Descriptors that a `vmm` process is started with; 0 and 1 are `/dev/null`, 2 is its log.
pub mod fds {
    /// SEQPACKET socket to `noded`: [`super::VmmEvent`] out, [`super::VmmCommand`] in.
    pub const CONTROL: i32 = 3;
    /// `/dev/kvm`.
    pub const KVM: i32 = 4;
    /// The VM's tap, with `IFF_NO_PI | IFF_VNET_HDR`.
    pub const TAP: i32 = 5;
    /// The mstrap ELF image, read only.
    pub const MSTRAP: i32 = 6;
    /// The console ring's memory file.
    pub const CONSOLE: i32 = 7;
    /// The info page's memory file.
    pub const INFO: i32 = 8;
    /// The disk's file, where there is one.
    pub const DISK: i32 = 9;
    /// The file that the machine saves itself to, wakes up from, or shares with other clones.
    pub const SAVED: i32 = 10;
}

/// Stage of a VM's life as the meter shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// Admitted; mstrap or the loader is at work.
    #[default]
    Booting = 0,
    /// The guest runs.
    Running = 1,
    /// The guest runs and its balance is nearly gone.
    Low = 2,
    /// On disk, paying for storage only.
    Suspended = 3,
    /// The guest powered off, reset or failed; nothing is charged any more.
    Ended = 4,
    /// The customer stopped it; the redemption certificate is made.
    Stopped = 5,
    /// Its balance reached zero; all of it is gone.
    Purged = 6,
    /// A template: its memory is there for clones, and nothing runs.
    Template = 7,
}

impl Stage {
    /// The stage with this number, if there is one.
    pub fn parse(value: u32) -> Option<Self> {
        use Stage::*;
        [Booting, Running, Low, Suspended, Ended, Stopped, Purged, Template]
            .into_iter()
            .find(|stage| *stage as u32 == value)
    }

    /// Whether the VM's process is there, or a template's memory.
    pub fn is_alive(self) -> bool {
        matches!(self, Stage::Booting | Stage::Running | Stage::Low | Stage::Template)
    }

    /// The stage's name as commands print it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Booting => "booting",
            Stage::Running => "running",
            Stage::Low => "low",
            Stage::Suspended => "suspended",
            Stage::Ended => "ended",
            Stage::Stopped => "stopped",
            Stage::Purged => "purged",
            Stage::Template => "template",
        }
    }
}

/// The meter, as `noded` publishes it in the info page at least once a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meter {
    /// Where the VM stands.
    pub stage: Stage,
    /// Micro-tokens left.
    pub balance_micro: u64,
    /// Micro-tokens a second at the present rate.
    pub burn_micro_per_s: u64,
    /// Seconds left at the present rate, until the VM is saved or, where it cannot be, purged.
    pub seconds_left: u64,
    /// Seconds until all of it is gone, at the present rate.
    pub purge_s: u64,
}

/// Who this VM is: from its boot token, written once by `noded` into the info page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Job id of the boot token.
    pub job: [u8; 16],
    /// Id of the node the VM runs on.
    pub node: [u8; 16],
    /// Key of the job: HMAC(node key, "job", job id).
    pub job_key: [u8; 32],
    /// Digest that mstrap demands of the loader.
    pub loader_sha256: [u8; 32],
    /// Fresh random bytes, for sequence numbers and nonces of bare-metal programs.
    pub seed: [u8; 32],
    /// RAM and disk.
    pub space: Space,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Frequency of the guest's time stamp counter; `vmm` writes it.
    pub tsc_khz: u32,
    /// MAC that mstrap uses.
    pub boot_mac: [u8; 6],
    /// IPv4 address that mstrap listens on.
    pub boot_ipv4: [u8; 4],
    /// MAC of the guest.
    pub mac: [u8; 6],
    /// IPv4 address of the guest.
    pub ipv4: [u8; 4],
    /// Gateway, all zero for none.
    pub gateway: [u8; 4],
    /// Length of the network prefix.
    pub prefix_len: u8,
}

impl core::fmt::Debug for Identity {
    // The key and the seed stay out of logs.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Identity")
            .field("job", &self.job)
            .field("boot_ipv4", &self.boot_ipv4)
            .field("ipv4", &self.ipv4)
            .finish_non_exhaustive()
    }
}

/// Bytes of an Ethernet frame with an ARP packet for IPv4 (RFC 826).
pub const ARP_SIZE: usize = 42;

/// "ONDEINFO".
const INFO_MAGIC: [u8; 8] = *b"ONDEINFO";
const INFO_VERSION: u32 = 1;
/// Offset of the meter in the info page: a u32 sequence count (odd while being written),
/// then stage u32, balance, burn, seconds left and seconds to the purge as u64.
pub const INFO_METER: usize = 0x20;
/// Bytes of the meter.
pub const INFO_METER_SIZE: usize = 40;
/// Offset of the identity in the info page.
pub const INFO_IDENTITY: usize = 0x100;
/// Offset of `tsc_khz`, the one word that `vmm` writes.
pub const INFO_TSC_KHZ: usize = INFO_IDENTITY + 16 + 16 + 32 + 32 + 32 + 8 + 4;
/// Bytes of the info page that carry something.
pub const INFO_SIZE: usize = 512;

impl Identity {
    /// The whole info page, with a meter that is still zero.
    pub fn emit(&self) -> [u8; INFO_SIZE] {
        let mut page = [0; INFO_SIZE];
        page[..8].copy_from_slice(&INFO_MAGIC);
        page[8..12].copy_from_slice(&INFO_VERSION.to_le_bytes());
        let mut w = Writer::new(&mut page[INFO_IDENTITY..]);
        w.put(&self.job);
        w.put(&self.node);
        w.put(&self.job_key);
        w.put(&self.loader_sha256);
        w.put(&self.seed);
        w.put(&self.space.mem_bytes.to_le_bytes());
        w.put(&self.vcpus.to_le_bytes());
        w.put(&self.tsc_khz.to_le_bytes());
        w.put(&self.boot_mac);
        w.put(&self.boot_ipv4);
        w.put(&self.mac);
        w.put(&self.ipv4);
        w.put(&self.gateway);
        w.put(&[self.prefix_len]);
        w.put(&self.space.disk_bytes.to_le_bytes());
        page
    }

    /// The frame that tells the network where the guest is: a gratuitous ARP (RFC 5227, 3). Bridges learn its MAC by it.
    pub fn announcement(&self) -> [u8; ARP_SIZE] {
        let mut frame = [0; ARP_SIZE];
        let mut w = Writer::new(&mut frame);
        w.put(&[0xFF; 6]);
        w.put(&self.mac);
        // ARP; Ethernet, IPv4, their addresses' sizes; a request.
        w.put(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        w.put(&self.mac);
        w.put(&self.ipv4);
        // Its own address is what it asks for.
        w.put(&[0; 6]);
        w.put(&self.ipv4);
        frame
    }

    /// Reads the info page; `None` if it is not one of this version.
    pub fn parse(page: &[u8]) -> Option<Self> {
        if page.len() < INFO_SIZE || page[..8] != INFO_MAGIC {
            return None;
        }
        if page[8..12] != INFO_VERSION.to_le_bytes() {
            return None;
        }
        let mut r = Reader::new(&page[INFO_IDENTITY..INFO_SIZE]);
        let mut identity = Self {
            job: r.array()?,
            node: r.array()?,
            job_key: r.array()?,
            loader_sha256: r.array()?,
            seed: r.array()?,
            space: Space { mem_bytes: r.u64()?, disk_bytes: 0 },
            vcpus: r.u32()?,
            tsc_khz: r.u32()?,
            boot_mac: r.array()?,
            boot_ipv4: r.array()?,
            mac: r.array()?,
            ipv4: r.array()?,
            gateway: r.array()?,
            prefix_len: r.u8()?,
        };
        identity.space.disk_bytes = r.u64()?;
        Some(identity)
    }
}

impl Meter {
    /// The bytes at [`INFO_METER`] for sequence count `seq` (even).
    pub fn emit(&self, seq: u32) -> [u8; INFO_METER_SIZE] {
        let mut out = [0; INFO_METER_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&seq.to_le_bytes());
        w.put(&(self.stage as u32).to_le_bytes());
        w.put(&self.balance_micro.to_le_bytes());
        w.put(&self.burn_micro_per_s.to_le_bytes());
        w.put(&self.seconds_left.to_le_bytes());
        w.put(&self.purge_s.to_le_bytes());
        out
    }

    /// Reads the meter; `None` while it is being written (read it again) or where it is no meter.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        if r.u32()? % 2 == 1 {
            return None;
        }
        Some(Self {
            stage: Stage::parse(r.u32()?)?,
            balance_micro: r.u64()?,
            burn_micro_per_s: r.u64()?,
            seconds_left: r.u64()?,
            purge_s: r.u64()?,
        })
    }
}

/// How a cold machine's first vCPU is entered; the others wait for INIT and SIPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColdStart {
    /// PVH: 32-bit protected mode, flat segments, no paging; ebx = `start_info`.
    Pvh {
        /// Physical address of the first instruction.
        entry: u32,
        /// Physical address of `hvm_start_info`.
        start_info: u32,
    },
    /// Linux' 64-bit boot protocol: long mode, flat segments; rsi = `boot_params`.
    Linux64 {
        /// Physical address of the first instruction.
        entry: u64,
        /// Physical address of `boot_params`.
        boot_params: u64,
        /// Page table root: identity map of all the kernel touches first, laid out by the sender.
        cr3: u64,
    },
}

/// The first page of the FROZEN window. The machine state follows at the next page, then, from the page behind it, the
/// addresses of the pages saved (u64 each), then, from the page behind those, the pages in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Bytes of the machine state.
    pub state_size: u64,
    /// Number of pages saved.
    pub page_count: u64,
}

/// "ONDEFROZ", first in the FROZEN window after FREEZE.
const FROZEN_MAGIC: [u8; 8] = *b"ONDEFROZ";

impl Frozen {
    /// Bytes of the header.
    pub const SIZE: usize = 24;

    /// The header's bytes.
    pub fn emit(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&FROZEN_MAGIC);
        w.put(&self.state_size.to_le_bytes());
        w.put(&self.page_count.to_le_bytes());
        out
    }

    /// Reads the header; `None` where nothing is frozen or the numbers are over their limits.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        if r.array()? != FROZEN_MAGIC {
            return None;
        }
        let frozen = Self { state_size: r.u64()?, page_count: r.u64()? };
        let in_bounds = frozen.state_size <= STATE_SIZE_MAX.into();
        (in_bounds && frozen.page_count <= FROZEN_PAGES_MAX).then_some(frozen)
    }

    /// Offset of the machine state in the window.
    pub fn state_at(&self) -> u64 {
        PAGE_SIZE
    }

    /// Offset of the pages' addresses.
    pub fn addresses_at(&self) -> u64 {
        (self.state_at() + self.state_size).next_multiple_of(PAGE_SIZE)
    }

    /// Offset of the pages.
    pub fn pages_at(&self) -> u64 {
        (self.addresses_at() + 8 * self.page_count).next_multiple_of(PAGE_SIZE)
    }

    /// Bytes of the window at most.
    pub fn window_size() -> u64 {
        let most = Self { state_size: STATE_SIZE_MAX.into(), page_count: FROZEN_PAGES_MAX };
        most.pages_at() + FROZEN_PAGES_MAX * PAGE_SIZE
    }
}

/// "ONDEMACH", first in every machine state.
pub const STATE_MAGIC: [u8; 8] = *b"ONDEMACH";
/// Version of the cold machine state.
pub const STATE_COLD: u32 = 1;
/// Version of a full machine state: what follows is `vmm`'s own, and only a `vmm` of the same version reads it.
pub const STATE_FULL: u32 = 2;
/// Bytes of a cold machine state.
pub const COLD_SIZE: usize = 48;
/// Most bytes of any machine state: 64 vCPUs at 32 KiB and the devices.
pub const STATE_SIZE_MAX: u32 = 4 << 20;

impl ColdStart {
    /// The state's bytes, as a MACHINE record carries them and RESUME takes them.
    pub fn emit(&self) -> [u8; COLD_SIZE] {
        let (mode, entry, arg, cr3) = match *self {
            ColdStart::Pvh { entry, start_info } => (1u32, entry.into(), start_info.into(), 0),
            ColdStart::Linux64 { entry, boot_params, cr3 } => (2, entry, boot_params, cr3),
        };
        let mut out = [0; COLD_SIZE];
        let mut w = Writer::new(&mut out);
        w.put(&STATE_MAGIC);
        w.put(&STATE_COLD.to_le_bytes());
        w.put(&mode.to_le_bytes());
        w.put(&u64::to_le_bytes(entry));
        w.put(&u64::to_le_bytes(arg));
        w.put(&u64::to_le_bytes(cr3));
        out
    }

    /// Reads a cold state; `None` for anything else.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        if r.array()? != STATE_MAGIC || r.u32()? != STATE_COLD {
            return None;
        }
        let (mode, entry, arg, cr3) = (r.u32()?, r.u64()?, r.u64()?, r.u64()?);
        match mode {
            1 => Some(ColdStart::Pvh {
                entry: entry.try_into().ok()?,
                start_info: arg.try_into().ok()?,
            }),
            2 => Some(ColdStart::Linux64 { entry, boot_params: arg, cr3 }),
            _ => None,
        }
    }
}

/// What `vmm` tells `noded`: one message of [`MESSAGE_SIZE`] bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmEvent {
    /// The machine is built and its first vCPU is about to run.
    Started,
    /// RESUME is done but for the first instruction, which waits for [`VmmCommand::Go`].
    Resumed,
    /// The guest handed in a payment token.
    Pay(PaymentToken),
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself or a vCPU met a triple fault.
    Reset,
    /// The VMM cannot go on; the number says where (see `vmm`'s `Fault`).
    Fault(u32),
    /// The machine is in its file, whole, and ends.
    Saved,
    /// The machine could not be saved, and goes on.
    NotSaved,
}

/// What `noded` tells `vmm`: one message of [`MESSAGE_SIZE`] bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmCommand {
    /// Answer to [`VmmEvent::Pay`]: whether the token was accepted.
    PayDone(bool),
    /// Press the power button.
    PowerButton,
    /// Answer to [`VmmEvent::Resumed`]: the guest may run. From then on it has lived, for all who ask.
    Go,
    /// Save the machine to its file, and end. As the answer to [`VmmEvent::Resumed`]: before its first instruction.
    Save,
}

/// Bytes of a message between `noded` and `vmm`.
pub const MESSAGE_SIZE: usize = 64;

impl VmmEvent {
    /// The message's bytes.
    pub fn emit(&self) -> [u8; MESSAGE_SIZE] {
        let mut out = [0; MESSAGE_SIZE];
        let mut w = Writer::new(&mut out);
        match self {
            VmmEvent::Started => w.put(&[1]),
            VmmEvent::Resumed => w.put(&[2]),
            VmmEvent::Pay(token) => {
                w.put(&[3]);
                w.put(&token.index.to_le_bytes());
                w.put(&token.value);
            }
            VmmEvent::PowerOff => w.put(&[4]),
            VmmEvent::Reset => w.put(&[5]),
            VmmEvent::Fault(code) => {
                w.put(&[6]);
                w.put(&code.to_le_bytes());
            }
            VmmEvent::Saved => w.put(&[7]),
            VmmEvent::NotSaved => w.put(&[8]),
        }
        out
    }

    /// Reads a message; `None` if it is none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != MESSAGE_SIZE {
            return None;
        }
        let mut r = Reader::new(bytes);
        match r.u8()? {
            1 => Some(VmmEvent::Started),
            2 => Some(VmmEvent::Resumed),
            3 => Some(VmmEvent::Pay(PaymentToken { index: r.u32()?, value: r.array()? })),
            4 => Some(VmmEvent::PowerOff),
            5 => Some(VmmEvent::Reset),
            6 => Some(VmmEvent::Fault(r.u32()?)),
            7 => Some(VmmEvent::Saved),
            8 => Some(VmmEvent::NotSaved),
            _ => None,
        }
    }
}

impl VmmCommand {
    /// The message's bytes.
    pub fn emit(&self) -> [u8; MESSAGE_SIZE] {
        let mut out = [0; MESSAGE_SIZE];
        match self {
            VmmCommand::PayDone(accepted) => {
                out[0] = 1;
                out[1] = u8::from(*accepted);
            }
            VmmCommand::PowerButton => out[0] = 2,
            VmmCommand::Go => out[0] = 3,
            VmmCommand::Save => out[0] = 4,
        }
        out
    }

    /// Reads a message; `None` if it is none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != MESSAGE_SIZE {
            return None;
        }
        match bytes[0] {
            1 => Some(VmmCommand::PayDone(bytes[1] == 1)),
            2 => Some(VmmCommand::PowerButton),
            3 => Some(VmmCommand::Go),
            4 => Some(VmmCommand::Save),
            _ => None,
        }
    }
}
