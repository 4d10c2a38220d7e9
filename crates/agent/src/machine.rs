//! The machine from inside: the control device's commands, and the windows on the guest's own memory
//! ([`onde_wire::machine`]), through `/dev/mem`. [`crate::snapshot`] uses it; its tests have a machine of their own.

use onde_sys::physical::Window;
use onde_wire::machine::control::{MAGIC, REG_MAGIC, REG_RESULT};
use onde_wire::machine::{CONTROL_START, INFO_SIZE, INFO_START, Identity, PAGE_SIZE};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::freezer::{Freezer, Frozen};

/// Windows are mapped in pieces of this size, what one page of a page table holds: mapping writes pages, which have to be
/// copied again.
const PIECE: u64 = 2 << 20;
/// Pieces that stay mapped.
const PIECES_MAX: usize = 256;

/// What a snapshot needs of a machine.
pub trait Machine {
    /// Writes a register of the control device, and returns what became of the command.
    fn command(&mut self, register: u64, value: u32) -> u32;
    /// Reads a window: `out.len()` bytes at a guest-physical address that is a multiple of 8.
    fn read(&mut self, address: u64, out: &mut [u8]) -> io::Result<()>;
    /// Lets go of what reading took, so that there is less to copy.
    fn let_go(&mut self);
    /// Whether the kernel has nothing in the pages from this one on.
    fn are_free(&mut self, first_page: u64, out: &mut [bool]);
    /// Who this machine is now.
    fn identity(&mut self) -> io::Result<Identity>;
    /// Lets no program run: an error leaves them running.
    fn stop_programs(&mut self) -> io::Result<()>;
    /// Lets programs run again.
    fn start_programs(&mut self);
}

/// The machine that this program runs in.
pub struct Devices {
    control: Window,
    /// Mapped before FREEZE: a copy is not to lose time over who it is.
    info: Window,
    pieces: HashMap<u64, Window>,
    page_flags: Option<File>,
    freezer: Arc<Freezer>,
    frozen: Option<Frozen>,
}

impl Devices {
    /// Finds the control device. Errors: `NotFound` where there is none.
    pub fn open(freezer: &Arc<Freezer>) -> io::Result<Self> {
        let control = Window::map_registers(CONTROL_START, PAGE_SIZE as usize)?;
        let mut magic = [0; 8];
        control.read(REG_MAGIC as usize, &mut magic);
        if u64::from_le_bytes(magic) != MAGIC {
            return Err(io::ErrorKind::NotFound.into());
        }
        // Without it all memory is sent.
        let page_flags = File::open("/proc/kpageflags").ok();
        let info = Window::map(INFO_START, PAGE_SIZE as usize)?;
        let freezer = freezer.clone();
        Ok(Self { control, info, pieces: HashMap::new(), page_flags, freezer, frozen: None })
    }

    /// What keeps the programs of a copy from running.
    pub fn into_frozen(self) -> Option<Frozen> {
        self.frozen
    }

    fn piece(&mut self, start: u64) -> io::Result<&Window> {
        if !self.pieces.contains_key(&start) {
            if self.pieces.len() == PIECES_MAX {
                self.pieces.clear();
            }
            self.pieces.insert(start, Window::map(start, PIECE as usize)?);
        }
        Ok(&self.pieces[&start])
    }
}

impl Machine for Devices {
    fn command(&mut self, register: u64, value: u32) -> u32 {
        self.control.write_u32(register as usize, value);
        self.control.read_u32(REG_RESULT as usize)
    }

    fn read(&mut self, mut address: u64, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let (start, offset) = (address - address % PIECE, address % PIECE);
            let count = out.len().min((PIECE - offset) as usize);
            let (front, back) = out.split_at_mut(count);
            self.piece(start)?.read(offset as usize, front);
            (address, out) = (address + count as u64, back);
        }
        Ok(())
    }

    /// A processor counts the page tables that it goes through as written.
    fn let_go(&mut self) {
        self.pieces.clear();
    }

    /// By `/proc/kpageflags` (proc(5), Documentation/admin-guide/mm/pagemap.rst).
    fn are_free(&mut self, first_page: u64, out: &mut [bool]) {
        const BUDDY: u64 = 1 << 10;
        let mut flags = vec![0; out.len() * 8];
        let read =
            self.page_flags.as_ref().map(|file| file.read_exact_at(&mut flags, first_page * 8));
        let is_known = matches!(read, Some(Ok(())));
        for (to, flags) in out.iter_mut().zip(flags.as_chunks::<8>().0) {
            *to = is_known && u64::from_le_bytes(*flags) & BUDDY != 0;
        }
    }

    fn identity(&mut self) -> io::Result<Identity> {
        let mut page = [0; INFO_SIZE];
        self.info.read(0, &mut page);
        Identity::parse(&page).ok_or_else(|| io::Error::other("no info page"))
    }

    fn stop_programs(&mut self) -> io::Result<()> {
        self.frozen = Some(self.freezer.freeze()?);
        Ok(())
    }

    fn start_programs(&mut self) {
        self.frozen = None;
    }
}
