//! Which device answers at which address. vCPU threads come here with every exit for I/O.
//! Addresses where nothing is read as all ones and take writes without effect, like an empty bus.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use onde_wire::machine::{CONTROL_START, PAGE_SIZE, SERIAL_PORT, VIRTIO_START, VIRTIO_STRIDE};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::console::Console;
use crate::control::{Control, Request};
use crate::line::Line;
use crate::virtio::mmio::Slot;

/// Ports of a 16550.
const SERIAL_SIZE: u16 = 8;

/// The serial port's interrupt line.
#[derive(Clone)]
pub struct SerialLine(pub Arc<dyn Line>);

impl Trigger for SerialLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse();
        Ok(())
    }
}

type SerialPort = Serial<SerialLine, NoEvents, Console>;

/// All devices.
pub struct Bus {
    serial: Mutex<SerialPort>,
    control: Mutex<Control>,
    /// By position in the address space.
    pub virtio: Vec<Slot>,
}

impl Bus {
    /// A bus with devices after power-on.
    pub fn new(line: SerialLine, console: Console, virtio: Vec<Slot>) -> Self {
        let serial = Mutex::new(Serial::new(line, console));
        Self { serial, control: Mutex::default(), virtio }
    }

    /// The control device.
    pub fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An `in` from a port, or several of a string instruction.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match serial_register(port) {
            Some(register) => {
                let mut serial = self.serial();
                data.iter_mut().for_each(|byte| *byte = serial.read(register));
            }
            None => data.fill(0xFF),
        }
    }

    /// An `out` to a port, or several of a string instruction.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        let Some(register) = serial_register(port) else { return };
        let mut serial = self.serial();
        for byte in data {
            // The ring takes every byte.
            let _ = serial.write(register, *byte);
        }
    }

    /// A read from memory that is no RAM.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Target::Control(offset) => self.control().read(offset, data),
            // Registers of virtio devices are memory to a guest that reads them.
            Target::Virtio(..) | Target::Nothing => data.fill(0xFF),
        }
    }

    /// A write to memory that is no RAM.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Request> {
        match self.find(address) {
            Target::Control(offset) => return self.control().write(offset, data),
            Target::Virtio(slot, offset) => slot.write(offset, data),
            Target::Nothing => {}
        }
        None
    }

    fn find(&self, address: u64) -> Target<'_> {
        if let Some(offset) = address.checked_sub(VIRTIO_START) {
            let position = usize::try_from(offset / VIRTIO_STRIDE).unwrap_or(usize::MAX);
            return match self.virtio.get(position) {
                Some(slot) => Target::Virtio(slot, offset % VIRTIO_STRIDE),
                None => Target::Nothing,
            };
        }
        match address.checked_sub(CONTROL_START) {
            Some(offset) if offset < PAGE_SIZE => Target::Control(offset),
            _ => Target::Nothing,
        }
    }
}

enum Target<'a> {
    Control(u64),
    Virtio(&'a Slot, u64),
    Nothing,
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(SERIAL_PORT)?;
    (register < SERIAL_SIZE).then_some(register as u8)
}

impl Bus {
    /// The serial port's state.
    pub fn serial_state(&self) -> SerialState {
        self.serial().state()
    }

    /// RESUME: the serial port with this state, its output where it was. Raises its interrupt where one is due.
    pub fn set_serial(&self, state: &SerialState) {
        let mut serial = self.serial();
        let (line, console) = (serial.interrupt_evt().clone(), serial.writer().clone());
        // Fails where more input waits than there is room for: no state from `state` has any.
        if let Ok(port) = Serial::from_state(state, line, NoEvents, console) {
            *serial = port;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use onde_wire::machine::INFO_START;
    use vmm_sys_util::eventfd::EventFd;
    use vmm_sys_util::tempfile::TempFile;

    fn bus() -> (Bus, EventFd) {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(PAGE_SIZE + onde_wire::machine::CONSOLE_RING_SIZE).unwrap();
        let console = Console::new(memory::map_console(file).unwrap());
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Bus::new(SerialLine(Arc::new(line.try_clone().unwrap())), console, Vec::new()), line)
    }

    #[test]
    fn empty_addresses_read_as_ones() {
        let (bus, _) = bus();
        for address in [0xC000_0000, CONTROL_START - 1, INFO_START, VIRTIO_START, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!((data, bus.write(address, &data)), ([0xFF; 4], None), "{address:#x}");
        }
        for port in [0, 0x60, 0x64, 0x70, 0xCF8, SERIAL_PORT - 1, SERIAL_PORT + 8, 0xFFFF] {
            let mut data = [0; 1];
            bus.port_read(port, &mut data);
            bus.port_write(port, &data);
            assert_eq!(data, [0xFF], "{port:#x}");
        }
        let mut magic = [0; 8];
        bus.read(CONTROL_START, &mut magic);
        assert_eq!(&magic, b"ONDECTRL");
    }

    #[test]
    fn the_serial_port_writes_interrupts_and_resets() {
        let (bus, line) = bus();
        bus.port_write(SERIAL_PORT + 1, &[2]);
        bus.port_write(SERIAL_PORT, b"x");
        assert!(line.read().is_ok());
        bus.set_serial(&SerialState::default());
        let mut register = [0; 1];
        bus.port_read(SERIAL_PORT + 1, &mut register);
        assert_eq!(register, [0]);
        bus.port_write(SERIAL_PORT, b"y");
        assert!(line.read().is_err(), "interrupts are on after a reset");
    }
}
