//! The ACPI tables of the guest, hardware-reduced: they name the few devices there are, so that
//! the guest probes for no others (every probe is an exit). Written into guest memory at RESUME
//! of a cold machine. Sources: ACPI 6.5; Linux `drivers/virtio/virtio_mmio.c` for `LNRO0005`.

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use onde_wire::machine::control::{
    REG_EVENT, REG_RESET, REG_SLEEP_CONTROL, REG_SLEEP_STATUS, RESET_VALUE,
};
use onde_wire::machine::{
    ACPI_START, CONTROL_START, GED_GSI, INFO_START, PAGE_SIZE, SERIAL_GSI, SERIAL_PORT, VIRTIO_GSI,
    VIRTIO_START, VIRTIO_STRIDE,
};

const OEM: [u8; 6] = *b"ONDE  ";
const OEM_TABLE: [u8; 8] = *b"ONDEVMM ";
/// Where a PC has its local APICs and its I/O APIC; KVM's are there.
const LAPIC_ADDRESS: u32 = 0xFEE0_0000;
const IOAPIC_ADDRESS: u32 = 0xFEC0_0000;
/// FADT boot flags (ACPI 6.5, table 5.11): no VGA, no MSI, no CMOS clock; and, by their bits being
/// clear, no legacy devices and no 8042 keyboard controller, whose probe alone takes 2 s.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 3 | 1 << 5;
/// What lies at the PC's reset vector, in real mode: `lidt cs:[7]; int3` and an empty interrupt
/// table at 7, which is a triple fault and so a reset. A Linux that finds hardware-reduced ACPI and
/// no EFI jumps there to restart, whatever the reset register says.
pub const RESET_CODE: [u8; 16] =
    [0x2E, 0x0F, 0x01, 0x1E, 0x07, 0x00, 0xCC, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Guest-physical address of [`RESET_CODE`]: FFFF:0000.
pub const RESET_VECTOR: u64 = 0xF_FFF0;

/// Tables start at multiples of this.
const ALIGN: usize = 16;

/// All tables as they lie from `ACPI_START` on, for `vcpus` CPUs and `virtio_count` devices.
pub fn tables(vcpus: u32, virtio_count: u64) -> Vec<u8> {
    let mut area = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let dsdt = append(&mut area, &DsdtTable(dsdt(virtio_count)));
    let fadt = append(&mut area, &fadt(dsdt).finalize());
    let madt = append(&mut area, &madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut area, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    area[..rsdp.len()].copy_from_slice(&rsdp);
    // 64 CPUs and 3 devices take under 2 KiB of 128.
    assert!(ACPI_START + area.len() as u64 <= RESET_VECTOR);
    area
}

/// Adds a table and returns its guest-physical address.
fn append(area: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    area.resize(area.len().next_multiple_of(ALIGN), 0);
    let address = ACPI_START + area.len() as u64;
    table.to_aml_bytes(area);
    address
}

fn control_register(offset: u64) -> GAS {
    let address = CONTROL_START + offset;
    GAS::new(AddressSpace::SystemMemory, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // The power button is a device of its own (PNP0C0C), not a fixed register.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = control_register(REG_RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = control_register(REG_SLEEP_CONTROL);
    fadt.sleep_status_reg = control_register(REG_SLEEP_STATUS);
    fadt
}

fn madt(vcpus: u32) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(LAPIC_ADDRESS));
    for id in 0..vcpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    madt
}

/// A DSDT under construction is just AML; the table's header comes last.
struct DsdtTable(Vec<u8>);

impl Aml for DsdtTable {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, 1);
        table.append_slice(&self.0);
        sink.vec(table.as_slice());
    }
}

fn dsdt(virtio_count: u64) -> Vec<u8> {
    let mut devices = Vec::new();
    serial(&mut devices);
    reserved(&mut devices);
    for position in 0..virtio_count {
        virtio(&mut devices, position);
    }
    power_button(&mut devices);
    let mut aml = aml::Scope::raw(Path::new("\\_SB_"), devices);
    // \_S5: the sleep type that REG_SLEEP_CONTROL takes for soft off.
    let s5 = aml::Package::new(vec![&5u8, &5u8, &0u8, &0u8]);
    aml::Name::new(Path::new("\\_S5_"), &s5).to_aml_bytes(&mut aml);
    aml
}

/// An interrupt as `kvm`'s lines give them: one edge, active high, not shared.
fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

