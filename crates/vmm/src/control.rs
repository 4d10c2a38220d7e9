//! The control device's registers (`wire::machine::control`). Keeps what the guest wrote and
//! says what is to be done; it does none of it, so it needs neither KVM nor threads.
//!
//! ```text
//!   guest writes a register -> Control::write -> Request -> vCPU thread acts -> Control::finish
//! ```

use onde_wire::bytes::Reader;
use onde_wire::machine::control::*;

use crate::virtio::flow::Flow;

/// What a register write asks the VMM to do before the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Take the machine state at this guest-physical address and run it.
    Resume(u64),
    /// Say whether it could be resumed.
    Check(u64),
    /// Hand the payment token with this index and value to `noded`.
    Pay(u32, [u8; 32]),
    /// Wait for the network device, at most this many milliseconds.
    Idle(u32),
    /// Note which pages are written, or no longer.
    Track(bool),
    /// Show the pages written in BITMAP.
    Harvest,
    /// Save the machine for a copy with this role.
    Freeze(u32),
    /// End the machine that was saved.
    Commit,
    /// Go on as if FREEZE had not been.
    Abort,
    /// Power off.
    PowerOff,
    /// Reset, which ends the VM.
    Reset,
}

/// Longest wait of one IDLE: the guest's own timers must not be late by more.
const IDLE_MS_MAX: u32 = 1000;
/// The two u64 registers that Linux reaches in halves, too.
const REG_MAGIC_HIGH: u64 = REG_MAGIC + 4;
const REG_FLOW_END: u64 = REG_FLOW + 8;
/// Sleep control: bit 5 starts the transition, bits 2-4 say which state (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// S5, soft off.
const SLEEP_TYPE_S5: u8 = 5;
/// Bit of `REG_EVENT` for the power button.
const EVENT_POWER_BUTTON: u32 = 1;

/// State of the registers.
#[derive(Debug, Default)]
pub struct Control {
    result: u32,
    token: [u8; 32],
    events: u32,
    sleep_control: u8,
    role: u32,
    flow: [u8; 8],
    judge: u32,
}

impl Control {
    /// Reads `data.len()` bytes at `offset` of the page; what is no register reads as zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            REG_MAGIC => fill(data, &MAGIC.to_le_bytes()),
            REG_MAGIC_HIGH => fill(data, &MAGIC.to_le_bytes()[4..]),
            REG_VERSION => fill(data, &VERSION.to_le_bytes()),
            REG_RESULT => fill(data, &self.result.to_le_bytes()),
            REG_ROLE => fill(data, &self.role.to_le_bytes()),
            REG_SLEEP_CONTROL => fill(data, &[self.sleep_control]),
            // The status register's wake bit is never set: no VM wakes up from S5.
            REG_EVENT => fill(data, &std::mem::take(&mut self.events).to_le_bytes()),
            _ => {}
        }
    }

    /// Writes `data` at `offset`; a width that is not the register's own changes nothing.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (REG_RESUME, _) => Some(Request::Resume(u64::from_le_bytes(data.try_into().ok()?))),
            (REG_CHECK, _) => Some(Request::Check(u64::from_le_bytes(data.try_into().ok()?))),
            (REG_PAY, _) => Some(Request::Pay(word(data)?, self.token)),
            (REG_IDLE, _) => Some(Request::Idle(word(data)?.min(IDLE_MS_MAX))),
            (REG_TRACK, _) => Some(Request::Track(word(data)? != 0)),
            (REG_HARVEST, _) => word(data).map(|_| Request::Harvest),
            (REG_FREEZE, _) => Some(Request::Freeze(word(data)?)),
            (REG_COMMIT, _) => word(data).map(|_| Request::Commit),
            (REG_ABORT, _) => word(data).map(|_| Request::Abort),
            (REG_FLOW..REG_FLOW_END, _) => self.set_flow((offset - REG_FLOW) as usize, data),
            (REG_JUDGE, _) => {
                self.judge = word(data)?;
                None
            }
            (REG_SLEEP_CONTROL, &[value]) => self.sleep(value),
            (REG_RESET, &[RESET_VALUE]) => Some(Request::Reset),
            (REG_TOKEN.., _) => self.write_token((offset - REG_TOKEN) as usize, data),
            _ => None,
        }
    }

    fn sleep(&mut self, value: u8) -> Option<Request> {
        self.sleep_control = value & !SLEEP_ENABLE;
        let off = value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_S5;
        off.then_some(Request::PowerOff)
    }

    fn set_flow(&mut self, at: usize, data: &[u8]) -> Option<Request> {
        self.flow.get_mut(at..at + data.len())?.copy_from_slice(data);
        None
    }

    fn write_token(&mut self, at: usize, data: &[u8]) -> Option<Request> {
        self.token.get_mut(at..at + data.len())?.copy_from_slice(data);
        None
    }

    /// Sets RESULT: a request was carried out, or was not.
    pub fn finish(&mut self, result: u32) {
        self.result = result;
    }

    /// What leaves after FREEZE, by REG_FLOW and REG_JUDGE.
    pub fn flow(&self) -> Flow {
        Flow::parse(self.flow, self.judge.to_le_bytes())
    }

    /// FREEZE was done: what is read in a copy is no longer read here.
    pub fn be_source(&mut self) {
        self.role = ROLE_SOURCE;
    }

    /// What ROLE reads.
    pub fn role(&self) -> u32 {
        self.role
    }

    /// Whether an event waits for the guest, its interrupt perhaps lost on the way.
    pub fn has_event(&self) -> bool {
        self.events != 0
    }

    /// The registers as a copy with `role` finds them when FREEZE returns there.
    pub fn save(&self, role: u32) -> Vec<u8> {
        let mut out = role.to_le_bytes().to_vec();
        out.extend(self.events.to_le_bytes());
        out.extend(self.flow);
        out.extend(self.token);
        out.push(self.sleep_control);
        out
    }

    /// Reads what [`Self::save`] wrote.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        let (role, events, flow) = (r.u32()?, r.u32()?, r.array()?);
        let (token, sleep_control) = (r.array()?, r.u8()?);
        // Whoever freezes this machine next says anew whom it may speak to.
        let control =
            Self { result: RESULT_OK, token, events, sleep_control, role, flow, judge: 0 };
        r.rest().is_empty().then_some(control)
    }

    /// The power button: sets its event bit; the caller raises the interrupt.
    pub fn press_power_button(&mut self) {
        self.events |= EVENT_POWER_BUTTON;
    }
}

