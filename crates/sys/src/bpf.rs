//! Small eBPF programs on the receive path of an interface (XDP): load, attach, try on a packet. `noded` keeps
//! guests from sending under a false address with one. Instructions: Documentation/bpf/standardization/
//! instruction-set.rst. Never attaches anything that outlives the returned descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// One instruction, as the kernel takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Width of a load from memory.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub enum Width {
    /// One byte.
    U8 = 0x10,
    /// Two bytes.
    U16 = 0x08,
    /// Four bytes.
    U32 = 0x00,
    /// Eight bytes.
    U64 = 0x18,
}

impl Insn {
    const fn new(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Self {
        Self { code, registers: dst | src << 4, offset, immediate }
    }

    /// `dst = *(width *)(src + offset)`
    pub const fn load(width: Width, dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x61 | width as u8, dst, src, offset, 0)
    }

    /// `*(width *)(dst + offset) = src`
    pub const fn store(width: Width, dst: u8, offset: i16, src: u8) -> Self {
        Self::new(0x63 | width as u8, dst, src, offset, 0)
    }

    /// `dst` = the table, for [`Self::look_up`].
    pub fn table(dst: u8, table: &Table) -> [Self; 2] {
        const PSEUDO_MAP_FD: u8 = 1;
        let fd = table.fd.as_raw_fd();
        [Self::new(0x18, dst, PSEUDO_MAP_FD, 0, fd), Self::new(0, 0, 0, 0, 0)]
    }

    /// Register 0 = address of the value in table (register 1) under the key at (register 2), or 0. Registers 1 to
    /// 5 are lost.
    pub const fn look_up() -> Self {
        Self::new(0x85, 0, 0, 0, 1)
    }

    /// Register 0 = nanoseconds since some moment. Registers 1 to 5 are lost.
    pub const fn now_ns() -> Self {
        Self::new(0x85, 0, 0, 0, 5)
    }

    /// `dst = src`
    pub const fn copy(dst: u8, src: u8) -> Self {
        Self::new(0xbf, dst, src, 0, 0)
    }

    /// `dst = immediate`, 32 bits, upper half zero.
    pub const fn set(dst: u8, immediate: u32) -> Self {
        Self::new(0xb4, dst, 0, 0, immediate as i32)
    }

    /// `dst += immediate`
    pub const fn add(dst: u8, immediate: i32) -> Self {
        Self::new(0x07, dst, 0, 0, immediate)
    }

    /// `dst += src`
    pub const fn add_register(dst: u8, src: u8) -> Self {
        Self::new(0x0f, dst, src, 0, 0)
    }

    /// `dst -= src`
    pub const fn subtract(dst: u8, src: u8) -> Self {
        Self::new(0x1f, dst, src, 0, 0)
    }

    /// `dst *= src`
    pub const fn multiply(dst: u8, src: u8) -> Self {
        Self::new(0x2f, dst, src, 0, 0)
    }

    /// `dst >>= bits`, zeros come in.
    pub const fn shift_right(dst: u8, bits: i32) -> Self {
        Self::new(0x77, dst, 0, 0, bits)
    }

    /// `dst &= immediate`, 32 bits.
    pub const fn and(dst: u8, immediate: u32) -> Self {
        Self::new(0x54, dst, 0, 0, immediate as i32)
    }

    /// Skips `skip` instructions if `dst <= src` (unsigned, 64 bits).
    pub const fn skip_if_not_greater(dst: u8, src: u8, skip: i16) -> Self {
        Self::new(0xbd, dst, src, skip, 0)
    }

    /// Skips if `dst` is not zero (64 bits).
    pub const fn skip_unless_zero(dst: u8, skip: i16) -> Self {
        Self::new(0x55, dst, 0, skip, 0)
    }

    /// Skips if the low 32 bits of `dst` are `immediate`.
    pub const fn skip_if_equal(dst: u8, immediate: u32, skip: i16) -> Self {
        Self::new(0x16, dst, 0, skip, immediate as i32)
    }