fn serial(out: &mut Vec<u8>) {
    let io = aml::IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    let interrupt = interrupt(SERIAL_GSI);
    aml::Device::new(
        Path::new("COM1"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
            &aml::Name::new(Path::new("_UID"), &0u8),
            &aml::Name::new(Path::new("_CRS"), &aml::ResourceTemplate::new(vec![&io, &interrupt])),
        ],
    )
    .to_aml_bytes(out);
}

/// Motherboard resources: the control page and the info page belong to no driver.
fn reserved(out: &mut Vec<u8>) {
    let size = INFO_START + PAGE_SIZE - CONTROL_START;
    let pages = aml::Memory32Fixed::new(true, CONTROL_START as u32, size as u32);
    aml::Device::new(
        Path::new("ONDE"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new(Path::new("_UID"), &0u8),
            &aml::Name::new(Path::new("_CRS"), &aml::ResourceTemplate::new(vec![&pages])),
        ],
    )
    .to_aml_bytes(out);
}

fn virtio(out: &mut Vec<u8>, position: u64) {
    let address = VIRTIO_START + position * VIRTIO_STRIDE;
    let registers = aml::Memory32Fixed::new(true, address as u32, VIRTIO_STRIDE as u32);
    let interrupt = interrupt(VIRTIO_GSI + position as u32);
    aml::Device::new(
        Path::new(&format!("VIO{position}")),
        vec![
            &aml::Name::new(Path::new("_HID"), &"LNRO0005"),
            &aml::Name::new(Path::new("_UID"), &(position as u8)),
            &aml::Name::new(Path::new("_CCA"), &aml::ONE),
            &aml::Name::new(
                Path::new("_CRS"),
                &aml::ResourceTemplate::new(vec![&registers, &interrupt]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// The power button and the generic event device that reports it: on its interrupt the guest
/// reads REG_EVENT and notifies the button.
fn power_button(out: &mut Vec<u8>) {
    aml::Device::new(
        Path::new("PWRB"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0C0C")),
            &aml::Name::new(Path::new("_UID"), &0u8),
        ],
    )
    .to_aml_bytes(out);
    let interrupt = interrupt(GED_GSI);
    let events = Path::new("EVTS");
    let pressed = aml::Local(0);
    aml::Device::new(
        Path::new("GED_"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"ACPI0013"),
            &aml::Name::new(Path::new("_UID"), &0u8),
            &aml::Name::new(Path::new("_CRS"), &aml::ResourceTemplate::new(vec![&interrupt])),
            &aml::OpRegion::new(
                Path::new("EVNT"),
                aml::OpRegionSpace::SystemMemory,
                &(CONTROL_START + REG_EVENT),
                &4u8,
            ),
            &aml::Field::new(
                Path::new("EVNT"),
                aml::FieldAccessType::DWord,
                aml::FieldLockRule::NoLock,
                aml::FieldUpdateRule::WriteAsZeroes,
                vec![aml::FieldEntry::Named(*b"EVTS", 32)],
            ),
            &aml::Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    &aml::And::new(&pressed, &events, &aml::ONE),
                    &aml::If::new(
                        &pressed,
                        vec![&aml::Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_wire::machine::ACPI_END;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    /// The table at a guest-physical address, by the length in its header.
    fn table(area: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI_START) as usize;
        let length = u32::from_le_bytes(area[at + 4..at + 8].try_into().unwrap());
        &area[at..at + length as usize]
    }

    fn pointer(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        for vcpus in [1, 2, 64] {
            let area = tables(vcpus, 3);
            assert_eq!(&area[..8], b"RSD PTR ");
            assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
            let xsdt = table(&area, pointer(&area, 24));
            let fadt = table(&area, pointer(xsdt, 36));
            let madt = table(&area, pointer(xsdt, 44));
            let dsdt = table(&area, pointer(fadt, 140));
            for (name, table) in
                [(b"XSDT", xsdt), (b"FACP", fadt), (b"APIC", madt), (b"DSDT", dsdt)]
            {
                assert_eq!((&table[..4], sum(table)), (&name[..], 0));
            }
            assert_eq!(madt.len(), 44 + 8 * vcpus as usize + 12);
            assert_eq!(fadt.len(), 276);
        }
    }

    #[test]
    fn the_reset_vector_is_in_the_reserved_area() {
        assert_eq!(RESET_VECTOR + RESET_CODE.len() as u64, ACPI_END);
    }

    #[test]
    fn the_guest_is_told_what_is_not_there() {
        let area = tables(1, 2);
        let fadt = table(&area, pointer(table(&area, pointer(&area, 24)), 36));
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0x2C);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!(pointer(fadt, 120), CONTROL_START + REG_RESET);
        assert_eq!(pointer(fadt, 248), CONTROL_START + REG_SLEEP_CONTROL);
    }
}
