//! The upload of a loader: its head, its bytes, its digest. mstrap calls it once a client has proven the
//! job key. It never runs what it receives.

use crate::server::{Channel, Link, Refused};
use onde_wire::bootstrap::{self, Report};
use onde_wire::key;

/// Why an upload failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadError {
    /// The connection is over.
    Refused(Refused),
    /// The upload is wrong, and this is what the client is told.
    Wrong(Report),
}

impl From<Refused> for UploadError {
    fn from(refused: Refused) -> Self {
        UploadError::Refused(refused)
    }
}

/// Receives a loader to the front of `area` and returns its size, if its digest is `expect`.
/// `area` has room for the largest loader; on any error its contents are worth nothing.
pub fn receive<L: Link>(
    channel: &mut Channel<'_, L>,
    area: &mut [u8],
    expect: &[u8; 32],
) -> Result<usize, UploadError> {
    let mut head = [0; bootstrap::UPLOAD_HEAD_SIZE];
    channel.recv(&mut head)?;
    let size = bootstrap::parse_upload_head(&head).ok_or(UploadError::Wrong(Report::BadUpload))?;
    let image = &mut area[..size as usize];
    channel.recv(image)?;
    if key::sha256(image) != *expect {
        return Err(UploadError::Wrong(Report::OtherLoader));
    }
    Ok(image.len())
}
