//! What the first two stages in a new VM say: the client's upload of a loader to mstrap, the table
//! of services that mstrap hands to a loader, and the loader's report. All of it inside the
//! secure channel. A customer's own loader needs only this file and [`crate::machine`].
//!
//! ```text
//!  client -> mstrap  "ONDELOAD" | size u32 | loader image
//!  mstrap -> client  Report                                (5 bytes)
//!  client -> loader  checkpoint stream                     (our loader)
//!  loader -> client  Report                                (5 bytes), then RESUME
//! ```
//! A loader is a flat image: mstrap copies it to [`crate::machine::LOADER_START`], zeroes the rest of
//! BOOT behind it, and calls its first byte with `rdi` = address of [`Services`], on the mstrap stack,
//! in 64-bit mode, memory mapped one to one, interrupts off.

/// First bytes of an upload.
pub const UPLOAD_MAGIC: [u8; 8] = *b"ONDELOAD";
/// Bytes before the image: magic and size.
pub const UPLOAD_HEAD_SIZE: usize = 12;
/// Bytes of a report: stage u8, code u32.
pub const REPORT_SIZE: usize = 5;

/// The head of an upload.
pub fn upload_head(size: u32) -> [u8; UPLOAD_HEAD_SIZE] {
    let mut out = [0; UPLOAD_HEAD_SIZE];
    out[..8].copy_from_slice(&UPLOAD_MAGIC);
    out[8..].copy_from_slice(&size.to_le_bytes());
    out
}

/// The image size that an upload announces; `None` if it is no upload or not of a size allowed.
pub fn parse_upload_head(head: &[u8; UPLOAD_HEAD_SIZE]) -> Option<u32> {
    let (magic, size) = head.split_at(8);
    let size = u32::from_le_bytes(size.try_into().ok()?);
    (magic == UPLOAD_MAGIC && (1..=crate::machine::LOADER_SIZE_MAX).contains(&size)).then_some(size)
}

/// What mstrap or the loader says to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// mstrap: the loader has the right digest and is about to run.
    LoaderOk,
    /// mstrap: the upload was malformed or too large.
    BadUpload,
    /// mstrap: the loader's digest is not the boot token's.
    OtherLoader,
    /// loader: all of the stream is in and right, and the VMM can become this machine; RESUME follows.
    StreamOk,
    /// loader: the stream was refused; the number is a [`crate::stream::StreamError`].
    BadStream(u32),
    /// loader: the VMM did not take the machine state; the number is its RESULT.
    BadState(u32),
}

impl Report {
    /// The report's bytes.
    pub fn emit(&self) -> [u8; REPORT_SIZE] {
        let (stage, code): (u8, u32) = match *self {
            Report::LoaderOk => (1, 0),
            Report::BadUpload => (2, 0),
            Report::OtherLoader => (3, 0),
            Report::StreamOk => (4, 0),
            Report::BadStream(code) => (5, code),
            Report::BadState(code) => (6, code),
        };
        let mut out = [stage; REPORT_SIZE];
        out[1..].copy_from_slice(&code.to_le_bytes());
        out
    }

    /// Reads a report.
    pub fn parse(bytes: &[u8; REPORT_SIZE]) -> Option<Self> {
        let code = u32::from_le_bytes(bytes[1..].try_into().ok()?);
        match bytes[0] {
            1 => Some(Report::LoaderOk),
            2 => Some(Report::BadUpload),
            3 => Some(Report::OtherLoader),
            4 => Some(Report::StreamOk),
            5 => Some(Report::BadStream(code)),
            6 => Some(Report::BadState(code)),
            _ => None,
        }
    }
}

/// Version of [`Services`].
pub const SERVICES_VERSION: u64 = 1;

/// What mstrap does for a loader. All addresses are physical, all calls the System V x86-64 convention.
#[repr(C)]
pub struct Services {
    /// [`SERVICES_VERSION`].
    pub version: u64,
    /// Address of the info page ([`crate::machine::Identity`]).
    pub info: u64,
    /// First address behind the image that the loader may use as it likes.
    pub heap_start: u64,
    /// End of it.
    pub heap_end: u64,
    /// Reads exactly `size` plaintext bytes of the channel to `buffer`. Returns 0; anything else means
    /// that the connection is over or was tampered with, and nothing more will come.
    pub recv: extern "C" fn(buffer: *mut u8, size: usize) -> i32,
    /// Sends `size` bytes (at most 4096) and waits until the peer acknowledged them. Returns 0, else as `recv`.
    pub send: extern "C" fn(bytes: *const u8, size: usize) -> i32,
    /// Writes text to the VM's console.
    pub log: extern "C" fn(text: *const u8, size: usize),
}