/// Copies as much of a register as the access is wide.
fn fill(data: &mut [u8], register: &[u8]) {
    let size = data.len().min(register.len());
    data[..size].copy_from_slice(&register[..size]);
}

fn word(data: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(data.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(offset: u64, data: &[u8], expect: Option<Request>) {
        assert_eq!(Control::default().write(offset, data), expect, "{offset:#x} {data:x?}");
    }

    #[test]
    fn writes_become_requests() {
        check(
            REG_RESUME,
            &0x1234_5678_9ABCu64.to_le_bytes(),
            Some(Request::Resume(0x1234_5678_9ABC)),
        );
        check(REG_RESUME, &[1, 2, 3, 4], None);
        check(REG_CHECK, &0x2000u64.to_le_bytes(), Some(Request::Check(0x2000)));
        check(REG_CHECK, &[1], None);
        check(REG_IDLE, &u32::MAX.to_le_bytes(), Some(Request::Idle(1000)));
        check(REG_SLEEP_CONTROL, &[0x34], Some(Request::PowerOff));
        check(REG_SLEEP_CONTROL, &[0x14], None);
        check(REG_SLEEP_CONTROL, &[0x24], None);
        check(REG_RESET, &[RESET_VALUE], Some(Request::Reset));
        check(REG_RESET, &[0], None);
        check(REG_TRACK, &[1, 0, 0, 0], Some(Request::Track(true)));
        check(REG_HARVEST, &[0; 4], Some(Request::Harvest));
        check(REG_FREEZE, &[2, 0, 0, 0], Some(Request::Freeze(ROLE_FORKED)));
        check(REG_FREEZE, &[2], None);
        check(REG_COMMIT, &[0; 4], Some(Request::Commit));
        check(REG_ABORT, &[0; 4], Some(Request::Abort));
        check(REG_MAGIC, &[0; 8], None);
        check(0xFF8, &[0; 8], None);
    }

    #[test]
    fn pay_carries_the_token_and_a_result() {
        let mut control = Control::default();
        for at in 0..4 {
            control.write(REG_TOKEN + at * 8, &[at as u8; 8]);
        }
        // Past the end of TOKEN: no effect.
        assert_eq!(control.write(REG_TOKEN + 28, &[9; 8]), None);
        let Some(Request::Pay(7, value)) = control.write(REG_PAY, &7u32.to_le_bytes()) else {
            panic!("PAY made no request");
        };
        assert_eq!(value[24..], [3; 8]);
        control.finish(RESULT_REFUSED);
        let mut result = [0; 4];
        control.read(REG_RESULT, &mut result);
        assert_eq!(u32::from_le_bytes(result), RESULT_REFUSED);
    }

    #[test]
    fn a_copy_has_its_role() {
        let mut control = Control::default();
        control.write(REG_FLOW, &[1, 2, 3, 4]);
        control.write(REG_FLOW + 4, &[5, 6, 7, 8]);
        control.write(REG_FLOW + 4, &[9; 8]);
        control.write(REG_JUDGE, &[9, 10, 11, 12]);
        let flow = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(control.flow(), Flow::parse(flow, [9, 10, 11, 12]));
        control.press_power_button();
        control.finish(RESULT_INVALID);
        let saved = control.save(ROLE_FORKED);
        let mut copy = Control::parse(&saved).unwrap();
        let mut role = [0; 4];
        copy.read(REG_ROLE, &mut role);
        assert_eq!(u32::from_le_bytes(role), ROLE_FORKED);
        assert_eq!((copy.result, copy.flow, copy.has_event()), (RESULT_OK, control.flow, true));
        assert!(Control::parse(&saved[1..]).is_none());
        copy.be_source();
        copy.read(REG_ROLE, &mut role);
        assert_eq!(u32::from_le_bytes(role), ROLE_SOURCE);
    }

    #[test]
    fn power_button_is_seen_once() {
        let mut control = Control::default();
        control.press_power_button();
        let mut events = [0; 4];
        control.read(REG_EVENT, &mut events);
        assert_eq!(events, [1, 0, 0, 0]);
        control.read(REG_EVENT, &mut events);
        assert_eq!(events, [0; 4]);
        control.read(REG_MAGIC + 4, &mut events);
        assert_eq!(&events, b"CTRL");
        let mut magic = [0; 8];
        control.read(REG_MAGIC, &mut magic);
        assert_eq!(&magic, b"ONDECTRL");
    }
}
