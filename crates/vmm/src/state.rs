//! A full machine state (`STATE_FULL`) as bytes: what FREEZE leaves in FROZEN and RESUME takes from memory. Fields in one
//! fixed order, each with a tag and its size; whatever deviates is refused whole. Knows nothing of KVM's structures.
//!
//! ```text
//!   "ONDEMACH"  STATE_FULL u32  size of all u32
//!   { tag u32  size u32  bytes }: SHAPE CPU VCPU... IOAPIC CLOCK SERIAL CONTROL DEVICE...
//! ```

use onde_wire::bytes::Reader;
use onde_wire::machine::control::{RESULT_OTHER_CPU, RESULT_OTHER_SHAPE, RESULT_UNREADABLE};
use onde_wire::machine::{STATE_FULL, STATE_MAGIC, STATE_SIZE_MAX};
use vm_superio::SerialState;

use crate::checkpoint::Refused;
use crate::machine::Shape;

/// Version of all that is in the fields. Each change of any of them, or of the devices, counts it up.
const LAYOUT_VERSION: u32 = 3;
/// Bytes before the first field.
pub const HEAD_SIZE: usize = 16;

const TAG_SHAPE: u32 = 1;
const TAG_CPU: u32 = 2;
const TAG_VCPU: u32 = 3;
const TAG_IOAPIC: u32 = 4;
const TAG_CLOCK: u32 = 5;
const TAG_SERIAL: u32 = 6;
const TAG_CONTROL: u32 = 7;
const TAG_DEVICE: u32 = 8;

/// The state of a machine, its parts as bytes of their owners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// What was built.
    pub shape: Shape,
    /// The CPU features that the guest saw.
    pub cpu: Vec<u8>,
    /// Each vCPU, in order.
    pub vcpus: Vec<Vec<u8>>,
    /// The I/O APIC.
    pub ioapic: Vec<u8>,
    /// KVM's clock, nanoseconds.
    pub clock_ns: u64,
    /// The serial port.
    pub serial: Vec<u8>,
    /// The control device.
    pub control: Vec<u8>,
    /// Each virtio device, by position.
    pub devices: Vec<Vec<u8>>,
}

impl State {
    /// The state's bytes.
    pub fn emit(&self) -> Vec<u8> {
        let mut out = STATE_MAGIC.to_vec();
        out.extend(STATE_FULL.to_le_bytes());
        out.extend([0; 4]);
        put(&mut out, TAG_SHAPE, &emit_shape(&self.shape));
        put(&mut out, TAG_CPU, &self.cpu);
        self.vcpus.iter().for_each(|vcpu| put(&mut out, TAG_VCPU, vcpu));
        put(&mut out, TAG_IOAPIC, &self.ioapic);
        put(&mut out, TAG_CLOCK, &self.clock_ns.to_le_bytes());
        put(&mut out, TAG_SERIAL, &self.serial);
        put(&mut out, TAG_CONTROL, &self.control);
        self.devices.iter().for_each(|device| put(&mut out, TAG_DEVICE, device));
        let size = out.len() as u32;
        out[HEAD_SIZE - 4..HEAD_SIZE].copy_from_slice(&size.to_le_bytes());
        out
    }

    /// Reads a state for a machine of `shape` that shows its guest `cpu`; any other is refused, with a `RESULT_*`.
    pub fn parse(bytes: &[u8], shape: &Shape, cpu: &[u8]) -> Result<Self, Refused> {
        if size(bytes) != Some(bytes.len()) {
            return Err(RESULT_UNREADABLE);
        }
        let mut r = Reader::new(&bytes[HEAD_SIZE..]);
        let saw = take(&mut r, TAG_SHAPE).ok_or(RESULT_UNREADABLE)?;
        // Another version's fields are nobody's to read but its own's.
        if saw.get(..4) != Some(&LAYOUT_VERSION.to_le_bytes()[..]) {
            return Err(RESULT_UNREADABLE);
        }
        if saw != emit_shape(shape) {
            return Err(RESULT_OTHER_SHAPE);
        }
        if take(&mut r, TAG_CPU).ok_or(RESULT_UNREADABLE)? != cpu {
            return Err(RESULT_OTHER_CPU);
        }
        Self::parse_rest(r, shape, cpu).ok_or(RESULT_UNREADABLE)
    }

    fn parse_rest(mut r: Reader<'_>, shape: &Shape, cpu: &[u8]) -> Option<Self> {
        let many = |r: &mut Reader<'_>, tag, count| -> Option<Vec<Vec<u8>>> {
            (0..count).map(|_| take(r, tag).map(<[u8]>::to_vec)).collect()
        };
        let state = Self {
            shape: *shape,
            cpu: cpu.to_vec(),
            vcpus: many(&mut r, TAG_VCPU, shape.vcpus as usize)?,
            ioapic: take(&mut r, TAG_IOAPIC)?.to_vec(),
            clock_ns: u64::from_le_bytes(take(&mut r, TAG_CLOCK)?.try_into().ok()?),
            serial: take(&mut r, TAG_SERIAL)?.to_vec(),
            control: take(&mut r, TAG_CONTROL)?.to_vec(),
            devices: many(&mut r, TAG_DEVICE, shape.device_count())?,
        };
        r.rest().is_empty().then_some(state)
    }
}