    /// Skips if the low 32 bits of `dst` are not `immediate`.
    pub const fn skip_unless_equal(dst: u8, immediate: u32, skip: i16) -> Self {
        Self::new(0x56, dst, 0, skip, immediate as i32)
    }

    /// Skips if the low 32 bits of `dst` and `src` differ.
    pub const fn skip_unless_same(dst: u8, src: u8, skip: i16) -> Self {
        Self::new(0x5e, dst, src, skip, 0)
    }

    /// Skips if the low 32 bits of `dst` and `src` are the same.
    pub const fn skip_if_same(dst: u8, src: u8, skip: i16) -> Self {
        Self::new(0x1e, dst, src, skip, 0)
    }

    /// Skips always.
    pub const fn skip(skip: i16) -> Self {
        Self::new(0x05, 0, 0, skip, 0)
    }

    /// Ends the program; register 0 is its result.
    pub const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
}

/// XDP's verdicts.
pub const XDP_DROP: u32 = 1;
/// The packet goes on its way.
pub const XDP_PASS: u32 = 2;

// include/uapi/linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;

#[repr(C)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_count: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

#[repr(C)]
struct LinkAttr {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct TestAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the attribute structs above lay out what these commands read and write, the size told is their
    // size, and all addresses in them point to memory that lives over the call (the callers below see to it).
    match unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as libc::c_int),
    }
}

/// A table that programs can look values up in by a 32-bit key.
pub struct Table {
    fd: OwnedFd,
    value_size: usize,
}

impl Table {
    /// An empty table for at most `entries_max` values of `value_size` bytes.
    pub fn new(value_size: usize, entries_max: u32) -> io::Result<Self> {
        let mut attr = CreateAttr {
            map_type: BPF_MAP_TYPE_HASH,
            key_size: size_of::<u32>() as u32,
            value_size: value_size as u32,
            max_entries: entries_max,
        };
        let fd = bpf(BPF_MAP_CREATE, &mut attr)?;
        // SAFETY: BPF_MAP_CREATE returned a new descriptor that nobody else owns.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, value_size })
    }

    fn element(&self, key: &u32, value: u64) -> ElementAttr {
        let map_fd = self.fd.as_raw_fd() as u32;
        ElementAttr { map_fd, key: std::ptr::from_ref(key) as u64, value, flags: 0 }
    }

    /// Puts a value under a key. Errors: `E2BIG` where the table is full.
    ///
    /// # Panics
    /// Where the value has not the size of the table's values.
    pub fn set(&self, key: u32, value: &[u8]) -> io::Result<()> {
        assert_eq!(value.len(), self.value_size, "the kernel would read past the value");
        bpf(BPF_MAP_UPDATE_ELEM, &mut self.element(&key, value.as_ptr() as u64)).map(drop)
    }

    /// Takes the value under a key away. Errors: `ENOENT` where there is none.
    pub fn remove(&self, key: u32) -> io::Result<()> {
        bpf(BPF_MAP_DELETE_ELEM, &mut self.element(&key, 0)).map(drop)
    }
}

/// Loads an XDP program. Errors: `EACCES` or `EINVAL` where the kernel's verifier refuses it.
pub fn load_xdp(insns: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_count: insns.len() as u32,
        insns: insns.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &mut attr)?;
    // SAFETY: BPF_PROG_LOAD returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a program to the interface with this number until the returned descriptor is closed.
/// Errors: `EBUSY` where the interface has one already.
pub fn attach_xdp(program: BorrowedFd<'_>, index: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkAttr {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: index,
        attach_type: BPF_XDP,
        flags: 0,
    };
    let fd = bpf(BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: BPF_LINK_CREATE returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a loaded program says to one frame of at least 14 bytes; the frame goes nowhere.
pub fn try_on(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<u32> {
    let mut attr = TestAttr {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        ..TestAttr::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}