/// Size of the full state whose first bytes these are; `None` where it is none or too large.
pub fn size(head: &[u8]) -> Option<usize> {
    let mut r = Reader::new(head);
    if r.array()? != STATE_MAGIC || r.u32()? != STATE_FULL {
        return None;
    }
    let size = r.u32().filter(|size| *size <= STATE_SIZE_MAX)? as usize;
    (size >= HEAD_SIZE).then_some(size)
}

fn emit_shape(shape: &Shape) -> Vec<u8> {
    let mut out = LAYOUT_VERSION.to_le_bytes().to_vec();
    out.extend(shape.space.mem_bytes.to_le_bytes());
    out.extend(shape.space.disk_bytes.to_le_bytes());
    out.extend(shape.vcpus.to_le_bytes());
    out
}

fn put(out: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    out.extend(tag.to_le_bytes());
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

fn take<'a>(reader: &mut Reader<'a>, tag: u32) -> Option<&'a [u8]> {
    if reader.u32()? != tag {
        return None;
    }
    let size = reader.u32()?;
    reader.take(size as usize)
}

/// The serial port's registers; its input is never used.
pub fn emit_serial(state: &SerialState) -> Vec<u8> {
    vec![
        state.baud_divisor_low,
        state.baud_divisor_high,
        state.interrupt_enable,
        state.interrupt_identification,
        state.line_control,
        state.line_status,
        state.modem_control,
        state.modem_status,
        state.scratch,
    ]
}

/// Reads what [`emit_serial`] wrote.
pub fn parse_serial(bytes: &[u8]) -> Option<SerialState> {
    let &[low, high, enable, identification, line, status, modem, modem_status, scratch] = bytes
    else {
        return None;
    };
    Some(SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: line,
        line_status: status,
        modem_control: modem,
        modem_status,
        scratch,
        in_buffer: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_wire::machine::Space;

    const SHAPE: Shape = Shape { space: Space { mem_bytes: 128 << 20, disk_bytes: 0 }, vcpus: 2 };

    fn example() -> State {
        State {
            shape: SHAPE,
            cpu: vec![9; 40],
            vcpus: vec![vec![1; 100], vec![2; 90]],
            ioapic: vec![3; 50],
            clock_ns: 123_456_789,
            serial: emit_serial(&SerialState::default()),
            control: vec![4; 20],
            devices: vec![vec![5; 10], Vec::new()],
        }
    }

    fn check(bytes: &[u8], shape: &Shape, cpu: &[u8], expect: Result<State, Refused>) {
        assert_eq!(State::parse(bytes, shape, cpu), expect);
    }

    #[test]
    fn a_state_is_read_whole_or_not_at_all() {
        let bytes = example().emit();
        check(&bytes, &SHAPE, &[9; 40], Ok(example()));
        for size in 0..bytes.len() {
            check(&bytes[..size], &SHAPE, &[9; 40], Err(RESULT_UNREADABLE));
            // With a size that fits, too.
            let mut cut = bytes[..size].to_vec();
            if let Some(field) = cut.get_mut(12..16) {
                field.copy_from_slice(&(size as u32).to_le_bytes());
            }
            check(&cut, &SHAPE, &[9; 40], Err(RESULT_UNREADABLE));
        }
        check(&[&bytes[..], &[0]].concat(), &SHAPE, &[9; 40], Err(RESULT_UNREADABLE));
    }

    #[test]
    fn another_machines_state_is_refused() {
        let bytes = example().emit();
        check(&bytes, &Shape { vcpus: 1, ..SHAPE }, &[9; 40], Err(RESULT_OTHER_SHAPE));
        for space in [Space::of_mib(64, 0), Space::of_mib(128, 1)] {
            check(&bytes, &Shape { space, ..SHAPE }, &[9; 40], Err(RESULT_OTHER_SHAPE));
        }
        check(&bytes, &SHAPE, &[8; 40], Err(RESULT_OTHER_CPU));
        // Magic, version, tag of the shape, version of the layout.
        for at in [0, 8, 16, 24] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            check(&other, &SHAPE, &[9; 40], Err(RESULT_UNREADABLE));
        }
        let mut large = bytes.clone();
        large[12..16].copy_from_slice(&(STATE_SIZE_MAX + 1).to_le_bytes());
        assert_eq!(size(&large), None);
    }

    #[test]
    fn the_serial_port_keeps_its_registers() {
        let state = SerialState { scratch: 7, interrupt_enable: 2, ..SerialState::default() };
        assert_eq!(parse_serial(&emit_serial(&state)), Some(state.clone()));
        assert_eq!(parse_serial(&emit_serial(&state)[1..]), None);
    }
}
